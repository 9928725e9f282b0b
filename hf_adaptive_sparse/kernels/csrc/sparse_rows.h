/* Products row by row: each block of columns of a row is expanded into a buffer that stays in the
 * first-level cache, and is then multiplied with every token. Included by sparse_body.h. */

#if FUSES
/* What add_12 multiplied instead of exception number `number`: products take denormals for 0. */
HAS_INLINE float stand_in(const has_sparse_call *call, int64_t number) {
    const uint8_t *codes = call->values + values_of_12(call), *book = (const uint8_t *)call->codebook;
    int code = codes[number / 2] >> (number % 2 * 4) & 15;
    uint16_t half = (uint16_t)(book[code] << 8 | call->values[number]);
    return half & 0x7f80 ? has_from_bfloat16(half) : 0.0f;
}

/* One token times the columns of a row that make whole blocks of 64; returns how many those are, 0
 * where that cannot be. For an exception add_12 multiplies what its code and lower byte make, hardly
 * more than 0, which is taken back; and would not be 0 times an x that is not finite. */
FORCED int64_t multiply_12(const has_sparse_call *call, const has_sparse_x *x, int64_t row,
                           int64_t *at, exceptions *ahead, float *sums) {
    const uint8_t *mask = mask_of(call, row);
    const uint8_t *codes = call->values + values_of_12(call);
    int64_t whole = call->columns / 64 * 64, end = furthest(call, *at);
    if (!*x->is_finite || codes + end / 2 + 64 > call->values + call->value_bytes) return 0;
    int64_t taken = add_12(mask, call->values + *at, codes + *at / 2, *at % 2, whole,
                           (const uint8_t *)call->codebook, x->shuffled, sums);
    skip_to(ahead, *at);
    for (; !is_free_of(ahead, *at + taken); ahead->next++) {
        int64_t column = column_of(mask, whole, next_exception(ahead, *at));
        float is = has_from_bfloat16((uint16_t)*ahead->next);
        float was = stand_in(call, (int64_t)(*ahead->next >> 16));
        sums[0] += (is - was) * has_from_bfloat16(((const uint16_t *)x->numbers)[column]);
    }
    *at += taken;
    return whole;
}

/* One token times the segments of a row that make whole blocks of 64; returns how many columns those
 * have, 0 where what lies behind the row's values cannot be read. */
FORCED int64_t multiply_codes(const has_sparse_call *call, const has_sparse_x *x, int64_t row,
                              int64_t *at, group_cursor *group, int bits, float *sums) {
    enum { SEGMENTS = 64 }; /* at a time */
    const uint8_t *mask = mask_of(call, row);
    int64_t whole = call->columns, step = SEGMENTS * x->segment;
    if (whole % 64 != 0) whole -= whole % x->segment;
    float factors[SEGMENTS];
    if (furthest(call, *at) * bits / 8 + 64 > call->value_bytes || x->segment < 64) return 0;
    for (int64_t first = 0, s = 0; first < whole; first += step, s += SEGMENTS) {
        int64_t n = whole - first < step ? whole - first : step, count = segments_in(x, n);
        take_units(call, x, group, count, factors);
        for (int64_t i = 0; i < count; i++) factors[i] *= x->steps[s + i];
        *at += expand_and_add_codes(mask + first / 8, call->values, *at, n, bits, split_of(x, 0, s),
                                    x->segment, corrections_of(x, 0, s), factors, sums);
    }
    return whole;
}
#endif

/* Products of one row with all tokens, added to their sums; constants say which kind. Returns the
 * number of the value after the row's. */
FORCED int64_t multiply_row(const has_sparse_call *call, const has_sparse_x *x, int64_t row,
                            int bits, int is_bfloat16, exceptions *ahead, float (*sums)[LANES]) {
    _Alignas(64) uint8_t block[BLOCK * 4 + 64];
    _Alignas(64) float wide[BLOCK];
    const uint8_t *mask = mask_of(call, row);
    int64_t at = offset_of(call, row), step = x->segment;
    int64_t column = 0;
    group_cursor group = first_group(x, row);
#if FUSES
    if (call->tokens == 1 && bits == 12) column = multiply_12(call, x, row, &at, ahead, sums[0]);
    if (call->tokens == 1 && bits <= 8)
        column = multiply_codes(call, x, row, &at, &group, bits, sums[0]);
#endif
    for (; column < call->columns; column += step) {
        int64_t n = call->columns - column < step ? call->columns - column : step;
        __builtin_prefetch(mask + column / 8 + 512, 0, 3);
        at += expand(call, mask + column / 8, n, at, bits, ahead, block);
        int64_t s = segments_in(x, column);
        n = round_up_64(n);
        if (bits <= 8) {
            float unit;
            take_units(call, x, &group, 1, &unit);
            for (int64_t t = 0; t < call->tokens; t++) {
                float factor = unit * x->steps[t * x->segments + s];
#if FUSES
                add_codes((const int8_t *)block, split_of(x, t, s), corrections_of(x, t, s), n,
                          factor, sums[t]);
#else
                add_codes((const int8_t *)block, (const int16_t *)x->numbers + t * x->stride + column,
                          n, factor, sums[t]);
#endif
            }
#if TAKES_BFLOAT16
        } else if (is_bfloat16) {
            for (int64_t t = 0; t < call->tokens; t++)
                add_bfloat16((const uint16_t *)block,
                             (const uint16_t *)x->numbers + t * x->stride + column, n, sums[t]);
#endif
        } else {
            const float *a = (const float *)block;
            if (bits != 32) {
                widen(block, n, is_bfloat16 ? HAS_BFLOAT16 : HAS_FLOAT16, wide);
                a = wide;
            }
            for (int64_t t = 0; t < call->tokens; t++)
                add_floats(a, (const float *)x->numbers + t * x->stride + column, n, sums[t]);
        }
    }
    return at;
}
