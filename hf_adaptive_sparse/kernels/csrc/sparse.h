/* Products with a sparse weight: the plain C interface and what all variants share. The storage
 * format is described in packing/sparse_weight.py. */
#ifndef HAS_SPARSE_H
#define HAS_SPARSE_H

#include "numbers.h"

/* Columns that are expanded at a time, tokens of one call, and lanes of a partial sum. */
enum { HAS_SPARSE_BLOCK = 512, HAS_SPARSE_TOKENS = 32, HAS_SPARSE_LANES = 16 };

/* Mirrored field by field in sparse_calls.py. */
typedef struct {
    int64_t rows, columns;
    int64_t bits;       /* of a value: 32 or 16 (then of type dtype), 12 (bfloat16, by a codebook), 8
                           or 4 (then codes) */
    int64_t dtype;      /* of x, output, bias and scales */
    int64_t group_size; /* columns per scale; 0: one scale per row */
    const uint8_t *bitmask;
    const uint8_t *values;
    int64_t value_bytes;     /* of all values: nothing is read behind them */
    const void *row_offsets; /* number of values before each row */
    int64_t offset_bytes;    /* 4 or 8 */
    const void *scales;
    const uint64_t *codebook; /* with 12 bits: see packing/upper_bytes.py */
    int64_t exceptions;       /* in it, behind its first two words */
    int64_t tokens;
    const void *x;
    int64_t x_stride; /* elements from token to token; columns lie next to each other */
    const void *bias; /* may be NULL */
    void *output;
    int64_t output_stride;       /* elements from token to token, or of decompressed rows */
    int64_t first_row, last_row; /* to decompress, half open */
    int64_t widens;              /* decompressed rows, to float32 */
    int64_t threads;
} has_sparse_call;

/* x as kernels take it: rows of `stride` elements, 64-byte aligned, zeros after the last column (of
 * codes that are split, up to a multiple of 64). */
typedef struct {
    int64_t stride;
    void *shuffled;  /* bfloat16 for add_12, see sparse_body.h, with values of 12 bits and a token */
    int *is_finite;  /* whether all of x is */
    void *numbers;   /* float or, where a variant multiplies them, bfloat16; where it rounds x to
                        codes, those as int16 or split */
    int64_t segment; /* with codes: columns that share a step of x, a power of two; part of one group */
    int64_t segments;
    int64_t groups;         /* of codes, per row */
    int64_t group_segments; /* of a group that is whole */
    float *steps;         /* [token][segment] */
    int32_t *corrections; /* [token][segment][lane], of codes that are split: see sparse_body.h */
} has_sparse_x;

/* How a product of many tokens is divided, and where its parts lie in memory of the caller's. */
typedef struct {
    uint32_t *x;          /* all tokens, in the order of the matrix unit's tiles */
    uint8_t *thread;      /* of the first thread; 64-byte aligned, as all of this */
    int64_t steps, tiles; /* of 32 columns, and of 16 tokens */
    int64_t rows;         /* of a task, a multiple of 32 */
    int64_t row_bytes;    /* of a decompressed row */
    int64_t weight_bytes; /* of the decompressed rows of a task */
    int64_t thread_bytes; /* of these and their sums */
    int64_t threads;
} has_sparse_many;

typedef struct {
    /* 1 where bfloat16 x stays as it is, 0 where it is widened. */
    int takes_bfloat16;
    /* 1 where x is rounded to codes when the weight's values are. */
    int rounds;
    /* 1 where rows are expanded in registers: see sparse_registers.h. */
    int in_registers;
    /* Rows that are multiplied at a time. */
    int64_t rows;
    /* Fill the codes and steps of x, or widen it. */
    void (*prepare)(const has_sparse_call *call, const has_sparse_x *x);
    /* These return HAS_OK, or HAS_BAD_ARGUMENT where the bitmask has other numbers of bits in its
     * rows than the offsets say: another one was put there. Nothing is read behind the values then.
     * Multiply rows first to last - 1 with all tokens. */
    int (*multiply)(const has_sparse_call *call, const has_sparse_x *x, int64_t first, int64_t last);
    /* Decompress rows first to last - 1 of the weight to where `output` has first_row. */
    int (*decompress)(const has_sparse_call *call, int64_t first, int64_t last);
    /* Of many tokens: put a tile of them in order. NULL where there is no product of many. */
    void (*pack)(const has_sparse_call *call, const has_sparse_many *many, int64_t tile);
    /* Multiply rows first to last - 1 with all tokens, in a thread's own memory. */
    int (*multiply_many)(const has_sparse_call *call, const has_sparse_many *many, uint8_t *memory,
                         int64_t first, int64_t last);
} has_sparse_variant;

/* The bits of columns i to i + 63; i is a multiple of 8. */
HAS_INLINE uint64_t mask_word(const uint8_t *mask, int64_t i) {
    uint64_t word;
    memcpy(&word, mask + (uint64_t)i / 8, sizeof word);
    return word;
}

extern const has_sparse_variant has_sparse_portable, has_sparse_avx2, has_sparse_avx512f,
    has_sparse_avx512, has_sparse_amx, has_sparse_neon;

/* The variant of a number, or NULL; and whether a call's sizes are none that kernels take. */
const has_sparse_variant *has_sparse_variant_of(int variant);
int has_sparse_bad_sizes(const has_sparse_call *call);

/* For a byte of the mask: which bytes of the next 8 values of 2 bytes, or of 1 byte, go to each of
 * its 8 columns, and of 1 byte to the upper half of 2; 0x80 or more where there is none. For half a
 * byte of it: which bytes of the next 4 values of 4 bytes. */
extern uint8_t has_expand_pairs[256][16], has_expand_bytes[256][8], has_expand_upper[256][16],
    has_expand_fours[16][16];

#endif
