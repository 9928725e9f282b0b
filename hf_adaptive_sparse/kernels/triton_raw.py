"""Tokens that are not packed, and what becomes of scores, for Triton's kernels of attention."""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
"""What finite numbers of a mask are no lower than."""

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def added_to_scores(given):
    """Return what numbers of a mask add to scores to base 2: float32.

    The lowest finite number must stay finite: where all is that low, all count alike. NaN stays.
    """
    scaled = given * LOG2E
    bounded = tl.where(scaled < LOWEST, LOWEST, scaled)
    return tl.where(given == float("-inf"), given, bounded)


@triton.jit
def masked(
    scores, visible, live, mask_rows, mask_stride, position, query_index,
    MASK: tl.constexpr, MASK_ROWS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return the scores (base 2) with -inf where a query does not see a token."""
    if CAUSAL:
        visible = visible & (position[None, :] <= query_index[:, None])
    if MASK != 0:
        place = position.to(tl.int64) * mask_stride
        if MASK_ROWS:
            given = tl.load(mask_rows[:, None] + place[None, :], mask=visible, other=0)
        else:  # one mask for all queries of the program: a vector
            given = tl.load(mask_rows + place, mask=live, other=0)[None, :]
        if MASK == 1:
            visible = visible & (given != 0)
        else:
            scores += added_to_scores(given.to(tl.float32))
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def softmax_step(scores, top, total):
    """Return probabilities (unnormalised), the factor of what was summed up, and the new state."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores - reference[:, None])
    correction = tl.exp2(top - reference)
    return p, correction, new_top, total * correction + tl.sum(p, axis=1)


@triton.jit
def attend_raw(
    acc, top, total, query_rows, query_in, raw_keys, raw_values, begin, end,
    raw_length, sinks, encoded, skip, row_in, scale, mask_rows, mask_stride, query_index,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, RAW_TILE: tl.constexpr,
    MASK: tl.constexpr, MASK_ROWS: tl.constexpr, CAUSAL: tl.constexpr, HALF: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Return sums, highest scores and sums of weights with raw tokens ``begin`` to ``end`` added.

    ``acc`` is ``(rows, values' channels)``, the others are ``(rows,)``; ``query_rows`` are the
    addresses of the rows' queries, and ``query_in`` says which of their channels there are.
    """
    c = tl.arange(0, query_in.shape[1])
    d = tl.arange(0, acc.shape[1])
    key_in = c < KEY_DIM
    value_in = d < VALUE_DIM
    raw_q = tl.load(query_rows[:, None] + c[None, :], mask=query_in, other=0)
    for tile in range(begin, end, RAW_TILE):
        index = tile + tl.arange(0, RAW_TILE)
        index_in = index < raw_length
        position = tl.where(index < sinks, index, index + encoded) - skip
        live = index_in & (position >= 0)
        keys = tl.load(
            raw_keys + index[None, :] * KEY_DIM + c[:, None],
            mask=index_in[None, :] & key_in[:, None],
            other=0,
        )
        if WIDEN:
            scores = tl.dot(raw_q.to(tl.float32), keys.to(tl.float32)) * scale
        elif HALF:
            scores = tl.dot(raw_q, keys) * scale
        else:
            scores = tl.dot(raw_q, keys, input_precision="tf32x3") * scale
        visible = row_in[:, None] & live[None, :]
        scores = masked(
            scores, visible, live, mask_rows, mask_stride, position, query_index,
            MASK, MASK_ROWS, CAUSAL,
        )  # fmt: skip
        p, correction, top, total = softmax_step(scores, top, total)
        values = tl.load(
            raw_values + index[:, None] * VALUE_DIM + d[None, :],
            mask=live[:, None] & value_in[None, :],
            other=0,
        )
        acc *= correction[:, None]
        if WIDEN:
            acc = tl.dot(p.to(values.dtype).to(tl.float32), values.to(tl.float32), acc)
        elif HALF:
            acc = tl.dot(p.to(values.dtype), values, acc)
        else:
            acc = tl.dot(p, values, acc, input_precision="tf32x3")
    return acc, top, total
