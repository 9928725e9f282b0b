/* x86-64 with AVX-512 VBMI and VNNI (Ice Lake, Zen 4 and later).
 *
 * 64 codes at a time: one byte permute brings the bytes of eight codes into each 64-bit lane, one
 * multishift gives every code a byte, one `and` cuts it out. */
#if defined(__x86_64__) || defined(_M_X64)

#define TARGET                                                                                  \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,"  \
                          "bmi2,f16c" HAS_WIDE_VECTORS)))
#define VARIANT(name) name##_avx512

#include <immintrin.h>
#include "numbers.h"

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

FORCED __m512i unpack(const uint8_t *at, __mmask64 valid, int bits, unpacker u) {
    __m512i packed = _mm512_maskz_loadu_epi8(valid, at);
    if (bits == 8) return packed;
    __m512i lanes = _mm512_permutexvar_epi8(u.bytes, packed);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(u.shifts, lanes), u.mask);
}

#include "attention_bytes.h"

#endif
