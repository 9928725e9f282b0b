/* x86-64 with AVX2 and FMA (Haswell, Zen and later).
 *
 * A table says for each byte of the mask which of the next values go to its eight columns; one byte
 * shuffle puts them there. */
#if defined(__x86_64__) || defined(_M_X64)

#define TARGET __attribute__((target("avx2,fma,f16c,popcnt")))
#define VARIANT(name) name##_avx2
#define TAKES_BFLOAT16 0
#define FOURS 1
#define FUSES 0

#include <immintrin.h>

#include "numbers.h"
#include "sparse.h"

enum { AHEAD_BYTES = 1536 };

#define FORCED static TARGET inline __attribute__((always_inline))

FORCED __m128i pairs_of(int mask) {
    return _mm_loadu_si128((const __m128i *)has_expand_pairs[mask]);
}

/* A bit of four columns becomes two, as a value of 4 bytes is two of 2. */
FORCED __m128i fours_of(int mask) {
    static const uint8_t doubled[16] = {0x00, 0x03, 0x0c, 0x0f, 0x30, 0x33, 0x3c, 0x3f,
                                        0xc0, 0xc3, 0xcc, 0xcf, 0xf0, 0xf3, 0xfc, 0xff};
    return pairs_of(doubled[mask]);
}

FORCED __m128i load(const void *at) { return _mm_loadu_si128((const __m128i *)at); }

FORCED int64_t expand_32(const uint8_t *mask, const uint32_t *values, int64_t at, int64_t n,
                         void *out) {
    const uint32_t *next = values + at;
    for (int64_t i = 0; i < n; i += 8) {
        int kept = mask[i / 8];
        const uint32_t *middle = next + _mm_popcnt_u32((unsigned)kept & 15);
        if (i % 16 == 0) _mm_prefetch((const char *)next + AHEAD_BYTES, _MM_HINT_T0);
        __m128i low = _mm_shuffle_epi8(load(next), fours_of(kept & 15));
        __m128i high = _mm_shuffle_epi8(load(middle), fours_of(kept >> 4));
        _mm_storeu_si128((__m128i *)((uint32_t *)out + i), low);
        _mm_storeu_si128((__m128i *)((uint32_t *)out + i + 4), high);
        next += _mm_popcnt_u32((unsigned)kept);
    }
    return next - values - at;
}

FORCED int64_t expand_16(const uint8_t *mask, const uint16_t *values, int64_t at, int64_t n,
                         void *out) {
    const uint16_t *next = values + at;
    for (int64_t i = 0; i < n; i += 8) {
        int kept = mask[i / 8];
        if (i % 32 == 0) _mm_prefetch((const char *)next + AHEAD_BYTES, _MM_HINT_T0);
        _mm_storeu_si128((__m128i *)((uint16_t *)out + i),
                         _mm_shuffle_epi8(load(next), pairs_of(kept)));
        next += _mm_popcnt_u32((unsigned)kept);
    }
    return next - values - at;
}

FORCED int64_t expand_8(const uint8_t *mask, const int8_t *values, int64_t at, int64_t n,
                        void *out) {
    const int8_t *next = values + at;
    for (int64_t i = 0; i < n; i += 8) {
        int kept = mask[i / 8];
        if (i % 64 == 0) _mm_prefetch((const char *)next + AHEAD_BYTES, _MM_HINT_T0);
        __m128i order = _mm_loadl_epi64((const __m128i *)has_expand_bytes[kept]);
        __m128i row = _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)next), order);
        _mm_storel_epi64((__m128i *)((int8_t *)out + i), row);
        next += _mm_popcnt_u32((unsigned)kept);
    }
    return next - values - at;
}

FORCED int64_t expand_4(const uint8_t *mask, const uint8_t *values, int64_t at, int64_t n,
                        void *out) {
    int8_t codes[HAS_SPARSE_BLOCK + 64];
    const uint8_t *from = values + at / 2;
    const __m128i low = _mm_set1_epi8(15);
    const __m128i signs = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    int64_t count = at % 2;
    for (int64_t i = 0; i < n; i += 8) count += _mm_popcnt_u32(mask[i / 8]);
    for (int64_t i = 0; i < count; i += 32) {
        _mm_prefetch((const char *)from + i / 2 + AHEAD_BYTES, _MM_HINT_T0);
        __m128i packed = load(from + i / 2);
        __m128i first = _mm_shuffle_epi8(signs, _mm_and_si128(packed, low));
        __m128i second = _mm_shuffle_epi8(signs, _mm_and_si128(_mm_srli_epi16(packed, 4), low));
        _mm_storeu_si128((__m128i *)(codes + i), _mm_unpacklo_epi8(first, second));
        _mm_storeu_si128((__m128i *)(codes + i + 16), _mm_unpackhi_epi8(first, second));
    }
    return expand_8(mask, codes, at % 2, n, out);
}

FORCED int64_t expand_12(const uint8_t *mask, const uint8_t *lower, const uint8_t *codes,
                         int64_t at, int64_t n, const uint8_t *book, void *out) {
    int8_t lower_bytes[HAS_SPARSE_BLOCK], of[HAS_SPARSE_BLOCK];
    const __m128i uppers = load(book), low = _mm_set1_epi8(15);
    int64_t taken = expand_8(mask, (const int8_t *)lower, 0, n, lower_bytes);
    expand_4(mask, codes, at, n, of);
    for (int64_t i = 0; i < n; i += 16) {
        __m128i upper = _mm_shuffle_epi8(uppers, _mm_and_si128(load(of + i), low));
        __m128i *to = (__m128i *)((uint16_t *)out + i);
        _mm_storeu_si128(to, _mm_unpacklo_epi8(load(lower_bytes + i), upper));
        _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(load(lower_bytes + i), upper));
    }
    return taken;
}

FORCED void widen_float16(const void *numbers, int64_t n, float *out) {
    const uint16_t *halves = numbers;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(load(halves + i)));
    for (; i < n; i++) out[i] = has_from_float16(halves[i]);
}

FORCED void add_floats(const float *a, const float *x, int64_t n, float *sums) {
    __m256 parts[4] = {_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + 8), _mm256_setzero_ps(),
                       _mm256_setzero_ps()};
    for (int64_t i = 0; i < n; i += 32)
        for (int part = 0; part < 4; part++)
            parts[part] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * part),
                                          _mm256_loadu_ps(x + i + 8 * part), parts[part]);
    _mm256_storeu_ps(sums, _mm256_add_ps(parts[0], parts[2]));
    _mm256_storeu_ps(sums + 8, _mm256_add_ps(parts[1], parts[3]));
}

FORCED __m256i product_of(const int8_t *codes, const int16_t *x) {
    return _mm256_madd_epi16(_mm256_cvtepi8_epi16(load(codes)),
                             _mm256_loadu_si256((const __m256i *)x));
}

FORCED void add_codes(const int8_t *codes, const int16_t *x, int64_t n, float factor,
                      float *sums) {
    __m256i first = _mm256_setzero_si256(), second = first;
    for (int64_t i = 0; i < n; i += 32) {
        first = _mm256_add_epi32(first, product_of(codes + i, x + i));
        second = _mm256_add_epi32(second, product_of(codes + i + 16, x + i + 16));
    }
    __m256 total = _mm256_cvtepi32_ps(_mm256_add_epi32(first, second));
    _mm256_storeu_ps(sums, _mm256_fmadd_ps(total, _mm256_set1_ps(factor), _mm256_loadu_ps(sums)));
}

#include "sparse_body.h"

#endif
