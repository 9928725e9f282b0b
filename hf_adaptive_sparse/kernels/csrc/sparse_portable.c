/* Portable C: any processor, any compiler with C11. */
#define TARGET
#define VARIANT(name) name##_portable
#define TAKES_BFLOAT16 0
#define ROUNDS 1
#define FOURS 1
#define FUSES 0
#define IN_REGISTERS 0

#include "numbers.h"
#include "sparse.h"

/* For each set bit of the mask, lowest first: `body` with its column as j. */
#define FOR_EACH_KEPT(body)                                                                     \
    for (int64_t i = 0; i < n; i += 64) {                                                       \
        uint64_t word = 0;                                                                      \
        for (int b = 0; b < 8; b++) word |= (uint64_t)mask[i / 8 + b] << (8 * b);               \
        for (; word != 0; word &= word - 1) {                                                   \
            int64_t j = i + __builtin_ctzll(word);                                              \
            body;                                                                               \
        }                                                                                       \
    }

#define EXPAND(bits, type)                                                                      \
    HAS_INLINE int64_t expand_##bits(const uint8_t *mask, const type *values, int64_t at,        \
                                     int64_t n, void *out) {                                     \
        const type *next = values + at;                                                         \
        memset(out, 0, (size_t)n * sizeof(type));                                               \
        FOR_EACH_KEPT(((type *)out)[j] = *next++)                                               \
        return next - values - at;                                                              \
    }

EXPAND(32, uint32_t)
EXPAND(16, uint16_t)
EXPAND(8, int8_t)

HAS_INLINE int64_t expand_4(const uint8_t *mask, const uint8_t *values, int64_t at, int64_t n,
                            void *out) {
    int64_t next = at;
    memset(out, 0, (size_t)n);
    FOR_EACH_KEPT(int code = values[next / 2] >> (next % 2 * 4) & 15;
                  ((int8_t *)out)[j] = (int8_t)((code ^ 8) - 8); next++)
    return next - at;
}

HAS_INLINE int64_t expand_12(const uint8_t *mask, const uint8_t *lower, const uint8_t *codes,
                             int64_t at, int64_t n, const uint8_t *book, void *out) {
    int64_t next = at;
    memset(out, 0, (size_t)n * 2);
    FOR_EACH_KEPT(int code = codes[next / 2] >> (next % 2 * 4) & 15;
                  ((uint16_t *)out)[j] = (uint16_t)(book[code] << 8 | lower[next - at]); next++)
    return next - at;
}

HAS_INLINE void widen_float16(const void *numbers, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = has_from_float16(((const uint16_t *)numbers)[i]);
}

HAS_INLINE void add_floats(const float *a, const float *x, int64_t n, float *sums) {
    for (int64_t i = 0; i < n; i += HAS_SPARSE_LANES)
        for (int lane = 0; lane < HAS_SPARSE_LANES; lane++) sums[lane] += a[i + lane] * x[i + lane];
}

HAS_INLINE void add_codes(const int8_t *codes, const int16_t *x, int64_t n, float factor,
                          float *sums) {
    int32_t total = 0;
    for (int64_t i = 0; i < n; i++) total += (int32_t)codes[i] * x[i];
    sums[0] += (float)total * factor;
}

#include "sparse_body.h"
