"""Packed rows as tiles of codes, and as an operand of a matrix product, for Triton.

A row is read in words, one or three at a time: as many as the pattern of codes takes to repeat.
Each code of the pattern comes from its word by a shift and a mask, and is laid beside its
neighbours in the same thread. The wider the words, the fewer codes straddle two.
"""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _code(w0, w1, w2, J: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr, HALF: tl.constexpr):
    """Return code ``J`` of the words as float16 (exact up to 255), or float32."""
    shift: tl.constexpr = (J * BITS) % WORD
    place: tl.constexpr = (J * BITS) // WORD
    if place == 0:
        code = w0 >> shift
        after = w1
    elif place == 1:
        code = w1 >> shift
        after = w2
    else:
        code = w2 >> shift
        after = w2
    if shift + BITS > WORD:
        code = code | (after << (WORD - shift))
    if WORD > BITS:
        code = code & ((1 << BITS) - 1)
    if HALF:
        # The float16 with these bits is 1024 + code: cheaper than a conversion.
        number = (code.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    else:
        # The float32 with these bits is 2**23 + code.
        number = (code.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return number


@triton.jit
def _codes1(
    w0, w1, w2, J: tl.constexpr, EVERY: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    return _code(w0, w1, w2, J, BITS, WORD, HALF)


@triton.jit
def _codes2(
    w0, w1, w2, J: tl.constexpr, EVERY: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    even = _codes1(w0, w1, w2, J, 2 * EVERY, BITS, WORD, HALF)
    odd = _codes1(w0, w1, w2, J + EVERY, 2 * EVERY, BITS, WORD, HALF)
    return tl.join(even, odd)


@triton.jit
def _codes4(
    w0, w1, w2, J: tl.constexpr, EVERY: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    even = _codes2(w0, w1, w2, J, 2 * EVERY, BITS, WORD, HALF)
    odd = _codes2(w0, w1, w2, J + EVERY, 2 * EVERY, BITS, WORD, HALF)
    return tl.join(even, odd)


@triton.jit
def _codes8(
    w0, w1, w2, J: tl.constexpr, EVERY: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    even = _codes4(w0, w1, w2, J, 2 * EVERY, BITS, WORD, HALF)
    odd = _codes4(w0, w1, w2, J + EVERY, 2 * EVERY, BITS, WORD, HALF)
    return tl.join(even, odd)


@triton.jit
def _codes16(
    w0, w1, w2, J: tl.constexpr, EVERY: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    even = _codes8(w0, w1, w2, J, 2 * EVERY, BITS, WORD, HALF)
    odd = _codes8(w0, w1, w2, J + EVERY, 2 * EVERY, BITS, WORD, HALF)
    return tl.join(even, odd)


@triton.jit
def _codes32(
    w0, w1, w2, J: tl.constexpr, EVERY: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    even = _codes16(w0, w1, w2, J, 2 * EVERY, BITS, WORD, HALF)
    odd = _codes16(w0, w1, w2, J + EVERY, 2 * EVERY, BITS, WORD, HALF)
    return tl.join(even, odd)


@triton.jit
def unpack(
    w0, w1, w2, CODES: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Return the ``CODES`` codes of each unit: the words' shape and then ``(2, 2, ...)``.

    They are in their order, and as float16 or float32 as ``HALF`` says.
    """
    if CODES == 1:
        codes = _codes1(w0, w1, w2, 0, 1, BITS, WORD, HALF)
    elif CODES == 2:
        codes = _codes2(w0, w1, w2, 0, 1, BITS, WORD, HALF)
    elif CODES == 4:
        codes = _codes4(w0, w1, w2, 0, 1, BITS, WORD, HALF)
    elif CODES == 8:
        codes = _codes8(w0, w1, w2, 0, 1, BITS, WORD, HALF)
    elif CODES == 16:
        codes = _codes16(w0, w1, w2, 0, 1, BITS, WORD, HALF)
    else:
        tl.static_assert(CODES == 32)
        codes = _codes32(w0, w1, w2, 0, 1, BITS, WORD, HALF)
    return codes


@triton.jit
def load_words(
    rows, row_in, count, SIZE: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Return the words of packed rows of ``count`` codes: one or three of ``(rows, units)``.

    ``rows`` are the byte addresses of the rows' first words, ``row_in`` says which may be read.
    ``FULL`` says that ``count`` is ``SIZE``.
    """
    UNITS: tl.constexpr = SIZE * BITS // ((3 if BITS % 3 == 0 else 1) * WORD)
    unit = tl.arange(0, UNITS)[None, :]
    return load_units(rows[:, None], row_in[:, None], unit, count, BITS, WORD, FULL)


@triton.jit
def load_units(
    rows, row_in, unit, count, BITS: tl.constexpr, WORD: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """Return the words of units of rows, a unit being one repetition of the pattern of codes.

    ``rows``, ``row_in`` and ``unit`` broadcast; else as ``load_words``.
    """
    WORDS: tl.constexpr = 3 if BITS % 3 == 0 else 1
    place = unit * WORDS
    if WORD == 8:
        address = rows
    elif WORD == 16:
        address = rows.to(tl.pointer_type(tl.uint16))
    elif WORD == 32:
        address = rows.to(tl.pointer_type(tl.uint32))
    else:
        tl.static_assert(WORD == 64)
        address = rows.to(tl.pointer_type(tl.uint64))
    address = address + place
    readable = row_in
    # Words that hold a code: what lies behind the last of them is another row.
    filled = (count * BITS + WORD - 1) // WORD
    if not FULL:
        readable = readable & (place < filled)
    w0 = tl.load(address, mask=readable, other=0)
    w1 = w0
    w2 = w0
    if WORDS == 3:
        if not FULL:
            readable = readable & (place + 1 < filled)
        w1 = tl.load(address + 1, mask=readable, other=0)
        if not FULL:
            readable = readable & (place + 2 < filled)
        w2 = tl.load(address + 2, mask=readable, other=0)
    return w0, w1, w2


@triton.jit
def dot_rows(
    weights, w0, w1, w2, BITS: tl.constexpr, WORD: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Return ``weights @ codes.T``, ``(M, rows)``."""
    ROWS: tl.constexpr = w0.shape[0]
    SIZE: tl.constexpr = weights.shape[1]
    CODES: tl.constexpr = SIZE // w0.shape[1]
    codes = unpack(w0, w1, w2, CODES, BITS, WORD, HALF)
    operand = tl.trans(tl.reshape(codes, (ROWS, SIZE)))
    if HALF:
        product = tl.dot(weights, operand)
    else:
        product = tl.dot(weights, operand, input_precision="tf32x3")
    return product
