/* Holds a path of encoding and decoding to the portable one, bit for bit, on random sizes and states.
 *
 *     fuzz PATH CASES        PATH: its number in library.PATHS
 *
 * Every buffer is allocated at its exact size, so that sanitizers see each access outside. Compile
 * without contraction of a * b + c, as the library's files are. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "encode.h"

int has_encode(int path, const has_encode_call *call);
int has_decode(int path, const has_encode_call *call);
int has_supports(int path);

static const int widths[] = {2, 3, 4, 6, 8};
static void *allocated[32];
static int allocations;

static int below(int n) { return rand() % n; }

static void *buffer(int64_t bytes) {
    unsigned char *memory = malloc((size_t)bytes);
    memset(memory, 0xa5, (size_t)bytes);
    return allocated[allocations++] = memory;
}

/* Numbers of moderate size; with `wild`, any bits: NaN, Inf and the smallest ones too. */
static void fill(void *memory, int64_t count, int64_t dtype, int wild) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)rand() << 16 ^ (uint32_t)rand();
        if (dtype == HAS_FLOAT32) {
            float moderate = (float)below(2001) / 500 - 2;
            memcpy((char *)memory + 4 * i, wild ? (void *)&bits : (void *)&moderate, 4);
        } else {
            int16_t sign = below(2) ? INT16_MIN : 0;
            uint16_t one = dtype == HAS_BFLOAT16 ? 0x3f80 : 0x3c00;
            ((uint16_t *)memory)[i] = (uint16_t)(wild ? bits : (one + below(300)) | sign);
        }
    }
}

/* Contiguous parts of one path, and the states that it makes of them again. */
static int run(int path, has_encode_call call, int64_t *sizes, void **parts, void *states,
               int64_t state_bytes) {
    int64_t heads = call.batch * call.heads;
    call.codes = parts[0] = buffer(sizes[0] * heads * call.blocks);
    call.code_strides[0] = call.heads * call.blocks * sizes[0];
    call.code_strides[1] = call.blocks * sizes[0];
    call.code_strides[2] = sizes[0];
    for (int m = 0; m < 3 && sizes[m + 1]; m++) {
        int64_t item_bytes = call.format == HAS_TRANSPOSED && m < 2 ? 1 : 2, size = sizes[m + 1];
        call.metadata[m] = parts[m + 1] = buffer(size * item_bytes * heads * call.blocks);
        call.metadata_strides[m][0] = call.heads * call.blocks * size;
        call.metadata_strides[m][1] = call.blocks * size;
        call.metadata_strides[m][2] = size;
    }
    int status = has_encode(path, &call);
    if (status) return status;
    int64_t tokens = state_bytes / heads / call.width / (call.dtype == HAS_FLOAT32 ? 4 : 2);
    call.states = states;
    call.state_strides[0] = call.heads * tokens * call.width;
    call.state_strides[1] = tokens * call.width;
    call.state_strides[3] = call.width;
    return has_decode(path, &call);
}

static int differs(int path, unsigned seed) {
    srand(seed);
    int64_t b = 1 + below(2), h = 1 + below(3), n = 1 + below(3), t = 1 + below(140);
    int64_t d = 1 + below(140), format = seed % 3, bits = widths[below(5)], dtype = below(3);
    int64_t group = below(3) ? 1 + below((int)d) : d, groups = (d + group - 1) / group;
    int64_t item_bytes = dtype == HAS_FLOAT32 ? 4 : 2, lengths[3], held = 0;
    for (int i = 0; i < n; i++) held += lengths[i] = below(2) ? t : 1 + below((int)t);
    int64_t rows = t * ((d * bits + 7) / 8), columns = d * ((t * bits + 7) / 8);
    int64_t sizes[3][4] = {{rows, d, d, 0},
                           {rows, t * groups, t * groups, 0},
                           {columns, groups * t, groups * t, 4}};
    void *source = buffer(b * h * n * t * d * item_bytes);
    fill(source, b * h * n * t * d, dtype, seed % 7 == 0);
    has_encode_call call = {
        .batch = b, .heads = h, .blocks = n, .tokens = t, .width = d, .format = format,
        .bits = bits, .group = group, .fits = format == HAS_BY_GROUP ? 0 : below(3),
        .dtype = dtype, .states = source, /* tokens outermost, as models have them */
        .state_strides = {n * t * h * d, d, t * h * d, h * d}, .lengths = lengths,
        .threads = 1 + below(3),
    };
    int64_t state_bytes = b * h * held * d * item_bytes;
    void *states[2] = {buffer(state_bytes), buffer(state_bytes)}, *parts[2][4];
    int found = run(path, call, sizes[format], parts[0], states[0], state_bytes);
    int expected = run(HAS_PORTABLE, call, sizes[format], parts[1], states[1], state_bytes);
    int bad = found != expected || (found != HAS_OK && found != HAS_REFUSED);
    if (found == HAS_OK) {
        bad |= memcmp(states[0], states[1], (size_t)state_bytes) != 0;
        for (int m = 0; m < 4 && sizes[format][m]; m++) {
            int64_t size = sizes[format][m] * b * h * n;
            if (m == 3 || (m > 0 && format != HAS_TRANSPOSED)) size *= 2;
            bad |= memcmp(parts[0][m], parts[1][m], (size_t)size) != 0;
        }
    }
    while (allocations > 0) free(allocated[--allocations]);
    return bad;
}

int main(int argc, char **argv) {
    int path = argc > 1 ? atoi(argv[1]) : 0, cases = argc > 2 ? atoi(argv[2]) : 100;
    if (!has_supports(path)) {
        printf("this processor has no path %d\n", path);
        return 2;
    }
    for (int seed = 0; seed < cases; seed++)
        if (differs(path, (unsigned)seed)) {
            printf("path %d differs from the portable one in case %d\n", path, seed);
            return 1;
        }
    return 0;
}
