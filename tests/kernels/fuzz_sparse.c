/* Compares a path of the kernels for sparse weights with the portable one on random sizes.
 *
 *     fuzz PATH CASES        PATH: its number in library.PATHS
 *
 * Every buffer is allocated at its exact size, so that sanitizers see each access outside. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"
#include "sparse.h"

int has_sparse_linear(int path, const has_sparse_call *call);
int has_sparse_dense(int path, const has_sparse_call *call);
int64_t has_sparse_many_bytes(int path, const has_sparse_call *call);
int has_sparse_many_linear(int path, const has_sparse_call *call, uint8_t *memory);

static const int widths[] = {32, 16, 12, 8, 4};

static int below(int n) { return rand() % n; }
static float uniform(void) { return (float)rand() / (float)RAND_MAX * 2 - 1; }

static void put(void *numbers, int64_t i, int64_t dtype, float value) {
    if (dtype == HAS_FLOAT32)
        ((float *)numbers)[i] = value;
    else
        ((uint16_t *)numbers)[i] =
            dtype == HAS_BFLOAT16 ? has_to_bfloat16(value) : has_to_float16(value);
}

static float get(const void *numbers, int64_t i, int64_t dtype) {
    if (dtype == HAS_FLOAT32) return ((const float *)numbers)[i];
    uint16_t half = ((const uint16_t *)numbers)[i];
    return dtype == HAS_BFLOAT16 ? has_from_bfloat16(half) : has_from_float16(half);
}

static void *random_numbers(int64_t count, int64_t dtype, float offset) {
    void *numbers = malloc((size_t)count * (dtype == HAS_FLOAT32 ? 4 : 2));
    for (int64_t i = 0; i < count; i++) put(numbers, i, dtype, uniform() + offset);
    return numbers;
}

/* Upper bytes of numbers near 1, and every `apart`-th value an exception, or nearly so. */
static uint64_t *random_codebook(int64_t count, int apart, int64_t *exceptions) {
    uint64_t *codebook = malloc((size_t)(count + 2) * sizeof *codebook);
    uint8_t *book = (uint8_t *)codebook;
    for (int code = 0; code < 16; code++)
        book[code] = code == 0 ? 0 : (uint8_t)(0x3b + code % 5 + (code % 2) * 0x80);
    for (int64_t i = below(apart); i < count; i += 1 + below(2 * apart))
        codebook[2 + (*exceptions)++] = (uint64_t)i << 16 | has_to_bfloat16(uniform());
    uint64_t *exact = malloc((size_t)(*exceptions + 2) * sizeof *exact);
    memcpy(exact, codebook, (size_t)(*exceptions + 2) * sizeof *exact);
    free(codebook);
    return exact;
}

/* The larger of two differences; NaN, once it was found, stays. */
static double worse(double a, double b) { return isnan(a) || b <= a ? a : b; }

/* Of a product of many tokens: the largest difference from sums in double, of what rounding allows. */
static double compare_many(int path, has_sparse_call call) {
    call.tokens = 1 + below(100);
    int64_t size = has_sparse_many_bytes(path, &call), rows = call.rows, columns = call.columns;
    if (size == 0) return 0; /* not for this path */
    call.x_stride = columns + below(3);
    call.output_stride = rows + below(3);
    void *x = random_numbers((call.tokens - 1) * call.x_stride + columns, call.dtype, 0);
    uint16_t *output = malloc((size_t)((call.tokens - 1) * call.output_stride + rows) * 2);
    uint16_t *weight = malloc((size_t)(rows * columns) * 2);
    uint8_t *memory = malloc((size_t)size);
    memset(memory, 0xff, (size_t)size); /* NaN, should any of it be read before it is written */
    has_sparse_call dense = call;
    dense.first_row = 0, dense.last_row = rows, dense.widens = 0;
    dense.output = weight, dense.output_stride = columns;
    call.x = x, call.output = output;
    int status = has_sparse_dense(0, &dense) | has_sparse_many_linear(path, &call, memory);
    double worst = status ? INFINITY : 0;
    for (int64_t t = 0; !status && t < call.tokens; t++)
        for (int64_t row = 0; row < rows; row++) {
            double sum = call.bias == NULL ? 0 : get(call.bias, row, call.dtype), sizes = fabs(sum);
            for (int64_t c = 0; c < columns; c++) {
                double product = (double)get(x, t * call.x_stride + c, call.dtype) *
                                 get(weight, row * columns + c, call.dtype);
                sum += product;
                sizes += fabs(product);
            }
            double found = get(output, t * call.output_stride + row, call.dtype);
            double allowed = 2e-6 * sizes + 0.008 * fabs(sum) + 1e-30;
            worst = worse(worst, fabs(found - sum) / allowed);
        }
    free(x), free(output), free(weight), free(memory);
    return worst;
}

/* Whether a mask with other numbers of bits in its rows than the offsets have is refused. What lies
 * behind the values is not read then, as sanitizers see. */
static int refuses_another_mask(int path, has_sparse_call call) {
    int64_t mask_bytes = (call.columns + 7) / 8, kept_of_8 = below(9);
    uint8_t *bitmask = calloc((size_t)(call.rows * mask_bytes), 1);
    int expected = HAS_OK;
    for (int64_t row = 0; row < call.rows; row++) {
        const int32_t *offsets = call.row_offsets;
        int64_t count = 0;
        for (int64_t c = 0; c < call.columns; c++)
            if (below(8) < kept_of_8) {
                bitmask[row * mask_bytes + c / 8] |= (uint8_t)(1 << c % 8);
                count++;
            }
        if (count != offsets[row + 1] - offsets[row]) expected = HAS_BAD_ARGUMENT;
    }
    call.bitmask = bitmask;
    call.output_stride = call.rows;
    int refuses = has_sparse_linear(path, &call) == expected;
    int64_t size = has_sparse_many_bytes(path, &call);
    uint8_t *memory = malloc((size_t)size + 1);
    if (size != 0) refuses &= has_sparse_many_linear(path, &call, memory) == expected;
    call.output_stride = call.columns;
    call.first_row = 0, call.last_row = call.rows;
    refuses &= has_sparse_dense(path, &call) == expected;
    free(bitmask), free(memory);
    return refuses;
}

static double compare(int path, unsigned seed) {
    srand(seed);
    int is_wide = seed % 8 == 7; /* more columns than kernels take at a time */
    int is_tall = seed % 8 == 3; /* more rows than a task takes */
    int64_t rows = 1 + below(is_tall ? 300 : is_wide ? 4 : 20);
    int64_t columns = 1 + below(is_wide ? 5000 : seed % 4 && !is_tall ? 700 : 100);
    int64_t bits = widths[below(5)], count = 0;
    int64_t tokens = below(2) ? 1 : 1 + below(HAS_SPARSE_TOKENS);
    int64_t dtype = bits == 32   ? HAS_FLOAT32
                    : bits == 16 ? 1 + below(2)
                    : bits == 12 ? HAS_BFLOAT16
                                 : below(3);
    int64_t mask_bytes = (columns + 7) / 8, kept_of_8 = below(9);
    uint8_t *bitmask = calloc((size_t)(rows * mask_bytes), 1);
    int32_t *offsets = malloc((size_t)(rows + 1) * sizeof *offsets);
    for (int64_t row = 0; row < rows; row++) {
        offsets[row] = (int32_t)count;
        for (int64_t c = 0; c < columns; c++)
            if (below(8) < kept_of_8) {
                bitmask[row * mask_bytes + c / 8] |= (uint8_t)(1 << c % 8);
                count++;
            }
    }
    offsets[rows] = (int32_t)count;
    int64_t group = 32 * below(is_wide ? 33 : 5), groups = group ? (columns + group - 1) / group : 1;
    int64_t value_bytes = bits == 12 ? count + (count + 1) / 2 : (count * bits + 7) / 8, exceptions = 0;
    uint64_t *codebook = random_codebook(count, 1 + below(40), &exceptions);
    int64_t output_bytes = 4; /* widened, too */
    uint8_t *values = bits > 12 ? random_numbers(count, dtype, 0) : malloc((size_t)value_bytes);
    if (bits <= 12)
        for (int64_t i = 0; i < value_bytes; i++) values[i] = (uint8_t)rand();
    void *scales = random_numbers(rows * groups, dtype, 1.5f);
    void *x = random_numbers(tokens * columns, dtype, 0), *bias = random_numbers(rows, dtype, 0);
    int64_t outputs = rows * (columns > tokens ? columns : tokens);
    void *expected = malloc((size_t)(outputs * output_bytes));
    void *found = malloc((size_t)(outputs * output_bytes));
    has_sparse_call call = {
        .rows = rows, .columns = columns, .bits = bits, .dtype = dtype, .group_size = group,
        .bitmask = bitmask, .values = values, .value_bytes = value_bytes,
        .row_offsets = offsets, .offset_bytes = 4, .scales = scales,
        .codebook = bits == 12 ? codebook : NULL, .exceptions = exceptions,
        .tokens = tokens, .x = x, .x_stride = columns, .bias = seed % 2 ? bias : NULL,
        .output_stride = rows, .threads = 1 + seed % 3,
    };
    double worst = 0, unit = dtype == HAS_FLOAT32 ? 1e-3 : dtype == HAS_BFLOAT16 ? 0.01 : 0.002;
    if (columns > 700) unit *= sqrt(columns / 700.0); /* as partial sums grow */
    for (int dense = 0; dense < 2; dense++) {
        if (dense) {
            call.first_row = below((int)rows);
            call.last_row = call.first_row + 1 + below((int)(rows - call.first_row));
            call.output_stride = columns;
            call.widens = seed % 4 < 2;
        }
        int64_t written_dtype = call.widens ? HAS_FLOAT32 : dtype;
        int64_t written =
            dense ? (call.last_row - call.first_row) * columns : rows * tokens;
        int (*function)(int, const has_sparse_call *) = dense ? has_sparse_dense : has_sparse_linear;
        call.output = expected;
        int status = function(0, &call);
        call.output = found;
        status |= function(path, &call);
        if (status) worst = INFINITY;
        for (int64_t i = 0; i < written; i++) {
            double a = get(expected, i, written_dtype), b = get(found, i, written_dtype);
            double difference = fabs(a - b) / (dense ? 0 : unit * (1 + fabs(a)));
            if (a == b) difference = 0; /* decompression is exact */
            worst = worse(worst, difference);
        }
    }
    worst = worse(worst, compare_many(path, call));
    if (!refuses_another_mask(0, call) || !refuses_another_mask(path, call)) worst = INFINITY;
    void *all[] = {bitmask, offsets, values, scales, codebook, x, bias, expected, found};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    return worst;
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    int path = atoi(arguments[1]), cases = atoi(arguments[2]);
    double worst = 0;
    if (!has_supports(path)) return 2;
    for (int i = 0; i < cases; i++) worst = worse(worst, compare(path, (unsigned)i));
    printf("%d cases, largest difference %g of what rounding allows\n", cases, worst);
    return !(worst < 1);
}
