/* Codes of one byte each into streams of 2, 3, 4, 6 or 8 bits per code and back, and bytes turned
 * over the diagonal. As packing/bits.py: eight codes are a 64-bit word whose neighbours are pushed
 * together in pairs, fours and eights; here the rounds run over many words at once. */
#include <string.h>

#include "numbers.h"

enum { PACK_WORDS = 64 };

/* The 64-bit word with `bits` ones in each lane. */
HAS_INLINE uint64_t every(int lane, int bits) {
    uint64_t pattern = 0;
    for (int start = 0; start < 64; start += lane) pattern |= ((1ull << bits) - 1) << start;
    return pattern;
}

HAS_INLINE void squeeze_words(uint64_t *words, int bits) {
    for (int lane = 8; lane < 64; lane *= 2) {
        const int used = bits * lane / 8;
        const uint64_t low = every(2 * lane, used);
        for (int i = 0; i < PACK_WORDS; i++)
            words[i] = (words[i] & low) | ((words[i] >> (lane - used)) & (low << used));
    }
}

HAS_INLINE void spread_words(uint64_t *words, int bits) {
    for (int lane = 32; lane >= 8; lane /= 2) {
        const int used = bits * lane / 8;
        const uint64_t low = every(2 * lane, used);
        for (int i = 0; i < PACK_WORDS; i++)
            words[i] = (words[i] & low) | ((words[i] & (low << used)) << (lane - used));
    }
}

/* One stream of `bytes` bytes from whole words of codes. A word is stored with the 8 - bits bytes
 * behind it, which the next one writes anew; the last ones go byte by byte. */
HAS_INLINE void pack_stream(const uint8_t *codes, int64_t bytes, int bits, uint8_t *out) {
    uint64_t words[PACK_WORDS];
    for (int64_t first = 0; first * bits < bytes; first += PACK_WORDS) {
        int64_t count = (bytes + bits - 1) / bits - first;
        if (count > PACK_WORDS) count = PACK_WORDS;
        memcpy(words, codes + first * 8, (size_t)count * 8);
        squeeze_words(words, bits);
        int64_t i = 0;
        for (; i < count && (first + i) * bits + 8 <= bytes; i++)
            memcpy(out + (first + i) * bits, words + i, 8);
        for (; i < count; i++) {
            int64_t at = (first + i) * bits;
            memcpy(out + at, words + i, (size_t)(bytes - at < bits ? bytes - at : bits));
        }
    }
}

HAS_INLINE void unpack_stream(const uint8_t *in, int64_t bytes, int bits, uint8_t *codes) {
    uint64_t words[PACK_WORDS];
    for (int64_t first = 0; first * bits < bytes; first += PACK_WORDS) {
        int64_t count = (bytes + bits - 1) / bits - first, i = 0;
        if (count > PACK_WORDS) count = PACK_WORDS;
        for (; i < count && (first + i) * bits + 8 <= bytes; i++)
            memcpy(words + i, in + (first + i) * bits, 8);
        for (; i < count; i++) {
            int64_t at = (first + i) * bits;
            words[i] = 0;
            memcpy(words + i, in + at, (size_t)(bytes - at < bits ? bytes - at : bits));
        }
        spread_words(words, bits);
        memcpy(codes + first * 8, words, (size_t)count * 8);
    }
}

/* Rows of whole words follow each other without a gap: they are one stream. */
HAS_INLINE void join_rows(int64_t stride, int64_t *rows, int64_t *count) {
    if (*count % 8 == 0 && stride == *count) {
        *count *= *rows;
        *rows = 1;
    }
}

/* `rows` rows of `count` codes, `stride` bytes apart (to a multiple of 8, zeros behind `count`),
 * to packed rows without gaps. */
static TARGET void pack_rows(const uint8_t *codes, int64_t stride, int64_t rows, int64_t count,
                             int bits, uint8_t *out) {
    join_rows(stride, &rows, &count);
    int64_t bytes = (count * bits + 7) / 8;
    for (int64_t r = 0; r < rows; r++, codes += stride, out += bytes) {
        switch (bits) {
            case 2: pack_stream(codes, bytes, 2, out); break;
            case 3: pack_stream(codes, bytes, 3, out); break;
            case 4: pack_stream(codes, bytes, 4, out); break;
            case 6: pack_stream(codes, bytes, 6, out); break;
            default: memcpy(out, codes, (size_t)count);
        }
    }
}

static TARGET void unpack_rows(const uint8_t *in, int64_t rows, int64_t count, int bits,
                               uint8_t *codes, int64_t stride) {
    join_rows(stride, &rows, &count);
    int64_t bytes = (count * bits + 7) / 8;
    for (int64_t r = 0; r < rows; r++, codes += stride, in += bytes) {
        switch (bits) {
            case 2: unpack_stream(in, bytes, 2, codes); break;
            case 3: unpack_stream(in, bytes, 3, codes); break;
            case 4: unpack_stream(in, bytes, 4, codes); break;
            case 6: unpack_stream(in, bytes, 6, codes); break;
            default: memcpy(codes, in, (size_t)count);
        }
    }
}

/* out[c][r] = in[r][c]; rows and columns are multiples of 16. Squares of 8 x 8 bytes are eight
 * words whose halves, quarters and bytes change places; eight squares at once. */
static TARGET void turn_bytes(const uint8_t *in, int64_t rows, int64_t columns, uint8_t *out) {
    static const uint64_t kept[3] = {0x00000000ffffffffull, 0x0000ffff0000ffffull,
                                     0x00ff00ff00ff00ffull};
    for (int64_t r = 0; r < rows; r += 8) {
        for (int64_t c = 0; c < columns; c += 64) {
            int64_t bytes = columns - c < 64 ? columns - c : 64;
            uint64_t words[8][8];
            for (int i = 0; i < 8; i++)
                memcpy(words[i], in + (r + i) * columns + c, (size_t)bytes);
            for (int round = 0; round < 3; round++) {
                const int apart = 4 >> round, shift = 8 * apart;
                for (int i = 0; i < 8; i++) {
                    if (i & apart) continue;
                    for (int k = 0; k < 8; k++) {
                        uint64_t a = words[i][k], b = words[i + apart][k];
                        uint64_t moved = ((a >> shift) ^ b) & kept[round];
                        words[i + apart][k] = b ^ moved;
                        words[i][k] = a ^ (moved << shift);
                    }
                }
            }
            for (int64_t k = 0; k < bytes / 8; k++)
                for (int i = 0; i < 8; i++)
                    memcpy(out + (c + k * 8 + i) * rows + r, &words[i][k], 8);
        }
    }
}
