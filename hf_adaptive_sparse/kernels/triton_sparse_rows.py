"""Rows of a sparse weight as operands, for Triton.

A tile is some rows by some columns. Its mask is read in words (of 32 columns, or of 8 where a row
is no whole number of those), a thread per word; where a word's values begin is a prefix sum of set
bits over the words of the row, behind what the tiles before it took. Then a thread takes four
columns of a word at a time: it counts the word's set bits below them, reads the next four values,
of which those columns take none to all, and deals them out bit by bit. Neighbouring threads so read
neighbouring values, about 128 bytes of 16-bit values per warp and instruction: each byte of the
weight comes from memory once, and no bank of the first-level cache is asked twice. More columns at
a time would take more steps to deal out, and values are not aligned for loads of more than one.

Reading four values wherever one may be needed touches up to five places behind the last row's. That
is done unasked where there are as many values behind a program's rows; the last programs ask.

Weights that are gone multiply as zeros, so that NaN and infinity in x spread as in a dense product.
"""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def set_bits(words):
    """Return the set bits of uint32 words; LLVM knows the pattern, the processor the count."""
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((nibbles + (nibbles >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def mask_words(mask_rows, row_in, word, words, WORD: tl.constexpr):
    """Return words of the mask, uint32 ``(rows, words)``: zero behind the row's last."""
    address = mask_rows
    if WORD == 32:
        address = mask_rows.to(tl.pointer_type(tl.uint32))
    readable = row_in[:, None] & (word < words)[None, :]
    return tl.load(address[:, None] + word[None, :], mask=readable, other=0).to(tl.uint32)


@triton.jit
def row_starts(values, row_offsets, row, row_in, rows, BITS: tl.constexpr):
    """Return where each row's values begin, and two counts beside.

    These are the values of another row in the same byte (codes of 4 bits begin anywhere), and the
    places from there to the end of all values, 0 for rows that are none.
    """
    first = tl.load(row_offsets + row, mask=row_in, other=0).to(tl.int64)
    end = tl.load(row_offsets + rows).to(tl.int64)
    taken = (first * 0).to(tl.int32)
    if BITS == 4:
        taken = (first & 1).to(tl.int32)
        first = first >> 1
        end = (end + 1) >> 1
    left = tl.minimum(end - first, 0x7FFFFFF0).to(tl.int32)
    return values + first, taken, tl.where(row_in, left, 0)


@triton.jit
def _at(values, place, k: tl.constexpr, left, SAFE: tl.constexpr):
    """Return what is stored at ``place + k``; undefined behind the end of all values."""
    if SAFE:
        return tl.load(values + place + k)
    return tl.load(values + place + k, mask=place + k < left)


@triton.jit
def _floats_of_bytes(code):
    """Return int8 codes as float32: their bits in those of 2**23 + 128 + code, less that.

    Conversions run at a fraction of the rate of this.
    """
    bits = code.to(tl.uint8, bitcast=True).to(tl.uint32)
    return (bits ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _floats_of_nibbles(codes, kept):
    """Return the lowest code of 4 bits as float32, likewise; 0 where it is not kept."""
    bits = tl.where(kept, (codes & 0x0F) ^ 0x4B000008, 0x4B000008)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def _spread_nibbles(values, place, left, bits, SAFE: tl.constexpr):
    """Return the four columns of ``bits``, whose codes of 4 bits begin at ``place``: float32."""
    byte = place >> 1
    codes = _at(values, byte, 0, left, SAFE).to(tl.uint32)
    codes |= _at(values, byte, 1, left, SAFE).to(tl.uint32) << 8
    codes |= _at(values, byte, 2, left, SAFE).to(tl.uint32) << 16
    codes = codes >> ((place & 1) << 2).to(tl.uint32)
    kept = (bits & 1) != 0
    w0 = _floats_of_nibbles(codes, kept)
    codes = tl.where(kept, codes >> 4, codes)
    kept = (bits & 2) != 0
    w1 = _floats_of_nibbles(codes, kept)
    codes = tl.where(kept, codes >> 4, codes)
    kept = (bits & 4) != 0
    w2 = _floats_of_nibbles(codes, kept)
    codes = tl.where(kept, codes >> 4, codes)
    w3 = _floats_of_nibbles(codes, (bits & 8) != 0)
    return w0, w1, w2, w3


@triton.jit
def _spread(values, place, left, bits, BITS: tl.constexpr, SAFE: tl.constexpr):
    """Return the four columns of ``bits``, whose values begin at ``place``; of codes float32."""
    v0 = _at(values, place, 0, left, SAFE)
    v1 = _at(values, place, 1, left, SAFE)
    v2 = _at(values, place, 2, left, SAFE)
    v3 = _at(values, place, 3, left, SAFE)
    if BITS == 8:
        v0 = _floats_of_bytes(v0)
        v1 = _floats_of_bytes(v1)
        v2 = _floats_of_bytes(v2)
        v3 = _floats_of_bytes(v3)
    # Where a column is kept it takes the first in the queue, and the others move up.
    kept = (bits & 1) != 0
    w0 = tl.where(kept, v0, 0)
    v0 = tl.where(kept, v1, v0)
    v1 = tl.where(kept, v2, v1)
    v2 = tl.where(kept, v3, v2)
    kept = (bits & 2) != 0
    w1 = tl.where(kept, v0, 0)
    v0 = tl.where(kept, v1, v0)
    v1 = tl.where(kept, v2, v1)
    kept = (bits & 4) != 0
    w2 = tl.where(kept, v0, 0)
    v0 = tl.where(kept, v1, v0)
    w3 = tl.where((bits & 8) != 0, v0, 0)
    return w0, w1, w2, w3


@triton.jit
def four_columns(
    value_rows, left, words, taken, BITS: tl.constexpr, WORD: tl.constexpr, SAFE: tl.constexpr
):  # fmt: skip
    """Return the weights of every fourth column, from 0, 1, 2 and 3 on, and the values they took.

    Each is ``(rows, words, WORD / 4)``; ``taken`` counts the row's values before the tile. ``SAFE``
    says that there are values behind those of these rows.
    """
    counts = set_bits(words)
    start = taken[:, None] + tl.cumsum(counts, axis=1) - counts
    shift = (tl.arange(0, WORD // 4) * 4).to(tl.uint32)[None, None, :]
    spread = words[:, :, None]
    place = start[:, :, None] + set_bits(spread & ((tl.zeros_like(shift) + 1 << shift) - 1))
    bits = spread >> shift
    values = value_rows[:, None, None]
    behind = left[:, None, None]
    if BITS == 4:
        w0, w1, w2, w3 = _spread_nibbles(values, place, behind, bits, SAFE)
    else:
        w0, w1, w2, w3 = _spread(values, place, behind, bits, BITS, SAFE)
    return w0, w1, w2, w3, tl.sum(counts, axis=1)


@triton.jit
def four_of_x(x, word, columns, WORD: tl.constexpr):
    """Return one token's numbers of the same columns: float32 ``(words, WORD / 4)`` each."""
    part = tl.arange(0, WORD // 4) * 4
    column = (word * WORD)[:, None, None] + part[None, :, None] + tl.arange(0, 4)[None, None, :]
    numbers = tl.load(x + column, mask=column < columns, other=0).to(tl.float32)
    pairs = tl.reshape(numbers, (word.shape[0], WORD // 4, 2, 2))
    even, odd = tl.split(pairs)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def scales_of_fours(
    scales, row, row_in, word, columns, GROUP: tl.constexpr, WORD: tl.constexpr
):  # fmt: skip
    """Return the scale of each four columns: ``(rows, words, WORD / 4)``."""
    groups = (columns + GROUP - 1) // GROUP
    column = (word * WORD)[:, None] + (tl.arange(0, WORD // 4) * 4)[None, :]
    place = (row.to(tl.int64) * groups)[:, None, None] + (column // GROUP)[None, :, :]
    readable = row_in[:, None, None] & (column < columns)[None, :, :]
    return tl.load(scales + place, mask=readable, other=0)


@triton.jit
def in_order(w0, w1, w2, w3):
    """Put the columns in order: ``(rows, columns)``."""
    ordered = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(ordered, (w0.shape[0], w0.shape[1] * w0.shape[2] * 4))


@triton.jit
def are_safe(row_offsets, row, rows, ROWS: tl.constexpr):
    """Return whether the values behind those of ``ROWS`` rows are enough to be read with them."""
    behind = tl.load(row_offsets + tl.minimum(row + ROWS, rows))
    return behind.to(tl.int64) + 5 <= tl.load(row_offsets + rows).to(tl.int64)
