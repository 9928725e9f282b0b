/* Products with a sparse weight, and its decompression, in terms of a variant's primitives.
 *
 * A row is taken in blocks of columns, each of which is expanded, zeros included, and multiplied with
 * every token: sparse_rows.h does so by a buffer that stays in the first-level cache, and
 * sparse_registers.h, IN_REGISTERS, without one. The weight is read from memory once, however many
 * tokens there are, and a NaN or infinity in x meets the zeros as it does in a dense product. Sums are
 * float32, in HAS_SPARSE_LANES parts per token.
 *
 * With codes, where a variant ROUNDS, x is rounded to 15 bits and a sign on a step of its own per
 * segment of at most 256 columns; products of integers are summed exactly within a segment:
 *
 *     sum over columns of x * w = sum over segments of step * unit * (sum of x_code * w_code)
 *
 * which is off by at most step / 2 * sum |w| per segment, where step = max |x| / X_LIMIT.
 *
 * Where FUSES, a code of x is split in two signed bytes, 256 * upper + lower, and the weight's code
 * gets 128 added, which takes its sign away. A lane multiplies the columns 64 * i + 4 * lane + 0 to 3
 * of a segment; -128 times the sum of their codes of x is its correction, which all rows share. A
 * segment lies in [64 columns][upper, lower][column].
 *
 * Defined by the variant, all with n a multiple of 64 and masks and values readable as far as said:
 *     expand_32, _16, _8, _4 (mask, values, at, n, out)   out[i] = mask bit i ? next value : 0, the
 *         first being number `at`; returns how many were taken. Up to 64 values after the last are
 *         read and dropped. Bytes for 8; 4 bits give int8 too, FOURS (1 or 16) times the code.
 *     expand_12 (mask, lower, codes, at, n, book, out)    the same to bfloat16: lower bytes, the first
 *         being number 0, and codes, the first number `at`, each for an upper byte of `book`.
 *     widen_float16(numbers, n, out)                      to float, n of any size
 * and, unless IN_REGISTERS:
 *     add_floats(a, x, n, sums), add_codes(codes, x_codes, n, factor, sums)
 *         add products to HAS_SPARSE_LANES sums; the second times factor. Where FUSES, codes of x
 *         are split, and followed by the segment's corrections.
 *     add_bfloat16 (a, x, n, sums)                        where TAKES_BFLOAT16;
 *     add_12 (mask, lower, codes, at, n, book, x, sums)   where FUSES: expand_12 and add_bfloat16
 *         in one, with columns of x where `shuffled_column` has them;
 *     expand_and_add_codes (mask, values, at, n, bits, x_codes, segment, corrections, factors, sums)
 *         also: expand_8 or expand_4 and add_codes in one, for segments behind each other. */
#include <string.h>

#include "numbers.h"
#include "sparse.h"

/* 32639 = 127 * 256 + 127 is the largest code of x whose two bytes both have a sign. */
enum { BLOCK = HAS_SPARSE_BLOCK, LANES = HAS_SPARSE_LANES, SLACK_BYTES = 256, X_LIMIT = 32639 };

HAS_INLINE int64_t round_up_64(int64_t n) { return (n + 63) / 64 * 64; }

HAS_INLINE int64_t offset_of(const has_sparse_call *call, int64_t row) {
    return call->offset_bytes == 4 ? ((const int32_t *)call->row_offsets)[row]
                                   : ((const int64_t *)call->row_offsets)[row];
}

/* Of a row that begins with value number `at`: the number that is not reached, whatever its mask. */
HAS_INLINE int64_t furthest(const has_sparse_call *call, int64_t at) { return at + call->columns; }

/* Copy what there is of `bytes` bytes. */
HAS_INLINE const uint8_t *copied(const uint8_t *from, const uint8_t *end, int64_t bytes,
                                 uint8_t *copy) {
    int64_t left = end - from < bytes ? end - from : bytes;
    return memcpy(copy, from, left > 0 ? (size_t)left : 0);
}

HAS_INLINE const uint8_t *mask_of(const has_sparse_call *call, int64_t row) {
    return call->bitmask + row * ((call->columns + 7) / 8);
}

HAS_INLINE int64_t group_columns(const has_sparse_call *call) {
    return call->group_size ? call->group_size : call->columns;
}

/* What a code of this group counts: its scale over the largest code, as decompression has it. */
HAS_INLINE double unit_of(const has_sparse_call *call, int64_t group) {
    int limit = call->bits == 8 ? 127 : 7;
    if (call->dtype == HAS_FLOAT32) return (double)((const float *)call->scales)[group] / limit;
    return has_number_at(call->scales, call->dtype, group) / (float)limit;
}

/* By what a scale is multiplied in products: codes of 4 bits come FOURS times as large. */
HAS_INLINE float inverse_limit(const has_sparse_call *call) {
    return 1.0f / (float)(call->bits == 8 ? 127 : 7 * FOURS);
}

/* Loops with a constant type inside, so that they are vectorised. */
static TARGET void widen(const void *numbers, int64_t n, int64_t dtype, float *out) {
    if (dtype == HAS_FLOAT32)
        memcpy(out, numbers, (size_t)n * sizeof *out);
    else if (dtype == HAS_BFLOAT16)
        for (int64_t i = 0; i < n; i++) out[i] = has_from_bfloat16(((const uint16_t *)numbers)[i]);
    else
        widen_float16(numbers, n, out);
}

/* The exceptions among values of 12 bits that are still ahead, in their order. */
typedef struct {
    const uint64_t *next, *end;
} exceptions;

/* Those from value number `at` on. */
HAS_INLINE exceptions exceptions_from(const has_sparse_call *call, int64_t at) {
    if (call->bits != 12) return (exceptions){NULL, NULL};
    const uint64_t *next = call->codebook + 2, *end = next + call->exceptions;
    for (int64_t left = end - next; left > 0;) {
        int64_t half = left / 2;
        if ((int64_t)(next[half] >> 16) < at) {
            next += half + 1;
            left -= half + 1;
        } else {
            left = half;
        }
    }
    return (exceptions){next, end};
}

/* Whether there is none up to value number `end`. */
HAS_INLINE int is_free_of(const exceptions *ahead, int64_t end) {
    return ahead->next == ahead->end || (int64_t)(*ahead->next >> 16) >= end;
}

/* Where add_12 and the matrix unit have a column: of every 64, even ones before odd ones, so that
 * their bytes are joined without crossing lanes. */
HAS_INLINE int64_t shuffled_column(int64_t column) {
    return column / 64 * 64 + column % 2 * 32 + column % 64 / 2;
}

/* The one of so many columns that value number `number` is in. */
static TARGET int64_t column_of(const uint8_t *mask, int64_t columns, int64_t number) {
    int64_t column = 0;
    for (; column + 64 <= columns; column += 64) {
        int64_t kept = __builtin_popcountll(mask_word(mask, column));
        if (number < kept) break;
        number -= kept;
    }
    for (int64_t kept; number >= (kept = __builtin_popcount(mask[column / 8])); column += 8)
        number -= kept;
    for (int bits = mask[column / 8]; number > 0 || !(bits & 1); bits >>= 1, column++)
        number -= bits & 1;
    return column;
}

/* Its number, from value number `at` on. */
HAS_INLINE int64_t next_exception(const exceptions *ahead, int64_t at) {
    return (int64_t)(*ahead->next >> 16) - at;
}

/* Go on to the first that is not before value number `at`. */
HAS_INLINE void skip_to(exceptions *ahead, int64_t at) {
    while (!is_free_of(ahead, at)) ahead->next++;
}

/* Put those among the values `at` to `at` + taken - 1 to the columns, of so many, that the mask has
 * them in. */
HAS_INLINE void put_exceptions(exceptions *ahead, const uint8_t *mask, int64_t columns, int64_t at,
                               int64_t taken, int is_shuffled, uint16_t *out) {
    skip_to(ahead, at);
    for (; !is_free_of(ahead, at + taken); ahead->next++) {
        int64_t column = column_of(mask, columns, next_exception(ahead, at));
        out[is_shuffled ? shuffled_column(column) : column] = (uint16_t)*ahead->next;
    }
}

/* Values of 12 bits in these bytes: see packing/upper_bytes.py. */
HAS_INLINE int64_t values_of_12(const has_sparse_call *call) { return call->value_bytes * 2 / 3; }

/* Expand n columns of a row, those of `mask`, whose first value is number `at`, into `out`, zero up to
 * the next multiple of 64; returns how many values that took. */
FORCED int64_t expand(const has_sparse_call *call, const uint8_t *mask, int64_t n, int64_t at,
                      int bits, exceptions *ahead, void *out) {
    uint8_t mask_copy[BLOCK / 8], value_copy[BLOCK * 4 + SLACK_BYTES];
    const uint8_t *values = call->values;
    if (n % 64 != 0) { /* what follows in memory is the next row, or nothing */
        memset(mask_copy, 0, sizeof mask_copy);
        memcpy(mask_copy, mask, (size_t)((n + 7) / 8));
        mask = mask_copy;
    }
    if (bits == 12) {
        uint8_t code_copy[BLOCK / 2 + SLACK_BYTES];
        const uint8_t *lower = values + at, *codes = values + values_of_12(call) + at / 2;
        const uint8_t *end = values + call->value_bytes;
        if (end - lower < BLOCK + SLACK_BYTES)
            lower = copied(lower, end, BLOCK + SLACK_BYTES, value_copy);
        if (end - codes < BLOCK / 2 + SLACK_BYTES)
            codes = copied(codes, end, BLOCK / 2 + SLACK_BYTES, code_copy);
        int64_t taken = expand_12(mask, lower, codes, at % 2, round_up_64(n),
                                  (const uint8_t *)call->codebook, out);
        put_exceptions(ahead, mask, n, at, taken, 0, out);
        return taken;
    }
    int64_t byte = at * bits / 8, most = BLOCK * bits / 8 + SLACK_BYTES;
    if (byte + most > call->value_bytes) {
        values = copied(values + byte, values + call->value_bytes, most, value_copy);
        at = bits == 4 ? at % 2 : 0;
    }
    n = round_up_64(n);
    switch (bits) {
        case 32: return expand_32(mask, (const uint32_t *)values, at, n, out);
        case 16: return expand_16(mask, (const uint16_t *)values, at, n, out);
        case 8: return expand_8(mask, (const int8_t *)values, at, n, out);
        default: return expand_4(mask, values, at, n, out);
    }
}

/* Round at most 256 numbers to codes; returns their step, NaN where one is NaN or an infinity. */
static TARGET float round_segment(const void *numbers, int64_t n, int64_t dtype, int16_t *codes) {
    float a[256];
    uint32_t highest = 0; /* bits of numbers >= 0 are in the order of the numbers, NaN last */
    widen(numbers, n, dtype, a);
    for (int64_t i = 0; i < n; i++) {
        uint32_t size = has_bits_of_float(a[i]) & 0x7fffffffu;
        highest = size > highest ? size : highest;
    }
    float largest = has_float_of_bits(highest);
    if (highest >= 0x7f800000u || largest < 1e-30f) {
        memset(codes, 0, (size_t)n * sizeof *codes);
        return highest >= 0x7f800000u ? NAN : 0.0f;
    }
    float inverse = X_LIMIT / largest;
    for (int64_t i = 0; i < n; i++) {
        float scaled = a[i] * inverse;
        codes[i] = (int16_t)(int32_t)(scaled + copysignf(0.5f, scaled));
    }
    return largest / X_LIMIT;
}

#if FUSES
/* Lay x out for add_12, and see whether all of it is finite. */
static TARGET void shuffle(const has_sparse_x *x, int64_t columns) {
    const uint16_t *numbers = x->numbers;
    uint16_t *out = x->shuffled, infinite = 0x7f80;
    int is_finite = 1;
    for (int64_t i = 0; i < round_up_64(columns); i++) {
        out[shuffled_column(i)] = numbers[i];
        is_finite &= (numbers[i] & infinite) != infinite;
    }
    *x->is_finite = is_finite;
}

#endif

/* Segments of n columns. No division: they take up to a hundred cycles before Ice Lake. */
HAS_INLINE int64_t segments_in(const has_sparse_x *x, int64_t n) {
    return (n + x->segment - 1) >> __builtin_ctzll((uint64_t)x->segment);
}

/* Where a row is among its groups of codes. */
typedef struct {
    int64_t group;
    int64_t left; /* segments of it that are still ahead */
} group_cursor;

HAS_INLINE group_cursor first_group(const has_sparse_x *x, int64_t row) {
    return (group_cursor){row * x->groups, x->group_segments};
}

/* What a code counts in each of the next segments of a row. */
static TARGET void take_units(const has_sparse_call *call, const has_sparse_x *x,
                              group_cursor *at, int64_t count, float *out) {
    float inverse = inverse_limit(call);
    if (x->group_segments == 1 && call->dtype == HAS_BFLOAT16) { /* with vectors */
        const uint16_t *scales = (const uint16_t *)call->scales + at->group;
        for (int64_t i = 0; i < count; i++) out[i] = has_from_bfloat16(scales[i]) * inverse;
        at->group += count;
        return;
    }
    for (int64_t i = 0; i < count;) {
        if (at->left == 0) *at = (group_cursor){at->group + 1, x->group_segments};
        float unit = has_number_at(call->scales, call->dtype, at->group) * inverse;
        for (; i < count && at->left > 0; at->left--) out[i++] = unit;
    }
}

#if FUSES
/* Where the codes of a segment of a token are, and its corrections. */
HAS_INLINE int8_t *split_of(const has_sparse_x *x, int64_t token, int64_t segment) {
    return (int8_t *)x->numbers + 2 * (token * x->stride + segment * round_up_64(x->segment));
}

HAS_INLINE int32_t *corrections_of(const has_sparse_x *x, int64_t token, int64_t segment) {
    return x->corrections + (token * x->segments + segment) * LANES;
}

static TARGET void split(const int16_t *codes, int64_t n, int8_t *out, int32_t *corrections) {
    int32_t sums[64] = {0};
    for (int64_t i = 0; i < n; i += 64, out += 128)
        for (int k = 0; k < 64; k++) {
            int8_t lower = (int8_t)codes[i + k];
            out[k] = (int8_t)((codes[i + k] - lower) / 256);
            out[64 + k] = lower;
            sums[k] += codes[i + k];
        }
    for (int lane = 0; lane < LANES; lane++)
        corrections[lane] = -128 * (sums[4 * lane] + sums[4 * lane + 1] + sums[4 * lane + 2] +
                                    sums[4 * lane + 3]);
}
#endif

static TARGET void prepare(const has_sparse_call *call, const has_sparse_x *x) {
    int narrow = call->dtype == HAS_BFLOAT16 && TAKES_BFLOAT16;
    int64_t columns = call->columns, item_bytes = call->dtype == HAS_FLOAT32 ? 4 : 2;
    for (int64_t token = 0; token < call->tokens; token++) {
        const uint8_t *row = (const uint8_t *)call->x + token * call->x_stride * item_bytes;
        int64_t start = token * x->stride, rest = x->stride - columns;
        if (call->bits <= 8 && ROUNDS) {
            for (int64_t s = 0; s < x->segments; s++) {
                int64_t first = s * x->segment;
                int64_t n = columns - first < x->segment ? columns - first : x->segment;
                const uint8_t *from = row + first * item_bytes;
                float *step = x->steps + token * x->segments + s;
#if FUSES
                int16_t codes[256] = {0};
                *step = round_segment(from, n, call->dtype, codes);
                split(codes, round_up_64(n), split_of(x, token, s), corrections_of(x, token, s));
#else
                *step = round_segment(from, n, call->dtype, (int16_t *)x->numbers + start + first);
#endif
            }
#if !FUSES
            memset((int16_t *)x->numbers + start + columns, 0, (size_t)rest * sizeof(int16_t));
#endif
        } else if (narrow) {
            uint16_t *numbers = (uint16_t *)x->numbers + start;
            memcpy(numbers, row, (size_t)columns * sizeof *numbers);
            memset(numbers + columns, 0, (size_t)rest * sizeof *numbers);
#if FUSES
            if (call->bits == 12 && call->tokens == 1) shuffle(x, columns);
#endif
        } else {
            float *numbers = (float *)x->numbers + start;
            widen(row, columns, call->dtype, numbers);
            memset(numbers + columns, 0, (size_t)rest * sizeof *numbers);
#if IN_REGISTERS
            if (call->dtype == HAS_BFLOAT16) arrange(numbers, x->stride);
#endif
        }
    }
}

#if IN_REGISTERS
#include "sparse_registers.h"
#else
#include "sparse_rows.h"
#endif

static TARGET int multiply(const has_sparse_call *call, const has_sparse_x *x, int64_t first,
                           int64_t last) {
    exceptions ahead = exceptions_from(call, offset_of(call, first));
    for (int64_t row = first; row < last; row++) {
        _Alignas(64) float sums[HAS_SPARSE_TOKENS][LANES];
        int64_t end;
        memset(sums, 0, (size_t)call->tokens * sizeof *sums);
        if (call->bits == 32)
            end = multiply_row(call, x, row, 32, 0, NULL, sums);
        else if (call->bits == 12)
            end = multiply_row(call, x, row, 12, 1, &ahead, sums);
        else if (call->bits == 8)
            end = multiply_row(call, x, row, 8, 0, NULL, sums);
        else if (call->bits == 4)
            end = multiply_row(call, x, row, 4, 0, NULL, sums);
        else if (call->dtype == HAS_BFLOAT16)
            end = multiply_row(call, x, row, 16, 1, NULL, sums);
        else
            end = multiply_row(call, x, row, 16, 0, NULL, sums);
        if (end != offset_of(call, row + 1)) return HAS_BAD_ARGUMENT;
        float bias = call->bias == NULL ? 0.0f : has_number_at(call->bias, call->dtype, row);
        for (int64_t t = 0; t < call->tokens; t++) {
            for (int half = LANES / 2; half > 0; half /= 2) /* one after the other would wait */
                for (int lane = 0; lane < half; lane++) sums[t][lane] += sums[t][lane + half];
            has_store_number(call->output, call->dtype, t * call->output_stride + row,
                             sums[t][0] + bias);
        }
    }
    return HAS_OK;
}

/* Both return the number of the value after the row's. */
FORCED int64_t decompress_values(const has_sparse_call *call, int64_t row, int bits,
                                 exceptions *ahead, uint8_t *out) {
    _Alignas(64) uint8_t block[BLOCK * 4 + 64];
    const int item_bytes = bits == 12 ? 2 : bits / 8;
    const uint8_t *mask = mask_of(call, row);
    int64_t at = offset_of(call, row);
    for (int64_t column = 0; column < call->columns; column += BLOCK) {
        int64_t left = call->columns - column;
        __builtin_prefetch(mask + column / 8 + 512, 0, 3);
        if (left >= BLOCK) {
            at += expand(call, mask + column / 8, BLOCK, at, bits, ahead, out + column * item_bytes);
        } else {
            at += expand(call, mask + column / 8, left, at, bits, ahead, block);
            memcpy(out + column * item_bytes, block, (size_t)(left * item_bytes));
        }
    }
    return at;
}

FORCED int64_t decompress_codes(const has_sparse_call *call, int64_t row, int bits, void *out) {
    int8_t block[BLOCK + 64];
    const uint8_t *mask = mask_of(call, row);
    int64_t at = offset_of(call, row);
    int64_t size = group_columns(call), groups = (call->columns + size - 1) / size;
    int64_t step = call->group_size && call->group_size % BLOCK ? 32 : BLOCK;
    if (call->group_size && BLOCK % call->group_size == 0) step = call->group_size;
    for (int64_t column = 0; column < call->columns; column += step) {
        int64_t n = call->columns - column < step ? call->columns - column : step;
        at += expand(call, mask + column / 8, n, at, bits, NULL, block);
        double exact = unit_of(call, row * groups + column / size);
        float unit = (float)exact;
        if (bits == 4)
            for (int64_t i = 0; i < n; i++) block[i] /= FOURS;
        if (call->dtype == HAS_FLOAT32) /* in double, as weight_codes.py has it and why */
            for (int64_t i = 0; i < n; i++) ((float *)out)[column + i] = (float)(block[i] * exact);
        else if (call->dtype == HAS_BFLOAT16)
            for (int64_t i = 0; i < n; i++)
                ((uint16_t *)out)[column + i] = has_to_bfloat16(block[i] * unit);
        else
            for (int64_t i = 0; i < n; i++)
                ((uint16_t *)out)[column + i] = has_to_float16(block[i] * unit);
    }
    return at;
}

/* Turn n numbers at the end of a row of float32 into that row. */
static TARGET void widen_in_place(int64_t n, int64_t dtype, float *row) {
    const uint16_t *halves = (const uint16_t *)row + n;
    for (int64_t i = 0; i < n; i += BLOCK) { /* what is written over has been read */
        uint16_t copy[BLOCK];
        int64_t count = n - i < BLOCK ? n - i : BLOCK;
        memcpy(copy, halves + i, (size_t)count * sizeof *copy);
        widen(copy, count, dtype, row + i);
    }
}

static TARGET int decompress(const has_sparse_call *call, int64_t first, int64_t last) {
    int widens = call->widens && call->dtype != HAS_FLOAT32;
    int64_t item_bytes = call->dtype == HAS_FLOAT32 || widens ? 4 : 2;
    exceptions ahead = exceptions_from(call, offset_of(call, first));
    for (int64_t row = first; row < last; row++) {
        uint8_t *whole = (uint8_t *)call->output +
                         (row - call->first_row) * call->output_stride * item_bytes;
        uint8_t *out = whole + (widens ? 2 * call->columns : 0);
        int64_t end;
        if (call->bits == 32)
            end = decompress_values(call, row, 32, NULL, out);
        else if (call->bits == 16)
            end = decompress_values(call, row, 16, NULL, out);
        else if (call->bits == 12)
            end = decompress_values(call, row, 12, &ahead, out);
        else if (call->bits == 8)
            end = decompress_codes(call, row, 8, out);
        else
            end = decompress_codes(call, row, 4, out);
        if (end != offset_of(call, row + 1)) return HAS_BAD_ARGUMENT;
        if (widens) widen_in_place(call->columns, call->dtype, (float *)whole);
    }
    return HAS_OK;
}

const has_sparse_variant VARIANT(has_sparse) = {
    .takes_bfloat16 = TAKES_BFLOAT16,
    .rounds = ROUNDS,
    .in_registers = IN_REGISTERS,
    .rows = 1,
    .prepare = prepare,
    .multiply = multiply,
    .decompress = decompress,
};
