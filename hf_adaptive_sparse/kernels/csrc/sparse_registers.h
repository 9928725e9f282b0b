/* Products of rows that are expanded in registers: no zero is written to memory, and each vector of
 * weights is multiplied with up to AT_ONCE tokens. Where there are more, they go piece by piece, with
 * the row's piece in the cache by then. Included by sparse_body.h.
 *
 * Values that have to be decoded (12 and 4 bits) are, at the start of a piece, into a buffer without
 * zeros. What a token's sum adds up to, and in which order, is the same with any number of tokens.
 *
 * Defined by the variant, where masks and values may be read 64 bytes further than said:
 *     count_kept(mask, n)                     set bits of n columns, a multiple of 64
 *     arrange(x, n)                           put n floats of x, a multiple of 64, in the order that
 *         add_values has them in with bfloat16
 *     decode_4(codes, n, out)                 n codes of 4 bits to int8
 *     decode_12(lower, codes, n, book, out)   n values of 12 bits to bfloat16
 *     add_values(mask, values, n, bits, is_bfloat16, x, x_stride, tokens, sums)
 *         add the products of n columns, a multiple of 64, with 1 to AT_ONCE tokens to the sums;
 *         32 and 16 bits
 *     add_code_step(word, step, values, x, x_stride, tokens, parts)
 *         add the products of int8 codes in as many columns as a step has, 64 or 32, to a `code_sum`
 *         for each token. Both return where the values after these are.
 *     scaled(part, factor, total)             a `float_sum`, total + factor * part
 *     load_sum(sums), store_sum(sums, total)  a `float_sum` from and to the sums of a token */

enum { PIECE = 2048, PIECE_SEGMENTS = PIECE / 32 }; /* columns */
enum { CODED_X_BYTES = ROUNDS ? 2 : 4 };            /* of x, where the weight has codes */

/* A row that is being multiplied. */
typedef struct {
    const uint8_t *mask;
    int64_t at;      /* number of its next value */
    int64_t segment; /* and segment of codes */
    group_cursor group;
    const uint8_t *end; /* of all values; near it, they are copied before they are read */
    int is_near_end;
    uint8_t mask_copy[PIECE / 8 + 64];
    uint8_t first_copy[PIECE * 4 + 64], second_copy[PIECE / 2 + 64];
    uint8_t decoded[PIECE * 2 + 128];
} registered_row;

HAS_INLINE const uint8_t *readable(const registered_row *row, const uint8_t *from, int64_t count,
                                   uint8_t *copy) {
    return row->is_near_end ? copied(from, row->end, count, copy) : from;
}

/* Where the values of n more columns of a row are, in 4 bits decoded to int8 and in 12 to bfloat16. */
FORCED const uint8_t *take_values(const has_sparse_call *call, registered_row *row,
                                  exceptions *ahead, const uint8_t *mask, int64_t n, int bits) {
    const uint8_t *codes = call->values + (bits == 12 ? values_of_12(call) : 0) + row->at / 2;
    int64_t at = row->at, odd = at % 2, item_bytes = bits / 8;
    if (bits != 12 && bits != 4 && !row->is_near_end) return call->values + at * item_bytes;
    int64_t count = count_kept(mask, round_up_64(n)), code_bytes = (count + odd + 1) / 2;
    if (bits == 12) {
        uint16_t *halves = (uint16_t *)row->decoded;
        decode_12(readable(row, call->values + at - odd, count + odd, row->first_copy),
                  readable(row, codes, code_bytes, row->second_copy), count + odd,
                  (const uint8_t *)call->codebook, halves);
        halves += odd;
        skip_to(ahead, at);
        for (; !is_free_of(ahead, at + count); ahead->next++)
            halves[next_exception(ahead, at)] = (uint16_t)*ahead->next;
        return (const uint8_t *)halves;
    }
    if (bits == 4) {
        decode_4(readable(row, codes, code_bytes, row->first_copy), count + odd,
                 (int8_t *)row->decoded);
        return row->decoded + odd;
    }
    return readable(row, call->values + at * item_bytes, count * item_bytes, row->first_copy);
}

/* What codes count, all from the same segment on: of the row, and of x for each token. */
typedef struct {
    int64_t segment; /* columns, a multiple of a step */
    const float *units;
    const float *steps; /* [token][segment], used where a variant ROUNDS */
    int64_t stride;     /* steps from token to token */
} code_factors;

/* Add the products of n columns of int8 codes with 1 to AT_ONCE tokens. */
FORCED const uint8_t *add_codes(const uint8_t *mask, const uint8_t *values, int64_t n,
                                const code_factors *of, int step, const void *x, int64_t x_stride,
                                int tokens, float *sums) {
    float_sum totals[AT_ONCE];
    for (int t = 0; t < tokens; t++) totals[t] = load_sum(sums + LANES * t);
    int64_t segment = of->segment, s = 0;
    for (int64_t first = 0; first < n; first += segment, s++) {
        int64_t end = first + segment < n ? first + segment : n;
        code_sum parts[AT_ONCE];
        memset(parts, 0, (size_t)tokens * sizeof *parts);
        for (int64_t i = first; i < end; i += step)
            values = add_code_step(mask_word(mask, i), step, values,
                                   (const uint8_t *)x + i * CODED_X_BYTES, x_stride, tokens, parts);
        for (int t = 0; t < tokens; t++) {
            float step_of_x = ROUNDS ? of->steps[t * of->stride + s] : 1;
            totals[t] = scaled(parts[t], of->units[s] * step_of_x, totals[t]);
        }
    }
    for (int t = 0; t < tokens; t++) store_sum(sums + LANES * t, totals[t]);
    return values;
}

/* Products of n columns with up to AT_ONCE tokens. How many is a constant, TOKENS, within each case,
 * so that their sums stay in registers. */
#define OPERANDS                                                                                \
    const uint8_t *mask, const uint8_t *values, int64_t n, const code_factors *of,              \
        const void *x, int64_t x_stride, int64_t tokens, float *sums
#define CASE(count, product)                                                                    \
    case count: {                                                                               \
        enum { TOKENS = count < AT_ONCE ? count : AT_ONCE };                                    \
        return count > AT_ONCE ? values : product;                                              \
    }
#define FOR_TOKENS(product)                                                                     \
    switch (tokens) {                                                                           \
        CASE(1, product) CASE(2, product) CASE(3, product) CASE(4, product)                     \
        CASE(5, product) CASE(6, product) CASE(7, product) default: CASE(8, product)            \
    }
#define ADD_VALUES(name, bits, is_bfloat16)                                                     \
    static TARGET __attribute__((noinline)) const uint8_t *name(OPERANDS) {                     \
        (void)of;                                                                               \
        FOR_TOKENS(add_values(mask, values, round_up_64(n), bits, is_bfloat16, x, x_stride,     \
                              TOKENS, sums))                                                    \
    }

ADD_VALUES(add_32, 32, 0)
ADD_VALUES(add_float16, 16, 0)
ADD_VALUES(add_bfloat16, 16, 1)

static TARGET __attribute__((noinline)) const uint8_t *add_8(OPERANDS) {
    if (of->segment < 64)
        FOR_TOKENS(add_codes(mask, values, n, of, 32, x, x_stride, TOKENS, sums))
    FOR_TOKENS(add_codes(mask, values, n, of, 64, x, x_stride, TOKENS, sums))
}

/* Add the products of columns `column` to `column` + n of a row with all tokens. */
FORCED void add_piece(const has_sparse_call *call, const has_sparse_x *x, registered_row *row,
                      exceptions *ahead, int64_t column, int64_t n, int bits, int is_bfloat16,
                      float (*sums)[LANES]) {
    const int item_bits = bits == 12 ? 16 : bits == 4 ? 8 : bits; /* once decoded */
    const int64_t x_bytes = bits <= 8 ? CODED_X_BYTES : 4, mask_bytes = (n + 7) / 8;
    const uint8_t *(*const add)(OPERANDS) = bits == 32    ? add_32
                                             : bits <= 8   ? add_8
                                             : is_bfloat16 ? add_bfloat16
                                                           : add_float16;
    const uint8_t *mask = row->mask + column / 8, *end = NULL;
    float units[PIECE_SEGMENTS];
    int64_t segments = bits <= 8 ? segments_in(x, n) : 0;
    __builtin_prefetch(mask + 512, 0, 3);
    if (n % 64 != 0 || (bits <= 8 && x->segment < 64)) { /* what follows is not ours, or not there */
        mask = memcpy(row->mask_copy, mask, (size_t)mask_bytes);
        memset(row->mask_copy + mask_bytes, 0, 64);
    }
    const uint8_t *values = take_values(call, row, ahead, mask, n, bits);
    if (bits <= 8) take_units(call, x, &row->group, segments, units);
    for (int64_t t = 0, tokens; t < call->tokens; t += tokens) {
        const uint8_t *numbers =
            (const uint8_t *)x->numbers + (t * x->stride + column) * x_bytes;
        tokens = call->tokens - t < AT_ONCE ? call->tokens - t : AT_ONCE;
        code_factors of = {x->segment, units, x->steps + t * x->segments + row->segment, x->segments};
        end = add(mask, values, n, &of, numbers, x->stride, tokens, sums[t]);
    }
    row->at += (end - values) / (item_bits / 8);
    row->segment += segments;
}

#undef OPERANDS
#undef CASE
#undef FOR_TOKENS
#undef ADD_VALUES

/* Products of one row with all tokens, added to their sums; constants say which kind. Returns the
 * number of the value after the row's. */
FORCED int64_t multiply_row(const has_sparse_call *call, const has_sparse_x *x, int64_t row,
                            int bits, int is_bfloat16, exceptions *ahead, float (*sums)[LANES]) {
    int64_t end = furthest(call, offset_of(call, row));
    int64_t end_byte = bits == 12 ? values_of_12(call) + end / 2 : end * bits / 8;
    registered_row of;
    of.end = call->values + call->value_bytes;
    of.mask = mask_of(call, row);
    of.at = offset_of(call, row);
    of.segment = 0;
    of.group = first_group(x, row);
    of.is_near_end = end_byte + 64 > call->value_bytes;
    for (int64_t column = 0; column < call->columns; column += PIECE) {
        int64_t n = call->columns - column < PIECE ? call->columns - column : PIECE;
        add_piece(call, x, &of, ahead, column, n, bits, is_bfloat16, sums);
    }
    return of.at;
}
