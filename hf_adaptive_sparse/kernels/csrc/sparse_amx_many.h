/* Products of many tokens on AMX, included by sparse_amx.h.
 *
 * Each task decompresses some rows into memory that stays in the second-level cache, and multiplies
 * them with all tokens from there: no dense weight goes to memory or comes from it. Decompressed rows
 * are in the order in which tiles take them. x is put in the order of the other operand once, for all
 * tasks: transposed, with pairs of columns side by side,
 *
 *     [tile of tokens][32 columns][16 pairs of columns][token][2]
 *
 * Four tiles of sums, of 32 rows and 32 tokens, take four products of four tiles loaded. Only
 * MANY_STEPS times 32 columns are gone through with all tokens before the next, so that these parts of
 * x and of the rows stay in the cache; sums wait in memory meanwhile. Where all of x is more than stays
 * there, the tiles of tokens that come next are fetched while others are multiplied. */
enum { MANY_STEPS = 64, STEP_COLUMNS = 32, STEP_BYTES = 64, TILE_NUMBERS = 256, LINE_NUMBERS = 16 };
enum { KEPT_X_BYTES = 1 << 20 };

/* Turn the rows of a matrix of 16 by 16 numbers of 32 bits into its columns. */
AMX_FORCED void transpose_16(__m512i *v) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i a = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        __m512i b = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        __m512i d = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) v[i] = t[i];
}

/* Put a tile of tokens in order; zeros where there are no tokens or columns. */
static TARGET_AMX void many_pack(const has_sparse_call *call, const has_sparse_many *many,
                                 int64_t tile) {
    const uint16_t *x = (const uint16_t *)call->x + tile * AMX_TOKENS * call->x_stride;
    int64_t tokens = call->tokens - tile * AMX_TOKENS;
    uint32_t *to = many->x + tile * many->steps * TILE_NUMBERS;
    for (int64_t column = 0; column < call->columns; column += STEP_COLUMNS) {
        int64_t left = call->columns - column;
        __mmask32 there = left >= STEP_COLUMNS ? ~0u : (1u << left) - 1;
        __m512i pairs[16];
        for (int64_t t = 0; t < AMX_TOKENS; t++)
            pairs[t] = t < tokens ? _mm512_maskz_loadu_epi16(there, x + t * call->x_stride + column)
                                  : _mm512_setzero_si512();
        transpose_16(pairs);
        for (int i = 0; i < 16; i++, to += AMX_TOKENS) _mm512_store_si512(to, pairs[i]);
    }
}

/* Tiles 0 to 3 hold the sums of 2 by 2 tiles, row by row. */
AMX_FORCED void many_begin(int rows, int tokens) {
    _tile_zero(0);
    if (tokens > 1) _tile_zero(1);
    if (rows > 1) _tile_zero(2);
    if (rows > 1 && tokens > 1) _tile_zero(3);
}

AMX_FORCED void many_go_on(const float *sums, int rows, int tokens) {
    MEMORY_BARRIER();
    _tile_loadd(0, sums, 64);
    if (tokens > 1) _tile_loadd(1, sums + TILE_NUMBERS, 64);
    if (rows > 1) _tile_loadd(2, sums + 2 * TILE_NUMBERS, 64);
    if (rows > 1 && tokens > 1) _tile_loadd(3, sums + 3 * TILE_NUMBERS, 64);
}

AMX_FORCED void many_store(float *sums, int rows, int tokens) {
    _tile_stored(0, sums, 64);
    if (tokens > 1) _tile_stored(1, sums + TILE_NUMBERS, 64);
    if (rows > 1) _tile_stored(2, sums + 2 * TILE_NUMBERS, 64);
    if (rows > 1 && tokens > 1) _tile_stored(3, sums + 3 * TILE_NUMBERS, 64);
    MEMORY_BARRIER();
}

/* Part of the two tiles of tokens that come next: `share` numbers of each for every step. */
typedef struct {
    const uint32_t *x;
    int64_t share;
} many_ahead;

/* Add the products of `count` steps: of one tile of rows or two with one of tokens or two, the second
 * of which lies `apart` numbers behind the first. */
AMX_FORCED void many_add(const uint8_t *weights, int64_t row_bytes, const uint32_t *x, int64_t apart,
                         int64_t count, int rows, int tokens, many_ahead ahead) {
    const uint8_t *below = weights + AMX_ROWS * row_bytes;
    MEMORY_BARRIER();
    for (int64_t step = 0; step < count; step++) {
        for (int64_t i = 0; i < ahead.share; i += LINE_NUMBERS, ahead.x += LINE_NUMBERS) {
            _mm_prefetch((const char *)ahead.x, _MM_HINT_T1);
            _mm_prefetch((const char *)(ahead.x + apart), _MM_HINT_T1);
        }
        _tile_loadd(4, weights + step * STEP_BYTES, row_bytes);
        _tile_loadd(6, x + step * TILE_NUMBERS, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (tokens > 1) {
            _tile_loadd(7, x + apart + step * TILE_NUMBERS, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (rows > 1) {
            _tile_loadd(5, below + step * STEP_BYTES, row_bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (rows > 1 && tokens > 1) _tile_dpbf16ps(3, 5, 7);
    }
}

/* Write a tile of sums to the output: rows from `row` on, tokens from `token` on. */
AMX_FORCED void many_write(const has_sparse_call *call, const float *sums, int64_t row, int64_t last,
                           int64_t token) {
    int64_t rows = last - row < AMX_ROWS ? last - row : AMX_ROWS;
    int64_t tokens = call->tokens - token < AMX_TOKENS ? call->tokens - token : AMX_TOKENS;
    uint16_t *to = (uint16_t *)call->output + token * call->output_stride + row;
    __m512 bias = amx_bias(call, row, rows);
    __m512i of_token[AMX_TOKENS];
    for (int r = 0; r < AMX_ROWS; r++) of_token[r] = _mm512_load_si512(sums + r * AMX_TOKENS);
    transpose_16(of_token);
    for (int64_t t = 0; t < tokens; t++) {
        __m512 total = _mm512_add_ps(_mm512_castsi512_ps(of_token[t]), bias);
        _mm256_mask_storeu_epi16(to + t * call->output_stride, (__mmask16)((1u << rows) - 1),
                                 (__m256i)_mm512_cvtneps_pbh(total));
    }
}

/* Rows first to last - 1, decompressed, their sums, and how much of x is fetched ahead. */
typedef struct {
    const has_sparse_call *call;
    const has_sparse_many *many;
    const uint8_t *weights;
    float *sums;
    int64_t first, last;
    int64_t share; /* numbers of a tile, for each step: all tiles of rows together fetch it */
} many_task;

/* Multiply up to 2 tiles of rows with up to 2 of tokens, over `count` steps; write what is complete. */
AMX_FORCED void many_square(const many_task *task, int64_t row, int64_t tile, int64_t step,
                            int64_t count, int rows, int tokens) {
    const has_sparse_many *many = task->many;
    int begins = step == 0, ends = step + count == many->steps;
    int64_t before = row - task->first, tiles = many->rows / AMX_ROWS;
    float *sums = task->sums; /* those that need not wait are always the same */
    if (!(begins && ends)) sums += (tile * tiles + before / AMX_ROWS * 2) * TILE_NUMBERS;
    if (begins)
        many_begin(rows, tokens);
    else
        many_go_on(sums, rows, tokens);
    const uint32_t *x = many->x + (tile * many->steps + step) * TILE_NUMBERS;
    int64_t apart = many->steps * TILE_NUMBERS;
    many_ahead ahead = {x + 2 * apart + before / (2 * AMX_ROWS) * count * task->share, task->share};
    many_add(task->weights + before * many->row_bytes + step * STEP_BYTES, many->row_bytes, x, apart,
             count, rows, tokens, ahead);
    many_store(sums, rows, tokens);
    for (int r = 0; ends && r < rows; r++)
        for (int t = 0; t < tokens; t++)
            many_write(task->call, sums + (2 * r + t) * TILE_NUMBERS, row + r * AMX_ROWS, task->last,
                       (tile + t) * AMX_TOKENS);
}

static TARGET_AMX int many_multiply(const has_sparse_call *call, const has_sparse_many *many,
                                    uint8_t *memory, int64_t first, int64_t last) {
    has_sparse_call to_memory = *call;
    to_memory.output = memory;
    to_memory.output_stride = many->row_bytes / 2;
    to_memory.first_row = first;
    to_memory.widens = 0;
    int status = decompress(&to_memory, first, last);
    if (status != HAS_OK) return status;
    for (int64_t r = 0; r < last - first; r++) /* zeros of x times NaN would be NaN */
        memset(memory + r * many->row_bytes + call->columns * 2, 0,
               (size_t)(many->steps * STEP_BYTES - call->columns * 2));
    many_task task = {call, many, memory, (float *)(memory + many->weight_bytes), first, last, 0};
    if (many->tiles * many->steps * STEP_BYTES * AMX_TOKENS > KEPT_X_BYTES) {
        int64_t squares = (last - first + 2 * AMX_ROWS - 1) / (2 * AMX_ROWS);
        task.share = (TILE_NUMBERS / squares + LINE_NUMBERS - 1) / LINE_NUMBERS * LINE_NUMBERS;
    }
    amx_configure(AMX_TOKENS);
    for (int64_t step = 0; step < many->steps; step += MANY_STEPS) {
        int64_t count = many->steps - step < MANY_STEPS ? many->steps - step : MANY_STEPS;
        for (int64_t tile = 0; tile < many->tiles; tile += 2)
            for (int64_t row = first; row < last; row += 2 * AMX_ROWS) {
                int is_full = row + AMX_ROWS < last, is_pair = tile + 1 < many->tiles;
                if (is_full && is_pair)
                    many_square(&task, row, tile, step, count, 2, 2);
                else if (is_full)
                    many_square(&task, row, tile, step, count, 2, 1);
                else if (is_pair)
                    many_square(&task, row, tile, step, count, 1, 2);
                else
                    many_square(&task, row, tile, step, count, 1, 1);
            }
    }
    _tile_release();
    return HAS_OK;
}
