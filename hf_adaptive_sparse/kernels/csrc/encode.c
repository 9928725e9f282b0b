/* Entry points of encoding and decoding: choice of variant, and division into tasks. */
#include "encode.h"

#include <stddef.h>

#include "threads.h"

HAS_EXPORT int64_t has_encode_call_size_bytes(void) { return (int64_t)sizeof(has_encode_call); }

static const has_encode_variant *variant_of(int variant) {
    if (!has_supports(variant)) return NULL;
    switch (variant) {
#if defined(__x86_64__)
        case HAS_AVX2: return &has_encode_avx2;
        case HAS_AMX: /* which rounding has no use for */
        case HAS_AVX512: return &has_encode_avx512;
#endif
#if defined(__aarch64__)
        case HAS_NEON: return &has_encode_neon;
#endif
        default: return &has_encode_portable;
    }
}

typedef struct {
    const has_encode_call *call;
    int (*function)(const has_encode_call *, const has_encode_task *);
    int decodes;
} work;

static int64_t metadata_bytes(const has_encode_call *call, int i) {
    return call->format == HAS_TRANSPOSED && i < 2 ? 1 : 2;
}

/* Task i: the heads of a block follow each other, as a token's do in the states of a model. */
static int run_task(void *shared, int64_t i) {
    const work *w = shared;
    const has_encode_call *call = w->call;
    int64_t head = i % call->heads, block = i / call->heads % call->blocks;
    int64_t batch = i / call->heads / call->blocks, item_bytes = call->dtype == HAS_FLOAT32 ? 4 : 2;
    const int64_t *ss = call->state_strides, *cs = call->code_strides;
    has_encode_task task = {.tokens = call->tokens};
    int64_t at = batch * ss[0] + head * ss[1];
    if (!w->decodes) {
        at += block * ss[2];
    } else if (call->lengths == NULL) {
        at += block * call->tokens * ss[3];
    } else {
        for (int64_t b = 0; b < block; b++) at += call->lengths[b] * ss[3];
        task.tokens = call->lengths[block];
    }
    task.states = (uint8_t *)call->states + at * item_bytes;
    task.codes = (uint8_t *)call->codes + batch * cs[0] + head * cs[1] + block * cs[2];
    for (int m = 0; m < 3; m++) {
        const int64_t *ms = call->metadata_strides[m];
        if (call->metadata[m] != NULL)
            task.metadata[m] =
                (uint8_t *)call->metadata[m] +
                (batch * ms[0] + head * ms[1] + block * ms[2]) * metadata_bytes(call, m);
    }
    return w->function(call, &task);
}

static int run(int variant, const has_encode_call *call, int decodes) {
    const has_encode_variant *chosen = variant_of(variant);
    if (chosen == NULL) return HAS_BAD_VARIANT;
    if (call->tokens < 1 || call->tokens > HAS_MAX_CODES || call->width < 1 ||
        call->width > HAS_MAX_CODES || call->group < 1)
        return HAS_BAD_ARGUMENT;
    work w = {.call = call, .function = decodes ? chosen->decode : chosen->encode,
              .decodes = decodes};
    return has_run(run_task, &w, call->batch * call->heads * call->blocks, call->threads);
}

HAS_EXPORT int has_encode(int variant, const has_encode_call *call) {
    return run(variant, call, 0);
}

HAS_EXPORT int has_decode(int variant, const has_encode_call *call) {
    return run(variant, call, 1);
}
