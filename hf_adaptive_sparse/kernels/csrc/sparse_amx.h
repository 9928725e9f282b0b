/* x86-64 with AMX (Sapphire Rapids and later), included by sparse_avx512.c.
 *
 * Sixteen rows are expanded side by side, 64 columns at a time, into a buffer that the matrix unit
 * then multiplies with all tokens. The vector units only expand, so that 32 tokens take hardly longer
 * than two. Values come from the second-level cache: while a block of rows is multiplied, the next
 * block, which follows it in memory, is prefetched share by share.
 *
 * x lies in the order in which tiles take it: pairs of columns (bfloat16) or fours (codes, upper and
 * lower byte apart), and within them the tokens of a tile:
 *
 *     bfloat16   [32 columns][tile of tokens][16 pairs][token][2]
 *     codes      [64 columns][tile of tokens][upper, lower][16 fours][token][4]
 *
 * A code of x is 256 * upper + lower, upper signed and lower not; both products with the codes of
 * the weight are exact, and so is 256 * one plus the other: sums stay below 2^31 as elsewhere. */
enum { AMX_ROWS = 16, AMX_TOKENS = 16, AMX_STEP = 64, AMX_CHUNK_BYTES = 256 };
/* Tiles: sums of a full tile of tokens and of the last one, weights, and x of either. bfloat16 has
 * two sums for two steps, codes one for upper bytes and one for lower. */
#define FULL_A 0
#define FULL_B 1
#define LAST_A 2
#define LAST_B 3
#define WEIGHT_A 4
#define WEIGHT_B 5
#define X_FULL 6
#define X_LAST 7

#define TARGET_AMX __attribute__((target(FEATURES ",amx-tile,amx-int8,amx-bf16")))
#define AMX_FORCED static TARGET_AMX inline __attribute__((always_inline))

/* Compilers do not know that a tile is loaded from memory. */
#define MEMORY_BARRIER() __asm__ volatile("" ::: "memory")
#define LOAD_TILE(tile, at, stride)                                                             \
    do {                                                                                        \
        MEMORY_BARRIER();                                                                       \
        _tile_loadd(tile, at, stride);                                                          \
    } while (0)

/* One token is left to the rows one by one: it needs the memory's whole bandwidth, and the
 * processor's own prefetchers help a single stream of values more than sixteen. */
static int amx_takes(const has_sparse_call *call, const has_sparse_x *x) {
    if (call->tokens == 1) return 0;
    return call->bits > 8 ? call->dtype == HAS_BFLOAT16 : x->segment >= AMX_STEP;
}

/* Put 64 bytes of a token, 4 by 4, to where tile `tile` of steps of `kinds` tiles has them. */
AMX_FORCED void amx_put(const has_sparse_x *x, int64_t tokens, int64_t token, int64_t tile,
                        int64_t kinds, const void *bytes) {
    int64_t before = token / AMX_TOKENS * AMX_TOKENS;
    int64_t width = tokens - before < AMX_TOKENS ? tokens - before : AMX_TOKENS;
    uint32_t *to = (uint32_t *)x->numbers + (token - before) +
                   (tile / kinds * kinds * tokens + kinds * before + tile % kinds * width) * 16;
    for (int64_t i = 0; i < 16; i++) memcpy(to + i * width, (const uint8_t *)bytes + 4 * i, 4);
}

static TARGET_AMX void amx_prepare(const has_sparse_call *call, const has_sparse_x *x) {
    if (!amx_takes(call, x)) {
        prepare(call, x);
        return;
    }
    int64_t columns = call->columns, item_bytes = call->dtype == HAS_FLOAT32 ? 4 : 2;
    for (int64_t token = 0; token < call->tokens; token++) {
        const uint8_t *row = (const uint8_t *)call->x + token * call->x_stride * item_bytes;
        for (int64_t column = 0; call->bits > 8 && column < columns; column += AMX_STEP) {
            int64_t n = columns - column < AMX_STEP ? columns - column : AMX_STEP;
            uint16_t numbers[AMX_STEP] = {0}, in_order[AMX_STEP] = {0};
            memcpy(in_order, row + column * 2, (size_t)n * 2);
            for (int64_t i = 0; i < AMX_STEP; i++)
                numbers[call->bits == 12 ? shuffled_column(i) : i] = in_order[i];
            for (int64_t half = 0; half < 2; half++)
                amx_put(x, call->tokens, token, column / 32 + half, 1, numbers + 32 * half);
        }
        for (int64_t s = 0; call->bits <= 8 && s < x->segments; s++) {
            int16_t codes[256] = {0};
            int64_t first = s * x->segment;
            int64_t n = columns - first < x->segment ? columns - first : x->segment;
            x->steps[token * x->segments + s] =
                round_segment(row + first * item_bytes, n, call->dtype, codes);
            for (int64_t i = 0; i < n; i += AMX_STEP) {
                uint8_t upper[AMX_STEP], lower[AMX_STEP];
                for (int k = 0; k < AMX_STEP; k++) {
                    upper[k] = (uint8_t)(codes[i + k] >> 8);
                    lower[k] = (uint8_t)codes[i + k];
                }
                int64_t tile = (first + i) / AMX_STEP * 2;
                amx_put(x, call->tokens, token, tile, 2, upper);
                amx_put(x, call->tokens, token, tile + 1, 2, lower);
            }
        }
    }
}

/* Bytes that are fetched for the next block while a chunk of one row is expanded. */
typedef struct {
    const char *at;
    int64_t share_bytes;
} amx_ahead;

AMX_FORCED void amx_fetch(amx_ahead *ahead) {
    for (int64_t i = 0; i < ahead->share_bytes; i += 64)
        _mm_prefetch(ahead->at + i, _MM_HINT_T1);
    ahead->at += ahead->share_bytes;
}

/* Sixteen rows on their way. */
typedef struct {
    const uint8_t *mask[AMX_ROWS];
    int64_t next[AMX_ROWS]; /* number of the value that comes next */
    const uint8_t *values, *end;
    const uint8_t *codes; /* with 12 bits: of the upper bytes, beside lower bytes for values */
    __m512i books;
    exceptions exceptions[AMX_ROWS];
    amx_ahead values_ahead, codes_ahead, masks_ahead;
} amx_rows;

/* 64 bytes, or those that there are. */
AMX_FORCED __m512i amx_load(const uint8_t *at, const uint8_t *end, int careful) {
    if (!careful) return _mm512_loadu_si512(at);
    int64_t left = end - at;
    return _mm512_maskz_loadu_epi8(left >= 64 ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1, at);
}

/* Columns of a row that are expanded before it is the next row's turn. */
AMX_FORCED int64_t amx_chunk(int bits) { return bits > 8 ? AMX_CHUNK_BYTES / 2 : AMX_CHUNK_BYTES; }

/* Expand `n` columns of each row, at most a chunk, from `column` on. */
AMX_FORCED void amx_expand(amx_rows *rows, int64_t column, int64_t n, int bits, int careful,
                           uint8_t *out) {
    const __m512i upper = _mm512_set1_epi8((char)0xf0);
    for (int r = 0; r < AMX_ROWS; r++) {
        const uint8_t *mask = rows->mask[r] + column / 8;
        int64_t next = rows->next[r];
        uint8_t *row = out + r * AMX_CHUNK_BYTES;
        amx_fetch(&rows->values_ahead);
        if (bits == 12) amx_fetch(&rows->codes_ahead);
        amx_fetch(&rows->masks_ahead);
        for (int64_t i = 0; i < n; i += AMX_STEP) {
            uint64_t word = 0;
            if (n - i >= AMX_STEP)
                memcpy(&word, mask + i / 8, sizeof word);
            else
                for (int64_t b = 0; b < (n - i + 7) / 8; b++)
                    word |= (uint64_t)mask[i / 8 + b] << (8 * b);
            if (bits == 16) {
                const uint8_t *from = rows->values + 2 * next;
                const uint8_t *middle = from + 2 * _mm_popcnt_u32((uint32_t)word);
                _mm512_store_si512(row + 2 * i,
                                   _mm512_maskz_expand_epi16((__mmask32)word,
                                                             amx_load(from, rows->end, careful)));
                _mm512_store_si512(row + 2 * i + 64,
                                   _mm512_maskz_expand_epi16((__mmask32)(word >> 32),
                                                             amx_load(middle, rows->end, careful)));
            } else if (bits == 12) {
                __m512i lower = amx_load(rows->values + next, rows->end, careful);
                __m512i packed = amx_load(rows->codes + (next >> 1), rows->end, careful);
                __m512i upper = upper_bytes(packed, next, rows->books);
                lower = _mm512_maskz_expand_epi8(word, lower);
                upper = _mm512_maskz_expand_epi8(word, upper);
                _mm512_store_si512(row + 2 * i, even_columns(lower, upper));
                _mm512_store_si512(row + 2 * i + 64, odd_columns(lower, upper));
            } else {
                const uint8_t *from = rows->values + (bits == 8 ? next : next >> 1);
                __m512i codes = amx_load(from, rows->end, careful);
                if (bits == 4) {
                    codes = _mm512_and_si512(codes_of_4(codes, next, value_shifts), upper);
                }
                _mm512_store_si512(row + i, _mm512_maskz_expand_epi8(word, codes));
            }
            next += _mm_popcnt_u64(word);
        }
        if (bits == 12)
            put_exceptions(&rows->exceptions[r], mask, n, rows->next[r], next - rows->next[r], 1,
                           (uint16_t *)row);
        rows->next[r] = next;
    }
}

/* Add the products of an expanded step to the sums in the tiles. */
AMX_FORCED void amx_add(const uint8_t *weight, const uint8_t *x, int64_t tokens, int bits) {
    int64_t full = (tokens - 1) / AMX_TOKENS, last_bytes = (tokens - full * AMX_TOKENS) * 4;
    if (bits > 8) {
        LOAD_TILE(WEIGHT_A, weight, AMX_CHUNK_BYTES);
        _tile_loadd(WEIGHT_B, weight + 64, AMX_CHUNK_BYTES);
        if (full) {
            LOAD_TILE(X_FULL, x, 64);
            _tile_dpbf16ps(FULL_A, WEIGHT_A, X_FULL);
            LOAD_TILE(X_FULL, x + 64 * tokens, 64);
            _tile_dpbf16ps(FULL_B, WEIGHT_B, X_FULL);
        }
        LOAD_TILE(X_LAST, x + full * 1024, last_bytes);
        _tile_dpbf16ps(LAST_A, WEIGHT_A, X_LAST);
        LOAD_TILE(X_LAST, x + full * 1024 + 64 * tokens, last_bytes);
        _tile_dpbf16ps(LAST_B, WEIGHT_B, X_LAST);
    } else {
        LOAD_TILE(WEIGHT_A, weight, AMX_CHUNK_BYTES);
        if (full) {
            LOAD_TILE(X_FULL, x, 64);
            _tile_dpbssd(FULL_A, WEIGHT_A, X_FULL);
            LOAD_TILE(X_FULL, x + 1024, 64);
            _tile_dpbsud(FULL_B, WEIGHT_A, X_FULL);
        }
        LOAD_TILE(X_LAST, x + full * 2048, last_bytes);
        _tile_dpbssd(LAST_A, WEIGHT_A, X_LAST);
        LOAD_TILE(X_LAST, x + full * 2048 + 16 * last_bytes, last_bytes);
        _tile_dpbsud(LAST_B, WEIGHT_A, X_LAST);
    }
}

/* What the tiles of a tile of tokens hold: a[row * AMX_TOKENS + token] and b. */
AMX_FORCED void amx_store(int is_last, void *a, void *b) {
    if (is_last) {
        _tile_stored(LAST_A, a, AMX_TOKENS * 4);
        _tile_stored(LAST_B, b, AMX_TOKENS * 4);
    } else {
        _tile_stored(FULL_A, a, AMX_TOKENS * 4);
        _tile_stored(FULL_B, b, AMX_TOKENS * 4);
    }
    MEMORY_BARRIER();
}

AMX_FORCED void amx_zero(int64_t tokens) {
    if (tokens > AMX_TOKENS) {
        _tile_zero(FULL_A);
        _tile_zero(FULL_B);
    }
    _tile_zero(LAST_A);
    _tile_zero(LAST_B);
}

/* Sums of a block: [tile of tokens][row][token]. */
typedef struct {
    _Alignas(64) float of[2][AMX_ROWS * AMX_TOKENS];
} amx_sums;

/* Sums of the products of codes in the segments of a chunk: upper and lower bytes of x. */
typedef struct {
    _Alignas(64) int32_t of[AMX_CHUNK_BYTES / AMX_STEP][2][2][AMX_ROWS * AMX_TOKENS];
} amx_products;

/* Add the products of a chunk's segments, in the units of their weights and tokens. They were
 * stored a while ago, and have arrived where they are loaded from. */
AMX_FORCED void amx_scale(const has_sparse_call *call, const has_sparse_x *x, int64_t column,
                          const int64_t *row_of, const amx_products *products, amx_sums *sums) {
    int64_t size = group_columns(call), groups = (call->columns + size - 1) / size;
    float inverse = inverse_limit(call);
    for (int64_t i = 0; i < AMX_CHUNK_BYTES && column + i < call->columns; i += x->segment) {
        _Alignas(64) float units[AMX_ROWS];
        int64_t s = (column + i) / x->segment, group = (column + i) / size;
        for (int64_t r = 0; r < AMX_ROWS; r++)
            units[r] =
                has_number_at(call->scales, call->dtype, row_of[r] * groups + group) * inverse;
        for (int64_t first = 0; first < call->tokens; first += AMX_TOKENS) {
            const int32_t (*of)[AMX_ROWS * AMX_TOKENS] = products->of[i / x->segment][first != 0];
            _Alignas(64) float steps[AMX_TOKENS] = {0};
            for (int64_t t = first; t < call->tokens && t < first + AMX_TOKENS; t++)
                steps[t - first] = x->steps[t * x->segments + s];
            for (int64_t r = 0; r < AMX_ROWS; r++) {
                float *sum = sums->of[first != 0] + r * AMX_TOKENS;
                __m512i upper = _mm512_load_si512(of[0] + r * AMX_TOKENS);
                __m512i lower = _mm512_load_si512(of[1] + r * AMX_TOKENS);
                __m512i both = _mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower);
                __m512 factor = _mm512_mul_ps(_mm512_set1_ps(units[r]), _mm512_load_ps(steps));
                _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), factor,
                                                     _mm512_load_ps(sum)));
            }
        }
    }
}

/* The bias of rows first to first + count - 1, at most 16; zeros where there is none. */
AMX_FORCED __m512 amx_bias(const has_sparse_call *call, int64_t first, int64_t count) {
    _Alignas(64) float bias[AMX_ROWS] = {0};
    if (call->bias != NULL)
        for (int64_t r = 0; r < count; r++)
            bias[r] = has_number_at(call->bias, call->dtype, first + r);
    return _mm512_load_ps(bias);
}

AMX_FORCED void amx_write(const has_sparse_call *call, int64_t first, int64_t count,
                          const amx_sums *sums) {
    _Alignas(64) float column[AMX_ROWS];
    const __m512 bias = amx_bias(call, first, count);
    const __m512i rows = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32(AMX_TOKENS));
    for (int64_t t = 0; t < call->tokens; t++) {
        const float *of = sums->of[t / AMX_TOKENS] + t % AMX_TOKENS;
        __m512 total = _mm512_add_ps(_mm512_i32gather_ps(rows, of, 4), bias);
        int64_t at = t * call->output_stride + first;
        if (call->dtype == HAS_BFLOAT16) {
            __m256i halves = (__m256i)_mm512_cvtneps_pbh(total);
            _mm256_mask_storeu_epi16((uint16_t *)call->output + at,
                                     (__mmask16)((1u << count) - 1), halves);
        } else {
            _mm512_store_ps(column, total);
            for (int64_t r = 0; r < count; r++)
                has_store_number(call->output, call->dtype, at + r, column[r]);
        }
    }
}

AMX_FORCED amx_ahead amx_ahead_of(const uint8_t *from, int64_t size_bytes, int64_t chunks) {
    int64_t shares = chunks * AMX_ROWS;
    return (amx_ahead){(const char *)from, (size_bytes + shares - 1) / shares};
}

/* Rows first to first + count - 1, at most 16, with all tokens; constants say which kind. Returns a
 * status, see has_sparse_variant. */
AMX_FORCED int amx_block(const has_sparse_call *call, const has_sparse_x *x, int64_t first,
                         int64_t count, int bits, int careful) {
    _Alignas(64) uint8_t weight[2][AMX_ROWS * AMX_CHUNK_BYTES];
    amx_products products;
    amx_sums sums;
    memset(&sums, 0, sizeof sums);
    int64_t columns = call->columns, mask_bytes = (columns + 7) / 8, last = first + count;
    int64_t row_of[AMX_ROWS];
    amx_rows rows = {.values = call->values, .end = call->values + call->value_bytes};
    exceptions ahead = exceptions_from(call, offset_of(call, first));
    if (bits == 12) {
        rows.codes = call->values + values_of_12(call);
        rows.books = four_books((const uint8_t *)call->codebook);
    }
    for (int64_t r = 0; r < AMX_ROWS; r++) { /* missing rows repeat the last one, for nothing */
        row_of[r] = r < count ? first + r : last - 1;
        rows.mask[r] = call->bitmask + row_of[r] * mask_bytes;
        rows.next[r] = offset_of(call, row_of[r]);
        skip_to(&ahead, rows.next[r]);
        rows.exceptions[r] = ahead;
    }
    int64_t chunk = amx_chunk(bits), chunks = (columns + chunk - 1) / chunk;
    int64_t after = last + AMX_ROWS < call->rows ? last + AMX_ROWS : call->rows;
    int64_t begin = offset_of(call, last), end = offset_of(call, after);
    int value_bits = bits == 12 ? 8 : bits; /* of which codes of 4 lie apart */
    rows.values_ahead = amx_ahead_of(call->values + begin * value_bits / 8,
                                     (end - begin) * value_bits / 8, chunks);
    if (bits == 12) rows.codes_ahead = amx_ahead_of(rows.codes + begin / 2, (end - begin) / 2, chunks);
    rows.masks_ahead =
        amx_ahead_of(call->bitmask + last * mask_bytes, (after - last) * mask_bytes, chunks);
    int64_t step_bytes = AMX_STEP * 2 * call->tokens;
    amx_zero(call->tokens);
    amx_expand(&rows, 0, columns < chunk ? columns : chunk, bits, careful, weight[0]);
    for (int64_t column = 0; column < columns; column += chunk) {
        int64_t left = columns - column, n = left - chunk;
        if (n > 0)
            amx_expand(&rows, column + chunk, n < chunk ? n : chunk, bits, careful,
                       weight[(column / chunk + 1) % 2]);
        if (bits <= 8 && column > 0)
            amx_scale(call, x, column - chunk, row_of, &products, &sums);
        for (int64_t i = 0; i < chunk && i < left; i += AMX_STEP) {
            amx_add(weight[column / chunk % 2] + i * (bits > 8 ? 2 : 1),
                    (const uint8_t *)x->numbers + (column + i) / AMX_STEP * step_bytes,
                    call->tokens, bits);
            if (bits <= 8 && ((i + AMX_STEP) % x->segment == 0 || i + AMX_STEP >= left)) {
                int32_t (*to)[2][AMX_ROWS * AMX_TOKENS] = products.of[i / x->segment];
                int is_second = call->tokens > AMX_TOKENS;
                if (is_second) amx_store(0, to[0][0], to[0][1]);
                amx_store(1, to[is_second][0], to[is_second][1]);
                amx_zero(call->tokens);
            }
        }
    }
    if (bits <= 8)
        amx_scale(call, x, (columns - 1) / chunk * chunk, row_of, &products, &sums);
    if (bits > 8) {
        _Alignas(64) float second[AMX_ROWS * AMX_TOKENS];
        int64_t tiles = (call->tokens + AMX_TOKENS - 1) / AMX_TOKENS;
        for (int64_t tile = 0; tile < tiles; tile++) {
            amx_store(tile == tiles - 1, sums.of[tile], second);
            for (int64_t i = 0; i < AMX_ROWS * AMX_TOKENS; i++) sums.of[tile][i] += second[i];
        }
    }
    amx_write(call, first, count, &sums);
    int status = HAS_OK;
    for (int64_t r = 0; r < AMX_ROWS; r++)
        if (rows.next[r] != offset_of(call, row_of[r] + 1)) status = HAS_BAD_ARGUMENT;
    return status;
}

AMX_FORCED void amx_configure(int64_t tokens) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    int64_t last_bytes = ((tokens - 1) % AMX_TOKENS + 1) * 4;
    for (int tile = 0; tile < 8; tile++) {
        tiles.rows[tile] = AMX_ROWS;
        tiles.row_bytes[tile] = 64;
    }
    tiles.row_bytes[LAST_A] = tiles.row_bytes[LAST_B] = tiles.row_bytes[X_LAST] =
        (uint16_t)last_bytes;
    MEMORY_BARRIER();
    _tile_loadconfig(&tiles);
}

AMX_FORCED int amx_rows_of(const has_sparse_call *call, const has_sparse_x *x, int64_t first,
                           int64_t last, int bits) {
    int status = HAS_OK;
    for (int64_t row = first; row < last && status == HAS_OK; row += AMX_ROWS) {
        int64_t count = last - row < AMX_ROWS ? last - row : AMX_ROWS;
        int64_t end = furthest(call, offset_of(call, row + count - 1));
        end = bits == 12 ? values_of_12(call) + end / 2 : end * bits / 8;
        if (end + 64 <= call->value_bytes)
            status = amx_block(call, x, row, count, bits, 0);
        else
            status = amx_block(call, x, row, count, bits, 1);
    }
    return status;
}

static TARGET_AMX int amx_multiply(const has_sparse_call *call, const has_sparse_x *x,
                                   int64_t first, int64_t last) {
    if (!amx_takes(call, x)) return multiply(call, x, first, last);
    int status;
    amx_configure(call->tokens);
    if (call->bits == 16)
        status = amx_rows_of(call, x, first, last, 16);
    else if (call->bits == 12)
        status = amx_rows_of(call, x, first, last, 12);
    else if (call->bits == 8)
        status = amx_rows_of(call, x, first, last, 8);
    else
        status = amx_rows_of(call, x, first, last, 4);
    _tile_release();
    return status;
}

#include "sparse_amx_many.h"

const has_sparse_variant has_sparse_amx = {
    .takes_bfloat16 = 1,
    .rounds = 1,
    .rows = AMX_ROWS,
    .prepare = amx_prepare,
    .multiply = amx_multiply,
    .decompress = decompress,
    .pack = many_pack,
    .multiply_many = many_multiply,
};
