/* x86-64 with AVX-512 BW and VNNI, but not VBMI (Cascade Lake, Cooper Lake).
 *
 * 64 codes at a time: what 16 of them take is brought into each lane of 128 bits, a byte shuffle and a
 * shift bring two into each of 16 bits, and the second is moved to the upper byte. */
#if defined(__x86_64__) || defined(_M_X64)

#define TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi2,f16c")))
#define VARIANT(name) name##_vnni

#include <immintrin.h>

#include "numbers.h"

/* Where codes are: of each lane of 128 bits, the words with its 16 codes, the two bytes that each pair
 * of codes is in, and how many bits it begins above the first of them. */
typedef struct {
    uint32_t words[16];
    uint8_t bytes[64];
    uint16_t shifts[32];
} placement;

#define FOUR(...) __VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__
#define FROM(word) word, word + 1, word + 2, word + 3
static const placement of_6_bits = {
    {FROM(0), FROM(3), FROM(6), FROM(9)},
    {FOUR(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11)},
    {FOUR(0, 4, 0, 4, 0, 4, 0, 4)}};
#define OF_3_BITS(byte) /* of a lane that begins with this byte of its first word */                \
    byte, byte + 1, byte, byte + 1, byte + 1, byte + 2, byte + 2, byte + 3, byte + 3, byte + 4,     \
        byte + 3, byte + 4, byte + 4, byte + 5, byte + 5, byte + 6
static const placement of_3_bits = {
    {FROM(0), FROM(1), FROM(3), FROM(4)},
    {OF_3_BITS(0), OF_3_BITS(2), OF_3_BITS(0), OF_3_BITS(2)},
    {FOUR(0, 6, 4, 2, 0, 6, 4, 2)}};
static const placement of_2_bits = {
    {FROM(0), FROM(1), FROM(2), FROM(3)},
    {FOUR(0, 1, 0, 1, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4, 3, 4)},
    {FOUR(0, 4, 0, 4, 0, 4, 0, 4)}};

typedef struct {
    __m512i words, bytes, shifts, mask;
} unpacker;

static TARGET inline unpacker make_unpacker(int bits) {
    const placement *p = bits == 6 ? &of_6_bits : bits == 3 ? &of_3_bits : &of_2_bits;
    unpacker u = {_mm512_loadu_si512(p->words), _mm512_loadu_si512(p->bytes),
                  _mm512_loadu_si512(p->shifts), _mm512_set1_epi8((char)((1 << bits) - 1))};
    return u;
}

FORCED __m512i unpack(const uint8_t *at, __mmask64 valid, int bits, unpacker u) {
    __m512i x = _mm512_maskz_loadu_epi8(valid, at);
    if (bits == 8) return x;
    if (bits == 4) {
        x = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(x));
        return _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi16(x, 4)), u.mask);
    }
    x = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(u.words, x), u.bytes);
    x = _mm512_srlv_epi16(x, u.shifts);
    enum { lower_or_upper = 0xca }; /* bits of the second where the first has ones, else the third */
    x = _mm512_ternarylogic_epi64(_mm512_set1_epi16(0xff), x, _mm512_slli_epi16(x, 8 - bits),
                                  lower_or_upper);
    return _mm512_and_si512(x, u.mask);
}

#include "attention_bytes.h"

#endif
