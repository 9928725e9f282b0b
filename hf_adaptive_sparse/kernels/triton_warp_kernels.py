"""Triton kernel of attention in which each warp goes its own way; ``triton_attention`` launches it.

What it computes is what ``triton_kernels.split_kernel`` does, for up to eight queries of a KV head
in 16 bits, with keys by channel. That one has codes moved through shared memory to where the matrix
units take them from, as numbers, and waits for all warps at each step. Here a thread reads words
where they are operands (``triton_warp``), and takes two codes out of them at a time
(``triton_pairs``): a third of the instructions, and nothing that a warp waits for but its loads.

Scores of eight tokens a time are a product of queries and keys, and their columns are dealt to
threads so that each has the probabilities of the tokens whose values it reads.
"""

# Triton knows no unpacking in tuples.
# ruff: noqa: RUF005
# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from hf_adaptive_sparse.kernels.triton_pairs import first_codes, pair_of, shrunk
from hf_adaptive_sparse.kernels.triton_raw import added_to_scores, attend_raw
from hf_adaptive_sparse.kernels.triton_warp import (
    load_numbers,
    load_words,
    multiply,
    no_sums,
    pick,
    row_and_part,
    row_max,
    row_sum,
    store_numbers,
    store_pairs,
)
from hf_adaptive_sparse.kernels.triton_words import joined

_CHANNELS: tl.constexpr = tl.constexpr(32)  # of values at once, eight per tile of the product
_PEAK: tl.constexpr = tl.constexpr(16384.0)  # of what codes are multiplied with, as float16
_UNIT_OF_SUMS: tl.constexpr = tl.constexpr(1024.0)  # 2**24 / _PEAK


@triton.jit
def _masked(
    scores, token, start, length, shift, mask_row, mask_stride, query_index,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, EDGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Return the scores (base 2) with -inf where a query does not see a token of a block."""
    if MASK != 0 or CAUSAL or EDGES:
        position = token + (start + shift)
        visible = position >= 0
        if EDGES:
            visible = visible & (token < length)
        if MASK != 0:
            place = tl.where(visible, position, 0).to(tl.int64) * mask_stride
            given = load_numbers(mask_row + place, NATIVE)
            if MASK == 1:
                visible = visible & (given != 0)
            else:
                scores += added_to_scores(given)
        if CAUSAL:
            visible = visible & (position <= query_index)
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def _scores_of(
    key_row, part, weights, DIM: tl.constexpr, UNITS: tl.constexpr, UNIT: tl.constexpr,
    BITS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Return products of queries with eight tokens each, of rows of which a thread has addresses.

    The tokens of its part, ``(N, 32)`` twice, from ``(N, 32)`` addresses.
    """
    WORDS: tl.constexpr = UNIT * BITS // 32
    sums = no_sums(key_row.shape[0])
    for unit in tl.static_range(UNITS):
        # Behind the last unit of a row any will do: its queries are zeros.
        place_of_unit = tl.minimum(unit * 4 + part, DIM // UNIT - 1) * (UNIT * BITS // 8)
        words = load_words(key_row + place_of_unit, WORDS, NATIVE)
        for place in tl.static_range(0, UNIT // 2, 2):
            b0 = pair_of(words, place, BITS, NATIVE)
            b1 = pair_of(words, place + 1, BITS, NATIVE)
            a0 = pick(weights, unit * (UNIT // 2) + place)
            a1 = pick(weights, unit * (UNIT // 2) + place + 1)
            sums = multiply(sums, a0, a1, b0, b1, NATIVE)
    return sums[0], sums[1]


@triton.jit
def _weight_of(weights, place: tl.constexpr, APART: tl.constexpr):
    return pick(weights[place % APART], place // APART)


@triton.jit
def _values_of(
    value_row, weights, UNITS: tl.constexpr, UNIT: tl.constexpr, BITS: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Return the sum of values times ``weights`` (a tuple of ``(pairs / APART, 32)``)."""
    APART: tl.constexpr = (12 if BITS % 3 == 0 else 16) // BITS
    WORDS: tl.constexpr = UNIT * BITS // 32
    sums = no_sums(value_row.shape[0])
    for unit in tl.static_range(UNITS):
        words = load_words(value_row + unit * 4 * UNIT * BITS // 8, WORDS, NATIVE)
        for place in tl.static_range(0, UNIT // 2, 2):
            b0 = pair_of(words, place, BITS, NATIVE)
            b1 = pair_of(words, place + 1, BITS, NATIVE)
            a0 = _weight_of(weights, unit * (UNIT // 2) + place, APART)
            a1 = _weight_of(weights, unit * (UNIT // 2) + place + 1, APART)
            sums = multiply(sums, a0, a1, b0, b1, NATIVE)
    return sums[0], sums[1]


@triton.jit
def _byte(words, place: tl.constexpr):
    return ((words[place // 4] >> (place % 4 * 8)) & 0xFF).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "q_sb", "q_sh", "q_sq", "kc_sb", "kc_sh", "km_sb", "km_sh", "vc_sb", "vc_sh", "vm_sb",
        "vm_sh", "vs_sb", "vs_sh", "vs_sn", "rk_sb", "rk_sh", "rv_sb", "rv_sh", "m_sb", "m_sh",
        "m_sq", "m_st", "row_count", "kv_heads", "repeats", "queries", "blocks",
        "encoded", "raw_length", "sinks", "skip", "tiles_per_split", "block_splits", "row_tiles",
    ]
)  # fmt: skip
def warp_kernel(
    query, partial, key_codes, key_step, key_min, value_codes, step_codes, min_codes, scales,
    raw_keys, raw_values, mask, starts, scale,
    q_sb, q_sh, q_sq, kc_sb, kc_sh, kc_sn, km_sb, km_sh, km_sn, vc_sb, vc_sh, vc_sn,
    vm_sb, vm_sh, vm_sn, vs_sb, vs_sh, vs_sn,
    rk_sb, rk_sh, rv_sb, rv_sh, m_sb, m_sh, m_sq, m_st,
    row_count, kv_heads, repeats, queries, blocks, encoded, raw_length, sinks, skip,
    tiles_per_split, block_splits, row_tiles,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr,
    RAW_PAD: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_UNIT: tl.constexpr,
    VALUE_UNIT: tl.constexpr, VALUE_GROUP: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, RAW_TILE: tl.constexpr,
    MASK: tl.constexpr, MASK_ROWS: tl.constexpr, CAUSAL: tl.constexpr, SHORT: tl.constexpr,
    EDGES: tl.constexpr, WIDEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Attend to one part of the sequence: ``tiles_per_split`` tiles of blocks, or some raw tokens.

    Program ``(batch, kv head) x split``, one warp; splits from ``block_splits`` on are those of
    ``RAW_TILE`` raw tokens each. Writes what ``split_kernel`` writes.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    splits = tl.num_programs(1)
    all_rows = tl.num_programs(0).to(tl.int64) * row_count
    first_row = split * all_rows + pair.to(tl.int64) * row_count
    states = partial + splits * all_rows * VALUE_DIM
    if split < block_splits:
        APART: tl.constexpr = (12 if VALUE_BITS % 3 == 0 else 16) // VALUE_BITS
        KEY_UNITS: tl.constexpr = KEY_PAD // (4 * KEY_UNIT)
        VALUE_UNITS: tl.constexpr = TILE // (4 * VALUE_UNIT)
        PAIR_GROUPS: tl.constexpr = TILE // (8 * APART)  # groups of pairs of a thread
        GROUPS: tl.constexpr = (VALUE_DIM + VALUE_GROUP - 1) // VALUE_GROUP
        CHUNKS: tl.constexpr = (VALUE_DIM + _CHANNELS - 1) // _CHANNELS
        KEY_ROW: tl.constexpr = KEY_DIM * KEY_BITS // 8
        VALUE_ROW: tl.constexpr = BLOCK * VALUE_BITS // 8
        TILES: tl.constexpr = BLOCK // TILE

        row, part = row_and_part()
        row_in = row < row_count
        own_row = tl.minimum(row, row_count - 1)
        head = kv_head * repeats + own_row // queries
        query_index = own_row % queries
        mask_row = mask + batch * m_sb + row * 0
        if MASK_ROWS:
            mask_row += head * m_sh + query_index * m_sq

        # Queries, where each thread multiplies its part of the channels.
        channel_pair = tl.arange(0, KEY_PAD // 8)[:, None]
        low = first_codes(channel_pair, part, KEY_UNIT, KEY_BITS)
        KEY_APART: tl.constexpr = (12 if KEY_BITS % 3 == 0 else 16) // KEY_BITS
        low_place = tl.minimum(low, KEY_DIM - 1 - KEY_APART)
        high_place = low_place + KEY_APART
        query_row = query + batch * q_sb + head * q_sh + query_index * q_sq
        factor = tl.where(row_in & (low < KEY_DIM), scale, 0.0)
        q_low = load_numbers(query_row + low_place, NATIVE) * factor
        q_high = load_numbers(query_row + high_place, NATIVE) * factor
        shrunk_low = shrunk(channel_pair, False, KEY_BITS)
        shrunk_high = shrunk(channel_pair, True, KEY_BITS)

        # A thread's column of a product of keys is a token, of one of values a channel.
        group = tl.arange(0, PAIR_GROUPS)[:, None]
        key_codes += batch * kc_sb + kv_head * kc_sh
        value_codes += batch * vc_sb + kv_head * vc_sh
        code_offset = batch * vm_sb + kv_head * vm_sh
        step_codes += code_offset
        min_codes += code_offset
        key_step += batch * km_sb + kv_head * km_sh
        key_min += batch * km_sb + kv_head * km_sh
        scales += batch * vs_sb + kv_head * vs_sh

        acc0 = ()
        acc1 = ()
        for _ in tl.static_range(CHUNKS):
            acc0 = acc0 + (tl.zeros((_CHANNELS // 8, 32), dtype=tl.float32),)
            acc1 = acc1 + (tl.zeros((_CHANNELS // 8, 32), dtype=tl.float32),)
        acc_min = ()
        for _ in tl.static_range(GROUPS):
            acc_min = acc_min + (tl.zeros((1, 32), dtype=tl.float32),)
        top = tl.full((1, 32), float("-inf"), dtype=tl.float32)
        total = tl.zeros((1, 32), dtype=tl.float32)

        first = split * tiles_per_split
        last = tl.minimum(first + tiles_per_split, blocks * TILES)
        for tile in range(first, last):
            block = tl.cast(tile // TILES, tl.int64)
            start_in_block = (tile % TILES) * TILE
            if SHORT:
                start = tl.load(starts + block)
                length = tl.load(starts + block + 1) - start
            else:
                start = (tile // TILES) * BLOCK
                length = BLOCK

            # Queries times steps, as float16, and what minima add to each score.
            place = block * km_sn
            weight_low = q_low * load_numbers(key_step + place + low_place, NATIVE)
            weight_high = q_high * load_numbers(key_step + place + high_place, NATIVE)
            offset = q_low * load_numbers(key_min + place + low_place, NATIVE)
            offset += q_high * load_numbers(key_min + place + high_place, NATIVE)
            offset = row_sum(tl.sum(offset, axis=0)[None, :], NATIVE)
            peak = tl.max(tl.maximum(tl.abs(weight_low), tl.abs(weight_high)), axis=0)[None, :]
            peak = tl.maximum(row_max(peak, NATIVE), 1e-30)
            raised = _PEAK / peak
            weights = joined(
                weight_low * (raised * shrunk_low), weight_high * (raised * shrunk_high),
                True, NATIVE,
            )  # fmt: skip
            unit_of_scores = peak * _UNIT_OF_SUMS

            # Scores of pairs of tokens as values have them.
            key_block = key_codes + block * kc_sn
            s0 = ()
            s1 = ()
            new_top = top
            for i in tl.static_range(APART):
                column = first_codes(group * APART + i, row // 2, VALUE_UNIT, VALUE_BITS)
                column = start_in_block + column + row % 2 * APART
                c0, c1 = _scores_of(
                    key_block + column * KEY_ROW, part, weights, KEY_DIM, KEY_UNITS, KEY_UNIT,
                    KEY_BITS, NATIVE,
                )  # fmt: skip
                c0 = c0 * unit_of_scores + offset
                c1 = c1 * unit_of_scores + offset
                token = first_codes(group * APART + i, part, VALUE_UNIT, VALUE_BITS)
                token = start_in_block + token
                c0 = _masked(
                    c0, token, start, length, sinks - skip, mask_row, m_st, query_index,
                    MASK, CAUSAL, EDGES, NATIVE,
                )  # fmt: skip
                c1 = _masked(
                    c1, token + APART, start, length, sinks - skip, mask_row, m_st, query_index,
                    MASK, CAUSAL, EDGES, NATIVE,
                )  # fmt: skip
                new_top = tl.maximum(new_top, tl.max(tl.maximum(c0, c1), axis=0)[None, :])
                s0 = s0 + (c0,)
                s1 = s1 + (c1,)
            new_top = row_max(new_top, NATIVE)
            reference = tl.where(new_top == float("-inf"), 0.0, new_top)
            correction = tl.exp2(top - reference)
            top = new_top

            # Probabilities, and times steps, as float16 on a scale of the block's largest step.
            scale_row = scales + block * vs_sn + row * 0
            step_base = load_numbers(scale_row, NATIVE)
            step_unit = load_numbers(scale_row + 1, NATIVE)
            min_base = load_numbers(scale_row + 2, NATIVE)
            min_unit = load_numbers(scale_row + 3, NATIVE)
            largest = tl.maximum(tl.abs(step_base) + 255 * step_unit, 1e-30)
            raised = _PEAK / largest
            step_base = step_base * raised
            step_unit = step_unit * raised
            p0 = ()
            p1 = ()
            seen = tl.zeros((1, 32), dtype=tl.float32)
            for i in tl.static_range(APART):
                p0 = p0 + (tl.exp2(s0[i] - reference),)
                p1 = p1 + (tl.exp2(s1[i] - reference),)
                seen += tl.sum(p0[i] + p1[i], axis=0)[None, :]
            total = total * correction + seen
            group_place = first_codes(group * APART, part, VALUE_UNIT, VALUE_BITS)
            place = block * vm_sn + start_in_block + group_place
            value_weights = ()
            new_min = ()
            for g in tl.static_range(GROUPS):
                steps = load_words(step_codes + place + g * BLOCK, APART // 2, NATIVE)
                minima = load_words(min_codes + place + g * BLOCK, APART // 2, NATIVE)
                of_group = ()
                minimum = tl.zeros((1, 32), dtype=tl.float32)
                for i in tl.static_range(APART):
                    step_low = _byte(steps, i) * step_unit + step_base
                    step_high = _byte(steps, i + APART) * step_unit + step_base
                    low_weight = p0[i] * step_low * shrunk(group * APART + i, False, VALUE_BITS)
                    high_weight = p1[i] * step_high * shrunk(group * APART + i, True, VALUE_BITS)
                    of_group = of_group + (joined(low_weight, high_weight, True, NATIVE),)
                    coded = p0[i] * _byte(minima, i) + p1[i] * _byte(minima, i + APART)
                    minimum += tl.sum(coded, axis=0)[None, :]
                value_weights = value_weights + (of_group,)
                minimum = seen * min_base + minimum * min_unit
                new_min = new_min + (acc_min[g] * correction + minimum,)
            acc_min = new_min

            value_block = value_codes + block * vc_sn + start_in_block * VALUE_BITS // 8
            value_block += part * (VALUE_UNIT * VALUE_BITS // 8)
            unit_of_values = largest * _UNIT_OF_SUMS
            new0 = ()
            new1 = ()
            for chunk in tl.static_range(CHUNKS):
                channel = tl.arange(0, _CHANNELS // 8)[:, None] * 8 + (chunk * _CHANNELS + row)
                channel = tl.minimum(channel, VALUE_DIM - 1)
                c0, c1 = _values_of(
                    value_block + channel * VALUE_ROW,
                    value_weights[chunk * _CHANNELS // VALUE_GROUP],
                    VALUE_UNITS, VALUE_UNIT, VALUE_BITS, NATIVE,
                )  # fmt: skip
                new0 = new0 + (acc0[chunk] * correction + c0 * unit_of_values,)
                new1 = new1 + (acc1[chunk] * correction + c1 * unit_of_values,)
            acc0 = new0
            acc1 = new1

        target = first_row + own_row
        for chunk in tl.static_range(CHUNKS):
            channel = tl.arange(0, _CHANNELS // 8)[:, None] * 8 + (chunk * _CHANNELS + 2 * part)
            minimum = row_sum(acc_min[chunk * _CHANNELS // VALUE_GROUP], NATIVE)
            store_pairs(
                partial + target * VALUE_DIM + channel, acc0[chunk] + minimum,
                acc1[chunk] + minimum, row_in & (channel < VALUE_DIM), NATIVE,
            )  # fmt: skip
        once = row_in & (part == 0)
        store_numbers(states + target, top, once, NATIVE)
        store_numbers(states + splits * all_rows + target, row_sum(total, NATIVE), once, NATIVE)
    else:
        m = tl.arange(0, 16)
        raw_row_in = m < row_count
        raw_head = kv_head * repeats + m // queries
        raw_query_index = m % queries
        query_rows = query + batch * q_sb + raw_head * q_sh + raw_query_index * q_sq
        query_in = raw_row_in[:, None] & (tl.arange(0, RAW_PAD) < KEY_DIM)[None, :]
        mask_rows = mask + batch * m_sb
        if MASK_ROWS:
            mask_rows = mask_rows + raw_head * m_sh + raw_query_index * m_sq
        begin = (split - block_splits) * RAW_TILE
        acc, highest, weight = attend_raw(
            tl.zeros((16, VALUE_PAD), dtype=tl.float32),
            tl.full((16,), float("-inf"), dtype=tl.float32),
            tl.zeros((16,), dtype=tl.float32),
            query_rows, query_in, raw_keys + batch * rk_sb + kv_head * rk_sh,
            raw_values + batch * rv_sb + kv_head * rv_sh, begin, begin + RAW_TILE,
            raw_length, sinks, encoded, skip, raw_row_in, scale, mask_rows, m_st, raw_query_index,
            KEY_DIM, VALUE_DIM, RAW_TILE, MASK, MASK_ROWS, CAUSAL, True, WIDEN,
        )  # fmt: skip
        d = tl.arange(0, VALUE_PAD)
        raw_target = first_row + m
        tl.store(
            partial + raw_target[:, None] * VALUE_DIM + d[None, :],
            acc,
            mask=raw_row_in[:, None] & (d < VALUE_DIM)[None, :],
        )
        tl.store(states + raw_target, highest, mask=raw_row_in)
        tl.store(states + splits * all_rows + raw_target, weight, mask=raw_row_in)
