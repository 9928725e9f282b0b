"""Triton kernels of products with a sparse weight; ``triton_sparse`` launches them.

Importing this module imports Triton, an optional dependency. How a weight is read is described in
``triton_sparse_rows``. Arguments that all kernels are compiled for:

    BITS     per value: 32, 16, 8, 4
    GROUP    columns per scale, 0: one per row
    LIMIT    the largest code, 0: values are no codes
    ALIGNED  whether each row's mask is whole words of 64 bits
    WHOLE    whether codes can be read in words of four, see ``triton_sparse_rows``
    NATIVE   whether bytes are permuted by NVIDIA's instruction
    FULL     whether rows are whole tiles
    BLOCKS   blocks of 64 columns in a tile
    COLUMNS  columns per thread: 4, 8 or 16
"""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hf_adaptive_sparse.kernels.triton_sparse_rows import (
    block_starts,
    four_columns,
    four_of_x,
    mask_halves,
    place_of_columns,
    places,
    row_start,
    scales_of,
    set_bits,
)


@triton.jit
def _dot(acc, x, four, columns, w0, w1, w2, w3, FULL: tl.constexpr, PACKED: tl.constexpr):
    """Return ``acc`` plus the products of four columns with one token."""
    x0, x1, x2, x3 = four_of_x(x, four, columns, FULL, PACKED)
    acc += w0.to(tl.float32) * x0
    acc += w1.to(tl.float32) * x1
    acc += w2.to(tl.float32) * x2
    acc += w3.to(tl.float32) * x3
    return acc


@triton.jit
def _row_sums(
    x, x_stride, mask_row, offsets_row, value_row, left, taken, scales, row, columns,
    BITS: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr, ALIGNED: tl.constexpr,
    NATIVE: tl.constexpr, FULL: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return the sums of ``vector_kernel`` for each thread's columns, of four tokens."""
    row_bytes = (columns + 7) // 8
    blocks = (columns + 63) // 64
    inner, part = places(BLOCKS, COLUMNS)
    acc0 = tl.zeros((BLOCKS * 64 // COLUMNS,), dtype=tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    low, high = mask_halves(mask_row, inner, row_bytes, blocks, ALIGNED, FULL)
    start = block_starts(offsets_row, inner, blocks, FULL)
    for begin in range(0, blocks, BLOCKS):
        # Asked for a tile ahead: where the values lie is known only once the mask is here.
        ahead = begin + BLOCKS + inner
        low_ahead, high_ahead = mask_halves(mask_row, ahead, row_bytes, blocks, ALIGNED, False)
        start_ahead = block_starts(offsets_row, ahead, blocks, False)
        place, bits = place_of_columns(low, high, start + taken, part, COLUMNS)
        column = (begin + inner) * 64 + part * COLUMNS
        sum0 = tl.zeros_like(acc0)
        sum1 = sum0
        sum2 = sum0
        sum3 = sum0
        for i in tl.static_range(COLUMNS // 4):
            four = (column >> 2) + i
            w0, w1, w2, w3 = four_columns(value_row, left, place, bits, BITS, WHOLE, NATIVE)
            sum0 = _dot(sum0, x, four, columns, w0, w1, w2, w3, FULL, PACKED)
            if TOKENS > 1:
                sum1 = _dot(sum1, x + x_stride, four, columns, w0, w1, w2, w3, FULL, PACKED)
            if TOKENS > 2:
                sum2 = _dot(sum2, x + 2 * x_stride, four, columns, w0, w1, w2, w3, FULL, PACKED)
            if TOKENS > 3:
                sum3 = _dot(sum3, x + 3 * x_stride, four, columns, w0, w1, w2, w3, FULL, PACKED)
            place += set_bits(bits & 15)
            bits = bits >> 4
        unit = 1.0
        if GROUP > 0:
            scale = scales_of(scales, row, column, columns, GROUP, FULL)
            unit = scale.to(tl.float32) * (1.0 / LIMIT)
        acc0 += unit * sum0
        acc1 += unit * sum1
        acc2 += unit * sum2
        acc3 += unit * sum3
        low = low_ahead
        high = high_ahead
        start = start_ahead
    return acc0, acc1, acc2, acc3


@triton.jit
def _store_sum(acc, token: tl.constexpr, factor, added, output, row, rows):
    total = tl.sum(acc, axis=0) * factor + added
    tl.store(output + token * rows + row, total.to(output.dtype.element_ty))


@triton.jit(do_not_specialize=["rows"])
def vector_kernel(
    x, bitmask, values, row_offsets, block_offsets, scales, bias, output, rows, columns, x_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr, ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr, NATIVE: tl.constexpr, FULL: tl.constexpr, BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Multiply one to four tokens, ``x`` ``(tokens, columns)``, with a row per program.

    Sums are float32.
    """
    row = tl.program_id(0)
    mask_row = bitmask + row.to(tl.int64) * ((columns + 7) // 8)
    offsets_row = block_offsets + row.to(tl.int64) * ((columns + 63) // 64)
    value_row, taken, left, safe = row_start(values, row_offsets, row, rows, BITS)
    if WHOLE and safe:
        acc0, acc1, acc2, acc3 = _row_sums(
            x, x_stride, mask_row, offsets_row, value_row, left, taken, scales, row, columns,
            BITS, GROUP, LIMIT, ALIGNED, NATIVE, FULL, BLOCKS, COLUMNS, TOKENS, PACKED, True,
        )  # fmt: skip
    else:
        acc0, acc1, acc2, acc3 = _row_sums(
            x, x_stride, mask_row, offsets_row, value_row, left, taken, scales, row, columns,
            BITS, GROUP, LIMIT, ALIGNED, NATIVE, FULL, BLOCKS, COLUMNS, TOKENS, PACKED, False,
        )  # fmt: skip
    factor = 1.0
    if LIMIT > 0 and GROUP == 0:
        factor = tl.load(scales + row).to(tl.float32) * (1.0 / LIMIT)
    added = 0.0
    if BIAS:
        added = tl.load(bias + row).to(tl.float32)
    _store_sum(acc0, 0, factor, added, output, row, rows)
    if TOKENS > 1:
        _store_sum(acc1, 1, factor, added, output, row, rows)
    if TOKENS > 2:
        _store_sum(acc2, 2, factor, added, output, row, rows)
    if TOKENS > 3:
        _store_sum(acc3, 3, factor, added, output, row, rows)


@triton.jit
def _unit(scale, LIMIT: tl.constexpr):
    """Return ``scale / LIMIT``, rounded to nearest as on the CPU."""
    if scale.dtype == tl.float64:
        unit = scale / LIMIT
    else:
        unit = tl.div_rn(scale, tl.full(scale.shape, LIMIT, tl.float32))
    return unit


@triton.jit
def _joined(first, second):
    """Return two 16-bit numbers as one uint32, the first in its lower half."""
    low = first.to(tl.uint16, bitcast=True).to(tl.uint32)
    return low | (second.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def _write_four(
    output_row, four, columns, w0, w1, w2, w3, FULL: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Write four columns, at once where they are of 16 bits and ``PACKED`` says so."""
    if PACKED:
        upper = _joined(w2, w3).to(tl.uint64) << 32
        address = output_row.to(tl.pointer_type(tl.uint64)) + four
        if FULL:
            tl.store(address, upper | _joined(w0, w1).to(tl.uint64))
        else:
            tl.store(address, upper | _joined(w0, w1).to(tl.uint64), mask=four * 4 < columns)
    else:
        column = four * 4
        tl.store(output_row + column, w0, mask=column < columns)
        tl.store(output_row + column + 1, w1, mask=column + 1 < columns)
        tl.store(output_row + column + 2, w2, mask=column + 2 < columns)
        tl.store(output_row + column + 3, w3, mask=column + 3 < columns)


@triton.jit
def _write_row(
    mask_row, offsets_row, value_row, left, taken, scales, output_row, row, columns,
    BITS: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr, ALIGNED: tl.constexpr,
    NATIVE: tl.constexpr, FULL: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    PACKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = output_row.dtype.element_ty
    # In float64 for float32, as packing/weight_codes.py has it and why.
    wide: tl.constexpr = tl.float64 if kind == tl.float32 else tl.float32
    row_bytes = (columns + 7) // 8
    blocks = (columns + 63) // 64
    inner, part = places(BLOCKS, COLUMNS)
    if LIMIT > 0 and GROUP == 0:
        unit = _unit(tl.load(scales + row + part * 0).to(wide), LIMIT)
    for begin in range(0, blocks, BLOCKS):
        block = begin + inner
        low, high = mask_halves(mask_row, block, row_bytes, blocks, ALIGNED, FULL)
        start = block_starts(offsets_row, block, blocks, FULL)
        place, bits = place_of_columns(low, high, start + taken, part, COLUMNS)
        column = block * 64 + part * COLUMNS
        if GROUP > 0:
            scale = scales_of(scales, row, column, columns, GROUP, FULL)
            unit = _unit(scale.to(wide), LIMIT)
        for i in tl.static_range(COLUMNS // 4):
            w0, w1, w2, w3 = four_columns(value_row, left, place, bits, BITS, WHOLE, NATIVE)
            if LIMIT > 0:
                w0 = w0.to(wide) * unit
                w1 = w1.to(wide) * unit
                w2 = w2.to(wide) * unit
                w3 = w3.to(wide) * unit
            _write_four(
                output_row, (column >> 2) + i, columns,
                w0.to(kind), w1.to(kind), w2.to(kind), w3.to(kind), FULL, PACKED,
            )  # fmt: skip
            place += set_bits(bits & 15)
            bits = bits >> 4


@triton.jit(do_not_specialize=["first_row"])
def decompress_kernel(
    bitmask, values, row_offsets, block_offsets, scales, output, first_row, rows, columns,
    output_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr, ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr, NATIVE: tl.constexpr, FULL: tl.constexpr, BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write the weight's rows, from ``first_row`` on, to ``output``, a row per program."""
    place = tl.program_id(0)
    row = first_row + place
    mask_row = bitmask + row.to(tl.int64) * ((columns + 7) // 8)
    offsets_row = block_offsets + row.to(tl.int64) * ((columns + 63) // 64)
    output_row = output + place.to(tl.int64) * output_stride
    value_row, taken, left, safe = row_start(values, row_offsets, row, rows, BITS)
    if WHOLE and safe:
        _write_row(
            mask_row, offsets_row, value_row, left, taken, scales, output_row, row, columns,
            BITS, GROUP, LIMIT, ALIGNED, NATIVE, FULL, BLOCKS, COLUMNS, PACKED, True,
        )  # fmt: skip
    else:
        _write_row(
            mask_row, offsets_row, value_row, left, taken, scales, output_row, row, columns,
            BITS, GROUP, LIMIT, ALIGNED, NATIVE, FULL, BLOCKS, COLUMNS, PACKED, False,
        )  # fmt: skip
