/* x86-64 with AVX-512 VBMI2 and BF16 (Zen 4, Sapphire Rapids and later).
 *
 * One instruction puts the next values in the places that a mask names; the population count of the
 * mask says where the values after them begin. Out of cache this reaches the memory's bandwidth only
 * with the value stream prefetched some 1,500 bytes ahead: the hardware's prefetchers stop at the end
 * of a page. */
#if defined(__x86_64__) || defined(_M_X64)

#define FEATURES                                                                                \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,avx2,fma," \
    "bmi2,f16c,popcnt" HAS_WIDE_VECTORS
#define TARGET __attribute__((target(FEATURES)))
#define VARIANT(name) name##_avx512
#define TAKES_BFLOAT16 1
#define ROUNDS 1
#define FOURS 16
#define FUSES 1
#define IN_REGISTERS 0

#include <immintrin.h>

#include "numbers.h"
#include "sparse.h"

enum { AHEAD_BYTES = 1536 };

#include "sparse_join.h"

FORCED int64_t expand_32(const uint8_t *mask, const uint32_t *values, int64_t at, int64_t n,
                         void *out) {
    const uint32_t *next = values + at;
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t word = mask_word(mask, i);
        for (int part = 0; part < 64; part += 16) {
            __mmask16 kept = (__mmask16)(word >> part);
            _mm_prefetch((const char *)next + AHEAD_BYTES, _MM_HINT_T0);
            __m512i row = _mm512_maskz_expand_epi32(kept, _mm512_loadu_si512(next));
            _mm512_storeu_si512((uint32_t *)out + i + part, row);
            next += _mm_popcnt_u32(kept);
        }
    }
    return next - values - at;
}

FORCED int64_t expand_16(const uint8_t *mask, const uint16_t *values, int64_t at, int64_t n,
                         void *out) {
    const uint16_t *next = values + at;
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t word = mask_word(mask, i);
        __mmask32 low = (__mmask32)word, high = (__mmask32)(word >> 32);
        const uint16_t *middle = next + _mm_popcnt_u32(low);
        _mm_prefetch((const char *)next + AHEAD_BYTES, _MM_HINT_T0);
        _mm_prefetch((const char *)middle + AHEAD_BYTES, _MM_HINT_T0);
        _mm512_storeu_si512((uint16_t *)out + i,
                            _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(next)));
        _mm512_storeu_si512((uint16_t *)out + i + 32,
                            _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(middle)));
        next += _mm_popcnt_u64(word);
    }
    return next - values - at;
}

FORCED int64_t expand_8(const uint8_t *mask, const int8_t *values, int64_t at, int64_t n,
                        void *out) {
    const int8_t *next = values + at;
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t word = mask_word(mask, i);
        _mm_prefetch((const char *)next + AHEAD_BYTES, _MM_HINT_T0);
        _mm512_storeu_si512((int8_t *)out + i,
                            _mm512_maskz_expand_epi8(word, _mm512_loadu_si512(next)));
        next += _mm_popcnt_u64(word);
    }
    return next - values - at;
}

#define EIGHT_TIMES(lane) {lane, lane, lane, lane, lane, lane, lane, lane}

/* Five bytes in each 64-bit lane hold its eight codes of 4 bits, whichever half of a byte they begin
 * in: the first of the shifts where it is the lower one. In memory, since a branch would be predicted
 * wrongly every second time.
 *
 * A code of a value is taken with the four bits below it, which are then cleared: that leaves its
 * sign where it is, and 16 times its value. One of an upper byte is taken with the bits above it: a
 * lookup among 64 bytes takes the lower six, of which the upper two choose one of four equal books. */
static const _Alignas(64) uint64_t value_shifts[2][8] = {EIGHT_TIMES(0x1814100c0804003c),
                                                         EIGHT_TIMES(0x1c1814100c080400)};
static const _Alignas(64) uint64_t upper_shifts[2][8] = {EIGHT_TIMES(0x1c1814100c080400),
                                                         EIGHT_TIMES(0x201c1814100c0804)};

FORCED __m512i codes_of_4(__m512i packed, int64_t at, const uint64_t shifts[2][8]) {
    const __m512i lanes = _mm512_set_epi64(
        0x202020201f1e1d1c, 0x1c1c1c1c1b1a1918, 0x1818181817161514, 0x1414141413121110,
        0x101010100f0e0d0c, 0x0c0c0c0c0b0a0908, 0x0808080807060504, 0x0404040403020100);
    return _mm512_multishift_epi64_epi8(_mm512_load_si512(shifts[at & 1]),
                                        _mm512_permutexvar_epi8(lanes, packed));
}

FORCED int64_t expand_4(const uint8_t *mask, const uint8_t *values, int64_t at, int64_t n,
                        void *out) {
    const __m512i upper = _mm512_set1_epi8((char)0xf0);
    int64_t next = at;
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t word = mask_word(mask, i);
        const uint8_t *from = values + (next >> 1);
        _mm_prefetch((const char *)from + AHEAD_BYTES, _MM_HINT_T0);
        __m512i codes = codes_of_4(_mm512_loadu_si512(from), next, value_shifts);
        codes = _mm512_and_si512(codes, upper);
        _mm512_storeu_si512((int8_t *)out + i, _mm512_maskz_expand_epi8(word, codes));
        next += _mm_popcnt_u64(word);
    }
    return next - at;
}

/* The upper bytes of the next 64 values, of which the first is number `at`. */
FORCED __m512i upper_bytes(__m512i packed, int64_t at, __m512i books) {
    return _mm512_permutexvar_epi8(codes_of_4(packed, at, upper_shifts), books);
}

/* Even columns of 64, and odd ones: bytes of both go to the 16-bit lane that one of them is in. */
FORCED __m512i even_columns(__m512i lower, __m512i upper) {
    const __m512i bytes = _mm512_set1_epi16(0xff);
    return _mm512_ternarylogic_epi32(bytes, lower, _mm512_slli_epi16(upper, 8), 0xca);
}

FORCED __m512i odd_columns(__m512i lower, __m512i upper) {
    const __m512i bytes = _mm512_set1_epi16(0xff);
    return _mm512_ternarylogic_epi32(bytes, _mm512_srli_epi16(lower, 8), upper, 0xca);
}

FORCED __m512i four_books(const uint8_t *book) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)book));
}

FORCED int64_t expand_12(const uint8_t *mask, const uint8_t *lower, const uint8_t *codes,
                         int64_t at, int64_t n, const uint8_t *book, void *out) {
    const __m512i books = four_books(book);
    int64_t next = at;
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t word = mask_word(mask, i);
        const uint8_t *from = lower + (next - at), *code = codes + (next >> 1);
        _mm_prefetch((const char *)from + AHEAD_BYTES, _MM_HINT_T0);
        _mm_prefetch((const char *)code + AHEAD_BYTES / 2, _MM_HINT_T0);
        __m512i upper = upper_bytes(_mm512_loadu_si512(code), next, books);
        store_joined(_mm512_maskz_expand_epi8(word, _mm512_loadu_si512(from)),
                     _mm512_maskz_expand_epi8(word, upper), (uint16_t *)out + i);
        next += _mm_popcnt_u64(word);
    }
    return next - at;
}

FORCED void widen_float16(const void *numbers, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(
                                      (const __m256i *)((const uint16_t *)numbers + i))));
    for (; i < n; i++) out[i] = has_from_float16(((const uint16_t *)numbers)[i]);
}

FORCED void add_floats(const float *a, const float *x, int64_t n, float *sums) {
    __m512 first = _mm512_loadu_ps(sums), second = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 32) {
        first = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(x + i), first);
        second = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16), _mm512_loadu_ps(x + i + 16), second);
    }
    _mm512_storeu_ps(sums, _mm512_add_ps(first, second));
}

FORCED void add_bfloat16(const uint16_t *a, const uint16_t *x, int64_t n, float *sums) {
    __m512 first = _mm512_loadu_ps(sums), second = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 64) {
        first = _mm512_dpbf16_ps(first, (__m512bh)_mm512_loadu_si512(a + i),
                                 (__m512bh)_mm512_loadu_si512(x + i));
        second = _mm512_dpbf16_ps(second, (__m512bh)_mm512_loadu_si512(a + i + 32),
                                  (__m512bh)_mm512_loadu_si512(x + i + 32));
    }
    _mm512_storeu_ps(sums, _mm512_add_ps(first, second));
}

FORCED int64_t add_12(const uint8_t *mask, const uint8_t *lower, const uint8_t *codes, int64_t at,
                      int64_t n, const uint8_t *book, const uint16_t *x, float *sums) {
    const __m512i books = four_books(book);
    __m512 first = _mm512_loadu_ps(sums), second = _mm512_setzero_ps();
    int64_t next = at;
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t word = mask_word(mask, i);
        const uint8_t *from = lower + (next - at), *code = codes + (next >> 1);
        _mm_prefetch((const char *)from + AHEAD_BYTES, _MM_HINT_T0);
        _mm_prefetch((const char *)code + AHEAD_BYTES / 2, _MM_HINT_T0);
        __m512i upper = upper_bytes(_mm512_loadu_si512(code), next, books);
        __m512i low = _mm512_maskz_expand_epi8(word, _mm512_loadu_si512(from));
        upper = _mm512_maskz_expand_epi8(word, upper);
        first = _mm512_dpbf16_ps(first, (__m512bh)even_columns(low, upper),
                                 (__m512bh)_mm512_loadu_si512(x + i));
        second = _mm512_dpbf16_ps(second, (__m512bh)odd_columns(low, upper),
                                  (__m512bh)_mm512_loadu_si512(x + i + 32));
        next += _mm_popcnt_u64(word);
    }
    _mm512_storeu_ps(sums, _mm512_add_ps(first, second));
    return next - at;
}

/* Sums of products of the upper and the lower bytes of x, which have a sign, with 128 + a code of the
 * weight, which has none: so the processor multiplies bytes. They begin with what takes the products
 * of 128 away again. */
typedef struct {
    __m512i upper, lower;
} split_sums;

FORCED split_sums begin_split(const int32_t *corrections) {
    return (split_sums){_mm512_setzero_si512(), _mm512_load_si512(corrections)};
}

FORCED split_sums add_bytes(split_sums sums, __m512i weight, const int8_t *x) {
    sums.upper = _mm512_dpbusd_epi32(sums.upper, weight, _mm512_load_si512(x));
    sums.lower = _mm512_dpbusd_epi32(sums.lower, weight, _mm512_load_si512(x + 64));
    return sums;
}

FORCED __m512 end_split(split_sums of, __m512 factor, __m512 sums) {
    __m512i total = _mm512_add_epi32(_mm512_slli_epi32(of.upper, 8), of.lower);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), factor, sums);
}

FORCED void add_codes(const int8_t *codes, const int8_t *x, const int32_t *corrections, int64_t n,
                      float factor, float *sums) {
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    split_sums of = begin_split(corrections);
    for (int64_t i = 0; i < n; i += 64)
        of = add_bytes(of, _mm512_xor_si512(_mm512_loadu_si512(codes + i), sign), x + 2 * i);
    _mm512_storeu_ps(sums, end_split(of, _mm512_set1_ps(factor), _mm512_loadu_ps(sums)));
}

FORCED int64_t expand_and_add_codes(const uint8_t *mask, const uint8_t *values, int64_t at,
                                    int64_t n, int bits, const int8_t *x, int64_t segment,
                                    const int32_t *corrections, const float *factors,
                                    float *sums) {
    const __m512i sign = _mm512_set1_epi8((char)0x80), upper = _mm512_set1_epi8((char)0xf0);
    __m512 total = _mm512_loadu_ps(sums);
    int64_t next = at;
    for (int64_t first = 0; first < n; first += segment, factors++) {
        int64_t end = first + segment < n ? first + segment : n;
        split_sums of = begin_split(corrections);
        __builtin_prefetch(mask + first / 8 + 512, 0, 3);
        for (int64_t i = first; i < end; i += 64) {
            uint64_t word = mask_word(mask, i);
            const uint8_t *from = values + (bits == 8 ? next : next >> 1);
            _mm_prefetch((const char *)from + AHEAD_BYTES, _MM_HINT_T0);
            __m512i codes = _mm512_loadu_si512(from);
            if (bits == 4) /* (codes & upper) ^ sign */
                codes = _mm512_ternarylogic_epi32(codes_of_4(codes, next, value_shifts), upper,
                                                  sign, 0x6a);
            else
                codes = _mm512_xor_si512(codes, sign);
            of = add_bytes(of, _mm512_mask_expand_epi8(sign, word, codes), x + 2 * i);
            next += _mm_popcnt_u64(word);
        }
        total = end_split(of, _mm512_set1_ps(*factors), total);
        corrections += HAS_SPARSE_LANES;
    }
    _mm512_storeu_ps(sums, total);
    return next - at;
}

#include "sparse_body.h"

#if HAS_BUILDS_AMX
#include "sparse_amx.h"
#endif

#endif
