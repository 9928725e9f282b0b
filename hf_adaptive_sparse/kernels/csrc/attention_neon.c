/* AArch64 with NEON, which every such processor has.
 *
 * 16 codes at a time, the reverse of packing/bits.py: a table look-up brings the bytes of
 * eight codes into each 64-bit lane, three rounds of masks and shifts spread them to a byte each;
 * they are widened to 16 bits and multiplied with the vector's int16. */
#if defined(__aarch64__)

#define TARGET
#define VARIANT(name) name##_neon
#define VECTOR_LIMIT 16256.0f

#include <arm_neon.h>

#include "numbers.h"

static void store_vector(const float *a, int64_t n, float factor, int16_t *out) {
    for (int64_t i = 0; i < n; i += 8) {
        int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(a + i), factor));
        int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(a + i + 4), factor));
        vst1q_s16(out + i, vcombine_s16(vmovn_s32(low), vmovn_s32(high)));
    }
}

/* One round: in each lane of 2 * lane bits, move the upper of two fields of `used` bits up. */
HAS_INLINE uint64x2_t spread(uint64x2_t x, int lane, int used) {
    uint64_t low = 0;
    for (int start = 0; start < 64; start += 2 * lane) low |= ((1ull << used) - 1) << start;
    uint64x2_t kept = vandq_u64(x, vdupq_n_u64(low));
    uint64x2_t moved = vandq_u64(x, vdupq_n_u64(low << used));
    return vorrq_u64(kept, vshlq_u64(moved, vdupq_n_s64(lane - used)));
}

/* 16 codes from the 16 bytes at `at`, of which the first 2 * bits count. */
HAS_INLINE uint8x16_t unpack(const uint8_t *at, int bits) {
    if (bits == 8) return vld1q_u8(at);
    uint8_t order[16]; /* an index out of range gives 0 */
    for (int i = 0; i < 16; i++)
        order[i] = (uint8_t)(i % 8 < bits ? i / 8 * bits + i % 8 : 0x80);
    uint64x2_t x = vreinterpretq_u64_u8(vqtbl1q_u8(vld1q_u8(at), vld1q_u8(order)));
    x = spread(x, 32, 4 * bits);
    x = spread(x, 16, 2 * bits);
    return vreinterpretq_u8_u64(spread(x, 8, bits));
}

HAS_INLINE int32x4_t multiply_add(int32x4_t sum, uint8x16_t codes, const int16_t *vector) {
    int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes)));
    int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(codes));
    int16x8_t a = vld1q_s16(vector), b = vld1q_s16(vector + 8);
    sum = vmlal_s16(sum, vget_low_s16(low), vget_low_s16(a));
    sum = vmlal_high_s16(sum, low, a);
    sum = vmlal_s16(sum, vget_low_s16(high), vget_low_s16(b));
    return vmlal_high_s16(sum, high, b);
}

HAS_INLINE void rows_dot_bits(const uint8_t *rows, int64_t stride, int64_t n, int bits,
                              int64_t row_bytes, int64_t chunks, const int16_t *vectors,
                              int64_t vector_stride, int64_t nvec, int32_t *out,
                              int64_t out_stride, has_ahead ahead) {
    uint8_t copy[HAS_MAX_CODES + 32];
    uint8x16_t codes[HAS_MAX_CODES / 16];
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *row = rows + i * stride;
        if (i % 16 == 0) has_prefetch(ahead, i, 16);
        /* A row is read up to 32 bytes past its end, which is in the next rows but for the last. */
        if ((n - 1 - i) * stride < 32) {
            memcpy(copy, row, (size_t)row_bytes);
            row = copy;
        }
        if (nvec == 1) {
            int32x4_t sum = vdupq_n_s32(0);
            for (int64_t chunk = 0; chunk < chunks; chunk++)
                sum = multiply_add(sum, unpack(row + chunk * 2 * bits, bits),
                                   vectors + chunk * 16);
            out[i] = vaddvq_s32(sum);
            continue;
        }
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            codes[chunk] = unpack(row + chunk * 2 * bits, bits);
        for (int64_t v = 0; v < nvec; v++) {
            int32x4_t sum = vdupq_n_s32(0);
            for (int64_t chunk = 0; chunk < chunks; chunk++)
                sum = multiply_add(sum, codes[chunk], vectors + v * vector_stride + chunk * 16);
            out[v * out_stride + i] = vaddvq_s32(sum);
        }
    }
}

static void rows_dot(const uint8_t *rows, int64_t stride, int64_t n, int bits, int64_t count,
                     int64_t from, int64_t to, const int16_t *vectors, int64_t vector_stride,
                     int64_t nvec, int32_t *out, int64_t out_stride, has_ahead ahead) {
    int64_t skipped = from / 8 * bits, chunks = (to - from + 15) / 16;
    int64_t row_bytes = (count * bits + 7) / 8 - skipped;
#define ROWS_DOT(bits)                                                                          \
    rows_dot_bits(rows + skipped, stride, n, bits, row_bytes, chunks, vectors + from,           \
                  vector_stride, nvec, out, out_stride, ahead)
    switch (bits) {
        case 2: ROWS_DOT(2); break;
        case 3: ROWS_DOT(3); break;
        case 4: ROWS_DOT(4); break;
        case 6: ROWS_DOT(6); break;
        default: ROWS_DOT(8); break;
    }
#undef ROWS_DOT
}

#include "attention_body.h"

#endif
