/* Entry points for sparse weights: choice of variant, preparation of x, division into tasks. */
#define _POSIX_C_SOURCE 200809L
#include "sparse.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"
#include "threads.h"

_Alignas(64) uint8_t has_expand_fours[16][16], has_expand_pairs[256][16], has_expand_upper[256][16],
    has_expand_bytes[256][8];

static void fill_tables(void) {
    for (int mask = 0; mask < 256; mask++) {
        uint8_t next = 0;
        for (int column = 0; column < 8; column++) {
            int kept = mask >> column & 1;
            has_expand_bytes[mask][column] = kept ? next : 0x80;
            has_expand_pairs[mask][2 * column] = kept ? (uint8_t)(2 * next) : 0x80;
            has_expand_pairs[mask][2 * column + 1] = kept ? (uint8_t)(2 * next + 1) : 0x80;
            has_expand_upper[mask][2 * column] = 0x80;
            has_expand_upper[mask][2 * column + 1] = kept ? next : 0x80;
            for (int byte = 0; byte < 4 && mask < 16 && column < 4; byte++)
                has_expand_fours[mask][4 * column + byte] = kept ? (uint8_t)(4 * next + byte) : 0x80;
            next = (uint8_t)(next + kept);
        }
    }
}

const has_sparse_variant *has_sparse_variant_of(int variant) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fill_tables);
    if (!has_supports(variant)) return NULL;
    switch (variant) {
#if defined(__x86_64__)
#if HAS_BUILDS_AMX
        case HAS_AMX: return &has_sparse_amx;
#endif
        case HAS_AVX512: /* Ice Lake can expand, but has no bfloat16 product. */
            if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16"))
                return &has_sparse_avx512;
            return &has_sparse_avx512f;
        case HAS_AVX512F: return &has_sparse_avx512f;
        case HAS_AVX2: return &has_sparse_avx2;
#endif
#if defined(__aarch64__)
        case HAS_NEON: return &has_sparse_neon;
#endif
        default: return &has_sparse_portable;
    }
}

/* Whether a variant multiplies rows as they are expanded, in registers. */
HAS_EXPORT int has_sparse_in_registers(int variant) {
    const has_sparse_variant *v = has_sparse_variant_of(variant);
    return v != NULL && v->in_registers;
}

HAS_EXPORT int64_t has_sparse_call_size_bytes(void) { return (int64_t)sizeof(has_sparse_call); }

/* Bits of the values that the offsets promise. */
static int64_t promised_bits(const has_sparse_call *call) {
    int64_t values = call->offset_bytes == 4 ? ((const int32_t *)call->row_offsets)[call->rows]
                                             : ((const int64_t *)call->row_offsets)[call->rows];
    return values * call->bits;
}

int has_sparse_bad_sizes(const has_sparse_call *call) {
    int whole = call->bits == 32 ? call->dtype == HAS_FLOAT32
                                 : call->bits == 16 && (call->dtype == HAS_BFLOAT16 ||
                                                        call->dtype == HAS_FLOAT16);
    int by_book = call->bits == 12 && call->dtype == HAS_BFLOAT16 && call->codebook != NULL &&
                  call->exceptions >= 0;
    int codes = (call->bits == 8 || call->bits == 4) && call->dtype >= HAS_FLOAT32 &&
                call->dtype <= HAS_FLOAT16 && call->group_size >= 0 && call->group_size % 32 == 0;
    return call->rows < 0 || call->columns < 1 || !(whole || by_book || codes) ||
           (call->offset_bytes != 4 && call->offset_bytes != 8) ||
           promised_bits(call) > call->value_bytes * 8; /* others took the parameters' place */
}

/* Columns that share a step of x: 256 at most, so that sums of products fit 32 bits, and a part of
 * every group. */
static int64_t segment_of(int64_t group_size) {
    int64_t segment = 256;
    while (group_size % segment != 0) segment /= 2;
    return segment;
}

typedef struct {
    const has_sparse_call *call;
    const has_sparse_variant *variant;
    const has_sparse_x *x;
    int64_t first, last, step;
} range;

static int multiply_rows(void *argument, int64_t i) {
    const range *r = argument;
    int64_t first = r->first + i * r->step;
    int64_t last = first + r->step < r->last ? first + r->step : r->last;
    return r->x != NULL ? r->variant->multiply(r->call, r->x, first, last)
                        : r->variant->decompress(r->call, first, last);
}

/* Tasks of at least about 64 KB of dense 16-bit weights: threads stay even, and few rows begin
 * without what is ahead of them in the cache. Where rows go together, the first of every task wait
 * for memory, so that tasks are longer. */
static int run(range *r) {
    int64_t rows = r->last - r->first, together = r->x == NULL ? 1 : r->variant->rows;
    r->step = 32768 / r->call->columns + 1;
    int64_t tasks = r->call->threads > 1 ? 4 * r->call->threads : 1;
    if (together > 1 && r->step < rows / tasks) r->step = rows / tasks;
    r->step = (r->step + together - 1) / together * together;
    return has_run(multiply_rows, r, (rows + r->step - 1) / r->step, r->call->threads);
}

typedef struct {
    const uint8_t *bitmask;
    int64_t rows, row_bytes, step, *counts;
} counting;

HAS_INLINE void count_bits(const counting *c, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const uint8_t *mask = c->bitmask + row * c->row_bytes;
        int64_t i = 0, count = 0;
        for (; i + 8 <= c->row_bytes; i += 8) {
            uint64_t word;
            memcpy(&word, mask + i, sizeof word);
            count += __builtin_popcountll(word);
        }
        for (; i < c->row_bytes; i++) count += __builtin_popcount(mask[i]);
        c->counts[row] = count;
    }
}

#if defined(__x86_64__)
__attribute__((target("popcnt"))) static void count_bits_by_popcnt(const counting *c, int64_t first,
                                                                   int64_t last) {
    count_bits(c, first, last);
}
#endif

static int count_rows(void *argument, int64_t i) {
    const counting *c = argument;
    int64_t first = i * c->step, last = first + c->step < c->rows ? first + c->step : c->rows;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("popcnt")) {
        count_bits_by_popcnt(c, first, last);
        return HAS_OK;
    }
#endif
    count_bits(c, first, last);
    return HAS_OK;
}

/* offsets[row] = set bits of all rows before it, for row 0 to rows. */
HAS_EXPORT int has_row_offsets(const uint8_t *bitmask, int64_t rows, int64_t row_bytes,
                               int64_t *offsets, int64_t threads) {
    if (rows < 0 || row_bytes < 0) return HAS_BAD_ARGUMENT;
    counting c = {bitmask, rows, row_bytes, 65536 / (row_bytes + 1) + 1, offsets + 1};
    offsets[0] = 0;
    int status = has_run(count_rows, &c, (rows + c.step - 1) / c.step, threads);
    for (int64_t row = 0; row < rows; row++) offsets[row + 1] += offsets[row];
    return status;
}

/* output[token][row] = sum over columns of x[token][column] * weight[row][column] + bias[row] */
HAS_EXPORT int has_sparse_linear(int variant, const has_sparse_call *call) {
    const has_sparse_variant *v = has_sparse_variant_of(variant);
    if (v == NULL) return HAS_BAD_VARIANT;
    if (has_sparse_bad_sizes(call) || call->tokens < 1 || call->tokens > HAS_SPARSE_TOKENS)
        return HAS_BAD_ARGUMENT;
    int codes = call->bits <= 8;
    int narrow = (codes && v->rounds) || (call->dtype == HAS_BFLOAT16 && v->takes_bfloat16);
    has_sparse_x x = {
        /* A block that ends in the last columns is read to its own end, and 64 columns past it. */
        .stride = (call->columns + HAS_SPARSE_BLOCK + 63) / 64 * 64,
        .segment = codes ? segment_of(call->group_size) : HAS_SPARSE_BLOCK,
    };
    x.segments = (call->columns + x.segment - 1) / x.segment;
    x.group_segments = codes && call->group_size ? call->group_size / x.segment : x.segments;
    x.groups = (x.segments + x.group_segments - 1) / x.group_segments;
    int64_t split = x.segments * ((x.segment + 63) / 64 * 64); /* a segment begins at 64 bytes */
    if (codes && x.stride < split) x.stride = split;
    size_t number_bytes = (size_t)(call->tokens * x.stride) * (narrow ? 2 : 4);
    size_t step_bytes = (size_t)(call->tokens * x.segments) * sizeof(float);
    size_t correction_bytes = codes ? step_bytes * HAS_SPARSE_LANES : 0;
    size_t shuffled_bytes = call->bits == 12 && call->tokens == 1 ? (size_t)x.stride * 2 : 0;
    int is_finite = 1;
    uint8_t *memory = malloc(number_bytes + correction_bytes + shuffled_bytes + step_bytes + 64);
    if (memory == NULL) return HAS_NO_MEMORY;
    x.numbers = memory + (64 - (uintptr_t)memory % 64);
    x.is_finite = &is_finite;
    x.corrections = (int32_t *)((uint8_t *)x.numbers + number_bytes);
    x.shuffled = (uint8_t *)x.corrections + correction_bytes;
    x.steps = (float *)((uint8_t *)x.shuffled + shuffled_bytes);
    v->prepare(call, &x);
    range r = {.call = call, .variant = v, .x = &x, .first = 0, .last = call->rows};
    int status = run(&r);
    free(memory);
    return status;
}

/* Rows first_row to last_row - 1 of the weight in dtype; codes times scales are rounded to it. */
HAS_EXPORT int has_sparse_dense(int variant, const has_sparse_call *call) {
    const has_sparse_variant *v = has_sparse_variant_of(variant);
    if (v == NULL) return HAS_BAD_VARIANT;
    if (has_sparse_bad_sizes(call) || call->first_row < 0 || call->last_row > call->rows)
        return HAS_BAD_ARGUMENT;
    range r = {.call = call, .variant = v, .first = call->first_row, .last = call->last_row};
    return run(&r);
}
