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
        case HAS_AVX512F:
        case HAS_AMX: /* rounding has no use for what these differ in */
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

typedef struct {
    int64_t batch, head, block;
} place;

/* Of task i: the heads of a block follow each other, as a token's do in the states of a model. */
static place place_of(const has_encode_call *call, int64_t i) {
    return (place){i / call->heads / call->blocks, i % call->heads, i / call->heads % call->blocks};
}

/* First token of the states that are encoded at a place. */
static uint8_t *source(const has_encode_call *call, place at) {
    const int64_t *strides = call->state_strides;
    int64_t element = at.batch * strides[0] + at.head * strides[1] + at.block * strides[2];
    return (uint8_t *)call->states + element * has_element_bytes(call);
}

/* Where the states that are decoded at a place go, and how many tokens of them. */
static uint8_t *target(const has_encode_call *call, place at, int64_t *tokens) {
    const int64_t *strides = call->state_strides, *lengths = call->lengths;
    int64_t first = at.block * call->tokens;
    *tokens = call->tokens;
    if (lengths != NULL) {
        first = 0;
        for (int64_t b = 0; b < at.block; b++) first += lengths[b];
        *tokens = lengths[at.block];
    }
    int64_t element = at.batch * strides[0] + at.head * strides[1] + first * strides[3];
    return (uint8_t *)call->states + element * has_element_bytes(call);
}

static int run_task(void *shared, int64_t i) {
    const work *w = shared;
    const has_encode_call *call = w->call;
    place at = place_of(call, i);
    const int64_t *cs = call->code_strides;
    has_encode_task task = {.tokens = call->tokens};
    if (w->decodes) {
        task.states = target(call, at, &task.tokens);
    } else {
        int64_t next = i + call->threads; /* threads take tasks in turn, more or less */
        task.states = source(call, at);
        if (next < call->batch * call->heads * call->blocks)
            task.next = source(call, place_of(call, next));
    }
    task.codes = (uint8_t *)call->codes + at.batch * cs[0] + at.head * cs[1] + at.block * cs[2];
    for (int m = 0; m < 3; m++) {
        const int64_t *ms = call->metadata_strides[m];
        if (call->metadata[m] != NULL)
            task.metadata[m] =
                (uint8_t *)call->metadata[m] +
                (at.batch * ms[0] + at.head * ms[1] + at.block * ms[2]) * metadata_bytes(call, m);
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
