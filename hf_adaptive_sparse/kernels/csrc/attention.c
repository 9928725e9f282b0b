/* Entry points: choice of variant, division into tasks, and joining of partial results. */
#include "attention.h"

#include <math.h>
#include <stdlib.h>

#include "numbers.h"
#include "threads.h"

HAS_EXPORT int64_t has_call_size_bytes(void) { return (int64_t)sizeof(has_attention_call); }

static has_task_function function_of(int variant) {
    if (!has_supports(variant)) return NULL;
    switch (variant) {
#if defined(__x86_64__)
        case HAS_AVX2: return has_task_avx2;
        case HAS_AVX512F: /* Cascade Lake has VNNI, Skylake-X has not */
            return __builtin_cpu_supports("avx512vnni") ? has_task_vnni : has_task_avx2;
        case HAS_AMX: /* which attention has no use for */
        case HAS_AVX512: return has_task_avx512;
#endif
#if defined(__aarch64__)
        case HAS_NEON: return has_task_neon;
#endif
        default: return has_task_portable;
    }
}

typedef struct {
    const has_attention_call *call;
    has_task_function function;
    const has_task *tasks;
} work;

static int run_task(void *shared, int64_t i) {
    const work *w = shared;
    return w->function(w->call, w->tasks + i);
}

/* Join the partial results of one KV head, row by row, into the first of them. */
static void join(const has_attention_call *call, float *partials, int64_t splits, int64_t head) {
    int64_t rows = call->repeats * call->queries, width = call->value_dim + 2;
    for (int64_t row = 0; row < rows; row++) {
        float *first = partials + row * width, maximum = -INFINITY, total = 0.0f;
        for (int64_t s = 0; s < splits; s++) {
            float m = first[s * rows * width];
            maximum = m > maximum ? m : maximum;
        }
        for (int64_t s = 0; s < splits; s++) {
            float *part = first + s * rows * width;
            /* A split that saw no token has sums of 0. */
            float factor = part[0] == -INFINITY ? 1.0f : expf(part[0] - maximum);
            total += part[1] * factor;
            for (int64_t c = 2; c < width; c++)
                first[c] = s == 0 ? part[c] * factor : first[c] + part[c] * factor;
        }
        float factor = total == 0.0f ? 0.0f : 1.0f / total;
        int64_t query = row % call->queries;
        int64_t q_head = head % call->kv_heads * call->repeats + row / call->queries;
        int64_t at = head / call->kv_heads * call->output_strides[0] +
                     q_head * call->output_strides[1] + query * call->output_strides[2];
        for (int64_t c = 0; c < call->value_dim; c++)
            has_store_number(call->output, call->dtype, at + c, first[2 + c] * factor);
    }
}

/* Splits of the sequence: enough that every thread has something, none below eight blocks. */
static int64_t count_splits(const has_attention_call *call, int64_t blocks) {
    int64_t heads = call->batch * call->kv_heads, splits = 1;
    if (call->threads > 1 && heads % call->threads != 0 && heads < 4 * call->threads)
        splits = (4 * call->threads + heads - 1) / heads;
    if (splits > blocks / 8) splits = blocks / 8;
    return splits < 1 ? 1 : splits;
}

static int64_t tokens_before(const has_attention_call *call, int64_t block) {
    int64_t tokens = call->sinks.length;
    if (call->block_lengths == NULL) return tokens + block * call->block_length;
    for (int64_t i = 0; i < block; i++) tokens += call->block_lengths[i];
    return tokens;
}

HAS_EXPORT int has_attend(int variant, const has_attention_call *call) {
    work w = {.call = call, .function = function_of(variant)};
    if (w.function == NULL) return HAS_BAD_VARIANT;
    if (call->block_length < 1 || call->block_length > HAS_MAX_CODES || call->key_dim < 1 ||
        call->key_dim > HAS_MAX_CODES || call->value_dim < 1)
        return HAS_BAD_ARGUMENT;
    int64_t blocks = call->blocks;
    for (int64_t i = 0; call->block_lengths != NULL && i < blocks; i++)
        if (call->block_lengths[i] < 0 || call->block_lengths[i] > call->block_length)
            return HAS_BAD_ARGUMENT;
    int64_t heads = call->batch * call->kv_heads, splits = count_splits(call, blocks);
    int64_t rows = call->repeats * call->queries, width = call->value_dim + 2;
    if (heads == 0 || rows == 0) return HAS_OK;
    int64_t count = heads * splits;
    has_task *tasks = malloc((size_t)count * sizeof *tasks);
    float *partials = NULL;
    if (splits > 1) partials = malloc((size_t)(count * rows * width) * sizeof *partials);
    if (tasks == NULL || (splits > 1 && partials == NULL)) {
        free(tasks);
        free(partials);
        return HAS_NO_MEMORY;
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t head = i / splits, split = i % splits;
        tasks[i] = (has_task){
            .batch = head / call->kv_heads,
            .head = head % call->kv_heads,
            .first_block = blocks * split / splits,
            .last_block = blocks * (split + 1) / splits,
            .first_token = tokens_before(call, blocks * split / splits),
            .has_sinks = split == 0 && call->sinks.length > 0,
            .has_recent = split == splits - 1 && call->recent.length > 0,
            .partial = splits > 1 ? partials + i * rows * width : NULL,
        };
    }
    w.tasks = tasks;
    int status = has_run(run_task, &w, count, call->threads);
    if (splits > 1 && status == HAS_OK)
        for (int64_t head = 0; head < heads; head++)
            join(call, partials + head * splits * rows * width, splits, head);
    free(tasks);
    free(partials);
    return status;
}
