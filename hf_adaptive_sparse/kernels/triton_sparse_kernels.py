"""Triton kernels of products with a sparse weight; ``triton_sparse`` launches them.

Importing this module imports Triton, an optional dependency. How a weight is read is described in
``triton_sparse_rows``, how it is multiplied in ``triton_sparse_numbers``. Arguments that all
kernels are compiled for:

    BITS     per value: 32, 16, 8, 4
    GROUP    columns per scale, 0: one per row
    LIMIT    the largest code, 0: values are no codes
    ALIGNED  whether each row's mask is whole words of 64 bits
    WHOLE    whether values can be read in words, see ``triton_sparse_rows``
    NATIVE   whether NVIDIA's instructions can be had
    FULL     whether rows are whole tiles
    BLOCKS   blocks of 64 columns in a tile
    COLUMNS  columns per thread: 4 of 32 bits, 8 of 16, 8 or 16 with codes
"""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hf_adaptive_sparse.kernels.triton_sparse_numbers import (
    add_products,
    four_numbers,
    no_sums,
    rows_of_sums,
    words_of_eight,
)
from hf_adaptive_sparse.kernels.triton_sparse_rows import (
    block_starts,
    mask_halves,
    place_of_columns,
    places,
    read_words,
    row_start,
    scales_of,
    spread,
)
from hf_adaptive_sparse.kernels.triton_words import joined


@triton.jit
def _row(
    bitmask, block_offsets, values, row_offsets, row, rows, columns, BITS: tl.constexpr
):  # fmt: skip
    """Return a row's masks and block offsets, and of its values what ``row_start`` returns."""
    place = row.to(tl.int64)
    masks = bitmask + place * ((columns + 7) // 8)
    offsets = block_offsets + place * ((columns + 63) // 64)
    first, taken, left, safe = row_start(values, row_offsets, row, rows, BITS)
    return masks, offsets, first, taken, left, safe


@triton.jit
def _index(row, block, columns, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    """Return blocks' masks, in two words, and the values before them."""
    blocks = (columns + 63) // 64
    low, high = mask_halves(row[0], block, (columns + 7) // 8, blocks, ALIGNED, FULL)
    return low, high, block_starts(row[1], block, blocks, FULL)


@triton.jit
def _words(row, index, where, BITS: tl.constexpr, WHOLE: tl.constexpr, SAFE: tl.constexpr):
    """Return the words of each thread's columns, and their bits."""
    _masks, _offsets, values, taken, left, _safe = row
    low, high, start = index
    low_below, high_below, upper, shift = where
    place, bits = place_of_columns(low, high, start + taken, low_below, high_below, upper, shift)
    w0, w1, w2, w3, w4, within = read_words(values, place, left, BITS, WHOLE, SAFE)
    return w0, w1, w2, w3, w4, within, bits


@triton.jit
def _spread(words, BITS: tl.constexpr, COLUMNS: tl.constexpr, NATIVE: tl.constexpr):
    w0, w1, w2, w3, w4, within, bits = words
    return spread(w0, w1, w2, w3, w4, within, bits, BITS, COLUMNS, NATIVE)


@triton.jit
def _sums_of_rows(
    x, x_stride, tokens, row_u, row_v, scales, u, v, columns,
    BITS: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr, ALIGNED: tl.constexpr,
    NATIVE: tl.constexpr, FULL: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """Return the sums of ``vector_kernel`` for two rows, ``u`` and ``v``: four per token.

    ``row_u`` and ``row_v`` are theirs by ``_row``.
    """
    THREADS: tl.constexpr = BLOCKS * 64 // COLUMNS
    blocks = (columns + 63) // 64
    inner, low_below, high_below, upper, shift = places(BLOCKS, COLUMNS)
    where = (low_below, high_below, upper, shift)
    sums = no_sums(THREADS)
    for _ in tl.static_range(1, TOKENS):
        sums = sums + no_sums(THREADS)
    # Words are asked for a tile ahead, and where they lie is known only once the mask is here: the
    # index is asked for two tiles ahead. Behind the last tile it is that of the last again.
    # Unrolled by two, the loop took more registers and up to a quarter longer on an H100.
    index_u = _index(row_u, inner, columns, ALIGNED, FULL)
    index_v = _index(row_v, inner, columns, ALIGNED, FULL)
    words_u = _words(row_u, index_u, where, BITS, WHOLE, SAFE)
    words_v = _words(row_v, index_v, where, BITS, WHOLE, SAFE)
    ahead = tl.minimum(BLOCKS, blocks - BLOCKS) if FULL else BLOCKS
    index_u = _index(row_u, ahead + inner, columns, ALIGNED, FULL)
    index_v = _index(row_v, ahead + inner, columns, ALIGNED, FULL)
    for first in range(0, blocks, BLOCKS):
        next_u = _words(row_u, index_u, where, BITS, WHOLE, SAFE)
        next_v = _words(row_v, index_v, where, BITS, WHOLE, SAFE)
        ahead = first + 2 * BLOCKS
        if FULL:
            ahead = tl.minimum(ahead, blocks - BLOCKS)
        index_u = _index(row_u, ahead + inner, columns, ALIGNED, FULL)
        index_v = _index(row_v, ahead + inner, columns, ALIGNED, FULL)
        spread_u = _spread(words_u, BITS, COLUMNS, NATIVE)
        spread_v = _spread(words_v, BITS, COLUMNS, NATIVE)
        begin = first * 64
        unit_u = 1.0
        unit_v = 1.0
        if GROUP > 0:
            column = begin + tl.arange(0, THREADS) * COLUMNS
            unit_u = scales_of(scales, u, column, columns, GROUP, FULL).to(tl.float32)
            unit_v = scales_of(scales, v, column, columns, GROUP, FULL).to(tl.float32)
            unit_u *= 1.0 / LIMIT
            unit_v *= 1.0 / LIMIT
        added = ()
        for t in tl.static_range(TOKENS):
            before = (sums[4 * t], sums[4 * t + 1], sums[4 * t + 2], sums[4 * t + 3])
            x_row = x if t == 0 else x + tl.minimum(t, tokens - 1) * x_stride
            product = add_products(
                no_sums(THREADS) if GROUP > 0 else before, spread_u, spread_v, x_row, begin,
                columns, BITS, COLUMNS, THREADS, NATIVE, PACKED, FULL,
            )  # fmt: skip
            if GROUP > 0:
                product = (
                    before[0] + unit_u * product[0], before[1] + unit_u * product[1],
                    before[2] + unit_v * product[2], before[3] + unit_v * product[3],
                )  # fmt: skip
            added = added + product
        sums = added
        words_u = next_u
        words_v = next_v
    return sums


@triton.jit(do_not_specialize=["rows", "tokens"])
def vector_kernel(
    x, bitmask, values, row_offsets, block_offsets, scales, bias, output, rows, columns, x_stride,
    tokens,
    BITS: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr, ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr, NATIVE: tl.constexpr, FULL: tl.constexpr, BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Multiply a few tokens, ``x`` ``(tokens, columns)``, with two rows per program.

    Those up to ``TOKENS`` that there are not are the last one again, and are not written. Sums are
    float32. ``PACKED`` says that ``x`` can be read by 16 bytes, that a group is a multiple
    of 64 columns, and that a tile is columns for whole warps: see ``triton_sparse_numbers``.
    """
    u = tl.program_id(0) * 2
    v = tl.minimum(u + 1, rows - 1)
    row_u = _row(bitmask, block_offsets, values, row_offsets, u, rows, columns, BITS)
    row_v = _row(bitmask, block_offsets, values, row_offsets, v, rows, columns, BITS)
    if WHOLE and (row_u[5] and row_v[5]):
        sums = _sums_of_rows(
            x, x_stride, tokens, row_u, row_v, scales, u, v, columns,
            BITS, GROUP, LIMIT, ALIGNED, NATIVE, FULL, BLOCKS, COLUMNS, TOKENS, PACKED,
            WHOLE, True,
        )  # fmt: skip
    else:
        sums = _sums_of_rows(
            x, x_stride, tokens, row_u, row_v, scales, u, v, columns,
            BITS, GROUP, LIMIT, ALIGNED, NATIVE, FULL, BLOCKS, COLUMNS, TOKENS, PACKED,
            WHOLE, False,
        )  # fmt: skip
    unit_u = 1.0
    unit_v = 1.0
    if LIMIT > 0 and GROUP == 0:
        unit_u = tl.load(scales + u).to(tl.float32) * (1.0 / LIMIT)
        unit_v = tl.load(scales + v).to(tl.float32) * (1.0 / LIMIT)
    added_u = 0.0
    added_v = 0.0
    if BIAS:
        added_u = tl.load(bias + u).to(tl.float32)
        added_v = tl.load(bias + v).to(tl.float32)
    kind: tl.constexpr = output.dtype.element_ty
    for t in tl.static_range(TOKENS):
        of_token = (sums[4 * t], sums[4 * t + 1], sums[4 * t + 2], sums[4 * t + 3])
        total_u, total_v = rows_of_sums(of_token, PACKED, NATIVE)
        place = output + t * rows
        there = t < tokens
        tl.store(place + u, (total_u * unit_u + added_u).to(kind), mask=there)
        tl.store(place + v, (total_v * unit_v + added_v).to(kind), mask=there & (v > u))


@triton.jit
def _unit(scale, LIMIT: tl.constexpr):
    """Return ``scale / LIMIT``, rounded to nearest as on the CPU."""
    if scale.dtype == tl.float64:
        unit = scale / LIMIT
    else:
        unit = tl.div_rn(scale, tl.full(scale.shape, LIMIT, tl.float32))
    return unit


@triton.jit
def _store_words(
    output_row, w0, w1, w2, w3, begin, columns, COLUMNS: tl.constexpr, i: tl.constexpr,
    THREADS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Write a thread's four words at once, where its ``i``-th 16 bytes belong."""
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (THREADS, 4))
    SIZE: tl.constexpr = 4 if output_row.dtype.element_ty == tl.float32 else 2
    address = words_of_eight(output_row, begin * SIZE // 2, COLUMNS * SIZE // 2, i, THREADS)
    if FULL:
        tl.store(address, words)
    else:
        column = begin + tl.arange(0, THREADS) * COLUMNS + i * (16 // SIZE)
        tl.store(address, words, mask=(column < columns)[:, None])


@triton.jit
def _store_four(output_row, n0, n1, n2, n3, column, columns):
    tl.store(output_row + column, n0, mask=column < columns)
    tl.store(output_row + column + 1, n1, mask=column + 1 < columns)
    tl.store(output_row + column + 2, n2, mask=column + 2 < columns)
    tl.store(output_row + column + 3, n3, mask=column + 3 < columns)


@triton.jit
def _write_row(
    source, scales, output_row, row, columns,
    BITS: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr, ALIGNED: tl.constexpr,
    NATIVE: tl.constexpr, FULL: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    PACKED: tl.constexpr, WHOLE: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = output_row.dtype.element_ty
    HALF: tl.constexpr = kind == tl.float16
    # In float64 for float32, as packing/weight_codes.py has it and why.
    wide: tl.constexpr = tl.float64 if kind == tl.float32 else tl.float32
    THREADS: tl.constexpr = BLOCKS * 64 // COLUMNS
    inner, low_below, high_below, upper, shift = places(BLOCKS, COLUMNS)
    where = (low_below, high_below, upper, shift)
    if LIMIT > 0 and GROUP == 0:
        unit = _unit(tl.load(scales + row + inner * 0).to(wide), LIMIT)
    for first in range(0, (columns + 63) // 64, BLOCKS):
        index = _index(source, first + inner, columns, ALIGNED, FULL)
        words = _words(source, index, where, BITS, WHOLE, SAFE)
        w0, w1, w2, w3 = _spread(words, BITS, COLUMNS, NATIVE)
        begin = first * 64
        if PACKED and LIMIT == 0:
            _store_words(output_row, w0, w1, w2, w3, begin, columns, COLUMNS, 0, THREADS, FULL)
        else:
            column = begin + tl.arange(0, THREADS) * COLUMNS
            if GROUP > 0:
                unit = _unit(scales_of(scales, row, column, columns, GROUP, FULL).to(wide), LIMIT)
            for i in tl.static_range(COLUMNS // 4):
                n0, n1, n2, n3 = four_numbers(w0, w1, w2, w3, i, BITS, HALF, NATIVE)
                if LIMIT > 0:
                    n0 = (n0.to(wide) * unit).to(tl.float32)
                    n1 = (n1.to(wide) * unit).to(tl.float32)
                    n2 = (n2.to(wide) * unit).to(tl.float32)
                    n3 = (n3.to(wide) * unit).to(tl.float32)
                if not PACKED:
                    _store_four(
                        output_row, n0.to(kind), n1.to(kind), n2.to(kind), n3.to(kind),
                        column + 4 * i, columns,
                    )  # fmt: skip
                elif kind == tl.float32:
                    _store_words(
                        output_row, n0.to(tl.uint32, bitcast=True), n1.to(tl.uint32, bitcast=True),
                        n2.to(tl.uint32, bitcast=True), n3.to(tl.uint32, bitcast=True),
                        begin, columns, COLUMNS, i, THREADS, FULL,
                    )  # fmt: skip
                elif i % 2 == 0:
                    even0 = joined(n0, n1, HALF, NATIVE)
                    even1 = joined(n2, n3, HALF, NATIVE)
                else:
                    _store_words(
                        output_row, even0, even1,
                        joined(n0, n1, HALF, NATIVE), joined(n2, n3, HALF, NATIVE),
                        begin, columns, COLUMNS, i // 2, THREADS, FULL,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["first_row"])
def decompress_kernel(
    bitmask, values, row_offsets, block_offsets, scales, output, first_row, rows, columns,
    output_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr, ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr, NATIVE: tl.constexpr, FULL: tl.constexpr, BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write the weight's rows, from ``first_row`` on, to ``output``, a row per program.

    ``PACKED`` says that it can be written by 16 bytes.
    """
    place = tl.program_id(0)
    row = first_row + place
    output_row = output + place.to(tl.int64) * output_stride
    source = _row(bitmask, block_offsets, values, row_offsets, row, rows, columns, BITS)
    if WHOLE and source[5]:
        _write_row(
            source, scales, output_row, row, columns,
            BITS, GROUP, LIMIT, ALIGNED, NATIVE, FULL, BLOCKS, COLUMNS, PACKED, WHOLE, True,
        )  # fmt: skip
    else:
        _write_row(
            source, scales, output_row, row, columns,
            BITS, GROUP, LIMIT, ALIGNED, NATIVE, FULL, BLOCKS, COLUMNS, PACKED, WHOLE, False,
        )  # fmt: skip
