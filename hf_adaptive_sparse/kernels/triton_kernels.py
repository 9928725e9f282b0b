"""Triton kernels of attention over packed keys and values; ``triton_attention`` launches them.

Importing this module imports Triton, an optional dependency.

Both passes are packed rows times a vector, as steps and minima leave the inner products. With keys
by channel (``c``) and values by token (``t``) and group of channels (``g``)::

    score_t = sum_c (q_c step_c) code_tc + sum_c q_c min_c
    out_c   = sum_t (p_t step_gt) code_ct + sum_t p_t min_gt

Rows of a matrix product are pairs (group, query), each query once per group of channels: then one
product serves all groups, and row (g, q) is right in the channels of g. Matrix units take 16 rows
at least, so for one to a few queries the repetition is free. The queries of all heads that share a
KV head are rows of one program, so that codes are read and unpacked once for them.
"""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hf_adaptive_sparse.kernels.triton_raw import attend_raw, masked, softmax_step
from hf_adaptive_sparse.kernels.triton_rows import dot_rows, load_words


@triton.jit(
    do_not_specialize=[
        "q_sb", "q_sh", "q_sq", "kc_sb", "kc_sh", "km_sb", "km_sh", "vc_sb", "vc_sh", "vm_sb",
        "vm_sh", "vs_sb", "vs_sh", "vs_sn", "rk_sb", "rk_sh", "rv_sb", "rv_sh", "m_sb", "m_sh",
        "m_sq", "m_st", "row_count", "kv_heads", "repeats", "queries", "blocks",
        "encoded", "raw_length", "sinks", "skip", "tiles_per_split", "block_splits", "row_tiles",
    ]
)  # fmt: skip
def split_kernel(
    query, partial, key_codes, key_step, key_min, value_codes, step_codes, min_codes, scales,
    raw_keys, raw_values, mask, starts, scale,
    q_sb, q_sh, q_sq, kc_sb, kc_sh, kc_sn, km_sb, km_sh, km_sn, vc_sb, vc_sh, vc_sn,
    vm_sb, vm_sh, vm_sn, vs_sb, vs_sh, vs_sn,
    rk_sb, rk_sh, rv_sb, rv_sh, m_sb, m_sh, m_sq, m_st,
    row_count, kv_heads, repeats, queries, blocks, encoded, raw_length, sinks, skip,
    tiles_per_split, block_splits, row_tiles,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_WORD: tl.constexpr,
    VALUE_WORD: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, RAW_TILE: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, SHORT: tl.constexpr, ALIGNED: tl.constexpr, HALF: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Attend to one part of the sequence: ``tiles_per_split`` tiles of blocks, or all raw tokens.

    Program ``(batch, kv head, tile of rows) x split``; split ``block_splits`` is that of the raw
    tokens. Writes, per query, the sum of weighted values, the highest score, and the sum of weights
    (see ``combine_kernel``). Scores are to base 2: ``scale`` includes ``log2(e)``. ``WIDEN`` is for
    Triton's interpreter, which multiplies bfloat16 matrices wrongly.
    """
    program = tl.program_id(0)
    split = tl.program_id(1)
    row_tile = program % row_tiles
    pair = program // row_tiles
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)

    M: tl.constexpr = ROWS * GROUPS
    TILES: tl.constexpr = (BLOCK + TILE - 1) // TILE
    KEY_ROW: tl.constexpr = (KEY_DIM * KEY_BITS + 7) // 8
    VALUE_ROW: tl.constexpr = (BLOCK * VALUE_BITS + 7) // 8
    VALUE_GROUPS: tl.constexpr = (VALUE_DIM + VALUE_GROUP - 1) // VALUE_GROUP
    KEY_FULL: tl.constexpr = KEY_DIM == KEY_PAD
    VALUE_FULL: tl.constexpr = BLOCK % TILE == 0

    m = tl.arange(0, M)
    group = m // ROWS
    row = row_tile * ROWS + m % ROWS
    row_in = row < row_count
    head = kv_head * repeats + row // queries
    query_index = row % queries
    c = tl.arange(0, KEY_PAD)
    d = tl.arange(0, VALUE_PAD)
    key_in = c < KEY_DIM
    value_in = d < VALUE_DIM

    query_rows = query + batch * q_sb + head * q_sh + query_index * q_sq
    mask_rows = mask + batch * m_sb
    if MASK_ROWS:
        mask_rows = mask_rows + head * m_sh + query_index * m_sq
    query_in = row_in[:, None] & key_in[None, :]
    q = tl.load(query_rows[:, None] + c[None, :], mask=query_in, other=0).to(tl.float32) * scale
    if KEY_GROUP > 0:
        q = tl.where((c // KEY_GROUP)[None, :] == group[:, None], q, 0.0)
        q_sum = tl.sum(q, axis=1)
        q_peak = tl.max(tl.abs(q), axis=1)
        q_weights = q
        if HALF:
            q_weights = (q / tl.where(q_peak > 0, q_peak, 1.0)[:, None]).to(tl.float16)

    key_offset = batch * kc_sb + kv_head * kc_sh
    value_offset = batch * vc_sb + kv_head * vc_sh
    code_offset = batch * vm_sb + kv_head * vm_sh
    if ALIGNED:
        key_offset = tl.multiple_of(key_offset, 16)
        value_offset = tl.multiple_of(value_offset, 16)
        code_offset = tl.multiple_of(code_offset, 16)
    key_codes += key_offset
    value_codes += value_offset
    step_codes += code_offset
    min_codes += code_offset
    key_step += batch * km_sb + kv_head * km_sh
    key_min += batch * km_sb + kv_head * km_sh
    scales += batch * vs_sb + kv_head * vs_sh

    acc = tl.zeros((M, VALUE_PAD), dtype=tl.float32)
    acc_min = tl.zeros((M,), dtype=tl.float32)
    top = tl.full((M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((M,), dtype=tl.float32)

    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, blocks * TILES)
    for tile in range(first, last):
        block = tl.cast(tile // TILES, tl.int64)
        start_in_block = (tile % TILES) * TILE
        t = start_in_block + tl.arange(0, TILE)
        if SHORT:
            start = tl.load(starts + block)
            length = tl.load(starts + block + 1) - start
        else:
            start = (tile // TILES) * BLOCK
            length = BLOCK
        position = sinks - skip + start + t
        live = (t < length) & (position >= 0)
        stored = t < BLOCK

        # All codes are asked for first, so that those of the values arrive during the scores.
        key_rows = key_codes + block * kc_sn + t * KEY_ROW
        k0, k1, k2 = load_words(key_rows, stored, KEY_DIM, KEY_PAD, KEY_BITS, KEY_WORD, KEY_FULL)
        # A tile begins at a whole word of each row: TILE is a multiple of 32 codes or the block.
        value_rows = value_codes + block * vc_sn + d * VALUE_ROW
        value_rows += start_in_block * VALUE_BITS // 8
        v0, v1, v2 = load_words(
            value_rows, value_in, BLOCK - start_in_block, TILE, VALUE_BITS, VALUE_WORD, VALUE_FULL
        )

        # Scores: packed rows of tokens times queries.
        if KEY_GROUP > 0:
            KEY_GROUPS: tl.constexpr = (KEY_DIM + KEY_GROUP - 1) // KEY_GROUP
            inner = dot_rows(q_weights, k0, k1, k2, KEY_BITS, KEY_WORD, HALF)
            if HALF:
                inner *= q_peak[:, None]
            if GROUPS == 1:
                place = (block * km_sn + t)[None, :]
                place_in = stored[None, :]
            else:
                place = block * km_sn + t[None, :] * KEY_GROUPS + group[:, None]
                place_in = stored[None, :] & (group < KEY_GROUPS)[:, None]
            step = tl.load(key_step + place, mask=place_in, other=0).to(tl.float32)
            minimum = tl.load(key_min + place, mask=place_in, other=0).to(tl.float32)
            scores = inner * step + q_sum[:, None] * minimum
            if GROUPS > 1:
                per_group = tl.reshape(scores, (GROUPS, ROWS, TILE))
                over_groups = tl.sum(per_group, axis=0)[None, :, :]
                scores = tl.reshape(tl.broadcast_to(over_groups, (GROUPS, ROWS, TILE)), (M, TILE))
        else:
            place = block * km_sn + c
            step = tl.load(key_step + place, mask=key_in, other=0).to(tl.float32)
            minimum = tl.load(key_min + place, mask=key_in, other=0).to(tl.float32)
            weights = q * step[None, :]
            offset = tl.sum(q * minimum[None, :], axis=1)
            if HALF:
                peak = tl.max(tl.abs(weights), axis=1)
                weights = (weights / tl.where(peak > 0, peak, 1.0)[:, None]).to(tl.float16)
                inner = dot_rows(weights, k0, k1, k2, KEY_BITS, KEY_WORD, HALF)
                scores = inner * peak[:, None] + offset[:, None]
            else:
                inner = dot_rows(weights, k0, k1, k2, KEY_BITS, KEY_WORD, HALF)
                scores = inner + offset[:, None]
        visible = row_in[:, None] & live[None, :]
        scores = masked(
            scores, visible, live, mask_rows, m_st, position, query_index, MASK, MASK_ROWS, CAUSAL
        )
        p, correction, top, total = softmax_step(scores, top, total)

        # Values: packed rows of channels times probabilities.
        scale_row = scales + block * vs_sn
        step_base = tl.load(scale_row).to(tl.float32)
        step_unit = tl.load(scale_row + 1).to(tl.float32)
        min_base = tl.load(scale_row + 2).to(tl.float32)
        min_unit = tl.load(scale_row + 3).to(tl.float32)
        if GROUPS == 1:
            place = (block * vm_sn + t)[None, :]
            place_in = stored[None, :]
        else:
            place = block * vm_sn + group[:, None] * BLOCK + t[None, :]
            place_in = stored[None, :] & (group < VALUE_GROUPS)[:, None]
        step_code = tl.load(step_codes + place, mask=place_in, other=0)
        min_code = tl.load(min_codes + place, mask=place_in, other=0)
        step = step_base + step_code.to(tl.float32) * step_unit
        minimum = min_base + min_code.to(tl.float32) * min_unit
        acc_min = acc_min * correction + tl.sum(p * minimum, axis=1)
        if HALF:
            # Relative to the block's largest step and 2**14 times that, small ones keep digits.
            largest = tl.maximum(tl.abs(step_base) + 255 * step_unit, 1e-30)
            factor = 16384 / largest
            weights = (p * (step * factor)).to(tl.float16)
            inner = dot_rows(weights, v0, v1, v2, VALUE_BITS, VALUE_WORD, HALF)
            acc = acc * correction[:, None] + inner * (largest / 16384)
        else:
            inner = dot_rows(p * step, v0, v1, v2, VALUE_BITS, VALUE_WORD, HALF)
            acc = acc * correction[:, None] + inner

    acc += acc_min[:, None]

    # Raw tokens in the model's dtype, by the split behind those of the blocks.
    raw_first = tl.where(split == block_splits, 0, raw_length)
    raw_key_offset = batch * rk_sb + kv_head * rk_sh
    raw_value_offset = batch * rv_sb + kv_head * rv_sh
    if ALIGNED:
        raw_key_offset = tl.multiple_of(raw_key_offset, 8)
        raw_value_offset = tl.multiple_of(raw_value_offset, 8)
    raw_keys += raw_key_offset
    raw_values += raw_value_offset
    acc, top, total = attend_raw(
        acc, top, total, query_rows, query_in, raw_keys, raw_values, raw_first, raw_length,
        raw_length, sinks, encoded, skip, row_in, scale, mask_rows, m_st, query_index,
        KEY_DIM, VALUE_DIM, RAW_TILE, MASK, MASK_ROWS, CAUSAL, HALF, WIDEN,
    )  # fmt: skip

    # partial: (splits, heads' rows, VALUE_DIM) sums, then (2, splits, heads' rows) top and total.
    splits = tl.num_programs(1)
    all_rows = (tl.num_programs(0) // row_tiles).to(tl.int64) * row_count
    target = split * all_rows + pair.to(tl.int64) * row_count + row
    own_channels = (d // VALUE_GROUP)[None, :] == group[:, None]
    tl.store(
        partial + target[:, None] * VALUE_DIM + d[None, :],
        acc,
        mask=row_in[:, None] & value_in[None, :] & own_channels,
    )
    states = partial + splits * all_rows * VALUE_DIM
    once = row_in & (group == 0)
    tl.store(states + target, top, mask=once)
    tl.store(states + splits * all_rows + target, total, mask=once)


@triton.jit(do_not_specialize=["splits", "row_count"])
def combine_kernel(
    partial, output, splits, row_count,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Join the splits of one row (a query of a head); a row that sees no token becomes zeros."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, VALUE_PAD)
    states = partial + splits * row_count * VALUE_DIM
    acc = tl.zeros((VALUE_PAD,), dtype=tl.float32)
    top = -float("inf")
    total = 0.0
    for begin in range(0, splits, CHUNK):
        split = begin + tl.arange(0, CHUNK)
        split_in = split < splits
        place = split.to(tl.int64) * row_count + row
        tops = tl.load(states + place, mask=split_in, other=float("-inf"))
        totals = tl.load(states + splits * row_count + place, mask=split_in, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(tops - reference)
        correction = tl.exp2(top - reference)
        sums = tl.load(
            partial + place[:, None] * VALUE_DIM + d[None, :],
            mask=split_in[:, None] & (d < VALUE_DIM)[None, :],
            other=0.0,
        )
        acc = acc * correction + tl.sum(sums * weights[:, None], axis=0)
        total = total * correction + tl.sum(totals * weights, axis=0)
        top = new_top
    result = acc / tl.where(total > 0, total, 1.0)
    tl.store(output + row * VALUE_DIM + d, result.to(output.dtype.element_ty), mask=d < VALUE_DIM)
