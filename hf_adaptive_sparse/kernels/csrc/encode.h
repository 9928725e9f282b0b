/* Blocks of keys or values into bytes and back: the plain C interface and what all variants share.
 * The formats are those of kvcache/channel.py, grouped.py and transposed.py, and so are the results:
 * bit for bit. Files that include this are compiled without contraction of a * b + c for that. */
#ifndef HAS_ENCODE_H
#define HAS_ENCODE_H

#include "library.h"

enum { HAS_BY_CHANNEL = 0, HAS_BY_GROUP = 1, HAS_TRANSPOSED = 2 };
enum { HAS_REFUSED = 4 }; /* NaN, Inf, or a span that the metadata cannot hold */

/* Mirrored field by field in encoding.py. Strides of uint8 tensors are bytes, others elements.
 * What belongs to one head of one block is contiguous, but for the rows of the states. */
typedef struct {
    int64_t batch, heads, blocks, tokens, width; /* tokens of a block, channels of a head */
    int64_t format, bits, group;                 /* channels that share a step */
    int64_t fits;                                /* steps of least squares, see fitting.py */
    int64_t dtype;                               /* of the states */
    void *states;                                /* read by encode, written by decode */
    int64_t state_strides[4];                    /* batch, head, block (encode), token */
    /* NULL: all full; else tokens of each block: decode writes these only, one block's behind the
     * other's. Encode takes full blocks. */
    const int64_t *lengths;
    void *codes;
    int64_t code_strides[3]; /* batch, head, block */
    /* By channel, by group: step, minimum. Transposed: step codes, minimum codes, scales. */
    void *metadata[3];
    int64_t metadata_strides[3][3];
    int64_t threads;
} has_encode_call;

/* Bytes of an element of the states. */
static inline int64_t has_element_bytes(const has_encode_call *call) {
    return call->dtype == HAS_FLOAT32 ? 4 : 2;
}

/* Where one head of one block is. */
typedef struct {
    uint8_t *states;     /* first token */
    const uint8_t *next; /* first token of what is likely to be encoded next, or NULL */
    int64_t tokens;      /* to write, by decode */
    uint8_t *codes;
    void *metadata[3];
} has_encode_task;

/* Each returns HAS_OK, HAS_NO_MEMORY or, encoding, HAS_REFUSED. */
typedef struct {
    int (*encode)(const has_encode_call *call, const has_encode_task *task);
    int (*decode)(const has_encode_call *call, const has_encode_task *task);
} has_encode_variant;

extern const has_encode_variant has_encode_portable, has_encode_avx2, has_encode_avx512,
    has_encode_neon;

#endif
