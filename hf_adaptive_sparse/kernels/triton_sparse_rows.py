"""Rows of a sparse weight as operands, for Triton.

A program takes some blocks of 64 columns of a row at a time, and a thread four words of them: eight
columns with values of 16 bits, sixteen with codes. It reads the block's mask and where the block's
values begin, counts the set bits below its columns, and reads the words in which the values of its
columns lie (``read_words``), of which those columns take none to all. ``spread`` moves the values
to their columns, and zeros where weights are gone. No thread waits for another.

Values of 16 bits are spread one column after the other: where a bit is not set, all that lies above
moves up by one, which is one instruction a word. Codes are dealt four at a time by permuting bytes.

Tiles are tensors of one dimension, whose neighbouring elements are neighbours in the row, and so
are their values: each byte of the weight comes from memory once. With a dimension for the blocks
Triton gave neighbouring threads the columns of different blocks, because their masks lie side by
side, and moved all values through shared memory to meet x.

Words are read past a row's last value. Where there are as many values behind it that is done
unasked; the last programs ask for each word whether it is there. Of the last word all is read: it
is no more than a word beyond, in the same page of memory. Where values do not begin at whole words
they are read one by one.

Weights that are gone multiply as zeros, so that NaN and infinity in x spread as in a dense product.
"""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hf_adaptive_sparse.kernels.triton_words import gap, moved_up, permute_bytes, shifted

READ_PAST: tl.constexpr = tl.constexpr(32)
"""Values behind a row's that must be there for words to be read unasked: more than are read."""


@triton.jit
def set_bits(words):
    """Return the set bits of uint32 words; LLVM knows the pattern, the processor the count."""
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((nibbles + (nibbles >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def places(BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the block of each element of a tile, and how its columns are found in a block's mask.

    That is the bits of the lower and of the upper half that are below its columns, whether these
    are in the upper half, and how far up.
    """
    PARTS: tl.constexpr = 64 // COLUMNS
    index = tl.arange(0, BLOCKS * PARTS)
    # By bits: were neighbours known to be neighbours, a thread would be given two of them.
    part = index & (PARTS - 1)
    upper = part >= PARTS // 2
    shift = ((part & (PARTS // 2 - 1)) * COLUMNS).to(tl.uint32)
    below = (tl.zeros_like(shift) + 1 << shift) - 1
    low_below = tl.where(upper, 0xFFFFFFFF, below)
    high_below = tl.where(upper, below, 0)
    return index // PARTS, low_below, high_below, upper, shift


@triton.jit
def row_start(values, row_offsets, row, rows, BITS: tl.constexpr):
    """Return the address of the word in which a row's values begin, and three things beside.

    These are the values of another row before it, the values from there to the end of all, and
    whether there are enough behind this row's for words to be read unasked.
    """
    first = tl.load(row_offsets + row).to(tl.int64)
    behind = tl.load(row_offsets + row + 1).to(tl.int64)
    end = tl.load(row_offsets + rows).to(tl.int64)
    taken = (first & 7).to(tl.int32)  # eight values of 4 bits are a word
    first = first - taken
    left = tl.minimum(end - first, 0x7FFFFFF0).to(tl.int32)
    if BITS == 4:
        first = first >> 1
    return values + first, taken, left, behind + READ_PAST <= end


@triton.jit
def mask_halves(
    mask_row, block, row_bytes, blocks, ALIGNED: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """Return the two words of blocks' masks, uint32: zero behind the row's last byte.

    ``ALIGNED`` says that each row's mask is whole words of 64 bits, ``FULL`` that all are blocks.
    """
    if ALIGNED:
        address = mask_row.to(tl.pointer_type(tl.uint64)) + block
        mask = tl.load(address) if FULL else tl.load(address, mask=block < blocks, other=0)
        low = mask.to(tl.uint32)
        high = (mask >> 32).to(tl.uint32)
    else:
        low = (block * 0).to(tl.uint32)
        high = low
        for i in tl.static_range(4):
            byte = block * 8 + i
            part = tl.load(mask_row + byte, mask=byte < row_bytes, other=0).to(tl.uint32)
            low |= part << (8 * i)
            byte += 4
            part = tl.load(mask_row + byte, mask=byte < row_bytes, other=0).to(tl.uint32)
            high |= part << (8 * i)
    return low, high


@triton.jit
def block_starts(offsets_row, block, blocks, FULL: tl.constexpr):
    """Return the values before blocks: int32."""
    if FULL:
        start = tl.load(offsets_row + block)
    else:
        start = tl.load(offsets_row + block, mask=block < blocks, other=0)
    if start.dtype == tl.int16:
        start = start.to(tl.int32) & 0xFFFF
    return start


@triton.jit
def place_of_columns(low, high, start, low_below, high_below, upper, shift):
    """Return the values before the thread's columns, and their bits from the lowest on.

    ``low``, ``high`` and ``start`` are the blocks' masks and offsets, the others as in ``places``.
    """
    place = start + set_bits(low & low_below) + set_bits(high & high_below)
    return place, tl.where(upper, high, low) >> shift


@triton.jit
def _at(values, place, k: tl.constexpr, left):
    """Return what is stored at ``place + k``; undefined behind the end of all values."""
    return tl.load(values + place + k, mask=place + k < left)


@triton.jit
def _halves_singly(values, place, k: tl.constexpr, left):
    low = _at(values, place, k, left).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = _at(values, place, k + 1, left).to(tl.uint16, bitcast=True).to(tl.uint32)
    return low | (high << 16)


@triton.jit
def _bytes_singly(values, place, k: tl.constexpr, left):
    word = (place * 0).to(tl.uint32)
    for i in tl.static_range(4):
        byte = _at(values, place, k + i, left).to(tl.uint8, bitcast=True).to(tl.uint32)
        word |= byte << (8 * i)
    return word


@triton.jit
def _word(address, index, k: tl.constexpr, count, SAFE: tl.constexpr):
    """Return word ``index + k`` of ``count``; zero behind the last, for which ``SAFE`` stands."""
    inside = None if SAFE else index + k < count
    return tl.load(address + k, mask=inside, other=None if SAFE else 0)


@triton.jit
def read_words(values, place, left, BITS: tl.constexpr, WHOLE: tl.constexpr, SAFE: tl.constexpr):
    """Return the words in which values lie from ``place`` on, and by how many bits into the first.

    Five words uint32, of which four are filled from there; with codes of 4 bits three and two.
    Values of 32 bits begin with words. ``WHOLE`` says that values begin with words and are read by
    them, ``SAFE`` that there are as many as may be read.
    """
    if BITS == 32:
        w0 = _at(values, place, 0, left).to(tl.uint32, bitcast=True)
        w1 = _at(values, place, 1, left).to(tl.uint32, bitcast=True)
        w2 = _at(values, place, 2, left).to(tl.uint32, bitcast=True)
        w3 = _at(values, place, 3, left).to(tl.uint32, bitcast=True)
        w4 = w3
        within = (place & 0).to(tl.uint32)
    elif WHOLE:
        PER_WORD: tl.constexpr = 32 // BITS
        index = place // PER_WORD
        address = values.to(tl.pointer_type(tl.uint32)) + index
        count = (left + PER_WORD - 1) // PER_WORD
        w0 = _word(address, index, 0, count, SAFE)
        w1 = _word(address, index, 1, count, SAFE)
        w2 = _word(address, index, 2, count, SAFE)
        w3 = w2
        w4 = w2
        if BITS > 4:
            w3 = _word(address, index, 3, count, SAFE)
            w4 = _word(address, index, 4, count, SAFE)
        within = ((place & (PER_WORD - 1)) * BITS).to(tl.uint32)
    else:
        within = (place & 0).to(tl.uint32)
        if BITS == 16:
            w0 = _halves_singly(values, place, 0, left)
            w1 = _halves_singly(values, place, 2, left)
            w2 = _halves_singly(values, place, 4, left)
            w3 = _halves_singly(values, place, 6, left)
            w4 = w3
        elif BITS == 8:
            w0 = _bytes_singly(values, place, 0, left)
            w1 = _bytes_singly(values, place, 4, left)
            w2 = _bytes_singly(values, place, 8, left)
            w3 = _bytes_singly(values, place, 12, left)
            w4 = w3
        else:
            bytes_left = (left + 1) >> 1
            w0 = _bytes_singly(values, place >> 1, 0, bytes_left)
            w1 = _bytes_singly(values, place >> 1, 4, bytes_left)
            w2 = _bytes_singly(values, place >> 1, 8, bytes_left)
            w3 = w2
            w4 = w2
            within = ((place & 1) * 4).to(tl.uint32)
    return w0, w1, w2, w3, w4, within


@triton.jit
def _spread_halves(w0, w1, w2, w3, bits, NATIVE: tl.constexpr):
    """Return eight values of 16 bits in their columns: from the lowest bit on, each makes a gap."""
    for i in tl.static_range(8):
        kept = bits & (1 << i)
        w3 = moved_up(kept, w2, w3, NATIVE) if i < 6 else gap(kept, w3, i == 7, NATIVE)
        if i < 4:
            w2 = moved_up(kept, w1, w2, NATIVE)
        elif i < 6:
            w2 = gap(kept, w2, i == 5, NATIVE)
        if i < 2:
            w1 = moved_up(kept, w0, w1, NATIVE)
            w0 = gap(kept, w0, i == 1, NATIVE)
        elif i < 4:
            w1 = gap(kept, w1, i == 3, NATIVE)
    return w0, w1, w2, w3


@triton.jit
def _spread_words(v0, v1, v2, v3, bits):
    """Return four values in their columns: one that is kept takes the first, others move up."""
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
def _digits(bits):
    """Return a digit of four bits for each of the lowest eight."""
    digits = ((bits & 0xFF) | (bits << 12)) & 0x000F000F
    digits = (digits | (digits << 6)) & 0x03030303
    return (digits | (digits << 3)) & 0x11111111


@triton.jit
def _bytes_of_codes(word):
    """Return the four lowest codes of 4 bits as the bytes of a word."""
    pairs = (word & 0xFF) | ((word & 0xFF00) << 8)
    return (pairs & 0x000F000F) | ((pairs & 0x00F000F0) << 4)


@triton.jit
def _deal_codes(
    w0, w1, w2, w3, bits, BITS: tl.constexpr, COLUMNS: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """Return codes in their columns, a byte each, four to a word: in excess of the zero.

    A column that is kept takes the byte of as many as are kept below it, another one takes a zero.
    """
    BYTE: tl.constexpr = 3 if BITS == 8 else 2  # by how much to shift for so many bits
    zeros = (bits & 0) + (1 << (BITS - 1)) * 0x01010101
    d0 = zeros
    d1 = zeros
    d2 = zeros
    d3 = zeros
    for i in tl.static_range(COLUMNS // 4):
        if i % 2 == 0:
            digits = _digits(bits >> (4 * i))
            sums = digits * 0x1111  # every fourth digit is the sum of four
        codes = w0 if BITS == 8 else _bytes_of_codes(w0)
        selector = (digits >> (16 * (i % 2))) * 0x110C + 0x4444  # 4 where it is not kept
        dealt = permute_bytes(codes ^ zeros, zeros, selector, NATIVE)
        if i == 0:
            d0 = dealt
        elif i == 1:
            d1 = dealt
        elif i == 2:
            d2 = dealt
        else:
            d3 = dealt
        used = (sums >> (12 - BYTE + 16 * (i % 2))) & (7 << BYTE)
        w0 = shifted(w0, w1, used, NATIVE)
        w1 = shifted(w1, w2, used, NATIVE)
        w2 = shifted(w2, w3, used, NATIVE)
    return d0, d1, d2, d3


@triton.jit
def spread(
    w0, w1, w2, w3, w4, within, bits, BITS: tl.constexpr, COLUMNS: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Return four words of values in their columns, zeros between them, from ``read_words``.

    Codes are bytes in excess of the zero: 128 with 8 bits, 8 with 4.
    """
    if BITS == 32:
        w0, w1, w2, w3 = _spread_words(w0, w1, w2, w3, bits)
    else:
        w0 = shifted(w0, w1, within, NATIVE)
        w1 = shifted(w1, w2, within, NATIVE)
        w2 = shifted(w2, w3, within, NATIVE)
        w3 = shifted(w3, w4, within, NATIVE)
        if BITS == 16:
            w0, w1, w2, w3 = _spread_halves(w0, w1, w2, w3, bits, NATIVE)
        else:
            w0, w1, w2, w3 = _deal_codes(w0, w1, w2, w3, bits, BITS, COLUMNS, NATIVE)
    return w0, w1, w2, w3


@triton.jit
def scales_of(scales, row, column, columns, GROUP: tl.constexpr, FULL: tl.constexpr):
    """Return the scales of the columns that begin with ``column``: a thread's share a group."""
    groups = (columns + GROUP - 1) // GROUP
    address = scales + row.to(tl.int64) * groups + column // GROUP
    return tl.load(address) if FULL else tl.load(address, mask=column < columns, other=0)
