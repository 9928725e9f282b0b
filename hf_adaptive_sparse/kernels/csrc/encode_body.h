/* Encoding and decoding of one head of one block, included once per variant.
 *
 * Plain loops over rows that are padded to 16, which compilers vectorise; the including file says
 * for which processor (TARGET, VARIANT). Every operation is one of the torch reference's, in its
 * order, so that results are the same to the last bit: kvcache/affine.py and fitting.py. */

#include <float.h>
#include <stdlib.h>

#include "encode.h"
#include "numbers.h"
#include "pack_body.h"

/* 1.5 * 2^23: the sum's last bits are the whole number that 0 <= x < 2^22 rounds to. */
#define TO_WHOLE 12582912.0f
#define LANES 16

static TARGET inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* --- 16-bit metadata, rounded in one direction (affine.py) --------------------------------- */

HAS_INLINE uint16_t round_up(float value, int64_t dtype) {
    uint16_t half = has_to_half(value, dtype);
    float rounded = has_from_half(half, dtype);
    if (rounded < value) half = (uint16_t)(rounded < 0 ? half - 1 : half + 1);
    return half == 0x8000 ? 0 : half;
}

HAS_INLINE uint16_t round_down(float value, int64_t dtype) {
    uint16_t half = round_up(-value, dtype);
    return half == 0 ? 0 : half ^ 0x8000;
}

HAS_INLINE int is_finite(float value) {
    return (has_bits_of_float(value) & 0x7f800000u) != 0x7f800000u;
}

HAS_INLINE float inverse_of(float step) {
    float inverse = 1.0f / (step > 0 ? step : 1.0f);
    return inverse < FLT_MAX ? inverse : FLT_MAX;
}

/* --- States in and out --------------------------------------------------------------------- */

/* Widen a row; returns the largest magnitude's bits, 0x7f800000 or more if one is not finite. */
static TARGET uint32_t load_row(const void *source, int64_t dtype, int64_t n,
                                float *restrict out) {
    uint32_t worst = 0;
    if (dtype == HAS_FLOAT32) {
        memcpy(out, source, (size_t)n * sizeof(float));
    } else if (dtype == HAS_BFLOAT16) {
        const uint16_t *restrict halves = source;
        for (int64_t i = 0; i < n; i++) out[i] = has_from_bfloat16(halves[i]);
    } else {
        const uint16_t *restrict halves = source;
        for (int64_t i = 0; i < n; i++) out[i] = has_from_float16(halves[i]);
    }
    for (int64_t i = n; i < padded(n); i++) out[i] = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        uint32_t magnitude = has_bits_of_float(out[i]) & 0x7fffffffu;
        worst = magnitude > worst ? magnitude : worst;
    }
    return worst;
}

static TARGET void store_row(const float *restrict row, int64_t dtype, int64_t n, void *out) {
    if (dtype == HAS_FLOAT32) {
        memcpy(out, row, (size_t)n * sizeof(float));
    } else if (dtype == HAS_BFLOAT16) {
        uint16_t *restrict halves = out;
        for (int64_t i = 0; i < n; i++) halves[i] = has_to_bfloat16(row[i]);
    } else {
        /* A step that was rounded up may carry the highest code past the largest number. */
        uint16_t *restrict halves = out;
        for (int64_t i = 0; i < n; i++)
            halves[i] = has_to_float16(row[i] > 65504.0f ? 65504.0f : row[i]);
    }
}

/* --- Where the scales begin and end (fitting.py) ------------------------------------------- */

/* Add rows [half, n) to the first ones until one is left: an order that every processor has. */
static TARGET void fold_rows(float *rows, int64_t n, int64_t width) {
    while (n > 1) {
        int64_t half = (n + 1) / 2;
        for (int64_t r = 0; r < n - half; r++) {
            float *restrict to = rows + r * width;
            const float *restrict from = rows + (r + half) * width;
            for (int64_t c = 0; c < width; c++) to[c] += from[c];
        }
        n = half;
    }
}

static TARGET void column_extremes(const float *x, int64_t n, int64_t width, float *restrict low,
                                   float *restrict high) {
    memcpy(low, x, (size_t)width * sizeof(float));
    memcpy(high, x, (size_t)width * sizeof(float));
    for (int64_t r = 1; r < n; r++) {
        const float *restrict row = x + r * width;
        for (int64_t c = 0; c < width; c++) {
            low[c] = row[c] < low[c] ? row[c] : low[c];
            high[c] = row[c] > high[c] ? row[c] : high[c];
        }
    }
}

/* Move the ends [width] of the scales over n rows; `memory` holds n + 6 rows. */
static TARGET void fit_columns(const float *x, int64_t n, int64_t width, float levels, int64_t fits,
                               float *low, float *high, float *memory) {
    float *product = memory, *lowest = memory + n * width, *highest = lowest + width;
    float *mean = highest + width, *inverse = mean + width, *mean_code = inverse + width;
    float *variance = mean_code + width, count = (float)n;
    memcpy(lowest, low, (size_t)width * sizeof(float));
    memcpy(highest, high, (size_t)width * sizeof(float));
    memcpy(product, x, (size_t)(n * width) * sizeof(float));
    fold_rows(product, n, width);
    for (int64_t c = 0; c < width; c++) mean[c] = product[c] / count;
    for (; fits > 0; fits--) {
        for (int64_t c = 0; c < width; c++) inverse[c] = inverse_of((high[c] - low[c]) / levels);
        memset(mean_code, 0, (size_t)width * sizeof(float));
        for (int pass = 0; pass < 3; pass++) { /* sums of codes, of their squares, with x */
            for (int64_t r = 0; r < n; r++) {
                const float *restrict row = x + r * width;
                float *restrict out = product + r * width;
                for (int64_t c = 0; c < width; c++) {
                    float y = (row[c] - low[c]) * inverse[c];
                    y = y > 0 ? y : 0.0f;
                    y = y < levels ? y : levels;
                    float code = (y + TO_WHOLE) - TO_WHOLE;
                    float centred = code - mean_code[c];
                    out[c] = pass == 0   ? centred
                             : pass == 1 ? centred * centred
                                         : centred * (row[c] - mean[c]);
                }
            }
            fold_rows(product, n, width);
            if (pass == 0)
                for (int64_t c = 0; c < width; c++) mean_code[c] = product[c] / count;
            else if (pass == 1)
                memcpy(variance, product, (size_t)width * sizeof(float));
        }
        for (int64_t c = 0; c < width; c++) {
            float step = (high[c] - low[c]) / levels, fitted = product[c] / variance[c];
            step = variance[c] > 0 && fitted > 0 ? fitted : step;
            float begin = step > 0 ? mean[c] - step * mean_code[c] : low[c];
            float end = begin + step * levels;
            low[c] = begin > lowest[c] ? begin : lowest[c];
            high[c] = end < highest[c] ? end : highest[c];
        }
    }
}

/* Extremes of columns [from, to) of each row, to low[r] and high[r]. Compilers find those of whole
 * numbers with vectors; among floats NaN and the two zeros would depend on the order. */
static TARGET void row_extremes(const float *x, int64_t n, int64_t width, int64_t from, int64_t to,
                                float *restrict low, float *restrict high) {
    for (int64_t r = 0; r < n; r++) {
        const float *restrict row = x + r * width;
        int32_t lowest = INT32_MAX, highest = INT32_MIN;
        for (int64_t c = from; c < to; c++) {
            int32_t number = has_order(row[c]);
            lowest = number < lowest ? number : lowest;
            highest = number > highest ? number : highest;
        }
        low[r] = has_of_order(lowest);
        high[r] = has_of_order(highest);
    }
}

/* --- Codes (affine.py) ---------------------------------------------------------------------- */

HAS_INLINE uint8_t code_of(float x, float minimum, float inverse, float levels) {
    float y = (x - minimum) * inverse;
    y = y > 0 ? y : 0.0f;
    y = y < levels ? y : levels;
    return (uint8_t)has_bits_of_float(y + TO_WHOLE);
}

static TARGET void codes_by_column(const float *x, int64_t n, int64_t width,
                                   const float *restrict minimum, const float *restrict inverse,
                                   float levels, uint8_t *codes) {
    for (int64_t r = 0; r < n; r++) {
        const float *restrict row = x + r * width;
        uint8_t *restrict out = codes + r * width;
        for (int64_t c = 0; c < width; c++)
            out[c] = code_of(row[c], minimum[c], inverse[c], levels);
    }
}

/* Columns [from, to), a minimum and a step per row. */
static TARGET void codes_by_row(const float *x, int64_t n, int64_t width, int64_t from, int64_t to,
                                const float *minimum, const float *inverse, float levels,
                                uint8_t *codes) {
    for (int64_t r = 0; r < n; r++) {
        const float *restrict row = x + r * width;
        uint8_t *restrict out = codes + r * width;
        float below = minimum[r], factor = inverse[r];
        for (int64_t c = from; c < to; c++) out[c] = code_of(row[c], below, factor, levels);
    }
}

/* --- The formats ---------------------------------------------------------------------------- */

/* Rows of the states are tokens, padded with zeros to `width` channels. */
typedef struct {
    int64_t width, groups, group;
    int64_t kept; /* dtype of 16-bit metadata */
    float levels;
    float *x;                    /* [tokens][width]; decoding: one row */
    float *low, *high, *inverse; /* [groups][tokens] or [width] */
    float *memory;               /* for fits */
    uint8_t *codes, *turned;     /* [tokens][width], [width][padded tokens] */
} block;

static TARGET void *block_make(block *b, const has_encode_call *call, int encodes) {
    int64_t tokens = call->tokens, width = padded(call->width), turned = padded(tokens);
    b->width = width;
    b->group = call->group < call->width ? call->group : call->width;
    b->groups = (call->width + b->group - 1) / b->group;
    b->kept = call->dtype == HAS_FLOAT32 ? HAS_FLOAT16 : call->dtype;
    b->levels = (float)((1 << call->bits) - 1);
    int64_t scales = b->groups * tokens > width ? b->groups * tokens : width;
    int64_t x = encodes ? tokens * width : width, memory = 0;
    if (encodes && call->fits)
        memory = call->format == HAS_BY_CHANNEL ? (tokens + 6) * width : (2 * b->group + 8) * turned;
    size_t floats = (size_t)(x + 3 * scales + memory);
    size_t bytes = floats * sizeof(float) + (size_t)(2 * turned * width);
    char *allocated = malloc(bytes + 64);
    if (allocated == NULL) return NULL;
    b->x = (float *)(((uintptr_t)allocated + 63) / 64 * 64);
    b->low = b->x + x;
    b->high = b->low + scales;
    b->inverse = b->high + scales;
    b->memory = b->inverse + scales;
    b->codes = (uint8_t *)(b->memory + memory);
    b->turned = b->codes + turned * width;
    return allocated;
}

static TARGET int encode_by_channel(const has_encode_call *call, const has_encode_task *task,
                                    const block *b) {
    uint16_t *steps = task->metadata[0], *minima = task->metadata[1];
    column_extremes(b->x, call->tokens, b->width, b->low, b->high);
    if (call->fits)
        fit_columns(b->x, call->tokens, b->width, b->levels, call->fits, b->low, b->high,
                    b->memory);
    int refused = 0;
    for (int64_t c = 0; c < call->width; c++) {
        minima[c] = round_down(b->low[c], b->kept);
        b->low[c] = has_from_half(minima[c], b->kept);
        steps[c] = round_up((b->high[c] - b->low[c]) / b->levels, b->kept);
        float step = has_from_half(steps[c], b->kept);
        refused |= !is_finite(step);
        b->inverse[c] = inverse_of(step);
    }
    for (int64_t c = call->width; c < b->width; c++) b->low[c] = 0.0f, b->inverse[c] = 1.0f;
    if (refused) return HAS_REFUSED;
    codes_by_column(b->x, call->tokens, b->width, b->low, b->inverse, b->levels, b->codes);
    pack_rows(b->codes, b->width, call->tokens, call->width, (int)call->bits, task->codes);
    return HAS_OK;
}

/* Ends of the scales of group g, to low[g][t] and high[g][t]. */
static TARGET void group_ends(const has_encode_call *call, const block *b, int64_t g) {
    int64_t from = g * b->group, tokens = call->tokens;
    int64_t to = from + b->group < call->width ? from + b->group : call->width;
    float *low = b->low + g * tokens, *high = b->high + g * tokens;
    row_extremes(b->x, tokens, b->width, from, to, low, high);
    if (!call->fits) return;
    /* Turned, so that what is summed lies in rows; few bits are worth it. */
    int64_t turned = padded(tokens);
    float *x = b->memory, *ends = x + (to - from) * turned, *memory = ends + 2 * turned;
    memset(x, 0, (size_t)((to - from + 2) * turned) * sizeof(float));
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t c = from; c < to; c++) x[(c - from) * turned + t] = b->x[t * b->width + c];
    memcpy(ends, low, (size_t)tokens * sizeof(float));
    memcpy(ends + turned, high, (size_t)tokens * sizeof(float));
    fit_columns(x, to - from, turned, b->levels, call->fits, ends, ends + turned, memory);
    memcpy(low, ends, (size_t)tokens * sizeof(float));
    memcpy(high, ends + turned, (size_t)tokens * sizeof(float));
}

static TARGET void group_codes(const has_encode_call *call, const block *b) {
    for (int64_t g = 0; g < b->groups; g++) {
        int64_t from = g * b->group, to = g + 1 < b->groups ? from + b->group : b->width;
        codes_by_row(b->x, call->tokens, b->width, from, to, b->low + g * call->tokens,
                     b->inverse + g * call->tokens, b->levels, b->codes);
    }
    /* The padding of a row gives no codes of 0 by itself: its minimum is a group's. */
    if (b->width > call->width)
        for (int64_t t = 0; t < call->tokens; t++)
            memset(b->codes + t * b->width + call->width, 0, (size_t)(b->width - call->width));
}

static TARGET int encode_by_group(const has_encode_call *call, const has_encode_task *task,
                                  const block *b) {
    uint16_t *steps = task->metadata[0], *minima = task->metadata[1];
    int refused = 0;
    for (int64_t g = 0; g < b->groups; g++) {
        group_ends(call, b, g);
        float *low = b->low + g * call->tokens, *high = b->high + g * call->tokens;
        for (int64_t t = 0; t < call->tokens; t++) {
            uint16_t minimum = round_down(low[t], b->kept);
            low[t] = has_from_half(minimum, b->kept);
            uint16_t up = round_up((high[t] - low[t]) / b->levels, b->kept);
            float step = has_from_half(up, b->kept);
            refused |= !is_finite(step);
            b->inverse[g * call->tokens + t] = inverse_of(step);
            steps[t * b->groups + g] = up;
            minima[t * b->groups + g] = minimum;
        }
    }
    if (refused) return HAS_REFUSED;
    group_codes(call, b);
    pack_rows(b->codes, b->width, call->tokens, call->width, (int)call->bits, task->codes);
    return HAS_OK;
}

/* 8-bit codes of n numbers, which become what the codes stand for; base and unit to scales[0..1].
 * Codes are rounded down, or up. */
static TARGET int second_level(float *numbers, int64_t n, int64_t kept, int up, uint8_t *codes,
                               uint16_t *scales) {
    float low = numbers[0], high = numbers[0];
    for (int64_t i = 1; i < n; i++) {
        low = numbers[i] < low ? numbers[i] : low;
        high = numbers[i] > high ? numbers[i] : high;
    }
    scales[0] = round_down(low, kept);
    float base = has_from_half(scales[0], kept);
    scales[1] = round_up((high - base) / 255.0f, kept);
    float unit = has_from_half(scales[1], kept), divisor = unit > 0 ? unit : 1.0f;
    if (!is_finite(base) || !is_finite(unit)) return HAS_REFUSED;
    for (int64_t i = 0; i < n; i++) {
        float y = (numbers[i] - base) / divisor;
        y = up ? ceilf(y) : floorf(y);
        y = y > 0 ? y : 0.0f;
        y = y < 255.0f ? y : 255.0f;
        codes[i] = (uint8_t)(int32_t)y;
        numbers[i] = y * unit + base;
    }
    return HAS_OK;
}

static TARGET int encode_transposed(const has_encode_call *call, const has_encode_task *task,
                                    const block *b) {
    int64_t n = b->groups * call->tokens;
    uint16_t *scales = task->metadata[2];
    for (int64_t g = 0; g < b->groups; g++) group_ends(call, b, g);
    int status = second_level(b->low, n, b->kept, 0, task->metadata[1], scales + 2);
    if (status) return status;
    for (int64_t i = 0; i < n; i++) b->inverse[i] = (b->high[i] - b->low[i]) / b->levels;
    status = second_level(b->inverse, n, b->kept, 1, task->metadata[0], scales);
    if (status) return status;
    for (int64_t i = 0; i < n; i++) b->inverse[i] = inverse_of(b->inverse[i]);
    group_codes(call, b);
    int64_t turned = padded(call->tokens);
    memset(b->codes + call->tokens * b->width, 0, (size_t)((turned - call->tokens) * b->width));
    turn_bytes(b->codes, turned, b->width, b->turned);
    pack_rows(b->turned, turned, call->width, call->tokens, (int)call->bits, task->codes);
    return HAS_OK;
}

static TARGET int encode(const has_encode_call *call, const has_encode_task *task) {
    block b;
    void *memory = block_make(&b, call, 1);
    if (memory == NULL) return HAS_NO_MEMORY;
    int64_t row_bytes = call->state_strides[3] * has_element_bytes(call);
    uint32_t worst = 0;
    int64_t used = call->width * has_element_bytes(call);
    for (int64_t t = 0; t < call->tokens; t++) {
        if (task->next != NULL)
            for (int64_t at = 0; at < used; at += 64)
                __builtin_prefetch(task->next + t * row_bytes + at, 0, 2);
        uint32_t row = load_row(task->states + t * row_bytes, call->dtype, call->width,
                                b.x + t * b.width);
        worst = row > worst ? row : worst;
    }
    int status = worst >= 0x7f800000u              ? HAS_REFUSED
                 : call->format == HAS_BY_CHANNEL  ? encode_by_channel(call, task, &b)
                 : call->format == HAS_BY_GROUP    ? encode_by_group(call, task, &b)
                                                   : encode_transposed(call, task, &b);
    free(memory);
    return status;
}

/* Widen the metadata: steps to `inverse`, minima to `low`, [groups][tokens] or [width]. */
static TARGET void load_scales(const has_encode_call *call, const has_encode_task *task,
                               const block *b) {
    const uint16_t *steps = task->metadata[0], *minima = task->metadata[1];
    if (call->format == HAS_BY_CHANNEL) {
        for (int64_t c = 0; c < call->width; c++) {
            b->inverse[c] = has_from_half(steps[c], b->kept);
            b->low[c] = has_from_half(minima[c], b->kept);
        }
    } else if (call->format == HAS_BY_GROUP) {
        for (int64_t t = 0; t < call->tokens; t++)
            for (int64_t g = 0; g < b->groups; g++) {
                b->inverse[g * call->tokens + t] = has_from_half(steps[t * b->groups + g], b->kept);
                b->low[g * call->tokens + t] = has_from_half(minima[t * b->groups + g], b->kept);
            }
    } else {
        const uint8_t *step_codes = task->metadata[0], *minimum_codes = task->metadata[1];
        const uint16_t *halves = task->metadata[2];
        float scales[4];
        for (int i = 0; i < 4; i++) scales[i] = has_from_half(halves[i], b->kept);
        for (int64_t i = 0; i < b->groups * call->tokens; i++) {
            b->inverse[i] = step_codes[i] * scales[1] + scales[0];
            b->low[i] = minimum_codes[i] * scales[3] + scales[2];
        }
    }
}

static TARGET int decode(const has_encode_call *call, const has_encode_task *task) {
    block b;
    void *memory = block_make(&b, call, 0);
    if (memory == NULL) return HAS_NO_MEMORY;
    const int64_t width = call->width, tokens = call->tokens; /* no store may change them */
    int64_t row_bytes = call->state_strides[3] * has_element_bytes(call);
    load_scales(call, task, &b);
    if (call->format == HAS_TRANSPOSED) {
        int64_t turned = padded(call->tokens);
        unpack_rows(task->codes, call->width, call->tokens, (int)call->bits, b.turned, turned);
        turn_bytes(b.turned, b.width, turned, b.codes);
    } else {
        unpack_rows(task->codes, call->tokens, call->width, (int)call->bits, b.codes, b.width);
    }
    for (int64_t t = 0; t < task->tokens; t++) {
        const uint8_t *restrict codes = b.codes + t * b.width;
        float *restrict x = b.x;
        if (call->format == HAS_BY_CHANNEL) {
            const float *restrict steps = b.inverse, *restrict minima = b.low;
            for (int64_t c = 0; c < width; c++) x[c] = codes[c] * steps[c] + minima[c];
        } else {
            for (int64_t g = 0; g < b.groups; g++) {
                int64_t from = g * b.group;
                int64_t to = g + 1 < b.groups ? from + b.group : width;
                float step = b.inverse[g * tokens + t], minimum = b.low[g * tokens + t];
                for (int64_t c = from; c < to; c++) x[c] = codes[c] * step + minimum;
            }
        }
        store_row(x, call->dtype, width, task->states + t * row_bytes);
    }
    free(memory);
    return HAS_OK;
}

const has_encode_variant VARIANT(has_encode) = {encode, decode};
