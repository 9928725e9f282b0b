/* Lower and upper bytes of 64 values side by side, in AVX-512 BW. Included where FORCED functions
 * may use it. */
#include <immintrin.h>

FORCED void store_joined(__m512i lower, __m512i upper, void *out) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    __m512i even = _mm512_unpacklo_epi8(lower, upper), odd = _mm512_unpackhi_epi8(lower, upper);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(even, first, odd));
    _mm512_storeu_si512((uint8_t *)out + 64, _mm512_permutex2var_epi64(even, second, odd));
}
