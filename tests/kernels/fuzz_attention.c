/* Compares a path of the attention kernels with the portable one on random sizes and bytes.
 *
 *     fuzz PATH CASES        PATH: its number in library.PATHS
 *
 * Every buffer is allocated at its exact size, so that sanitizers see each access outside. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"

int has_attend(int path, const has_attention_call *call);
int has_supports(int path);

static const int widths[] = {2, 3, 4, 6, 8};
static void *allocated[32];
static int allocations;

static int below(int n) { return rand() % n; }
static float uniform(void) { return (float)rand() / (float)RAND_MAX * 2 - 1; }

static void *buffer(size_t bytes) {
    unsigned char *memory = malloc(bytes);
    for (size_t i = 0; i < bytes; i++) memory[i] = (unsigned char)rand();
    return allocated[allocations++] = memory;
}

static float *floats(size_t count, float factor, float offset) {
    float *numbers = buffer(count * sizeof(float));
    for (size_t i = 0; i < count; i++) numbers[i] = uniform() * factor + offset;
    return numbers;
}

/* Contiguous strides of all dimensions but the last. */
static void set_strides(int64_t *strides, int count, const int64_t *sizes) {
    int64_t stride = sizes[count];
    for (int i = count - 1; i >= 0; i--) {
        strides[i] = stride;
        stride *= sizes[i];
    }
}

/* The larger of two differences; NaN, once it was found, stays. */
static double worse(double a, double b) { return isnan(a) || b <= a ? a : b; }

static double compare(int path, unsigned seed) {
    srand(seed);
    int64_t d = 1 + below(140), dv = 1 + below(140), t = 1 + below(150), n = 1 + below(5);
    int64_t repeats = 1 + below(4), queries = 1 + below(5), h = 1 + below(3), b = 1 + below(2);
    int64_t bits = widths[below(5)], value_bits = widths[below(5)], raw = below(20);
    int64_t group = 1 + below((int)d), value_group = 1 + below((int)dv), mode = below(2);
    int64_t row = (d * bits + 7) / 8, value_row = (t * value_bits + 7) / 8;
    int64_t groups = (d + group - 1) / group;
    int64_t value_groups = (dv + value_group - 1) / value_group;
    size_t heads = (size_t)(b * h), q_heads = heads * (size_t)repeats;
    int64_t sinks = raw ? below((int)raw) : 0, lengths[5], tokens = raw;
    for (int i = 0; i < n; i++) tokens += lengths[i] = seed % 3 ? t : 1 + below((int)t);
    has_attention_call call = {
        .batch = b, .kv_heads = h, .repeats = repeats, .queries = queries,
        .key_dim = d, .value_dim = dv, .dtype = HAS_FLOAT32,
        .query = floats(q_heads * (size_t)(queries * d), 2, 0),
        .mask_dtype = seed % 2 ? HAS_FLOAT32 : HAS_NO_MASK,
        .causal = seed % 5 == 0, .skip = seed % 7 == 0 ? below((int)tokens) : 0,
        .blocks = n, .block_length = t, .block_lengths = seed % 3 ? NULL : lengths,
        .key_bits = bits, .key_mode = mode, .key_group = group, .key_meta_dtype = HAS_FLOAT32,
        .key_codes = buffer(heads * (size_t)(n * t * row)),
        .value_bits = value_bits, .value_group = value_group, .value_scale_dtype = HAS_FLOAT32,
        .value_codes = buffer(heads * (size_t)(n * dv * value_row)),
        .value_step_codes = buffer(heads * (size_t)(n * value_groups * t)),
        .value_minimum_codes = buffer(heads * (size_t)(n * value_groups * t)),
        .scale = 1 / sqrt((double)d), .threads = 1 + seed % 3,
    };
    int64_t visible = tokens - call.skip, key_meta = mode ? t * groups : d;
    call.mask = floats((size_t)(queries * visible), 1, 0);
    call.mask_strides[2] = visible;
    call.mask_strides[3] = 1;
    size_t meta = heads * (size_t)(n * key_meta);
    call.key_steps = floats(meta, 1.0f / (float)(1 << bits), 1.0f / (float)(1 << bits));
    call.key_minima = floats(meta, 1, -1);
    float *scales = floats(heads * (size_t)(n * 4), 0, 0);
    for (size_t i = 0; i < heads * (size_t)n; i++) {
        scales[4 * i] = scales[4 * i + 1] = 0.01f / (float)(1 << value_bits);
        scales[4 * i + 2] = -1;
        scales[4 * i + 3] = 0.004f;
    }
    call.value_scales = scales;
    const float *keys = floats(heads * (size_t)(raw * d), 1, 0);
    const float *values = floats(heads * (size_t)(raw * dv), 1, 0);
    call.sinks = (has_segment){.length = sinks, .keys = keys, .values = values};
    call.recent = (has_segment){.length = raw - sinks, .keys = keys + sinks * d,
                                .values = values + sinks * dv};
    set_strides(call.sinks.key_strides, 3, (int64_t[]){b, h, raw, d});
    set_strides(call.sinks.value_strides, 3, (int64_t[]){b, h, raw, dv});
    memcpy(call.recent.key_strides, call.sinks.key_strides, sizeof call.sinks.key_strides);
    memcpy(call.recent.value_strides, call.sinks.value_strides, sizeof call.sinks.value_strides);
    set_strides(call.query_strides, 3, (int64_t[]){b, h * repeats, queries, d});
    set_strides(call.output_strides, 3, (int64_t[]){b, h * repeats, queries, dv});
    set_strides(call.key_codes_strides, 4, (int64_t[]){b, h, n, t, row});
    set_strides(call.key_meta_strides, mode ? 4 : 3,
                mode ? (int64_t[]){b, h, n, t, groups} : (int64_t[]){b, h, n, d, 0});
    set_strides(call.value_codes_strides, 4, (int64_t[]){b, h, n, dv, value_row});
    set_strides(call.value_meta_strides, 4, (int64_t[]){b, h, n, value_groups, t});
    set_strides(call.value_scale_strides, 3, (int64_t[]){b, h, n, 4});
    size_t outputs = q_heads * (size_t)(queries * dv);
    float *expected = floats(outputs, 0, 7), *found = floats(outputs, 0, 8);
    double worst = 0;
    call.output = expected;
    int status = has_attend(0, &call);
    call.output = found;
    status |= has_attend(path, &call);
    for (size_t i = 0; i < outputs; i++)
        worst = worse(worst, fabs((double)expected[i] - (double)found[i]));
    while (allocations > 0) free(allocated[--allocations]);
    return status ? INFINITY : worst;
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    int path = atoi(arguments[1]), cases = atoi(arguments[2]);
    double worst = 0;
    if (!has_supports(path)) return 2;
    for (int i = 0; i < cases; i++) worst = worse(worst, compare(path, (unsigned)i));
    printf("%d cases, largest difference %g\n", cases, worst);
    return !(worst < 1e-3);
}
