/* x86-64 with AVX2 and FMA (Haswell, Zen and later). */
#if defined(__x86_64__) || defined(_M_X64)

#define TARGET __attribute__((target("avx2,fma,f16c,popcnt")))
#define VARIANT(name) name##_avx2
#define TAKES_BFLOAT16 0
#define ROUNDS 1
#define FOURS 1
#define FUSES 0
#define IN_REGISTERS 1
#define VECTOR_BYTES 32

enum { AHEAD_BYTES = 1536, AT_ONCE = 4 };

#include "sparse_lookup.h"

/* In each 16: even columns before odd ones, as the halves of 32-bit lanes have them. */
FORCED void arrange(float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        __m256 low = _mm256_loadu_ps(x + i), high = _mm256_loadu_ps(x + i + 8);
        __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88));
        __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0xdd));
        _mm256_storeu_pd((double *)(x + i), _mm256_permute4x64_pd(even, 0xd8));
        _mm256_storeu_pd((double *)(x + i + 8), _mm256_permute4x64_pd(odd, 0xd8));
    }
}

/* Sixteen columns, in the order of arrange for bfloat16. */
typedef struct {
    __m256 first, second;
} sixteen;

FORCED sixteen next_floats(uint64_t word, int byte, int bits, int is_bfloat16,
                           const uint8_t **next) {
    if (bits == 32)
        return (sixteen){_mm256_castsi256_ps(next_8_of_32(word, byte, next)),
                         _mm256_castsi256_ps(next_8_of_32(word, byte + 1, next))};
    __m256i halves = next_16_of_16(word, byte, next);
    if (is_bfloat16)
        return (sixteen){
            _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(halves, _mm256_set1_epi32((int)0xffff0000)))};
    return (sixteen){_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                     _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}

FORCED const uint8_t *add_values(const uint8_t *mask, const uint8_t *values, int64_t n, int bits,
                                 int is_bfloat16, const void *x, int64_t x_stride, int tokens,
                                 float *sums) {
    __m256 parts[AT_ONCE][2]; /* a single one would wait for itself */
    for (int t = 0; t < tokens; t++) {
        parts[t][0] = _mm256_loadu_ps(sums + HAS_SPARSE_LANES * t);
        parts[t][1] = _mm256_loadu_ps(sums + HAS_SPARSE_LANES * t + 8);
    }
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t word = mask_word(mask, i);
        for (int line = 0; line < bits / 16; line++)
            _mm_prefetch((const char *)values + AHEAD_BYTES + 64 * line, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) {
            sixteen a = next_floats(word, 2 * part, bits, is_bfloat16, &values);
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) {
                const float *at = (const float *)x + t * x_stride + i + 16 * part;
                parts[t][0] = _mm256_fmadd_ps(a.first, _mm256_loadu_ps(at), parts[t][0]);
                parts[t][1] = _mm256_fmadd_ps(a.second, _mm256_loadu_ps(at + 8), parts[t][1]);
            }
        }
    }
    for (int t = 0; t < tokens; t++) {
        _mm256_storeu_ps(sums + HAS_SPARSE_LANES * t, parts[t][0]);
        _mm256_storeu_ps(sums + HAS_SPARSE_LANES * t + 8, parts[t][1]);
    }
    return values;
}

typedef __m256i code_sum;
typedef __m256 float_sum;

FORCED float_sum load_sum(const float *sums) { return _mm256_loadu_ps(sums); }

FORCED void store_sum(float *sums, float_sum total) { _mm256_storeu_ps(sums, total); }

FORCED float_sum scaled(code_sum part, float factor, float_sum total) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(part), _mm256_set1_ps(factor), total);
}

FORCED const uint8_t *add_code_step(uint64_t word, int step, const uint8_t *values, const void *x,
                                    int64_t x_stride, int tokens, code_sum *parts) {
    _mm_prefetch((const char *)values + AHEAD_BYTES, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int part = 0; part < step / 16; part++) {
        __m256i a = next_16_of_8(word, 2 * part, &values);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            const int16_t *at = (const int16_t *)x + t * x_stride + 16 * part;
            __m256i of = _mm256_loadu_si256((const __m256i *)at);
            parts[t] = _mm256_add_epi32(parts[t], _mm256_madd_epi16(a, of));
        }
    }
    return values;
}

#include "sparse_body.h"

#endif
