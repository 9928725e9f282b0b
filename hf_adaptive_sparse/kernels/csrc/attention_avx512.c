/* x86-64 with AVX-512 VBMI and VNNI (Ice Lake, Zen 4 and later).
 *
 * 64 codes at a time: one byte permute brings the bytes of eight codes into each 64-bit lane, one
 * multishift gives every code a byte, one `and` cuts it out; dpbusd multiplies bytes. A vector's
 * int16 is split into two int8, 128 * high + low, which dpbusd takes as its signed operand. */
#if defined(__x86_64__) || defined(_M_X64)

#define TARGET                                                                                  \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,"  \
                          "bmi2,f16c" HAS_WIDE_VECTORS)))
#define VARIANT(name) name##_avx512
#define VECTOR_LIMIT 16256.0f

#include <immintrin.h>
#include "numbers.h"

/* Per 64 elements: 64 high bytes, then 64 low bytes. */
static TARGET void store_vector(const float *a, int64_t n, float factor, int16_t *out) {
    const __m512 scale = _mm512_set1_ps(factor);
    int8_t *bytes = (int8_t *)out;
    for (int64_t i = 0; i < n; i += 16) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(a + i), scale));
        __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(64)), 7);
        __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 7));
        int8_t *at = bytes + i / 64 * 128 + i % 64;
        _mm_storeu_si128((__m128i *)at, _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128((__m128i *)(at + 64), _mm512_cvtepi32_epi8(low));
    }
}

typedef struct {
    __m512i bytes, shifts, mask;
} unpacker;

static TARGET inline unpacker make_unpacker(int bits) {
    uint8_t bytes[64], shifts[64];
    for (int i = 0; i < 64; i++) {
        int lane = i / 8, place = i % 8;
        bytes[i] = (uint8_t)(lane * bits + (place < bits ? place : 0));
        shifts[i] = (uint8_t)(place * bits);
    }
    unpacker u = {_mm512_loadu_si512(bytes), _mm512_loadu_si512(shifts),
                  _mm512_set1_epi8((char)((1 << bits) - 1))};
    return u;
}

static TARGET inline __attribute__((always_inline)) __m512i unpack(
    const uint8_t *at, __mmask64 valid, int bits, unpacker u) {
    __m512i packed = _mm512_maskz_loadu_epi8(valid, at);
    if (bits == 8) return packed;
    __m512i lanes = _mm512_permutexvar_epi8(u.bytes, packed);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(u.shifts, lanes), u.mask);
}

/* Sums over the lanes of 16 vectors, as one vector. */
static TARGET inline __attribute__((always_inline)) __m512i sum_lanes(const __m512i *a) {
    __m512i b[8], c[4], d[2];
    for (int i = 0; i < 8; i++)
        b[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]),
                                _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 4; i++)
        c[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(b[2 * i], b[2 * i + 1]),
                                _mm512_unpackhi_epi64(b[2 * i], b[2 * i + 1]));
    for (int i = 0; i < 2; i++)
        d[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(c[2 * i], c[2 * i + 1], 0x88),
                                _mm512_shuffle_i32x4(c[2 * i], c[2 * i + 1], 0xdd));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(d[0], d[1], 0x88),
                            _mm512_shuffle_i32x4(d[0], d[1], 0xdd));
}

/* Products of 16 rows with one vector. Rows past n repeat the last one. */
static TARGET inline __attribute__((always_inline)) __m512i tile_dot(
    const uint8_t *rows, int64_t stride, int64_t n, int bits, unpacker u, int64_t chunks,
    __mmask64 last_valid, const int8_t *vector) {
    __m512i sums[16];
    const __mmask64 valid = bits == 8 ? ~0ull : (1ull << (8 * bits % 64)) - 1;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        const uint8_t *row = rows + (i < n ? i : n - 1) * stride;
        __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
#pragma GCC unroll 2
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            __m512i codes = unpack(row + chunk * 8 * bits,
                                   chunk + 1 < chunks ? valid : last_valid, bits, u);
            high = _mm512_dpbusd_epi32(high, codes, _mm512_loadu_si512(vector + chunk * 128));
            low = _mm512_dpbusd_epi32(low, codes, _mm512_loadu_si512(vector + chunk * 128 + 64));
        }
        sums[i] = _mm512_add_epi32(_mm512_slli_epi32(high, 7), low);
    }
    return sum_lanes(sums);
}

static TARGET inline __attribute__((always_inline)) void rows_dot_bits(
    const uint8_t *rows, int64_t stride, int64_t n, int bits, int64_t chunks, int64_t last_bytes,
    const int8_t *vectors, int64_t vector_stride, int64_t nvec, int32_t *out,
    int64_t out_stride, has_ahead ahead) {
    const unpacker u = make_unpacker(bits);
    const __mmask64 last = last_bytes >= 64 ? ~0ull : (1ull << last_bytes) - 1;
    const __mmask64 whole = bits == 8 ? ~0ull : (1ull << (8 * bits % 64)) - 1;
    _Alignas(64) uint8_t tile[16 * 1024];
    for (int64_t i = 0; i < n; i += 16) {
        int64_t left = n - i < 16 ? n - i : 16;
        const uint8_t *at = rows + i * stride;
        has_prefetch(ahead, i, 16);
        __mmask16 kept = (__mmask16)((1u << left) - 1);
        if (nvec == 1) {
            __m512i sums;
            if (chunks == 1 && left == 16)
                sums = tile_dot(at, stride, 16, bits, u, 1, last, vectors);
            else if (chunks == 2 && left == 16)
                sums = tile_dot(at, stride, 16, bits, u, 2, last, vectors);
            else
                sums = tile_dot(at, stride, left, bits, u, chunks, last, vectors);
            _mm512_mask_storeu_epi32(out + i, kept, sums);
            continue;
        }
        /* Several queries: unpack once. */
        for (int64_t row = 0; row < left; row++)
            for (int64_t chunk = 0; chunk < chunks; chunk++)
                _mm512_store_si512(tile + (row * chunks + chunk) * 64,
                                   unpack(at + row * stride + chunk * 8 * bits,
                                          chunk + 1 < chunks ? whole : last, bits, u));
        for (int64_t v = 0; v < nvec; v++) {
            const int8_t *vector = vectors + v * vector_stride;
            __m512i sums;
            if (chunks == 1 && left == 16)
                sums = tile_dot(tile, 64, 16, 8, u, 1, ~0ull, vector);
            else if (chunks == 2 && left == 16)
                sums = tile_dot(tile, 128, 16, 8, u, 2, ~0ull, vector);
            else
                sums = tile_dot(tile, chunks * 64, left, 8, u, chunks, ~0ull, vector);
            _mm512_mask_storeu_epi32(out + v * out_stride + i, kept, sums);
        }
    }
}

#define ROWS_DOT_BITS(bits)                                                                      \
    static TARGET __attribute__((noinline)) void rows_dot_##bits(                                \
        const uint8_t *rows, int64_t stride, int64_t n, int64_t chunks, int64_t last_bytes,      \
        const int8_t *vectors, int64_t vector_stride, int64_t nvec, int32_t *out,                \
        int64_t out_stride, has_ahead ahead) {                                                                    \
        rows_dot_bits(rows, stride, n, bits, chunks, last_bytes, vectors, vector_stride, nvec,   \
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
    /* Whole chunks of 64 codes; the vectors are 0 behind `to`, within its chunk. */
    int64_t first = from / 64, chunks = (to + 63) / 64 - first;
    int64_t end = (first + chunks) * 64 < count ? (first + chunks) * 64 : count;
    int64_t last_bytes = (end * bits + 7) / 8 - (first + chunks - 1) * 8 * bits;
    const uint8_t *at = rows + first * 8 * bits;
    const int8_t *vector = (const int8_t *)(vectors + from);
#define ARGUMENTS \
    at, stride, n, chunks, last_bytes, vector, 2 * vector_stride, nvec, out, out_stride, ahead
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
