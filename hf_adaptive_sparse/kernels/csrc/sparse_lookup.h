/* Expansion on x86-64 without an instruction for it: a table says for each byte of the mask which of
 * the next values go to its eight columns, and one byte shuffle puts them there. Included where
 * FORCED functions may use AVX2, F16C and POPCNT, and AVX-512 BW if VECTOR_BYTES are 64, not 32. */
#include <immintrin.h>
#include <string.h>

#include "numbers.h"
#include "sparse.h"

FORCED __m128i load(const void *at) { return _mm_loadu_si128((const __m128i *)at); }

FORCED __m256i load_both(const void *low, const void *high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load(low)), load(high), 1);
}

/* Sixteen times a byte of the mask, which is where a table of sixteen bytes each has its entry. */
FORCED uint32_t entry_of(uint64_t word, int byte) {
    return (uint32_t)(byte == 0 ? word << 4 : word >> (8 * byte - 4)) & 0xff0;
}

FORCED int64_t kept(uint32_t entry) { return _mm_popcnt_u32(entry); }

/* Eight columns of 32 bits, those of byte number `byte`; `next` goes on. */
FORCED __m256i next_8_of_32(uint64_t word, int byte, const uint8_t **next) {
    uint32_t low = (uint32_t)(word >> 8 * byte) & 15, high = (uint32_t)(word >> 8 * byte >> 4) & 15;
    const uint8_t *at = *next, *middle = at + 4 * kept(low);
    *next = middle + 4 * kept(high);
    return _mm256_shuffle_epi8(load_both(at, middle),
                               load_both(has_expand_fours[low], has_expand_fours[high]));
}

/* Sixteen columns of 16 bits. */
FORCED __m256i next_16_of_16(uint64_t word, int byte, const uint8_t **next) {
    const uint8_t *table = has_expand_pairs[0];
    uint32_t low = entry_of(word, byte), high = entry_of(word, byte + 1);
    const uint8_t *at = *next, *middle = at + 2 * kept(low);
    *next = middle + 2 * kept(high);
    return _mm256_shuffle_epi8(load_both(at, middle), load_both(table + low, table + high));
}

/* Sixteen columns of 8 bits, as int16. */
FORCED __m256i next_16_of_8(uint64_t word, int byte, const uint8_t **next) {
    const uint8_t *table = has_expand_upper[0];
    uint32_t low = entry_of(word, byte), high = entry_of(word, byte + 1);
    const uint8_t *at = *next, *middle = at + kept(low);
    *next = middle + kept(high);
    return _mm256_srai_epi16(
        _mm256_shuffle_epi8(load_both(at, middle), load_both(table + low, table + high)), 8);
}

FORCED int64_t expand_32(const uint8_t *mask, const uint32_t *values, int64_t at, int64_t n,
                         void *out) {
    const uint8_t *first = (const uint8_t *)(values + at), *next = first;
    for (int64_t i = 0; i < n; i += 8) {
        if (i % 16 == 0) _mm_prefetch((const char *)next + AHEAD_BYTES, _MM_HINT_T0);
        __m256i eight = next_8_of_32(mask[i / 8], 0, &next);
        _mm256_storeu_si256((__m256i *)((uint32_t *)out + i), eight);
    }
    return (next - first) / 4;
}

FORCED int64_t expand_16(const uint8_t *mask, const uint16_t *values, int64_t at, int64_t n,
                         void *out) {
    const uint8_t *first = (const uint8_t *)(values + at), *next = first;
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t word = mask_word(mask, i);
        _mm_prefetch((const char *)next + AHEAD_BYTES, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++)
            _mm256_storeu_si256((__m256i *)((uint16_t *)out + i + 16 * part),
                                next_16_of_16(word, 2 * part, &next));
    }
    return (next - first) / 2;
}

FORCED int64_t expand_8(const uint8_t *mask, const int8_t *values, int64_t at, int64_t n,
                        void *out) {
    const int8_t *next = values + at;
    for (int64_t i = 0; i < n; i += 64) {
        _mm_prefetch((const char *)next + AHEAD_BYTES, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int64_t byte = 0; byte < 8; byte++) {
            uint32_t places = mask[i / 8 + byte];
            __m128i order = _mm_loadl_epi64((const __m128i *)has_expand_bytes[places]);
            __m128i row = _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)next), order);
            _mm_storel_epi64((__m128i *)((int8_t *)out + i + 8 * byte), row);
            next += kept(places);
        }
    }
    return next - values - at;
}

/* As many codes of 4 bits as a vector has bytes, lower halves of bytes first, through a table of
 * sixteen bytes; and the values of which two vectors are the lower and the upper bytes. */
#if VECTOR_BYTES == 64
#include "sparse_join.h"

typedef __m512i bytes;

FORCED bytes look_up_next(const uint8_t *codes, __m128i table) {
    __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    __m512i half = _mm512_set1_epi8(15); /* (pairs | pairs << 4) & half */
    pairs = _mm512_ternarylogic_epi32(pairs, _mm512_slli_epi16(pairs, 4), half, 0xa8);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), pairs);
}

#else
typedef __m256i bytes;

FORCED bytes look_up_next(const uint8_t *codes, __m128i table) {
    __m256i pairs = _mm256_cvtepu8_epi16(load(codes));
    pairs = _mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table),
                               _mm256_and_si256(pairs, _mm256_set1_epi8(15)));
}

FORCED void store_joined(bytes lower, bytes upper, void *out) {
    __m256i low = _mm256_unpacklo_epi8(lower, upper), high = _mm256_unpackhi_epi8(lower, upper);
    _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256((__m256i *)out + 1, _mm256_permute2x128_si256(low, high, 0x31));
}
#endif

enum { AT_A_TIME = sizeof(bytes) };

FORCED bytes load_bytes(const uint8_t *at) {
    bytes of;
    memcpy(&of, at, sizeof of);
    return of;
}

FORCED void look_up(const uint8_t *codes, int64_t n, __m128i table, uint8_t *out) {
    for (int64_t i = 0; i < n; i += AT_A_TIME) {
        if (i % 128 == 0) _mm_prefetch((const char *)codes + i / 2 + AHEAD_BYTES, _MM_HINT_T0);
        bytes found = look_up_next(codes + i / 2, table);
        memcpy(out + i, &found, sizeof found);
    }
}

FORCED void decode_4(const uint8_t *codes, int64_t n, int8_t *out) {
    const __m128i signs = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    look_up(codes, n, signs, (uint8_t *)out);
}

FORCED void decode_12(const uint8_t *lower, const uint8_t *codes, int64_t n, const uint8_t *book,
                      uint16_t *out) {
    for (int64_t i = 0; i < n; i += AT_A_TIME) {
        if (i % 64 == 0) _mm_prefetch((const char *)lower + i + AHEAD_BYTES, _MM_HINT_T0);
        if (i % 128 == 0) _mm_prefetch((const char *)codes + i / 2 + AHEAD_BYTES, _MM_HINT_T0);
        store_joined(load_bytes(lower + i), look_up_next(codes + i / 2, load(book)), out + i);
    }
}

FORCED int64_t count_kept(const uint8_t *mask, int64_t n) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 64) count += (int64_t)_mm_popcnt_u64(mask_word(mask, i));
    return count;
}

FORCED int64_t expand_4(const uint8_t *mask, const uint8_t *values, int64_t at, int64_t n,
                        void *out) {
    int8_t codes[HAS_SPARSE_BLOCK + 64];
    decode_4(values + at / 2, at % 2 + count_kept(mask, n), codes);
    return expand_8(mask, codes, at % 2, n, out);
}

FORCED int64_t expand_12(const uint8_t *mask, const uint8_t *lower, const uint8_t *codes,
                         int64_t at, int64_t n, const uint8_t *book, void *out) {
    uint8_t upper[HAS_SPARSE_BLOCK + 64];
    uint16_t values[HAS_SPARSE_BLOCK + 64];
    int64_t count = count_kept(mask, n);
    look_up(codes, at + count, load(book), upper);
    for (int64_t i = 0; i < count; i += AT_A_TIME)
        store_joined(load_bytes(lower + i), load_bytes(upper + at + i), values + i);
    return expand_16(mask, values, 0, n, out);
}

FORCED void widen_float16(const void *numbers, int64_t n, float *out) {
    const uint16_t *halves = numbers;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(load(halves + i)));
    for (; i < n; i++) out[i] = has_from_float16(halves[i]);
}
