"""What the Triton kernels that encode share: scales, codes and packed rows.

Every operation is one of the torch reference's, in its order (``kvcache/affine.py`` and
``fitting.py``), so that results are the same to the last bit. For that, divisions are those that
IEEE rounds, and the kernels are to be compiled without ``enable_fp_fusion``: a product that is not
rounded before the sum is another number.

Tiles are ``(rows, columns)``: each column has a scale of its own, and packed rows lie along the
other axis. Halves (16-bit floats) are handled as their bits, in int32.
"""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

_LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
# 1.5 * 2**23: the sum's last bits are the whole number that 0 <= x < 2**22 rounds to.
_TO_WHOLE: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def quotient(above, below):
    """Return ``above / below`` as IEEE has it; ``below`` broadcasts against ``above``."""
    return tl.div_rn(above, below + tl.zeros_like(above))


@triton.jit
def widen(half, BFLOAT: tl.constexpr):
    """Return halves as float32."""
    if BFLOAT:
        number = (half << 16).to(tl.float32, bitcast=True)
    else:
        number = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return number


@triton.jit
def round_up(value, BFLOAT: tl.constexpr):
    """Return the smallest halves that are not below ``value``; zeros have no sign."""
    if BFLOAT:  # the upper half of a float32, one further from zero if it is to be larger
        bits = value.to(tl.int32, bitcast=True)
        half = (tl.where(bits < 0, bits, bits + 0xFFFF) >> 16) & 0xFFFF
    else:
        nearest = value.to(tl.float16)
        half = nearest.to(tl.uint16, bitcast=True).to(tl.int32)
        rounded = nearest.to(tl.float32)
        above = tl.where(rounded < 0, half - 1, half + 1)
        half = tl.where(rounded < value, above, half)
    return tl.where(half == 0x8000, 0, half)


@triton.jit
def round_down(value, BFLOAT: tl.constexpr):
    """Return the largest halves that are not above ``value``; zeros have no sign."""
    half = round_up(-value, BFLOAT)
    return tl.where(half == 0, 0, half ^ 0x8000)


@triton.jit
def inverse_of(step):
    """Return ``1 / step``, 1 for a step of 0, and finite for the smallest ones as well."""
    positive = tl.where(step > 0, step, 1.0)
    return tl.minimum(quotient(tl.zeros_like(step) + 1.0, positive), _LARGEST)


@triton.jit
def nearest_whole(x):
    """Return what ``0 <= x < 2**22`` rounds to, halves to even.

    For floors and ceilings, too: the instructions that Triton has for these flush subnormals.
    """
    return (x + _TO_WHOLE) - _TO_WHOLE


@triton.jit
def _levelled(x, minimum, inverse, LEVELS: tl.constexpr):
    return tl.minimum(tl.maximum((x - minimum) * inverse, 0.0), LEVELS)


@triton.jit
def codes_of(x, minimum, inverse, LEVELS: tl.constexpr):
    """Return ``round((x - minimum) * inverse)`` from 0 to ``LEVELS``: int32."""
    shifted = _levelled(x, minimum, inverse, LEVELS) + _TO_WHOLE
    return shifted.to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def magnitude(x):
    """Return the bits of magnitudes: 0x7f800000 or more where one is not finite."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def halving_order(count, HALVINGS: tl.constexpr):
    """Return ``2**HALVINGS`` places below ``count`` and whether there is one.

    In the order in which ``_sum_in_halves`` over all adds up what ``fitting.sum_in_halves`` does:
    where a number is odd the halves differ, so that one has a gap.
    """
    place = tl.arange(0, 1 << HALVINGS)
    index = tl.zeros_like(place)
    is_one = index == 0
    for level in tl.static_range(HALVINGS):
        half = (count + (1 << (HALVINGS - level)) - 1) >> (HALVINGS - level)
        whole = (count + (1 << (HALVINGS - level - 1)) - 1) >> (HALVINGS - level - 1)
        index += ((place >> level) & 1) * half
        is_one = is_one & (index < whole)
    return index, is_one


@triton.jit
def _sum_in_halves(x, HALVINGS: tl.constexpr):
    """Return the sum of each column: the second half is added to the first until one is left."""
    columns: tl.constexpr = x.shape[1]
    for level in tl.static_range(HALVINGS):
        x = tl.sum(tl.reshape(x, (2, 1 << (HALVINGS - level - 1), columns)), axis=0)
    return tl.reshape(x, (columns,))


@triton.jit
def scale_ends(
    x, row_in, count, LEVELS: tl.constexpr, FITS: tl.constexpr, HALVINGS: tl.constexpr
):  # fmt: skip
    """Return the values of the lowest and of the highest code of each column of a tile.

    Args:
        x: Elements ``(2**HALVINGS, columns)``, 0 where there are none.
        row_in: Which rows there are; with ``FITS`` they are in ``halving_order``.
        count: How many.
        LEVELS: The highest code.
        FITS: Steps of least squares, see ``kvcache/fitting.py``.
        HALVINGS: As above.
    """
    inside = row_in[:, None]
    lowest = tl.min(tl.where(inside, x, float("inf")), axis=0)
    highest = tl.max(tl.where(inside, x, float("-inf")), axis=0)
    low = lowest
    high = highest
    if FITS > 0:
        number = tl.zeros_like(low) + count
        mean = quotient(_sum_in_halves(x, HALVINGS), number)
        for _ in range(FITS):
            step = quotient(high - low, LEVELS)
            codes = nearest_whole(_levelled(x, low[None, :], inverse_of(step)[None, :], LEVELS))
            codes = tl.where(inside, codes, 0.0)
            mean_code = quotient(_sum_in_halves(codes, HALVINGS), number)
            centred = tl.where(inside, codes - mean_code[None, :], 0.0)
            variance = _sum_in_halves(centred * centred, HALVINGS)
            product = centred * tl.where(inside, x - mean[None, :], 0.0)
            covariance = _sum_in_halves(product, HALVINGS)
            varies = variance > 0
            fitted = quotient(covariance, tl.where(varies, variance, 1.0))
            step = tl.where(varies & (fitted > 0), fitted, step)
            begin = tl.where(step > 0, mean - step * mean_code, low)
            low = tl.maximum(begin, lowest)
            high = tl.minimum(begin + step * LEVELS, highest)
    return low, high


@triton.jit
def store_packed(
    codes, rows, row_in, first, BITS: tl.constexpr, WORD: tl.constexpr, ROW_BYTES: tl.constexpr
):  # fmt: skip
    """Store codes as ``packing/bits.py`` packs them.

    Args:
        codes: int32 ``(rows, n)``, 0 behind the end of a row.
        rows: The rows' addresses, uint8.
        row_in: Which rows are to be stored.
        first: Where in their rows the codes begin, a multiple of the codes whose pattern repeats.
        BITS: Bits per code.
        WORD: Bits of the words that are stored; rows are whole words.
        ROW_BYTES: Bytes of a row.
    """
    WORDS: tl.constexpr = 3 if BITS % 3 == 0 else 1
    PATTERN: tl.constexpr = WORDS * WORD // BITS
    PATTERNS: tl.constexpr = codes.shape[1] // PATTERN
    ROW_WORDS: tl.constexpr = ROW_BYTES * 8 // WORD
    kind: tl.constexpr = tl.uint32 if WORD == 32 else (tl.uint16 if WORD == 16 else tl.uint8)
    target = rows.to(tl.pointer_type(kind))
    place = first // PATTERN * WORDS + tl.arange(0, PATTERNS) * WORDS
    if PATTERN == 1:
        stored = row_in[:, None] & (place < ROW_WORDS)[None, :]
        tl.store(target[:, None] + place[None, :], codes.to(kind), mask=stored)
    else:
        patterns = tl.reshape(codes.to(tl.uint32), (codes.shape[0], PATTERNS, PATTERN))
        for word in tl.static_range(WORDS):
            at = tl.arange(0, PATTERN) * BITS - word * WORD
            touches = (at > -BITS) & (at < WORD)
            left = tl.where(touches & (at > 0), at, 0).to(tl.uint32)
            right = tl.where(touches & (at < 0), -at, 0).to(tl.uint32)
            placed = (patterns << left[None, None, :]) >> right[None, None, :]
            packed = tl.sum(tl.where(touches[None, None, :], placed, 0), axis=2).to(kind)
            stored = row_in[:, None] & (place + word < ROW_WORDS)[None, :]
            tl.store(target[:, None] + (place + word)[None, :], packed, mask=stored)
