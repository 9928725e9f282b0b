/* Attention of a few queries over a packed KV cache: the plain C interface and what all variants
 * share. The storage format is described in packed.py, the mathematics in attention_body.h. */
#ifndef HAS_ATTENTION_H
#define HAS_ATTENTION_H

#include "library.h"

enum { HAS_BOOL = 3, HAS_NO_MASK = -1 }; /* dtypes that a mask may have besides */
enum { HAS_KEYS_BY_CHANNEL = 0, HAS_KEYS_BY_TOKEN = 1 };
enum { HAS_MAX_ROWS = 16 }; /* of queries, per pass */

/* Keys and values in the model's dtype: the sinks at the start, or the unpacked tokens at the end.
 * Strides in elements: batch, head, token. Channels lie next to each other. */
typedef struct {
    int64_t length;
    const void *keys;
    const void *values;
    int64_t key_strides[3];
    int64_t value_strides[3];
} has_segment;

/* Mirrored field by field in attention.py. Strides of uint8 tensors are bytes, others elements. */
typedef struct {
    int64_t batch, kv_heads, repeats, queries, key_dim, value_dim;
    int64_t dtype; /* of query, output and segments */
    const void *query;
    int64_t query_strides[3]; /* batch, head, query */
    void *output;
    int64_t output_strides[3];
    const void *mask;
    int64_t mask_dtype;
    int64_t mask_strides[4]; /* batch, head, query, token; 0 where broadcast */
    int64_t causal;          /* query i sees tokens 0..i, as torch's is_causal */
    has_segment sinks, recent;
    int64_t skip;                 /* oldest tokens that are not seen; positions count from there */
    int64_t blocks, block_length; /* tokens of a block */
    const int64_t *block_lengths; /* NULL: all full; else what each block holds, from its start */
    int64_t key_bits, key_mode, key_group, key_meta_dtype;
    const void *key_codes;
    int64_t key_codes_strides[4]; /* batch, head, block, token */
    const void *key_steps;        /* by channel: [block][key_dim]; by token: [block][token][group] */
    const void *key_minima;
    int64_t key_meta_strides[4]; /* batch, head, block, token (by channel: unused) */
    int64_t value_bits, value_group, value_scale_dtype;
    const void *value_codes;
    int64_t value_codes_strides[4]; /* batch, head, block, channel */
    const void *value_step_codes;   /* [block][group][token], 8 bits each */
    const void *value_minimum_codes;
    int64_t value_meta_strides[4]; /* batch, head, block, group */
    const void *value_scales; /* [block][4]: step base, step unit, minimum base, minimum unit */
    int64_t value_scale_strides[3]; /* batch, head, block */
    double scale;
    int64_t threads;
} has_attention_call;

/* One unit of parallel work: a KV head of a sequence, and a range of its blocks. */
typedef struct {
    int64_t batch, head;
    int64_t first_block, last_block; /* half open */
    int64_t first_token;             /* tokens before first_block, sinks included */
    int has_sinks, has_recent;
    float *partial; /* NULL: write the output; else per row: maximum, sum, value_dim sums */
} has_task;

typedef int (*has_task_function)(const has_attention_call *call, const has_task *task);

/* Each returns HAS_OK or HAS_NO_MEMORY. */
int has_task_portable(const has_attention_call *call, const has_task *task);
int has_task_avx2(const has_attention_call *call, const has_task *task);
int has_task_avx512(const has_attention_call *call, const has_task *task);
int has_task_vnni(const has_attention_call *call, const has_task *task);
int has_task_neon(const has_attention_call *call, const has_task *task);

#endif
