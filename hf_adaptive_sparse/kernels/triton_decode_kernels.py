"""Triton kernels that decode blocks of keys and values; ``triton_decoding`` launches them.

Importing this module imports Triton, an optional dependency.

The formats are those of ``kvcache/channel.py`` and ``grouped.py``, whose packed rows are tokens,
and of ``transposed.py``, whose are channels. Every operation is one of ``rounding.from_codes``, in
its order, so that states are the same to the last bit. The kernels are to be compiled without
``enable_fp_fusion``: a product that is not rounded before the sum is another number.

A program has some rows of packed codes of a block of a head. A thread takes a unit of a row, one
repetition of the pattern of codes: with 16-bit states eight codes, as a rule, which are 16 bytes to
write. Where rows are tokens it writes them where they belong; where rows are channels, a tile of
states is turned first, through shared memory. ``BY_BITS`` is for Triton's interpreter, which cuts
bfloat16 off instead of rounding to it.
"""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hf_adaptive_sparse.kernels.triton_encode_rows import widen
from hf_adaptive_sparse.kernels.triton_rows import load_units, unpack

_LARGEST_HALF: tl.constexpr = tl.constexpr(65504.0)


@triton.jit
def _place_of(heads, blocks):
    """Return the batch, head and block of a program, int64."""
    program = tl.program_id(0)
    pair = program // blocks
    return (
        (pair // heads).to(tl.int64),
        (pair % heads).to(tl.int64),
        (program % blocks).to(tl.int64),
    )


@triton.jit
def _target_of(
    output, starts, batch, head, block, o_b, o_h, o_t, TOKENS: tl.constexpr, SHORT: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Return the address of a block's first token, and how many are to be written."""
    if SHORT:
        first = tl.load(starts + block).to(tl.int64)
        length = tl.load(starts + block + 1) - first.to(tl.int32)
    else:
        first = block * TOKENS
        length = TOKENS
    offset = batch * o_b + head * o_h + first * o_t
    return output + tl.multiple_of(offset, ALIGN), length


@triton.jit
def _units(ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Return the row of each unit of a tile, and which of the row's ``UNITS`` it is.

    A tile is a tensor of one dimension, so that neighbouring threads have neighbouring units, and
    by bits: were it known that its places follow each other, a thread would be given several.
    """
    SIZE: tl.constexpr = ROWS * UNITS
    index = tl.arange(0, SIZE) & (SIZE - 1)
    return index // UNITS, index % UNITS


@triton.jit
def _codes(
    rows, row_in, unit, COUNT: tl.constexpr, UNITS: tl.constexpr, CODES: tl.constexpr,
    BITS: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Return the codes of units of packed rows of ``COUNT``, float32: ``(units, CODES)``."""
    w0, w1, w2 = load_units(rows, row_in, unit, COUNT, BITS, WORD, UNITS * CODES == COUNT)
    if WORD < 32:  # what processors compute with
        w0 = w0.to(tl.uint32)
        w1 = w1.to(tl.uint32)
        w2 = w2.to(tl.uint32)
    codes = unpack(w0, w1, w2, CODES, BITS, WORD, False)
    return tl.reshape(codes, (unit.shape[0], CODES))


@triton.jit
def _halves(source, place, inside, BFLOAT: tl.constexpr):
    """Return 16-bit floats as float32."""
    half = tl.load(source.to(tl.pointer_type(tl.uint16)) + place, mask=inside, other=0)
    return widen(half.to(tl.int32), BFLOAT)


@triton.jit
def _states(codes, step, minimum, kind: tl.constexpr, BY_BITS: tl.constexpr):
    """Return ``minimum + step * codes`` as torch rounds it, see ``rounding.from_codes``."""
    states = codes * step + minimum
    if kind == tl.float16:
        states = tl.minimum(states, _LARGEST_HALF)
    if BY_BITS:
        bits = states.to(tl.uint32, bitcast=True)
        half = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = half.to(tl.uint16).to(kind, bitcast=True)
    else:
        rounded = states.to(kind)
    return rounded


@triton.jit(
    do_not_specialize=[
        "c_b", "c_h", "c_n", "m_b", "m_h", "m_n", "o_b", "o_h", "o_t", "heads", "blocks",
    ]
)  # fmt: skip
def token_kernel(
    codes, step, minimum, starts, output, c_b, c_h, c_n, m_b, m_h, m_n, o_b, o_h, o_t, heads,
    blocks, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr,
    CODES: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, GROUP: tl.constexpr,
    SHORT: tl.constexpr, BFLOAT: tl.constexpr, BY_BITS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Decode ``ROWS`` tokens of a block whose packed rows are tokens.

    A step and a minimum belong to each token and group of ``GROUP`` channels; where that is 0, to
    each channel.
    """
    ROW: tl.constexpr = (WIDTH * BITS + 7) // 8
    batch, head, block = _place_of(heads, blocks)
    target, length = _target_of(
        output, starts, batch, head, block, o_b, o_h, o_t, TOKENS, SHORT, ALIGN
    )
    token, unit = _units(ROWS, UNITS)
    token += tl.program_id(1) * ROWS
    token_in = token < length
    rows = codes + batch * c_b + head * c_h + block * c_n + token * ROW
    found = _codes(rows, token_in, unit, WIDTH, UNITS, CODES, BITS, WORD)
    channel = unit[:, None] * CODES + tl.arange(0, CODES)[None, :]
    inside = token_in[:, None] & (channel < WIDTH)
    offset = batch * m_b + head * m_h + block * m_n
    place = channel
    place_in = channel < WIDTH
    if GROUP == 0:
        offset = tl.multiple_of(offset, ALIGN)
        if WIDTH % CODES == 0:  # where there is no channel, another one: that needs no mask
            last: tl.constexpr = WIDTH // CODES - 1
            place = tl.minimum(unit, last)[:, None] * CODES + tl.arange(0, CODES)[None, :]
            place_in = True
    else:
        if GROUP % CODES == 0:  # all codes of a unit have the same
            place = unit[:, None] * CODES
            place_in = place < WIDTH
        GROUPS: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
        place = (token * GROUPS)[:, None] + place // GROUP
        place_in = token_in[:, None] & place_in
    wide_step = _halves(step + offset, place, place_in, BFLOAT)
    wide_minimum = _halves(minimum + offset, place, place_in, BFLOAT)
    states = _states(found, wide_step, wide_minimum, output.dtype.element_ty, BY_BITS)
    below = tl.multiple_of(token.to(tl.int64) * o_t, ALIGN)
    tl.store(target + below[:, None] + channel, states, mask=inside)


@triton.jit(
    do_not_specialize=[
        "c_b", "c_h", "c_n", "m_b", "m_h", "m_n", "s_b", "s_h", "s_n", "o_b", "o_h", "o_t",
        "heads", "blocks",
    ]
)  # fmt: skip
def transposed_kernel(
    codes, step_codes, min_codes, scales, starts, output, c_b, c_h, c_n, m_b, m_h, m_n, s_b, s_h,
    s_n, o_b, o_h, o_t, heads, blocks, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr, WORD: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr,
    UNITS: tl.constexpr, GROUP: tl.constexpr, SHORT: tl.constexpr, BFLOAT: tl.constexpr,
    BY_BITS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Decode ``ROWS`` channels of a group of a block, whose packed rows are channels."""
    ROW: tl.constexpr = (TOKENS * BITS + 7) // 8
    PIECES: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    batch, head, block = _place_of(heads, blocks)
    target, length = _target_of(
        output, starts, batch, head, block, o_b, o_h, o_t, TOKENS, SHORT, ALIGN
    )
    group = tl.program_id(1) // PIECES
    within = tl.program_id(1) % PIECES * ROWS
    row, unit = _units(ROWS, UNITS)
    row_in = (within + row < GROUP) & (group * GROUP + within + row < WIDTH)
    rows = codes + batch * c_b + head * c_h + block * c_n + (group * GROUP + within + row) * ROW
    found = _codes(rows, row_in, unit, TOKENS, UNITS, CODES, BITS, WORD)
    found = tl.reshape(found, (ROWS, UNITS, CODES))

    token = tl.arange(0, UNITS)[:, None] * CODES + tl.arange(0, CODES)[None, :]
    place = tl.multiple_of(batch * m_b + head * m_h + block * m_n, ALIGN) + group * TOKENS + token
    step_code = tl.load(step_codes + place, mask=token < TOKENS, other=0).to(tl.float32)
    min_code = tl.load(min_codes + place, mask=token < TOKENS, other=0).to(tl.float32)
    scale = batch * s_b + head * s_h + block * s_n
    step = step_code * _halves(scales, scale + 1, True, BFLOAT)
    step += _halves(scales, scale, True, BFLOAT)
    minimum = min_code * _halves(scales, scale + 3, True, BFLOAT)
    minimum += _halves(scales, scale + 2, True, BFLOAT)

    states = _states(found, step[None, :, :], minimum[None, :, :], output.dtype.element_ty, BY_BITS)
    turned = tl.trans(tl.reshape(states, (ROWS, UNITS * CODES)))
    token = tl.arange(0, UNITS * CODES)
    below = tl.multiple_of(token.to(tl.int64) * o_t, ALIGN)
    within += tl.arange(0, ROWS)
    channel = group * GROUP + within
    channel_in = (within < GROUP) & (channel < WIDTH)
    inside = (token < length)[:, None] & channel_in[None, :]
    tl.store(target + below[:, None] + channel[None, :], turned, mask=inside)
