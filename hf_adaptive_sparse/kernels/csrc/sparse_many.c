/* Entry points for products of many tokens with a sparse weight, where a variant has them. */
#include <stdatomic.h>

#include "sparse.h"
#include "threads.h"

enum { MOST_ROWS = 128, MOST_THREADS = 256, TILE_BYTES = 1024, TILE_ROWS = 16, ALIGNMENT = 64 };

/* Rows of a task: as few as give every thread two, since the last ones wait for each other, but no
 * fewer than the matrix unit takes at a time. */
static has_sparse_many divide(const has_sparse_call *call) {
    has_sparse_many many = {
        .steps = (call->columns + 31) / 32,
        .tiles = (call->tokens + TILE_ROWS - 1) / TILE_ROWS,
        .threads = call->threads < 1              ? 1
                   : call->threads > MOST_THREADS ? MOST_THREADS
                                                  : call->threads,
    };
    many.rows = (call->rows / (2 * many.threads) + 31) / 32 * 32;
    if (many.rows > MOST_ROWS) many.rows = MOST_ROWS;
    if (many.rows < 32) many.rows = 32;
    int64_t tasks = (call->rows + many.rows - 1) / many.rows;
    if (many.threads > tasks && tasks > 0) many.threads = tasks;
    many.row_bytes = many.steps * 64 + 64; /* rows a power of two apart would share cache lines */
    many.weight_bytes = many.rows * many.row_bytes;
    many.thread_bytes =
        many.weight_bytes + (many.tiles + 1) / 2 * 2 * (many.rows / TILE_ROWS) * TILE_BYTES;
    return many;
}

/* Bytes of memory that has_sparse_many_linear takes; 0 where it does not take the call. */
HAS_EXPORT int64_t has_sparse_many_bytes(int variant, const has_sparse_call *call) {
    const has_sparse_variant *v = has_sparse_variant_of(variant);
    if (v == NULL || v->pack == NULL || has_sparse_bad_sizes(call) ||
        call->dtype != HAS_BFLOAT16 || call->tokens < 1)
        return 0;
    has_sparse_many many = divide(call);
    return many.tiles * many.steps * TILE_BYTES + many.threads * many.thread_bytes + ALIGNMENT;
}

typedef struct {
    const has_sparse_call *call;
    const has_sparse_variant *variant;
    const has_sparse_many *many;
    atomic_uchar is_taken[MOST_THREADS]; /* a thread's part of the memory */
} work;

static int pack_tile(void *argument, int64_t i) {
    const work *w = argument;
    w->variant->pack(w->call, w->many, i);
    return HAS_OK;
}

static int multiply_task(void *argument, int64_t i) {
    work *w = argument;
    int64_t first = i * w->many->rows, last = first + w->many->rows, part = 0;
    while (atomic_exchange(&w->is_taken[part], 1)) part++; /* there are as many as threads */
    int status =
        w->variant->multiply_many(w->call, w->many, w->many->thread + part * w->many->thread_bytes,
                                  first, last < w->call->rows ? last : w->call->rows);
    atomic_store(&w->is_taken[part], 0);
    return status;
}

/* As has_sparse_linear, of any number of tokens, in memory of has_sparse_many_bytes. */
HAS_EXPORT int has_sparse_many_linear(int variant, const has_sparse_call *call, uint8_t *memory) {
    if (has_sparse_many_bytes(variant, call) == 0) return HAS_BAD_ARGUMENT;
    has_sparse_many many = divide(call);
    memory += (ALIGNMENT - (uintptr_t)memory % ALIGNMENT) % ALIGNMENT;
    many.x = (uint32_t *)memory;
    many.thread = memory + many.tiles * many.steps * TILE_BYTES;
    work w = {.call = call, .variant = has_sparse_variant_of(variant), .many = &many};
    int status = has_run(pack_tile, &w, many.tiles, many.threads);
    if (status != HAS_OK) return status;
    return has_run(multiply_task, &w, (call->rows + many.rows - 1) / many.rows, many.threads);
}
