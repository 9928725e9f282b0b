"""Pairs of codes of packed rows as numbers for the matrix units, for Triton.

The float16 number whose bits are those of a code is the code times 2**-24. It is subnormal, which
matrix units take as it is, and so exact. Two numbers share a word, so one mask cuts out two codes
that lie 16 bits apart, of 6 and 3 bits 12 apart::

    4 bits, pair 0 of a group    ............dddd............aaaa
    4 bits, pair 1, same shift   ........dddd............aaaa....
    6 bits                       ..........dddddd......aaaaaa....

A code that lies higher in its half counts for more, by a power of two. What it is multiplied with
is made smaller by as much (``shrunk``), so that pairs can share a shift.

A unit is ``UNIT`` codes of a row, which begin with a word; the four threads of a row take units in
turn (``triton_warp``). With ``APART`` codes from the first to the second of a pair, a group is as
many pairs, and pair ``i`` of a group is its codes ``i`` and ``i + APART``.
"""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hf_adaptive_sparse.kernels.triton_words import permute_bytes


@triton.jit
def pair_of(words, place: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Return pair ``place`` of units: words of two float16 numbers, uint32.

    Args:
        words: The units' words, a tuple.
        place: Which pair.
        BITS: Of a code.
        NATIVE: See ``triton_words``.
    """
    SPAN: tl.constexpr = 12 if BITS % 3 == 0 else 16
    APART: tl.constexpr = SPAN // BITS
    SHARED: tl.constexpr = 4 if BITS == 2 else (2 if BITS < 6 else 1)  # of a shift
    FIRST: tl.constexpr = place % APART // SHARED * SHARED
    # Where the first code would begin, were the second one at bit 16.
    start: tl.constexpr = (place // APART * 2 * APART + FIRST) * BITS - (16 - SPAN)
    above: tl.constexpr = place % SHARED * BITS
    code: tl.constexpr = ((1 << BITS) - 1) << above
    index: tl.constexpr = start // 32
    offset: tl.constexpr = start % 32
    if start < 0:
        word = words[0] << -start
    elif offset == 0:
        word = words[index]
    elif BITS == 8:
        word = permute_bytes(words[index], words[index] & 0, (words[index] & 0) + 0x4341, NATIVE)
    elif offset + 16 + SHARED * BITS <= 32:
        word = words[index] >> offset
    else:
        word = (words[index] >> offset) | (words[index + 1] << (32 - offset))
    if BITS < 8 or offset == 0:
        word = word & ((code << (16 - SPAN)) | (code << 16))
    return word


@triton.jit
def first_codes(pair, part, UNIT: tl.constexpr, BITS: tl.constexpr):
    """Return where in a row the first codes of pairs lie, of which each thread has its own.

    Args:
        pair: Which pair of the thread's, int32.
        part: Which of the four threads of a row, int32.
        UNIT: Codes of a unit.
        BITS: Of a code.
    """
    APART: tl.constexpr = (12 if BITS % 3 == 0 else 16) // BITS
    within = pair % (UNIT // 2)
    first = within // APART * (2 * APART) + within % APART
    return (pair // (UNIT // 2) * 4 + part) * UNIT + first


@triton.jit
def shrunk(pair, SECOND: tl.constexpr, BITS: tl.constexpr):
    """Return by how much a number is made smaller that a code of a pair is multiplied with.

    ``SECOND`` says of which; float32, a power of two.
    """
    APART: tl.constexpr = (12 if BITS % 3 == 0 else 16) // BITS
    SHARED: tl.constexpr = 4 if BITS == 2 else (2 if BITS < 6 else 1)
    LOW: tl.constexpr = 0 if SECOND else 16 - APART * BITS
    exponent = pair % SHARED * BITS + LOW
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True)
