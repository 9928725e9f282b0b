/* x86-64 with the AVX-512 of Skylake-X and Cascade Lake, which expands 32-bit lanes only: values are
 * widened first, and multiplied with x as it is in float32. Ice Lake, which expands bytes but does not
 * multiply bfloat16, takes this as well. */
#if defined(__x86_64__) || defined(_M_X64)

#define TARGET                                                                                  \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt"            \
                          HAS_WIDE_VECTORS)))
#define VARIANT(name) name##_avx512f
#define TAKES_BFLOAT16 0
#define ROUNDS 0
#define FOURS 1
#define FUSES 0
#define IN_REGISTERS 1
#define VECTOR_BYTES 64

enum { AHEAD_BYTES = 1536, AT_ONCE = 8 };

#include "sparse_lookup.h"

FORCED void arrange(float *x, int64_t n) {
    (void)x, (void)n; /* columns stay in their order */
}

/* The next sixteen values as float32. */
FORCED __m512 widened(const uint8_t *values, int bits, int is_bfloat16) {
    const __m256i *halves = (const __m256i *)values;
    if (bits == 32) return _mm512_loadu_ps(values);
    if (bits == 8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load(values)));
    if (!is_bfloat16) return _mm512_cvtph_ps(_mm256_loadu_si256(halves));
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(halves));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* Two sums of a token: a single one would wait for itself. */
typedef struct {
    __m512 even, odd;
} two_sums;

/* Bits 16 * part and up. Hidden from compilers, which would shift where expansion is already busy. */
FORCED __mmask16 places_of(uint64_t word, int part) {
    uint64_t places = word >> 16 * part;
    __asm__("" : "+r"(places));
    return (__mmask16)places;
}

/* Add the products of 64 or 32 columns; returns where the values after these are. */
FORCED const uint8_t *add_step(uint64_t word, int step, const uint8_t *values, int bits,
                               int is_bfloat16, const float *x, int64_t x_stride, int tokens,
                               two_sums *sums) {
    const int64_t item_bytes = bits / 8;
    const uint8_t *from[4] = {values, values + item_bytes * _mm_popcnt_u32((uint16_t)word),
                              values + item_bytes * _mm_popcnt_u32((uint32_t)word),
                              values + item_bytes * _mm_popcnt_u64(word << 16)};
    for (int line = 0; line <= bits / 32; line++)
        _mm_prefetch((const char *)values + AHEAD_BYTES + 64 * line, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int part = 0; part < step / 16; part++) {
        __m512 a = widened(from[part], bits, is_bfloat16);
        a = _mm512_maskz_expand_ps(places_of(word, part), a);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) {
            __m512 of = _mm512_loadu_ps(x + t * x_stride + 16 * part);
            if (part % 2 == 0)
                sums[t].even = _mm512_fmadd_ps(a, of, sums[t].even);
            else
                sums[t].odd = _mm512_fmadd_ps(a, of, sums[t].odd);
        }
    }
    return step == 64 ? values + item_bytes * _mm_popcnt_u64(word) : from[2];
}

FORCED const uint8_t *add_values(const uint8_t *mask, const uint8_t *values, int64_t n, int bits,
                                 int is_bfloat16, const void *x, int64_t x_stride, int tokens,
                                 float *sums) {
    two_sums parts[AT_ONCE];
    for (int t = 0; t < tokens; t++) {
        parts[t].even = _mm512_loadu_ps(sums + HAS_SPARSE_LANES * t);
        parts[t].odd = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < n; i += 64)
        values = add_step(mask_word(mask, i), 64, values, bits, is_bfloat16, (const float *)x + i,
                          x_stride, tokens, parts);
    for (int t = 0; t < tokens; t++)
        _mm512_storeu_ps(sums + HAS_SPARSE_LANES * t, _mm512_add_ps(parts[t].even, parts[t].odd));
    return values;
}

typedef two_sums code_sum;
typedef __m512 float_sum;

FORCED float_sum load_sum(const float *sums) { return _mm512_loadu_ps(sums); }

FORCED void store_sum(float *sums, float_sum total) { _mm512_storeu_ps(sums, total); }

FORCED float_sum scaled(code_sum part, float factor, float_sum total) {
    return _mm512_fmadd_ps(_mm512_add_ps(part.even, part.odd), _mm512_set1_ps(factor), total);
}

FORCED const uint8_t *add_code_step(uint64_t word, int step, const uint8_t *values, const void *x,
                                    int64_t x_stride, int tokens, code_sum *parts) {
    return add_step(word, step, values, 8, 0, x, x_stride, tokens, parts);
}

#include "sparse_body.h"

#endif
