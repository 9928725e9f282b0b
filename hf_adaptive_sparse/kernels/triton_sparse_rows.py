"""Rows of a sparse weight as operands, for Triton.

A program has one row, and takes some blocks of 64 columns at a time. A thread has four columns of a
block: it reads the block's mask and where the block's values begin, counts the set bits below its
columns, reads the next four values, of which those columns take none to all, and deals them out bit
by bit. No thread waits for another. Neighbouring threads read neighbouring values: each byte of the
weight comes from memory once.

Four values come with two loads: of the two whole words, each as wide as four values, that they lie
in. On an H100 that took a fifth off the time of 8-bit codes and nothing off that of 16-bit values:
neither bytes nor loads nor instructions alone are what it waits for.

All of that is in tensors ``(blocks, 16)``, one element per four columns, whose layouts agree.

Words are read past the last value that is needed. That is done where there are as many values
behind a program's row; the last programs, and all where values do not begin at whole words, read
value by value and ask for each whether it is there.

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
def _floats(codes, kept, BITS: tl.constexpr):
    """Return the lowest codes of words as float32, 0 where they are not kept.

    As their bits in those of 2**23 + half + code, less that: conversions run at a fraction of the
    rate of this.
    """
    half: tl.constexpr = 1 << (BITS - 1)
    zero: tl.constexpr = 0x4B000000 + half
    bits = tl.where(kept, (codes & ((1 << BITS) - 1)) ^ zero, zero)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True) - (8388608.0 + half)


@triton.jit
def _deal_codes(codes, bits, BITS: tl.constexpr):
    """Return four columns of ``bits``, which take codes from the lower end of words: float32."""
    kept = (bits & 1) != 0
    w0 = _floats(codes, kept, BITS)
    codes = tl.where(kept, codes >> BITS, codes)
    kept = (bits & 2) != 0
    w1 = _floats(codes, kept, BITS)
    codes = tl.where(kept, codes >> BITS, codes)
    kept = (bits & 4) != 0
    w2 = _floats(codes, kept, BITS)
    codes = tl.where(kept, codes >> BITS, codes)
    w3 = _floats(codes, (bits & 8) != 0, BITS)
    return w0, w1, w2, w3


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
def _four_codes(values, place, BITS: tl.constexpr):
    """Return words whose lowest bits are the four codes from ``place`` on."""
    if BITS == 8:
        address = values.to(tl.pointer_type(tl.uint32)) + (place >> 2)
        codes = _window(tl.load(address), tl.load(address + 1), (place & 3) * 8)
    else:
        address = values.to(tl.pointer_type(tl.uint16)) + (place >> 2)
        pair = tl.load(address).to(tl.uint32) | (tl.load(address + 1).to(tl.uint32) << 16)
        codes = pair >> ((place & 3) * 4).to(tl.uint32)
    return codes


@triton.jit
def _four_halves(values, place):
    """Return the four values of 16 bits from ``place`` on, as two words."""
    address = values.to(tl.pointer_type(tl.uint64)) + (place >> 2)
    near = tl.load(address)
    far = tl.load(address + 1)
    skip = (place & 2) != 0
    first = tl.where(skip, (near >> 32).to(tl.uint32), near.to(tl.uint32))
    second = tl.where(skip, far.to(tl.uint32), (near >> 32).to(tl.uint32))
    third = tl.where(skip, (far >> 32).to(tl.uint32), far.to(tl.uint32))
    shift = (place & 1) * 16
    return _window(first, second, shift), _window(second, third, shift)


@triton.jit
def _spread_words(values, place, bits, BITS: tl.constexpr, FLOATS: tl.constexpr):
    """Return the four columns of ``bits``, whose values begin at ``place``, from whole words."""
    if BITS == 16:
        kind: tl.constexpr = values.dtype.element_ty
        low, high = _four_halves(values, place)
        if FLOATS and kind == tl.bfloat16:  # the upper half of a float32
            v0, v1, v2, v3 = low << 16, low & _UPPER, high << 16, high & _UPPER
            w0, w1, w2, w3 = _deal(v0, v1, v2, v3, bits)
            w0 = w0.to(tl.float32, bitcast=True)
            w1 = w1.to(tl.float32, bitcast=True)
            w2 = w2.to(tl.float32, bitcast=True)
            w3 = w3.to(tl.float32, bitcast=True)
        else:
            w0, w1, w2, w3 = _deal(low & 0xFFFF, low >> 16, high & 0xFFFF, high >> 16, bits)
            w0 = w0.to(tl.uint16).to(kind, bitcast=True)
            w1 = w1.to(tl.uint16).to(kind, bitcast=True)
            w2 = w2.to(tl.uint16).to(kind, bitcast=True)
            w3 = w3.to(tl.uint16).to(kind, bitcast=True)
    else:
        w0, w1, w2, w3 = _deal_codes(_four_codes(values, place, BITS), bits, BITS)
    return w0, w1, w2, w3


@triton.jit
def _spread_singly(values, place, left, bits, BITS: tl.constexpr):
    """Return the same, value by value."""
    if BITS == 4:
        byte, bytes_left = place >> 1, (left + 1) >> 1
        codes = _at(values, byte, 0, bytes_left).to(tl.uint32)
        codes |= _at(values, byte, 1, bytes_left).to(tl.uint32) << 8
        codes |= _at(values, byte, 2, bytes_left).to(tl.uint32) << 16
        codes = codes >> ((place & 1) << 2).to(tl.uint32)
        w0, w1, w2, w3 = _deal_codes(codes, bits, BITS)
    elif BITS == 8:
        codes = _at(values, place, 0, left).to(tl.uint8, bitcast=True).to(tl.uint32)
        codes |= _at(values, place, 1, left).to(tl.uint8, bitcast=True).to(tl.uint32) << 8
        codes |= _at(values, place, 2, left).to(tl.uint8, bitcast=True).to(tl.uint32) << 16
        codes |= _at(values, place, 3, left).to(tl.uint8, bitcast=True).to(tl.uint32) << 24
        w0, w1, w2, w3 = _deal_codes(codes, bits, BITS)
    else:
        v0 = _at(values, place, 0, left)
        v1 = _at(values, place, 1, left)
        v2 = _at(values, place, 2, left)
        v3 = _at(values, place, 3, left)
        w0, w1, w2, w3 = _deal(v0, v1, v2, v3, bits)
    return w0, w1, w2, w3


@triton.jit
def four_columns(
    value_row, left, taken, low, high, start, part, BITS: tl.constexpr, WORDS: tl.constexpr,
    FLOATS: tl.constexpr,
):  # fmt: skip
    """Return the weights of every fourth column, from 0, 1, 2 and 3 on: ``(blocks, 16)`` each.

    In float32 where ``FLOATS`` asks for it, or of codes, else in the values' dtype. ``low``,
    ``high`` and ``start`` are the blocks' masks and offsets, ``part`` says which four. ``WORDS``
    says that whole words can be read.
    """
    upper = part >= 8
    shift = ((part & 7) * 4).to(tl.uint32)
    word = tl.where(upper, high, low)
    below = word & ((tl.zeros_like(shift) + 1 << shift) - 1)
    place = start + taken + tl.where(upper, set_bits(low), 0) + set_bits(below)
    bits = word >> shift
    if WORDS:
        w0, w1, w2, w3 = _spread_words(value_row, place, bits, BITS, FLOATS)
    else:
        w0, w1, w2, w3 = _spread_singly(value_row, place, left, bits, BITS)
    if FLOATS:
        w0 = w0.to(tl.float32)
        w1 = w1.to(tl.float32)
        w2 = w2.to(tl.float32)
        w3 = w3.to(tl.float32)
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
def scales_of_fours(scales, row, four, columns, GROUP: tl.constexpr, FULL: tl.constexpr):
    """Return the scale of each four columns: four columns share a group."""
    groups = (columns + GROUP - 1) // GROUP
    address = scales + row.to(tl.int64) * groups + four * 4 // GROUP
    scale = tl.load(address) if FULL else tl.load(address, mask=four * 4 < columns, other=0)
    return scale
