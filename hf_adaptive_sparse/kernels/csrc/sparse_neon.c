/* AArch64: a table look-up puts the next values into the eight columns of each byte of the mask. */
#if defined(__aarch64__)

#define TARGET
#define VARIANT(name) name##_neon
#define TAKES_BFLOAT16 0
#define ROUNDS 1
#define FOURS 1
#define FUSES 0
#define IN_REGISTERS 0

#include <arm_neon.h>

#include "numbers.h"
#include "sparse.h"

enum { AHEAD_BYTES = 1024 };

HAS_INLINE int64_t expand_32(const uint8_t *mask, const uint32_t *values, int64_t at, int64_t n,
                             void *out) {
    const uint32_t *next = values + at;
    for (int64_t i = 0; i < n; i += 4) {
        int kept = mask[i / 8] >> (i % 8) & 15;
        if (i % 16 == 0) __builtin_prefetch((const char *)next + AHEAD_BYTES, 0, 3);
        uint8x16_t order = vld1q_u8(has_expand_fours[kept]);
        uint8x16_t row = vqtbl1q_u8(vld1q_u8((const uint8_t *)next), order);
        vst1q_u32((uint32_t *)out + i, vreinterpretq_u32_u8(row));
        next += __builtin_popcount((unsigned)kept);
    }
    return next - values - at;
}

HAS_INLINE int64_t expand_16(const uint8_t *mask, const uint16_t *values, int64_t at, int64_t n,
                             void *out) {
    const uint16_t *next = values + at;
    for (int64_t i = 0; i < n; i += 8) {
        int kept = mask[i / 8];
        if (i % 32 == 0) __builtin_prefetch((const char *)next + AHEAD_BYTES, 0, 3);
        uint8x16_t order = vld1q_u8(has_expand_pairs[kept]);
        uint8x16_t row = vqtbl1q_u8(vld1q_u8((const uint8_t *)next), order);
        vst1q_u16((uint16_t *)out + i, vreinterpretq_u16_u8(row));
        next += __builtin_popcount((unsigned)kept);
    }
    return next - values - at;
}

HAS_INLINE int64_t expand_8(const uint8_t *mask, const int8_t *values, int64_t at, int64_t n,
                            void *out) {
    const int8_t *next = values + at;
    for (int64_t i = 0; i < n; i += 8) {
        int kept = mask[i / 8];
        if (i % 64 == 0) __builtin_prefetch((const char *)next + AHEAD_BYTES, 0, 3);
        vst1_s8((int8_t *)out + i, vtbl1_s8(vld1_s8(next), vld1_s8((const int8_t *)
                                                                   has_expand_bytes[kept])));
        next += __builtin_popcount((unsigned)kept);
    }
    return next - values - at;
}

HAS_INLINE int64_t expand_4(const uint8_t *mask, const uint8_t *values, int64_t at, int64_t n,
                            void *out) {
    int8_t codes[HAS_SPARSE_BLOCK + 64];
    const uint8_t *from = values + at / 2;
    int64_t count = at % 2;
    for (int64_t i = 0; i < n; i += 8) count += __builtin_popcount(mask[i / 8]);
    for (int64_t i = 0; i < count; i += 32) {
        uint8x16_t packed = vld1q_u8(from + i / 2);
        /* The lower half comes to the top, and back with its sign. */
        int8x16x2_t both = {{vshrq_n_s8(vreinterpretq_s8_u8(vshlq_n_u8(packed, 4)), 4),
                             vshrq_n_s8(vreinterpretq_s8_u8(packed), 4)}};
        vst2q_s8(codes + i, both);
    }
    return expand_8(mask, codes, at % 2, n, out);
}

HAS_INLINE int64_t expand_12(const uint8_t *mask, const uint8_t *lower, const uint8_t *codes,
                             int64_t at, int64_t n, const uint8_t *book, void *out) {
    int8_t lower_bytes[HAS_SPARSE_BLOCK], of[HAS_SPARSE_BLOCK];
    const uint8x16_t uppers = vld1q_u8(book), low = vdupq_n_u8(15);
    int64_t taken = expand_8(mask, (const int8_t *)lower, 0, n, lower_bytes);
    expand_4(mask, codes, at, n, of);
    for (int64_t i = 0; i < n; i += 16) {
        uint8x16_t code = vandq_u8(vreinterpretq_u8_s8(vld1q_s8(of + i)), low);
        uint8x16x2_t both = {{vreinterpretq_u8_s8(vld1q_s8(lower_bytes + i)),
                              vqtbl1q_u8(uppers, code)}};
        vst2q_u8((uint8_t *)out + 2 * i, both);
    }
    return taken;
}

HAS_INLINE void widen_float16(const void *numbers, int64_t n, float *out) {
    const uint16_t *halves = numbers;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + i))));
    for (; i < n; i++) out[i] = has_from_float16(halves[i]);
}

HAS_INLINE void add_floats(const float *a, const float *x, int64_t n, float *sums) {
    float32x4_t parts[4];
    for (int part = 0; part < 4; part++) parts[part] = vld1q_f32(sums + 4 * part);
    for (int64_t i = 0; i < n; i += 16)
        for (int part = 0; part < 4; part++)
            parts[part] =
                vfmaq_f32(parts[part], vld1q_f32(a + i + 4 * part), vld1q_f32(x + i + 4 * part));
    for (int part = 0; part < 4; part++) vst1q_f32(sums + 4 * part, parts[part]);
}

HAS_INLINE void add_codes(const int8_t *codes, const int16_t *x, int64_t n, float factor,
                          float *sums) {
    int32x4_t first = vdupq_n_s32(0), second = first;
    for (int64_t i = 0; i < n; i += 16) {
        int8x16_t row = vld1q_s8(codes + i);
        int16x8_t low = vmovl_s8(vget_low_s8(row)), high = vmovl_high_s8(row);
        int16x8_t a = vld1q_s16(x + i), b = vld1q_s16(x + i + 8);
        first = vmlal_s16(first, vget_low_s16(low), vget_low_s16(a));
        second = vmlal_high_s16(second, low, a);
        first = vmlal_s16(first, vget_low_s16(high), vget_low_s16(b));
        second = vmlal_high_s16(second, high, b);
    }
    float32x4_t total = vcvtq_f32_s32(vaddq_s32(first, second));
    vst1q_f32(sums, vfmaq_n_f32(vld1q_f32(sums), total, factor));
}

#include "sparse_body.h"

#endif
