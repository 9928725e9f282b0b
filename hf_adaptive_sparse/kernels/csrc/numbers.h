/* Number formats and elementary functions, written so that compilers vectorise loops over them. */
#ifndef HAS_NUMBERS_H
#define HAS_NUMBERS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "library.h"

#define HAS_INLINE static inline __attribute__((always_inline, unused))

/* The same for what needs the instructions that the including file's TARGET names. */
#define FORCED static TARGET inline __attribute__((always_inline))

HAS_INLINE float has_float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

HAS_INLINE uint32_t has_bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Whole numbers in the order of floats, and back: compilers vectorise their maximum. NaN is above
 * infinity, or below -infinity, by its sign. */
HAS_INLINE int32_t has_order(float value) {
    int32_t bits = (int32_t)has_bits_of_float(value);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

HAS_INLINE float has_of_order(int32_t order) {
    return has_float_of_bits((uint32_t)(order ^ ((order >> 31) & 0x7fffffff)));
}

HAS_INLINE float has_from_bfloat16(uint16_t half) {
    return has_float_of_bits((uint32_t)half << 16);
}

HAS_INLINE float has_from_float16(uint16_t half) {
    /* Shifted into place, the exponent is 112 too small; the product repairs subnormals too. */
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    uint32_t finite = has_bits_of_float(has_float_of_bits(magnitude) * 0x1p112f);
    uint32_t special = magnitude | 0x7f800000u;
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    return has_float_of_bits(((half & 0x7c00) == 0x7c00 ? special : finite) | sign);
}

HAS_INLINE uint16_t has_to_bfloat16(float value) {
    uint32_t bits = has_bits_of_float(value);
    if (value != value) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

HAS_INLINE uint16_t has_to_float16(float value) {
    uint32_t bits = has_bits_of_float(value), sign = (bits >> 16) & 0x8000;
    float magnitude = fabsf(value);
    if (value != value) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 65520.0f) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x1p-14f) /* subnormal: 0.5 has the right unit in the last place */
        return (uint16_t)(sign | (has_bits_of_float(magnitude + 0.5f) - 0x3f000000u));
    bits &= 0x7fffffff;
    return (uint16_t)(sign | ((bits - 0x38000000u + 0xfff + ((bits >> 13) & 1)) >> 13));
}

/* Between a float and the 16 bits of a number of either type. */
HAS_INLINE float has_from_half(uint16_t half, int64_t dtype) {
    return dtype == HAS_BFLOAT16 ? has_from_bfloat16(half) : has_from_float16(half);
}

HAS_INLINE uint16_t has_to_half(float value, int64_t dtype) {
    return dtype == HAS_BFLOAT16 ? has_to_bfloat16(value) : has_to_float16(value);
}

HAS_INLINE float has_number_at(const void *numbers, int64_t dtype, int64_t i) {
    if (dtype == HAS_FLOAT32) return ((const float *)numbers)[i];
    return has_from_half(((const uint16_t *)numbers)[i], dtype);
}

HAS_INLINE void has_store_number(void *numbers, int64_t dtype, int64_t i, float value) {
    if (dtype == HAS_FLOAT32)
        ((float *)numbers)[i] = value;
    else
        ((uint16_t *)numbers)[i] = has_to_half(value, dtype);
}

/* exp(x) for x <= 0, to about 2e-7 of itself; below -87 it is 0, NaN stays NaN. */
HAS_INLINE float has_exp(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    float bounded = x < -87.0f ? -87.0f : x;
    float shifted = bounded * 1.44269504f + magic;
    float whole = shifted - magic;
    float r = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t exponent = (has_bits_of_float(shifted) - 0x4b400000u + 127u) << 23;
    float result = p * has_float_of_bits(exponent & 0x7f800000u);
    return x < -87.0f ? 0.0f : result;
}

/* What the next pass will read. Hardware prefetchers stop at page ends, and rows are short. */
typedef struct {
    const uint8_t *at;
    int64_t bytes, share; /* share: of 8 rows, see has_shared */
} has_ahead;

/* Spread over n rows. Once for all of them: processors take up to a hundred cycles for a division. */
HAS_INLINE has_ahead has_shared(has_ahead ahead, int64_t n) {
    uint32_t share = n > 0 ? (uint32_t)(ahead.bytes * 8) / (uint32_t)n : 0;
    ahead.share = ((int64_t)share / 64 + 1) * 64; /* more than the share: none is left out */
    return ahead;
}

/* Prefetch the share of rows i to i + rows, both multiples of 8. */
HAS_INLINE void has_prefetch(has_ahead ahead, int64_t i, int64_t rows) {
    int64_t from = i / 8 * ahead.share, to = from + rows / 8 * ahead.share;
    if (to > ahead.bytes) to = ahead.bytes;
    for (int64_t at = from; at < to; at += 64) __builtin_prefetch(ahead.at + at, 0, 3);
}

#endif
