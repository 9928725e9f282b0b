/* Products by bytes, for processors with AVX-512 BW and VNNI: dpbusd multiplies codes, unsigned, with
 * the int8 that a vector's int16 are split into, 128 * high + low.
 *
 * The including file defines TARGET, VARIANT(name), and how 64 codes become bytes:
 *
 *   unpacker            what that takes, and make_unpacker(bits)
 *   unpack(at, valid, bits, u)    the codes from `at`; reads the bytes of `valid` */

#define VECTOR_LIMIT 16256.0f

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

/* The sums over neighbours of two vectors, in the lanes of one: of 32 bits, then of 64. */
FORCED __m512i add_words(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

FORCED __m512i add_pairs(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

/* The sums over lanes of 128 bits of four vectors, or of two that are such sums. */
FORCED __m512i add_lanes(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

/* Products of one row with one vector, to be summed up over lanes. */
FORCED __m512i row_dot(const uint8_t *row, int bits, unpacker u, int64_t chunks,
                       __mmask64 last_valid, const int8_t *vector) {
    const __mmask64 valid = bits == 8 ? ~0ull : (1ull << (8 * bits % 64)) - 1;
    __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        __m512i codes =
            unpack(row + chunk * 8 * bits, chunk + 1 < chunks ? valid : last_valid, bits, u);
        high = _mm512_dpbusd_epi32(high, codes, _mm512_loadu_si512(vector + chunk * 128));
        low = _mm512_dpbusd_epi32(low, codes, _mm512_loadu_si512(vector + chunk * 128 + 64));
    }
    return _mm512_add_epi32(_mm512_slli_epi32(high, 7), low);
}

/* Products of 16 rows with one vector. Rows past n repeat the last one. */
FORCED __m512i tile_dot(const uint8_t *rows, int64_t stride, int64_t n, int bits, unpacker u,
                        int64_t chunks, __mmask64 last_valid, const int8_t *vector) {
    __m512i fours[4];
    const uint8_t *row = rows;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* added up as they come: no more registers than there are */
        __m512i sums[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            sums[j] = row_dot(row, bits, u, chunks, last_valid, vector);
            if (4 * i + j + 1 < n) row += stride;
        }
        fours[i] = add_pairs(add_words(sums[0], sums[1]), add_words(sums[2], sums[3]));
    }
    return add_lanes(add_lanes(fours[0], fours[1]), add_lanes(fours[2], fours[3]));
}

FORCED void rows_dot_bits(
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
        int64_t out_stride, has_ahead ahead) {                                                   \
        rows_dot_bits(rows, stride, n, bits, chunks, last_bytes, vectors, vector_stride, nvec,   \
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
