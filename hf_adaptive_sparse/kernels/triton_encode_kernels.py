"""Triton kernels that encode blocks of keys and values; ``triton_encoding`` launches them.

Importing this module imports Triton, an optional dependency.

The formats are those of ``kvcache/channel.py``, ``grouped.py`` and ``transposed.py``, with a kernel
each. Programs are blocks of heads, and where parts of a block have nothing to do with each other
(channels of keys per channel, tokens of keys per token) those parts. A program whose states cannot
be stored says so in ``refused``, and what it stored means nothing.
"""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hf_adaptive_sparse.kernels.triton_encode_rows import (
    codes_of,
    halving_order,
    inverse_of,
    magnitude,
    nearest_whole,
    quotient,
    round_down,
    round_up,
    scale_ends,
    store_packed,
    widen,
)

_INFINITE: tl.constexpr = tl.constexpr(0x7F800000)


@triton.jit
def _block_of(states, s_b, s_h, s_n, heads, blocks, head_blocks, ALIGNED: tl.constexpr):
    """Return where a program's block is stored, and the address of its states."""
    program = tl.program_id(0)
    pair = program // blocks
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    offset = batch * s_b + head * s_h + (program % blocks).to(tl.int64) * s_n
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return pair.to(tl.int64) * head_blocks + program % blocks, states + offset


@triton.jit
def _load(source, token, channel, s_t, inside):
    """Return elements as float32, 0 where they are not inside; ``token`` and ``channel`` 2-D."""
    x = tl.load(source + token.to(tl.int64) * s_t + channel, mask=inside, other=0)
    if x.dtype == tl.bfloat16:  # Triton's interpreter widens subnormal ones wrongly
        wide = widen(x.to(tl.uint16, bitcast=True).to(tl.int32), True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _store_halves(target, place, half, inside):
    tl.store(target.to(tl.pointer_type(tl.uint16)) + place, half.to(tl.uint16), mask=inside)


@triton.jit
def _stored_scale(low, high, LEVELS: tl.constexpr, BFLOAT: tl.constexpr):
    """Return minimum and step as halves, then as float32; see ``rounding.stored_scale``."""
    minimum_half = round_down(low, BFLOAT)
    minimum = widen(minimum_half, BFLOAT)
    step_half = round_up(quotient(high - minimum, LEVELS), BFLOAT)
    return minimum_half, step_half, minimum, widen(step_half, BFLOAT)


@triton.jit(
    do_not_specialize=["s_b", "s_h", "s_n", "heads", "blocks", "head_blocks"],
    do_not_specialize_on_alignment=["refused"],
)
def channel_kernel(
    states, codes, step, minimum, refused, s_b, s_h, s_n, s_t, heads, blocks,
    head_blocks, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, FITS: tl.constexpr,
    HALVINGS: tl.constexpr, COLUMNS: tl.constexpr, WORD: tl.constexpr, BFLOAT: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Encode ``COLUMNS`` channels of a block: a step and a minimum each, rows of tokens."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    ROW: tl.constexpr = (WIDTH * BITS + 7) // 8
    block, source = _block_of(states, s_b, s_h, s_n, heads, blocks, head_blocks, ALIGNED)
    first = tl.program_id(1) * COLUMNS
    channel = first + tl.arange(0, COLUMNS)
    channel_in = channel < WIDTH
    if FITS > 0 and TOKENS != 1 << HALVINGS:
        token, token_in = halving_order(TOKENS, HALVINGS)
    else:
        token = tl.arange(0, 1 << HALVINGS)
        token_in = token < TOKENS
    inside = token_in[:, None] & channel_in[None, :]
    x = _load(source, token[:, None], channel[None, :], s_t, inside)
    low, high = scale_ends(x, token_in, TOKENS, LEVELS, FITS, HALVINGS)
    minimum_half, step_half, low, wide = _stored_scale(low, high, LEVELS, BFLOAT)
    worst = tl.maximum(tl.max(magnitude(x)), tl.max(magnitude(wide)))
    tl.store(refused, 1, mask=worst >= _INFINITE)
    _store_halves(step, block * WIDTH + channel, step_half, channel_in)
    _store_halves(minimum, block * WIDTH + channel, minimum_half, channel_in)
    found = codes_of(x, low[None, :], inverse_of(wide)[None, :], LEVELS)
    found = tl.where(inside, found, 0)
    rows = codes + block * (TOKENS * ROW) + token * ROW
    store_packed(found, rows, token_in, first, BITS, WORD, ROW)


@triton.jit(
    do_not_specialize=["s_b", "s_h", "s_n", "heads", "blocks", "head_blocks"],
    do_not_specialize_on_alignment=["refused"],
)
def group_kernel(
    states, codes, step, minimum, refused, s_b, s_h, s_n, s_t, heads, blocks,
    head_blocks, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORD: tl.constexpr, BFLOAT: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Encode ``ROWS`` tokens of a block: a step and a minimum per group of channels."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    ROW: tl.constexpr = (WIDTH * BITS + 7) // 8
    GROUPS: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    block, source = _block_of(states, s_b, s_h, s_n, heads, blocks, head_blocks, ALIGNED)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token_in = token < TOKENS
    channel = tl.arange(0, COLUMNS)
    channel_in = channel < WIDTH
    inside = token_in[:, None] & channel_in[None, :]
    x = _load(source, token[:, None], channel[None, :], s_t, inside)
    worst = tl.max(magnitude(x))
    group_of = channel // GROUP
    place = (block * TOKENS + token) * GROUPS
    found = tl.zeros((ROWS, COLUMNS), tl.int32)
    for group in range(GROUPS):
        is_of = ((group_of == group) & channel_in)[None, :]
        low = tl.min(tl.where(is_of, x, float("inf")), axis=1)
        high = tl.max(tl.where(is_of, x, float("-inf")), axis=1)
        minimum_half, step_half, low, wide = _stored_scale(low, high, LEVELS, BFLOAT)
        worst = tl.maximum(worst, tl.max(magnitude(wide)))
        _store_halves(step, place + group, step_half, token_in)
        _store_halves(minimum, place + group, minimum_half, token_in)
        theirs = codes_of(x, low[:, None], inverse_of(wide)[:, None], LEVELS)
        found = tl.where(is_of, theirs, found)
    tl.store(refused, 1, mask=worst >= _INFINITE)
    rows = codes + block * (TOKENS * ROW) + token * ROW
    store_packed(found, rows, token_in, 0, BITS, WORD, ROW)


@triton.jit
def _second_level(numbers, inside, UP: tl.constexpr, BFLOAT: tl.constexpr):
    """Return 8-bit codes of numbers, what they stand for, base and unit, and their magnitude."""
    base_half = round_down(tl.min(tl.where(inside, numbers, float("inf"))), BFLOAT)
    base = widen(base_half, BFLOAT)
    spread = tl.max(tl.where(inside, numbers, float("-inf"))) - base
    unit_half = round_up(quotient(spread, 255.0), BFLOAT)
    unit = widen(unit_half, BFLOAT)
    levels = quotient(numbers - base, tl.where(unit > 0, unit, 1.0))
    whole = nearest_whole(levels)
    if UP:
        levels = tl.where(whole < levels, whole + 1.0, whole)
    else:
        levels = tl.where(whole > levels, whole - 1.0, whole)
    levels = tl.minimum(tl.maximum(levels, 0.0), 255.0)
    worst = tl.maximum(magnitude(base), magnitude(unit))
    return levels.to(tl.int32), levels * unit + base, base_half, unit_half, worst


@triton.jit
def _group_rows(group, WIDTH: tl.constexpr, GROUP: tl.constexpr, FITS: tl.constexpr,
                HALVINGS: tl.constexpr):  # fmt: skip
    """Return the channels of a group, which of them there are, and how many."""
    count = tl.minimum(WIDTH - group * GROUP, GROUP)
    if FITS > 0 and (GROUP != 1 << HALVINGS or WIDTH % GROUP != 0):
        channel, channel_in = halving_order(count, HALVINGS)
    else:
        channel = tl.arange(0, 1 << HALVINGS)
        channel_in = channel < count
    return group * GROUP + channel, channel_in, count


@triton.jit(
    do_not_specialize=["s_b", "s_h", "s_n", "heads", "blocks", "head_blocks"],
    do_not_specialize_on_alignment=["scales", "refused"],
)
def transposed_kernel(
    states, codes, step_codes, min_codes, scales, refused, s_b, s_h, s_n, s_t, heads, blocks,
    head_blocks, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, FITS: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, HALVINGS: tl.constexpr, COLUMNS: tl.constexpr,
    WORD: tl.constexpr, BFLOAT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Encode a block: steps and minima per token and group of channels, rows of channels.

    A tile is a group's channels by tokens. ``GROUPS`` is their number, or a power of two above.
    """
    LEVELS: tl.constexpr = (1 << BITS) - 1
    ROW: tl.constexpr = (TOKENS * BITS + 7) // 8
    COUNT: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    block, source = _block_of(states, s_b, s_h, s_n, heads, blocks, head_blocks, ALIGNED)
    token = tl.arange(0, COLUMNS)
    token_in = token < TOKENS
    every = tl.arange(0, GROUPS)
    lows = tl.zeros((GROUPS, COLUMNS), tl.float32)
    highs = tl.zeros((GROUPS, COLUMNS), tl.float32)
    worst = 0
    for group in range(COUNT):
        channel, channel_in, count = _group_rows(group, WIDTH, GROUP, FITS, HALVINGS)
        inside = channel_in[:, None] & token_in[None, :]
        x = _load(source, token[None, :], channel[:, None], s_t, inside)
        worst = tl.maximum(worst, tl.max(magnitude(x)))
        low, high = scale_ends(x, channel_in, count, LEVELS, FITS, HALVINGS)
        is_it = (every == group)[:, None]
        lows = tl.where(is_it, low[None, :], lows)
        highs = tl.where(is_it, high[None, :], highs)

    is_scale = (every < COUNT)[:, None] & token_in[None, :]
    min_levels, minimum, min_base, min_unit, bad = _second_level(lows, is_scale, False, BFLOAT)
    worst = tl.maximum(worst, bad)
    wanted = quotient(highs - minimum, LEVELS)
    step_levels, step, step_base, step_unit, bad = _second_level(wanted, is_scale, True, BFLOAT)
    worst = tl.maximum(worst, bad)
    tl.store(refused, 1, mask=worst >= _INFINITE)
    halves = (scales + block * 4).to(tl.pointer_type(tl.uint16))
    tl.store(halves, step_base.to(tl.uint16))
    tl.store(halves + 1, step_unit.to(tl.uint16))
    tl.store(halves + 2, min_base.to(tl.uint16))
    tl.store(halves + 3, min_unit.to(tl.uint16))
    place = block * (COUNT * TOKENS) + every[:, None] * TOKENS + token[None, :]
    tl.store(step_codes + place, step_levels.to(tl.uint8), mask=is_scale)
    tl.store(min_codes + place, min_levels.to(tl.uint8), mask=is_scale)
    inverse = inverse_of(step)

    for group in range(COUNT):
        channel, channel_in, _ = _group_rows(group, WIDTH, GROUP, FITS, HALVINGS)
        inside = channel_in[:, None] & token_in[None, :]
        x = _load(source, token[None, :], channel[:, None], s_t, inside)  # from the L1 cache
        is_it = (every == group)[:, None]
        low = tl.sum(tl.where(is_it, minimum, 0.0), axis=0)
        factor = tl.sum(tl.where(is_it, inverse, 0.0), axis=0)
        found = tl.where(inside, codes_of(x, low[None, :], factor[None, :], LEVELS), 0)
        rows = codes + block * (WIDTH * ROW) + channel * ROW
        store_packed(found, rows, channel_in, 0, BITS, WORD, ROW)
