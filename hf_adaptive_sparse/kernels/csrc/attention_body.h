/* Attention of a few queries over one KV head, included once per variant.
 *
 * The including file defines TARGET (function attributes), VARIANT(name), and
 *
 *   rows_dot(rows, stride, n, bits, count, from, to, vectors, vector_stride, nvec, out, out_stride,
 *            ahead)
 *
 * which for n rows of `count` packed codes and nvec vectors writes out[v][i] = sum over codes j in
 * [from, to) of row_i[j] * vectors[v][j], as exact int32; `from` is a multiple of 64. Vectors are
 * int16 within +-VECTOR_LIMIT, zero from `count` up to the next multiple of 64, and in the layout
 * that store_vector writes. Meanwhile it prefetches `ahead`.
 *
 * Both passes of attention are such products, because step and minimum leave the inner product:
 *
 *   score_t = sum_c (q_c step_c) code_tc + sum_c q_c min_c        keys by channel, per block
 *   score_t = step_t sum_c q_c code_tc + min_t sum_c q_c          keys by token, per group
 *   out_c   = sum_t (p_t step_t) code_ct + sum_t p_t min_t        values by token, per block
 *
 * The vectors are rounded to 14 bits and a sign: an error of at most max|v| / 32,512 per element.
 * The softmax is online over blocks, in float32. */

#include <float.h>
#include <stdlib.h>

#include "attention.h"
#include "numbers.h"

/* Working memory of one task. Lengths are padded to 64 with zeros. */
typedef struct {
    int64_t key_width, value_width, block_width; /* padded */
    float *queries;                              /* [rows][key_width], times the softmax scale */
    float *scores;                               /* [rows][block_width], then probabilities */
    float *steps, *minima;                       /* [max width] */
    float *product;                              /* [max width] */
    int16_t *vectors;                            /* [rows][max width] */
    int64_t vector_width;
    int32_t *sums;   /* [rows][max width] */
    float *output;   /* [rows][value_width] */
    float *maximum;  /* [rows] */
    float *total;    /* [rows] */
    float *vector_scale, *offset; /* [rows] */
    const char *mask_rows[HAS_MAX_ROWS];
    int64_t query_of_row[HAS_MAX_ROWS];
} workspace;

static TARGET inline int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

static TARGET void *workspace_make(workspace *w, const has_attention_call *call) {
    w->key_width = padded(call->key_dim);
    w->value_width = padded(call->value_dim);
    w->block_width = padded(call->block_length > 64 ? call->block_length : 64);
    int64_t width = w->key_width > w->value_width ? w->key_width : w->value_width;
    if (w->block_width > width) width = w->block_width;
    w->vector_width = width;
    const int64_t rows = HAS_MAX_ROWS;
    size_t floats = (size_t)(rows * (w->key_width + w->block_width + w->value_width + width) +
                             3 * width + 4 * rows);
    size_t bytes = floats * sizeof(float) + (size_t)(rows * width) * sizeof(int16_t) + 64;
    char *memory = malloc(bytes);
    if (memory == NULL) return NULL;
    char *at = (char *)(((uintptr_t)memory + 63) / 64 * 64);
    w->queries = (float *)at;
    w->scores = w->queries + rows * w->key_width;
    w->output = w->scores + rows * w->block_width;
    w->sums = (int32_t *)(w->output + rows * w->value_width);
    w->steps = (float *)(w->sums + rows * width);
    w->minima = w->steps + width;
    w->product = w->minima + width;
    w->vectors = (int16_t *)(w->product + width);
    w->maximum = (float *)(w->vectors + rows * width);
    w->total = w->maximum + rows;
    w->vector_scale = w->total + rows;
    w->offset = w->vector_scale + rows;
    return memory;
}

/* Convert n numbers and pad with zeros to a multiple of 64. */
static TARGET void load_floats(const void *source, int64_t dtype, int64_t n, float *out) {
    if (dtype == HAS_FLOAT32) {
        memcpy(out, source, (size_t)n * sizeof(float));
    } else if (dtype == HAS_BFLOAT16) {
        const uint16_t *halves = source;
        for (int64_t i = 0; i < n; i++) out[i] = has_from_bfloat16(halves[i]);
    } else {
        const uint16_t *halves = source;
        for (int64_t i = 0; i < n; i++) out[i] = has_from_float16(halves[i]);
    }
    for (int64_t i = n; i < padded(n); i++) out[i] = 0.0f;
}

static TARGET void store_floats(const float *source, int64_t dtype, int64_t n, void *out) {
    if (dtype == HAS_FLOAT32) {
        memcpy(out, source, (size_t)n * sizeof(float));
    } else if (dtype == HAS_BFLOAT16) {
        for (int64_t i = 0; i < n; i++) ((uint16_t *)out)[i] = has_to_bfloat16(source[i]);
    } else {
        for (int64_t i = 0; i < n; i++) ((uint16_t *)out)[i] = has_to_float16(source[i]);
    }
}

static TARGET inline const void *element(const void *base, int64_t dtype, int64_t index) {
    return (const char *)base + index * (dtype == HAS_FLOAT32 ? 4 : dtype == HAS_BOOL ? 1 : 2);
}

static TARGET inline float load_one(const void *base, int64_t dtype, int64_t index) {
    const void *at = element(base, dtype, index);
    return dtype == HAS_FLOAT32 ? *(const float *)at : has_from_half(*(const uint16_t *)at, dtype);
}

/* Reductions over a multiple of 64 numbers; 16 partial results let compilers vectorise them. */
static TARGET float dot(const float *a, const float *b, int64_t n) {
    float part[16] = {0};
    for (int64_t i = 0; i < n; i += 16)
        for (int j = 0; j < 16; j++) part[j] += a[i + j] * b[i + j];
    for (int width = 8; width > 0; width /= 2)
        for (int j = 0; j < width; j++) part[j] += part[j + width];
    return part[0];
}

static TARGET float sum_of(const float *a, int64_t n) {
    float part[16] = {0};
    for (int64_t i = 0; i < n; i += 16)
        for (int j = 0; j < 16; j++) part[j] += a[i + j];
    for (int width = 8; width > 0; width /= 2)
        for (int j = 0; j < width; j++) part[j] += part[j + width];
    return part[0];
}

/* Round a float vector to int16 within +-VECTOR_LIMIT, or half of that where the sum of products
 * with `codes` codes of `bits` would pass 2^31; the factor that undoes it is returned: NaN where an
 * element is infinite or no number. */
static TARGET float round_vector(const float *a, int64_t n, int64_t codes, int64_t bits,
                                 int16_t *out) {
    const float limit = bits == 8 && codes > 512 ? VECTOR_LIMIT / 2 : VECTOR_LIMIT;
    int32_t most = 0; /* without signs, floats are in the order of their bits */
    for (int64_t i = 0; i < n; i++) {
        int32_t size = (int32_t)(has_bits_of_float(a[i]) & 0x7fffffff);
        most = size > most ? size : most;
    }
    float largest = has_float_of_bits((uint32_t)most);
    if (!(largest <= FLT_MAX) || largest < 1e-30f) {
        memset(out, 0, (size_t)n * sizeof(int16_t));
        return largest < 1e-30f ? 0.0f : NAN;
    }
    store_vector(a, n, limit / largest, out);
    return largest / limit;
}

/* Online softmax: turn the scores of `count` tokens into probabilities relative to the new maximum,
 * and rescale what was summed before. False: no token counts, skip the values. */
static TARGET int softmax_step(workspace *w, int64_t row, int64_t count, int64_t width) {
    float *scores = w->scores + row * w->block_width;
    for (int64_t i = count; i < width; i++) scores[i] = -INFINITY;
    int32_t most = has_order(w->maximum[row]);
    for (int64_t i = 0; i < width; i++) {
        int32_t order = has_order(scores[i]);
        most = order > most ? order : most;
    }
    float maximum = has_of_order(most);
    /* -inf throughout: nothing was seen yet. 0 in its place keeps exp(-inf - maximum) at 0. */
    float base = maximum == -INFINITY ? 0.0f : maximum;
    for (int64_t i = 0; i < width; i++) scores[i] = has_exp(scores[i] - base);
    float block_total = sum_of(scores, width);
    if (maximum > w->maximum[row]) {
        float correction = has_exp(w->maximum[row] - base);
        w->maximum[row] = maximum;
        w->total[row] *= correction;
        float *output = w->output + row * w->value_width;
        for (int64_t c = 0; c < w->value_width; c++) output[c] *= correction;
    }
    w->total[row] += block_total;
    return !(block_total == 0.0f);
}

/* Add the mask of `count` tokens from `token` on to the scores of a row. */
static TARGET void apply_mask(const has_attention_call *call, workspace *w, int64_t row,
                              int64_t token, int64_t count) {
    float *scores = w->scores + row * w->block_width;
    int64_t unseen = call->skip - token;
    if (unseen > 0) {
        if (unseen > count) unseen = count;
        for (int64_t i = 0; i < unseen; i++) scores[i] = -INFINITY;
        scores += unseen;
        token += unseen;
        count -= unseen;
    }
    token -= call->skip;
    int64_t stride = call->mask_strides[3];
    if (call->mask_dtype == HAS_BOOL) {
        const uint8_t *mask = (const uint8_t *)w->mask_rows[row] + token * stride;
        for (int64_t i = 0; i < count; i++)
            scores[i] = mask[i * stride] ? scores[i] : -INFINITY;
    } else if (call->mask_dtype != HAS_NO_MASK) {
        for (int64_t i = 0; i < count; i++)
            scores[i] += load_one(w->mask_rows[row], call->mask_dtype, (token + i) * stride);
    }
    if (call->causal)
        for (int64_t i = 0; i < count; i++)
            if (token + i > w->query_of_row[row]) scores[i] = -INFINITY;
}

/* Tokens in the model's dtype, a block's worth at a time. */
static TARGET void attend_segment(const has_attention_call *call, const has_task *task,
                                  const has_segment *segment, int64_t token, int64_t rows,
                                  workspace *w) {
    const int64_t *ks = segment->key_strides, *vs = segment->value_strides;
    int64_t key_at = task->batch * ks[0] + task->head * ks[1];
    int64_t value_at = task->batch * vs[0] + task->head * vs[1];
    for (int64_t start = 0; start < segment->length; start += w->block_width) {
        int64_t count = segment->length - start;
        if (count > w->block_width) count = w->block_width;
        for (int64_t i = 0; i < count; i++) {
            const void *at = element(segment->keys, call->dtype, key_at + (start + i) * ks[2]);
            load_floats(at, call->dtype, call->key_dim, w->product);
            for (int64_t row = 0; row < rows; row++)
                w->scores[row * w->block_width + i] =
                    dot(w->queries + row * w->key_width, w->product, w->key_width);
        }
        for (int64_t row = 0; row < rows; row++) {
            apply_mask(call, w, row, token + start, count);
            softmax_step(w, row, count, padded(count));
        }
        for (int64_t i = 0; i < count; i++) {
            const void *at = element(segment->values, call->dtype, value_at + (start + i) * vs[2]);
            load_floats(at, call->dtype, call->value_dim, w->product);
            for (int64_t row = 0; row < rows; row++) {
                float p = w->scores[row * w->block_width + i];
                if (p == 0.0f) continue; /* a masked token's NaN stays out */
                float *output = w->output + row * w->value_width;
                for (int64_t c = 0; c < w->value_width; c++) output[c] += p * w->product[c];
            }
        }
    }
}

/* Scores of a block whose keys were quantised per channel. */
static TARGET void scores_by_channel(const has_attention_call *call, const has_task *task,
                                     int64_t block, const uint8_t *codes, int64_t count,
                                     int64_t rows, has_ahead ahead, workspace *w) {
    const int64_t *ms = call->key_meta_strides;
    int64_t at = task->batch * ms[0] + task->head * ms[1] + block * ms[2];
    load_floats(element(call->key_steps, call->key_meta_dtype, at), call->key_meta_dtype,
                call->key_dim, w->steps);
    load_floats(element(call->key_minima, call->key_meta_dtype, at), call->key_meta_dtype,
                call->key_dim, w->minima);
    for (int64_t row = 0; row < rows; row++) {
        const float *query = w->queries + row * w->key_width;
        for (int64_t c = 0; c < w->key_width; c++) w->product[c] = query[c] * w->steps[c];
        w->vector_scale[row] =
            round_vector(w->product, w->key_width, call->key_dim, call->key_bits,
                         w->vectors + row * w->vector_width);
        w->offset[row] = dot(query, w->minima, w->key_width);
    }
    rows_dot(codes, call->key_codes_strides[3], count, (int)call->key_bits, call->key_dim, 0,
             call->key_dim, w->vectors, w->vector_width, rows, w->sums, w->vector_width,
             has_shared(ahead, count));
    for (int64_t row = 0; row < rows; row++) {
        const int32_t *sums = w->sums + row * w->vector_width;
        float *scores = w->scores + row * w->block_width;
        float factor = w->vector_scale[row], offset = w->offset[row];
        for (int64_t i = 0; i < count; i++) scores[i] = factor * (float)sums[i] + offset;
    }
}

/* Scores of a block whose keys were quantised per token, in groups of channels. */
static TARGET void scores_by_token(const has_attention_call *call, const has_task *task,
                                   int64_t block, const uint8_t *codes, int64_t count,
                                   int64_t rows, has_ahead ahead, workspace *w) {
    const int64_t *ms = call->key_meta_strides;
    int64_t at = task->batch * ms[0] + task->head * ms[1] + block * ms[2];
    for (int64_t row = 0; row < rows; row++)
        memset(w->scores + row * w->block_width, 0, (size_t)count * sizeof(float));
    int64_t group = 0;
    for (int64_t from = 0; from < call->key_dim; from += call->key_group, group++) {
        int64_t to = from + call->key_group;
        if (to > call->key_dim) to = call->key_dim;
        for (int64_t row = 0; row < rows; row++) {
            const float *query = w->queries + row * w->key_width;
            for (int64_t c = 0; c < w->key_width; c++)
                w->product[c] = c >= from && c < to ? query[c] : 0.0f;
            w->offset[row] = sum_of(w->product, w->key_width);
            w->vector_scale[row] =
                round_vector(w->product, w->key_width, call->key_dim, call->key_bits,
                             w->vectors + row * w->vector_width);
        }
        rows_dot(codes, call->key_codes_strides[3], count, (int)call->key_bits, call->key_dim,
                 from / 64 * 64, to, w->vectors, w->vector_width, rows, w->sums, w->vector_width,
                 has_shared(ahead, count));
        ahead.bytes = 0;
        for (int64_t i = 0; i < count; i++) {
            w->steps[i] = load_one(call->key_steps, call->key_meta_dtype, at + i * ms[3] + group);
            w->minima[i] = load_one(call->key_minima, call->key_meta_dtype, at + i * ms[3] + group);
        }
        for (int64_t row = 0; row < rows; row++) {
            const int32_t *sums = w->sums + row * w->vector_width;
            float *scores = w->scores + row * w->block_width;
            float factor = w->vector_scale[row], offset = w->offset[row];
            for (int64_t i = 0; i < count; i++)
                scores[i] += w->steps[i] * factor * (float)sums[i] + w->minima[i] * offset;
        }
    }
}

/* Add probabilities times values of a block, group by group of channels. */
static TARGET void add_values(const has_attention_call *call, const has_task *task, int64_t block,
                              int64_t rows, has_ahead ahead, workspace *w) {
    const int64_t *cs = call->value_codes_strides, *ms = call->value_meta_strides;
    const int64_t *ss = call->value_scale_strides;
    const uint8_t *codes = (const uint8_t *)call->value_codes + task->batch * cs[0] +
                           task->head * cs[1] + block * cs[2];
    int64_t meta = task->batch * ms[0] + task->head * ms[1] + block * ms[2];
    int64_t scale_at = task->batch * ss[0] + task->head * ss[1] + block * ss[2];
    float scales[4];
    for (int i = 0; i < 4; i++)
        scales[i] = load_one(call->value_scales, call->value_scale_dtype, scale_at + i);
    int64_t length = call->block_length, width = padded(length), group = 0;
    for (int64_t i = length; i < width; i++) w->steps[i] = w->minima[i] = 0.0f;
    for (int64_t from = 0; from < call->value_dim; from += call->value_group, group++) {
        int64_t channels = call->value_dim - from;
        if (channels > call->value_group) channels = call->value_group;
        const uint8_t *steps = (const uint8_t *)call->value_step_codes + meta + group * ms[3];
        const uint8_t *minima = (const uint8_t *)call->value_minimum_codes + meta + group * ms[3];
        for (int64_t i = 0; i < length; i++) {
            w->steps[i] = scales[0] + scales[1] * (float)steps[i];
            w->minima[i] = scales[2] + scales[3] * (float)minima[i];
        }
        for (int64_t row = 0; row < rows; row++) {
            const float *p = w->scores + row * w->block_width;
            for (int64_t i = 0; i < width; i++) w->product[i] = p[i] * w->steps[i];
            w->vector_scale[row] =
                round_vector(w->product, width, length, call->value_bits,
                             w->vectors + row * w->vector_width);
            w->offset[row] = dot(p, w->minima, width);
        }
        rows_dot(codes + from * cs[3], cs[3], channels, (int)call->value_bits, length, 0, length,
                 w->vectors, w->vector_width, rows, w->sums, w->vector_width,
                 has_shared(ahead, channels));
        ahead.bytes = 0;
        for (int64_t row = 0; row < rows; row++) {
            const int32_t *sums = w->sums + row * w->vector_width;
            float *output = w->output + row * w->value_width + from;
            float factor = w->vector_scale[row], offset = w->offset[row];
            for (int64_t i = 0; i < channels; i++) output[i] += factor * (float)sums[i] + offset;
        }
    }
}

static TARGET void attend_block(const has_attention_call *call, const has_task *task,
                                int64_t block, int64_t token, int64_t count, int64_t rows,
                                workspace *w) {
    const int64_t *cs = call->key_codes_strides, *vs = call->value_codes_strides;
    const uint8_t *codes = (const uint8_t *)call->key_codes + task->batch * cs[0] +
                           task->head * cs[1] + block * cs[2];
    /* Keys and values alternate: each pass fetches what the other will read. */
    has_ahead values = {(const uint8_t *)call->value_codes + task->batch * vs[0] +
                            task->head * vs[1] + block * vs[2],
                        call->value_dim * vs[3], 0};
    has_ahead next_keys = {codes + cs[2],
                           block + 1 < task->last_block ? call->block_length * cs[3] : 0, 0};
    if (call->key_mode == HAS_KEYS_BY_CHANNEL)
        scores_by_channel(call, task, block, codes, count, rows, values, w);
    else
        scores_by_token(call, task, block, codes, count, rows, values, w);
    int any = 0;
    for (int64_t row = 0; row < rows; row++) {
        apply_mask(call, w, row, token, count);
        any |= softmax_step(w, row, count, padded(call->block_length));
    }
    if (any) add_values(call, task, block, rows, next_keys, w);
}

static TARGET void start_rows(const has_attention_call *call, const has_task *task,
                              int64_t first_row, int64_t rows, workspace *w) {
    for (int64_t row = 0; row < rows; row++) {
        int64_t query = (first_row + row) % call->queries;
        int64_t head = task->head * call->repeats + (first_row + row) / call->queries;
        const int64_t *qs = call->query_strides, *ms = call->mask_strides;
        float *queries = w->queries + row * w->key_width;
        int64_t at = task->batch * qs[0] + head * qs[1] + query * qs[2];
        load_floats(element(call->query, call->dtype, at), call->dtype, call->key_dim, queries);
        for (int64_t c = 0; c < w->key_width; c++) queries[c] *= (float)call->scale;
        w->query_of_row[row] = query;
        if (call->mask_dtype != HAS_NO_MASK)
            w->mask_rows[row] =
                element(call->mask, call->mask_dtype,
                        task->batch * ms[0] + head * ms[1] + query * ms[2]);
        w->maximum[row] = -INFINITY;
        w->total[row] = 0.0f;
        memset(w->output + row * w->value_width, 0, (size_t)w->value_width * sizeof(float));
    }
}

static TARGET void finish_rows(const has_attention_call *call, const has_task *task,
                               int64_t first_row, int64_t rows, workspace *w) {
    for (int64_t row = 0; row < rows; row++) {
        float *output = w->output + row * w->value_width;
        if (task->partial != NULL) {
            float *partial = task->partial + (first_row + row) * (call->value_dim + 2);
            partial[0] = w->maximum[row];
            partial[1] = w->total[row];
            memcpy(partial + 2, output, (size_t)call->value_dim * sizeof(float));
            continue;
        }
        /* A row that sees no token is 0, as torch has it. */
        float factor = w->total[row] == 0.0f ? 0.0f : 1.0f / w->total[row];
        for (int64_t c = 0; c < call->value_dim; c++) output[c] *= factor;
        int64_t query = (first_row + row) % call->queries;
        int64_t head = task->head * call->repeats + (first_row + row) / call->queries;
        const int64_t *os = call->output_strides;
        int64_t at = task->batch * os[0] + head * os[1] + query * os[2];
        store_floats(output, call->dtype, call->value_dim,
                     (void *)element(call->output, call->dtype, at));
    }
}

TARGET int VARIANT(has_task)(const has_attention_call *call, const has_task *task) {
    workspace w;
    void *memory = workspace_make(&w, call);
    if (memory == NULL) return HAS_NO_MEMORY;
    int64_t all_rows = call->repeats * call->queries;
    for (int64_t first = 0; first < all_rows; first += HAS_MAX_ROWS) {
        int64_t rows = all_rows - first < HAS_MAX_ROWS ? all_rows - first : HAS_MAX_ROWS;
        start_rows(call, task, first, rows, &w);
        if (task->has_sinks) attend_segment(call, task, &call->sinks, 0, rows, &w);
        int64_t token = task->first_token;
        for (int64_t block = task->first_block; block < task->last_block; block++) {
            int64_t count =
                call->block_lengths == NULL ? call->block_length : call->block_lengths[block];
            if (token + count > call->skip)
                attend_block(call, task, block, token, count, rows, &w);
            token += count;
        }
        if (task->has_recent) attend_segment(call, task, &call->recent, token, rows, &w);
        finish_rows(call, task, first, rows, &w);
    }
    free(memory);
    return HAS_OK;
}
