/* x86-64 with AVX2 and FMA (Haswell, Zen and later).
 *
 * 32 codes at a time, as sixteen pairs: where codes are shorter than a byte, a byte shuffle brings a
 * pair's bytes into a lane of 16 bits, and a product moves it to the lane's upper end. Two shifts
 * then give the even and the odd codes, which madd multiplies with the even and the odd elements of
 * a vector. Eight rows are summed up together. */
#if defined(__x86_64__) || defined(_M_X64)

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define VARIANT(name) name##_avx2
#define VECTOR_LIMIT 16256.0f

#include <immintrin.h>

#include "attention.h"
#include "numbers.h"

enum { TOGETHER = 8 }; /* rows */

typedef struct {
    __m256i even, odd;
} pairs;

FORCED __m256i load(const void *at) { return _mm256_loadu_si256((const __m256i *)at); }

FORCED __m256i rounded(const float *a, __m256 scale) {
    __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(a), scale));
    __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(a + 8), scale));
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
}

/* Per 32 elements: the even ones, then the odd ones. */
static TARGET void store_vector(const float *a, int64_t n, float factor, int16_t *out) {
    const __m256 scale = _mm256_set1_ps(factor);
    for (int64_t i = 0; i < n; i += 32) {
        __m256i first = rounded(a + i, scale), second = rounded(a + i + 16, scale);
        __m256i even = _mm256_packs_epi32(_mm256_srai_epi32(_mm256_slli_epi32(first, 16), 16),
                                          _mm256_srai_epi32(_mm256_slli_epi32(second, 16), 16));
        __m256i odd =
            _mm256_packs_epi32(_mm256_srai_epi32(first, 16), _mm256_srai_epi32(second, 16));
        __m256i *to = (__m256i *)(out + i);
        _mm256_storeu_si256(to, _mm256_permute4x64_epi64(even, 0xd8));
        _mm256_storeu_si256(to + 1, _mm256_permute4x64_epi64(odd, 0xd8));
    }
}

/* What brings a pair to the upper end of its lane: the bytes it is in, and a factor for the bits. */
typedef struct {
    uint8_t bytes[32];
    uint16_t factors[16];
} placement;

#define TWICE(...) {__VA_ARGS__, __VA_ARGS__}
static const placement of_6_bits = {TWICE(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11),
                                    TWICE(16, 1, 16, 1, 16, 1, 16, 1)};
static const placement of_3_bits = {TWICE(0, 1, 0, 1, 1, 2, 1, 2, 3, 4, 3, 4, 4, 5, 4, 5),
                                    TWICE(1024, 16, 64, 1, 1024, 16, 64, 1)};
static const placement of_2_bits = {
    TWICE(0, 128, 0, 128, 1, 128, 1, 128, 2, 128, 2, 128, 3, 128, 3, 128),
    TWICE(4096, 256, 4096, 256, 4096, 256, 4096, 256)};

/* 32 codes from `at`; reads at most 16 bytes from at and from at + 2 * bits. */
FORCED pairs unpack(const uint8_t *at, int bits) {
    const __m256i code = _mm256_set1_epi16((short)((1 << bits) - 1));
    if (bits == 8) {
        __m256i x = load(at);
        return (pairs){_mm256_and_si256(x, code), _mm256_srli_epi16(x, 8)};
    }
    if (bits == 4) {
        __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)at));
        return (pairs){_mm256_and_si256(x, code), _mm256_srli_epi16(x, 4)};
    }
    const placement *p = bits == 6 ? &of_6_bits : bits == 3 ? &of_3_bits : &of_2_bits;
    __m256i x = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)at)),
        _mm_loadu_si128((const __m128i *)(at + 2 * bits)), 1);
    x = _mm256_mullo_epi16(_mm256_shuffle_epi8(x, load(p->bytes)), load(p->factors));
    return (pairs){_mm256_and_si256(_mm256_srli_epi16(x, 16 - 2 * bits), code),
                   _mm256_srli_epi16(x, 16 - bits)};
}

FORCED __m256i multiply_add(__m256i sum, pairs codes, const int16_t *vector) {
    __m256i even = _mm256_madd_epi16(codes.even, load(vector));
    __m256i odd = _mm256_madd_epi16(codes.odd, load(vector + 16));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}

/* Sums over the lanes of 8 vectors, as one vector. */
FORCED __m256i sum_lanes(const __m256i *a) {
    __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(a[0], a[1]), _mm256_hadd_epi32(a[2], a[3]));
    __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(a[4], a[5]), _mm256_hadd_epi32(a[6], a[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20),
                            _mm256_permute2x128_si256(low, high, 0x31));
}

/* Products of 8 rows with all vectors. A row may be read up to 32 bytes past its last chunk's start. */
FORCED void tile_dot(const uint8_t *rows, int64_t stride, int bits, int64_t chunks,
                     const int16_t *vectors, int64_t vector_stride, int64_t nvec, int32_t *out,
                     int64_t out_stride) {
    __m256i sums[TOGETHER];
    if (nvec == 1) {
        for (int i = 0; i < TOGETHER; i++) {
            const uint8_t *row = rows + i * stride;
            __m256i sum = _mm256_setzero_si256();
            for (int64_t chunk = 0; chunk < chunks; chunk++)
                sum = multiply_add(sum, unpack(row + chunk * 4 * bits, bits), vectors + chunk * 32);
            sums[i] = sum;
        }
        _mm256_storeu_si256((__m256i *)out, sum_lanes(sums));
        return;
    }
    pairs tile[TOGETHER * HAS_MAX_CODES / 32]; /* unpacked once */
    for (int i = 0; i < TOGETHER; i++)
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            tile[i * chunks + chunk] = unpack(rows + i * stride + chunk * 4 * bits, bits);
    for (int64_t v = 0; v < nvec; v++) {
        for (int i = 0; i < TOGETHER; i++) {
            __m256i sum = _mm256_setzero_si256();
            for (int64_t chunk = 0; chunk < chunks; chunk++)
                sum = multiply_add(sum, tile[i * chunks + chunk],
                                   vectors + v * vector_stride + chunk * 32);
            sums[i] = sum;
        }
        _mm256_storeu_si256((__m256i *)(out + v * out_stride), sum_lanes(sums));
    }
}

FORCED void rows_dot_bits(const uint8_t *rows, int64_t stride, int64_t n, int bits,
                          int64_t row_bytes, int64_t chunks, const int16_t *vectors,
                          int64_t vector_stride, int64_t nvec, int32_t *out, int64_t out_stride,
                          has_ahead ahead) {
    for (int64_t i = 0; i < n; i += TOGETHER) {
        has_prefetch(ahead, i, TOGETHER);
        /* A row is read up to 64 bytes past its end, which is in the next rows but for the last. */
        if (i + TOGETHER <= n && (n - i - TOGETHER) * stride >= 64) {
            const uint8_t *at = rows + i * stride;
            if (chunks == 2) /* a head of 64 channels */
                tile_dot(at, stride, bits, 2, vectors, vector_stride, nvec, out + i, out_stride);
            else
                tile_dot(at, stride, bits, chunks, vectors, vector_stride, nvec, out + i,
                         out_stride);
            continue;
        }
        uint8_t copies[TOGETHER * (HAS_MAX_CODES + 32)];
        int32_t products[HAS_MAX_ROWS * TOGETHER];
        int64_t left = n - i < TOGETHER ? n - i : TOGETHER;
        for (int64_t row = 0; row < left; row++)
            memcpy(copies + row * (HAS_MAX_CODES + 32), rows + (i + row) * stride,
                   (size_t)row_bytes);
        tile_dot(copies, HAS_MAX_CODES + 32, bits, chunks, vectors, vector_stride, nvec, products,
                 TOGETHER);
        for (int64_t v = 0; v < nvec; v++)
            memcpy(out + v * out_stride + i, products + v * TOGETHER,
                   (size_t)left * sizeof *out);
    }
}

#define ROWS_DOT_BITS(bits)                                                                      \
    static TARGET __attribute__((noinline)) void rows_dot_##bits(                                \
        const uint8_t *rows, int64_t stride, int64_t n, int64_t row_bytes, int64_t chunks,       \
        const int16_t *vectors, int64_t vector_stride, int64_t nvec, int32_t *out,               \
        int64_t out_stride, has_ahead ahead) {                                                   \
        rows_dot_bits(rows, stride, n, bits, row_bytes, chunks, vectors, vector_stride, nvec,    \
                      out, out_stride, ahead);                                                   \
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
