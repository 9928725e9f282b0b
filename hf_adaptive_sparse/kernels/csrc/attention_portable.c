/* Portable C: any processor, any compiler with C11. */
#define TARGET
#define VARIANT(name) name##_portable
#define VECTOR_LIMIT 16256.0f

#include "numbers.h"

static void store_vector(const float *a, int64_t n, float factor, int16_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = (int16_t)(a[i] * factor + (a[i] < 0 ? -0.5f : 0.5f));
}

/* Eight codes are `bits` bytes: one little-endian word, see packing/bits.py. */
static void unpack_row(const uint8_t *row, int bits, int64_t from, int64_t to, int64_t count,
                       uint8_t *codes) {
    const uint64_t mask = (1u << bits) - 1;
    const int64_t row_bytes = (count * bits + 7) / 8;
    for (int64_t j = from; j < to; j += 8) {
        int64_t at = j / 8 * bits, bytes = row_bytes - at < bits ? row_bytes - at : bits;
        uint64_t word = 0;
        for (int64_t b = 0; b < bytes; b++) word |= (uint64_t)row[at + b] << (8 * b);
        for (int k = 0; k < 8; k++) codes[j + k] = (uint8_t)((word >> (k * bits)) & mask);
    }
}

static void rows_dot(const uint8_t *rows, int64_t stride, int64_t n, int bits, int64_t count,
                     int64_t from, int64_t to, const int16_t *vectors, int64_t vector_stride,
                     int64_t nvec, int32_t *out, int64_t out_stride, has_ahead ahead) {
    uint8_t codes[1024 + 8];
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *row = rows + i * stride;
        if (i % 16 == 0) has_prefetch(ahead, i, 16);
        if (bits != 8) unpack_row(row, bits, from, to, count, codes);
        const uint8_t *unpacked = bits == 8 ? row : codes;
        for (int64_t v = 0; v < nvec; v++) {
            const int16_t *vector = vectors + v * vector_stride;
            int32_t sum = 0;
            for (int64_t j = from; j < to; j++) sum += (int32_t)unpacked[j] * vector[j];
            out[v * out_stride + i] = sum;
        }
    }
}

#include "attention_body.h"
