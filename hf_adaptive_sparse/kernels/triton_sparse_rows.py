"""Rows of a sparse weight as operands, for Triton.

A program has one row, and takes some blocks of 64 columns at a time. A thread has 4, 8 or 16
columns of a block: it reads the block's mask and where the block's values begin, counts the set
bits below its columns, and takes four columns at a time: it reads the next four values, of which
those columns take none to all, and deals them out bit by bit. No thread waits for another.

Tiles are tensors of one dimension, whose neighbouring elements are neighbours in the row, and so
are their values: each byte of the weight comes from memory once. With a dimension for the blocks
Triton gave neighbouring threads the columns of different blocks, because their masks lie side by
side, and moved all values through shared memory to meet x.

What it costs is instructions, about 27 per 64 columns and warp with values of 16 bits: that is why
a thread has more than four columns, and codes are dealt by bytes of a word (``permute_bytes``).

Words of codes, and values beside those that are needed, are read past a row's last. That is done
where there are as many values behind it; the last programs, and all where codes do not begin at
whole words, read value by value and ask for each whether it is there.

Weights that are gone multiply as zeros, so that NaN and infinity in x spread as in a dense product.
"""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

_UPPER: tl.constexpr = tl.constexpr(0xFFFF0000)


@triton.jit
def set_bits(words):
    """Return the set bits of uint32 words; LLVM knows the pattern, the processor the count."""
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((nibbles + (nibbles >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def places(BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the block of each element of a tile, and which of its ``COLUMNS`` that has."""
    PARTS: tl.constexpr = 64 // COLUMNS
    index = tl.arange(0, BLOCKS * PARTS)
    # By bits: were neighbours known to be neighbours, a thread would be given two of them.
    return index // PARTS, index & (PARTS - 1)


@triton.jit
def row_start(values, row_offsets, row, rows, BITS: tl.constexpr):
    """Return the address of the word in which a row's values begin, and three things beside.

    These are the values of another row in the same word, the values from there to the end of all,
    and whether there are enough behind this row's for whole words to be read. A word is as wide as
    four values; codes of 4 bits are stored two to a byte, and begin anywhere.
    """
    first = tl.load(row_offsets + row).to(tl.int64)
    behind = tl.load(row_offsets + row + 1).to(tl.int64)
    end = tl.load(row_offsets + rows).to(tl.int64)
    taken = (first & 3).to(tl.int32)
    first = first - taken
    left = tl.minimum(end - first, 0x7FFFFFF0).to(tl.int32)
    if BITS == 4:
        first = first >> 1
    return values + first, taken, left, behind + 8 <= end


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
def _at(values, place, k: tl.constexpr, left):
    """Return what is stored at ``place + k``; undefined behind the end of all values."""
    return tl.load(values + place + k, mask=place + k < left)


@triton.jit
def permute_bytes(first, second, selector, NATIVE: tl.constexpr):
    """Return the bytes of two words that the four digits of a selector name: 4 to 7, the second's.

    ``NATIVE`` says that it is NVIDIA's instruction, else it takes shifts.
    """
    if NATIVE:
        taken = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [first, second, selector],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        taken = first & 0
        for i in tl.static_range(4):
            digit = selector >> (4 * i)
            word = tl.where((digit & 4) != 0, second, first)
            taken |= ((word >> ((digit & 3) * 8)) & 0xFF) << (8 * i)
    return taken


@triton.jit
def _deal_codes(codes, bits, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Return four columns of ``bits``, which take codes from the lowest byte of words: float32.

    A column that is kept takes the byte of as many as are kept below it, another one takes a zero.
    To floats by their bits in those of 2**23 + half + code, less that: two instructions.
    """
    half: tl.constexpr = 1 << (BITS - 1)
    halves = (bits & 0) + half * 0x01010101
    magic = (bits & 0) + 0x4B000000
    spread = ((((bits & 15) * 0x41) & 0x303) * 9) & 0x1111  # a digit for each bit
    selector = spread * 0x110C + 0x4444  # those below it, and 4 where it is not set
    dealt = permute_bytes(codes ^ halves, halves, selector, NATIVE)
    base: tl.constexpr = 8388608.0 + half
    w0 = permute_bytes(dealt, magic, (bits & 0) + 0x7540, NATIVE).to(tl.float32, bitcast=True)
    w1 = permute_bytes(dealt, magic, (bits & 0) + 0x7541, NATIVE).to(tl.float32, bitcast=True)
    w2 = permute_bytes(dealt, magic, (bits & 0) + 0x7542, NATIVE).to(tl.float32, bitcast=True)
    w3 = permute_bytes(dealt, magic, (bits & 0) + 0x7543, NATIVE).to(tl.float32, bitcast=True)
    return w0 - base, w1 - base, w2 - base, w3 - base


@triton.jit
def _deal(v0, v1, v2, v3, bits):
    """Return four columns of ``bits``: one that is kept takes the first, and the others move up."""
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
def _window(first, second, shift):
    """Return 32 bits of two words of 32, from bit ``shift``, below 32, of the first on."""
    return ((first.to(tl.uint64) | (second.to(tl.uint64) << 32)) >> shift.to(tl.uint64)).to(
        tl.uint32
    )


@triton.jit
def _bytes_of_codes(word):
    """Return the four lowest codes of 4 bits as the bytes of a word."""
    pairs = (word & 0xFF) | ((word & 0xFF00) << 8)
    return (pairs & 0x000F000F) | ((pairs & 0x00F000F0) << 4)


@triton.jit
def _four_codes(values, place, BITS: tl.constexpr):
    """Return words whose bytes are the four codes from ``place`` on, the first in the lowest."""
    if BITS == 8:
        address = values.to(tl.pointer_type(tl.uint32)) + (place >> 2)
        codes = _window(tl.load(address), tl.load(address + 1), (place & 3) * 8)
    else:
        address = values.to(tl.pointer_type(tl.uint16)) + (place >> 2)
        pair = tl.load(address).to(tl.uint32) | (tl.load(address + 1).to(tl.uint32) << 16)
        codes = _bytes_of_codes(pair >> ((place & 3) * 4).to(tl.uint32))
    return codes


@triton.jit
def _four_codes_singly(values, place, left, BITS: tl.constexpr):
    """Return the same, byte by byte."""
    if BITS == 4:
        byte, bytes_left = place >> 1, (left + 1) >> 1
        codes = _at(values, byte, 0, bytes_left).to(tl.uint32)
        codes |= _at(values, byte, 1, bytes_left).to(tl.uint32) << 8
        codes |= _at(values, byte, 2, bytes_left).to(tl.uint32) << 16
        codes = _bytes_of_codes(codes >> ((place & 1) << 2).to(tl.uint32))
    else:
        codes = _at(values, place, 0, left).to(tl.uint8, bitcast=True).to(tl.uint32)
        codes |= _at(values, place, 1, left).to(tl.uint8, bitcast=True).to(tl.uint32) << 8
        codes |= _at(values, place, 2, left).to(tl.uint8, bitcast=True).to(tl.uint32) << 16
        codes |= _at(values, place, 3, left).to(tl.uint8, bitcast=True).to(tl.uint32) << 24
    return codes


@triton.jit
def place_of_columns(low, high, start, part, COLUMNS: tl.constexpr):
    """Return the values before the thread's columns, and their bits from the lowest on.

    ``low``, ``high`` and ``start`` are the blocks' masks and offsets, ``part`` says which columns.
    """
    HALF: tl.constexpr = 32 // COLUMNS
    upper = part >= HALF
    shift = ((part & (HALF - 1)) * COLUMNS).to(tl.uint32)
    word = tl.where(upper, high, low)
    below = word & ((tl.zeros_like(shift) + 1 << shift) - 1)
    place = start + tl.where(upper, set_bits(low), 0) + set_bits(below)
    return place, word >> shift


@triton.jit
def four_columns(
    value_row, left, place, bits, BITS: tl.constexpr, WHOLE: tl.constexpr, NATIVE: tl.constexpr
):
    """Return four columns of ``bits``, whose values begin at ``place``: codes as float32.

    ``WHOLE`` says that values may be read past the last, and codes in words.
    """
    if BITS <= 8:
        if WHOLE:
            codes = _four_codes(value_row, place, BITS)
        else:
            codes = _four_codes_singly(value_row, place, left, BITS)
        w0, w1, w2, w3 = _deal_codes(codes, bits, BITS, NATIVE)
    else:
        if WHOLE:
            at = value_row + place
            v0, v1, v2, v3 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        else:
            v0 = _at(value_row, place, 0, left)
            v1 = _at(value_row, place, 1, left)
            v2 = _at(value_row, place, 2, left)
            v3 = _at(value_row, place, 3, left)
        w0, w1, w2, w3 = _deal(v0, v1, v2, v3, bits)
    return w0, w1, w2, w3


@triton.jit
def _pair(word, HALF: tl.constexpr):
    """Return the two 16-bit numbers of uint32 words as float32."""
    if HALF:
        first = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        first = (word << 16).to(tl.float32, bitcast=True)
        second = (word & _UPPER).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def four_of_x(x, four, columns, FULL: tl.constexpr, PACKED: tl.constexpr):
    """Return one token's numbers of the same columns, float32; ``four`` counts fours of the row.

    ``PACKED`` says that they are of 16 bits and can be read four at a time.
    """
    if PACKED:
        address = x.to(tl.pointer_type(tl.uint64)) + four
        numbers = tl.load(address) if FULL else tl.load(address, mask=four * 4 < columns, other=0)
        x0, x1 = _pair(numbers.to(tl.uint32), x.dtype.element_ty == tl.float16)
        x2, x3 = _pair((numbers >> 32).to(tl.uint32), x.dtype.element_ty == tl.float16)
    else:
        column = four * 4
        x0 = tl.load(x + column, mask=column < columns, other=0).to(tl.float32)
        x1 = tl.load(x + column + 1, mask=column + 1 < columns, other=0).to(tl.float32)
        x2 = tl.load(x + column + 2, mask=column + 2 < columns, other=0).to(tl.float32)
        x3 = tl.load(x + column + 3, mask=column + 3 < columns, other=0).to(tl.float32)
    return x0, x1, x2, x3


@triton.jit
def scales_of(scales, row, column, columns, GROUP: tl.constexpr, FULL: tl.constexpr):
    """Return the scales of the columns that begin with ``column``: a thread's share a group."""
    groups = (columns + GROUP - 1) // GROUP
    address = scales + row.to(tl.int64) * groups + column // GROUP
    return tl.load(address) if FULL else tl.load(address, mask=column < columns, other=0)
