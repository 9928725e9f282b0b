/* x86-64 with AVX2 and FMA (Haswell, Zen and later).
 *
 * 32 codes at a time: a byte shuffle brings the bytes of eight codes into each 64-bit lane, and
 * three rounds of masks and shifts spread them to a byte each, the reverse of packing/bits.py. They
 * are widened to 16 bits and multiplied with the vector's int16 by madd. */
#if defined(__x86_64__) || defined(_M_X64)

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define VARIANT(name) name##_avx2
#define VECTOR_LIMIT 16256.0f

#include <immintrin.h>

#include "numbers.h"

static TARGET void store_vector(const float *a, int64_t n, float factor, int16_t *out) {
    const __m256 scale = _mm256_set1_ps(factor);
    for (int64_t i = 0; i < n; i += 16) {
        __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(a + i), scale));
        __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(a + i + 8), scale));
        __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
        _mm256_storeu_si256((__m256i *)(out + i), both);
    }
}

/* One round: in each lane of 2 * lane bits, move the upper of two fields of `used` bits up. */
static TARGET inline __attribute__((always_inline)) __m256i spread(__m256i x, int lane, int used) {
    uint64_t low = 0;
    for (int start = 0; start < 64; start += 2 * lane) low |= ((1ull << used) - 1) << start;
    __m256i kept = _mm256_and_si256(x, _mm256_set1_epi64x((int64_t)low));
    __m256i moved = _mm256_and_si256(x, _mm256_set1_epi64x((int64_t)(low << used)));
    return _mm256_or_si256(kept, _mm256_slli_epi64(moved, lane - used));
}

/* 32 codes from `at`; reads 16 bytes from at and from at + 2 * bits. */
static TARGET inline __attribute__((always_inline)) __m256i unpack(const uint8_t *at, int bits) {
    if (bits == 8) return _mm256_loadu_si256((const __m256i *)at);
    char order[32];
    for (int i = 0; i < 32; i++) {
        int place = i % 8;
        order[i] = (char)(place < bits ? i % 16 / 8 * bits + place : 0x80);
    }
    __m256i x = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)at)),
        _mm_loadu_si128((const __m128i *)(at + 2 * bits)), 1);
    x = _mm256_shuffle_epi8(x, _mm256_loadu_si256((const __m256i *)order));
    x = spread(x, 32, 4 * bits);
    x = spread(x, 16, 2 * bits);
    return spread(x, 8, bits);
}

static TARGET inline __attribute__((always_inline)) __m256i multiply_add(
    __m256i sum, __m256i codes, const int16_t *vector) {
    __m256i low = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(codes));
    __m256i high = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(codes, 1));
    low = _mm256_madd_epi16(low, _mm256_loadu_si256((const __m256i *)vector));
    high = _mm256_madd_epi16(high, _mm256_loadu_si256((const __m256i *)(vector + 16)));
    return _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
}

static TARGET inline int32_t sum_lanes(__m256i x) {
    __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1));
    return _mm_cvtsi128_si32(y);
}

/* `row` may be read up to 32 bytes past its last chunk's start. */
static TARGET inline __attribute__((always_inline)) void row_dot(
    const uint8_t *row, int bits, int64_t chunks, const int16_t *vectors, int64_t vector_stride,
    int64_t nvec, int32_t *out, int64_t out_stride) {
    if (nvec == 1) {
        __m256i sum = _mm256_setzero_si256();
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            sum = multiply_add(sum, unpack(row + chunk * 4 * bits, bits), vectors + chunk * 32);
        out[0] = sum_lanes(sum);
        return;
    }
    __m256i codes[HAS_MAX_CODES / 32];
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        codes[chunk] = unpack(row + chunk * 4 * bits, bits);
    for (int64_t v = 0; v < nvec; v++) {
        __m256i sum = _mm256_setzero_si256();
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            sum = multiply_add(sum, codes[chunk], vectors + v * vector_stride + chunk * 32);
        out[v * out_stride] = sum_lanes(sum);
    }
}

static TARGET inline __attribute__((always_inline)) void rows_dot_bits(
    const uint8_t *rows, int64_t stride, int64_t n, int bits, int64_t row_bytes, int64_t chunks,
    const int16_t *vectors, int64_t vector_stride, int64_t nvec, int32_t *out,
    int64_t out_stride, has_ahead ahead) {
    uint8_t copy[HAS_MAX_CODES + 32];
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *row = rows + i * stride;
        if (i % 16 == 0) has_prefetch(ahead, i, n);
        /* A row is read up to 64 bytes past its end, which is in the next rows but for the last. */
        if ((n - 1 - i) * stride < 64) {
            memcpy(copy, row, (size_t)row_bytes);
            row = copy;
        }
        row_dot(row, bits, chunks, vectors, vector_stride, nvec, out + i, out_stride);
    }
}

#define ROWS_DOT_BITS(bits)                                                                      \
    static TARGET __attribute__((noinline)) void rows_dot_##bits(                                \
        const uint8_t *rows, int64_t stride, int64_t n, int64_t row_bytes, int64_t chunks,       \
        const int16_t *vectors, int64_t vector_stride, int64_t nvec, int32_t *out,               \
        int64_t out_stride, has_ahead ahead) {                                                                    \
        rows_dot_bits(rows, stride, n, bits, row_bytes, chunks, vectors, vector_stride, nvec,    \
                      out, out_stride, ahead);                                                          \
    }
ROWS_DOT_BITS(2)
ROWS_DOT_BITS(3)
ROWS_DOT_BITS(4)
ROWS_DOT_BITS(6)
ROWS_DOT_BITS(8)

static TARGET void rows_dot(const uint8_t *rows, int64_t stride, int64_t n, int bits,
                            int64_t count, int64_t from, int64_t to, const int16_t *vectors,
                            int64_t vector_stride, int64_t nvec, int32_t *out,
                            int64_t out_stride, has_ahead ahead) {
    int64_t skipped = from / 8 * bits, chunks = (to - from + 31) / 32;
    int64_t row_bytes = (count * bits + 7) / 8 - skipped;
    const uint8_t *at = rows + skipped;
    const int16_t *vector = vectors + from;
#define ARGUMENTS \
    at, stride, n, row_bytes, chunks, vector, vector_stride, nvec, out, out_stride, ahead
    switch (bits) {
        case 2: rows_dot_2(ARGUMENTS); break;
        case 3: rows_dot_3(ARGUMENTS); break;
        case 4: rows_dot_4(ARGUMENTS); break;
        case 6: rows_dot_6(ARGUMENTS); break;
        default: rows_dot_8(ARGUMENTS); break;
    }
#undef ARGUMENTS
}

#include "attention_body.h"

#endif
