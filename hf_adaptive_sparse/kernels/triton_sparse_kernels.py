"""Triton kernels of products with a sparse weight; ``triton_sparse`` launches them.

Importing this module imports Triton, an optional dependency. How a weight is read is described in
``triton_sparse_rows``. Arguments that all kernels are compiled for:

    BITS     per value: 32, 16, 8, 4
    WORD     bits of the words that the mask is read in: 32, or 8
    GROUP    columns per scale, 0: one per row
    LIMIT    the largest code, 0: values are no codes
    ROWS     rows of a tile
    COLUMNS  columns of a tile
"""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hf_adaptive_sparse.kernels.triton_sparse_rows import (
    are_safe,
    four_columns,
    four_of_x,
    in_order,
    mask_words,
    row_starts,
    scales_of_fours,
    set_bits,
)


@triton.jit
def _vector_sums(
    x, mask_rows, value_rows, left, taken, scales, row, row_in, columns, words,
    BITS: tl.constexpr, WORD: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """Return the sums of ``vector_kernel``, one for each four columns of a tile."""
    WORDS: tl.constexpr = COLUMNS // WORD
    acc = tl.zeros((ROWS, WORDS, WORD // 4), dtype=tl.float32)
    word = tl.arange(0, WORDS)
    mask = mask_words(mask_rows, row_in, word, words, WORD)
    for begin in range(0, words, WORDS):
        # Asked for a tile ahead: where the values lie is known only once the mask is here.
        ahead = mask_words(mask_rows, row_in, word + begin + WORDS, words, WORD)
        x0, x1, x2, x3 = four_of_x(x, word + begin, columns, WORD)
        w0, w1, w2, w3, count = four_columns(value_rows, left, mask, taken, BITS, WORD, SAFE)
        part = acc
        if GROUP > 0:
            part = tl.zeros_like(acc)
        part += w0.to(tl.float32) * x0[None, :, :]
        part += w1.to(tl.float32) * x1[None, :, :]
        part += w2.to(tl.float32) * x2[None, :, :]
        part += w3.to(tl.float32) * x3[None, :, :]
        if GROUP > 0:
            scale = scales_of_fours(scales, row, row_in, word + begin, columns, GROUP, WORD)
            part = acc + part * (scale.to(tl.float32) * (1.0 / LIMIT))
        acc = part
        taken += count
        mask = ahead
    return acc


@triton.jit(do_not_specialize=["rows"])
def vector_kernel(
    x, bitmask, values, row_offsets, scales, bias, output, rows, columns,
    BITS: tl.constexpr, WORD: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Multiply one token, ``x`` ``(columns,)``, with ``ROWS`` rows per program.

    Sums are float32.
    """
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    row_in = row < rows
    row_bytes = (columns + 7) // 8
    words = row_bytes // (WORD // 8)
    mask_rows = bitmask + row.to(tl.int64) * row_bytes
    value_rows, taken, left = row_starts(values, row_offsets, row, row_in, rows, BITS)
    if are_safe(row_offsets, first_row, rows, ROWS):
        acc = _vector_sums(
            x, mask_rows, value_rows, left, taken, scales, row, row_in, columns, words,
            BITS, WORD, GROUP, LIMIT, ROWS, COLUMNS, True,
        )  # fmt: skip
    else:
        acc = _vector_sums(
            x, mask_rows, value_rows, left, taken, scales, row, row_in, columns, words,
            BITS, WORD, GROUP, LIMIT, ROWS, COLUMNS, False,
        )  # fmt: skip
    total = tl.sum(tl.sum(acc, axis=2), axis=1)
    if LIMIT > 0 and GROUP == 0:
        total *= tl.load(scales + row, mask=row_in, other=0).to(tl.float32) * (1.0 / LIMIT)
    if BIAS:
        total += tl.load(bias + row, mask=row_in, other=0).to(tl.float32)
    tl.store(output + row, total.to(output.dtype.element_ty), mask=row_in)


@triton.jit(do_not_specialize=["rows", "tokens", "words_per_split"])
def tokens_kernel(
    x, bitmask, values, row_offsets, scales, partial, rows, columns, tokens, x_stride,
    words_per_split,
    BITS: tl.constexpr, WORD: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Multiply a few tokens with a part of the columns of ``ROWS`` rows, by the matrix units.

    Program (tile of rows, split of the columns) writes its sums to ``partial``, float32
    ``(splits, tokens, rows)``. What the columns before the split took is counted from their mask.
    Tiles do not cross groups. ``WIDEN`` is for Triton's interpreter, which multiplies bfloat16
    matrices wrongly.
    """
    WORDS: tl.constexpr = COLUMNS // WORD
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_in = row < rows
    row_bytes = (columns + 7) // 8
    words = row_bytes // (WORD // 8)
    first = tl.program_id(1) * words_per_split
    last = tl.minimum(first + words_per_split, words)
    mask_rows = bitmask + row.to(tl.int64) * row_bytes
    value_rows, taken, left = row_starts(values, row_offsets, row, row_in, rows, BITS)
    word = tl.arange(0, WORDS)
    for begin in range(0, first, WORDS):
        before = mask_words(mask_rows, row_in, word + begin, first, WORD)
        taken += tl.sum(set_bits(before), axis=1)
    token = tl.arange(0, TOKENS)
    x_rows = x + token.to(tl.int64) * x_stride
    acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    mask = mask_words(mask_rows, row_in, word + first, last, WORD)
    for begin in range(first, last, WORDS):
        ahead = mask_words(mask_rows, row_in, word + begin + WORDS, last, WORD)
        column = begin * WORD + tl.arange(0, COLUMNS)
        readable = (token < tokens)[:, None] & (column < columns)[None, :]
        numbers = tl.load(x_rows[:, None] + column[None, :], mask=readable, other=0)
        w0, w1, w2, w3, count = four_columns(value_rows, left, mask, taken, BITS, WORD, False)
        tile = in_order(w0, w1, w2, w3).to(numbers.dtype)
        if WIDEN:
            part = tl.dot(tile.to(tl.float32), tl.trans(numbers.to(tl.float32)))
        elif numbers.dtype == tl.float32:
            part = tl.dot(tile, tl.trans(numbers), input_precision="tf32x3")
        else:
            part = tl.dot(tile, tl.trans(numbers))
        if GROUP > 0:
            groups = (columns + GROUP - 1) // GROUP
            place = row.to(tl.int64) * groups + begin * WORD // GROUP
            scale = tl.load(scales + place, mask=row_in, other=0).to(tl.float32) * (1.0 / LIMIT)
            part *= scale[:, None]
        acc += part
        taken += count
        mask = ahead
    if LIMIT > 0 and GROUP == 0:
        scale = tl.load(scales + row, mask=row_in, other=0).to(tl.float32) * (1.0 / LIMIT)
        acc *= scale[:, None]
    place = (tl.program_id(1) * tokens + token).to(tl.int64) * rows
    written = row_in[:, None] & (token < tokens)[None, :]
    tl.store(partial + place[None, :] + row[:, None], acc, mask=written)


@triton.jit(do_not_specialize=["rows", "tokens", "splits"])
def join_kernel(
    partial, bias, output, rows, tokens, splits, BIAS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Add up the splits, and the bias: ``output`` ``(tokens, rows)``, a token per program row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_in = row < rows
    token = tl.program_id(1)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for split in range(splits):
        place = (split * tokens + token).to(tl.int64) * rows
        total += tl.load(partial + place + row, mask=row_in, other=0)
    if BIAS:
        total += tl.load(bias + row, mask=row_in, other=0).to(tl.float32)
    place = token.to(tl.int64) * rows
    tl.store(output + place + row, total.to(output.dtype.element_ty), mask=row_in)


@triton.jit
def _unit(scale, LIMIT: tl.constexpr):
    """Return ``scale / LIMIT``, rounded to nearest as on the CPU."""
    if scale.dtype == tl.float64:
        unit = scale / LIMIT
    else:
        unit = tl.div_rn(scale, tl.full(scale.shape, LIMIT, tl.float32))
    return unit


@triton.jit
def _write_rows(
    mask_rows, value_rows, left, taken, scales, output_rows, row, row_in, columns, words,
    BITS: tl.constexpr, WORD: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = COLUMNS // WORD
    kind: tl.constexpr = output_rows.dtype.element_ty
    # In float64 for float32, as packing/weight_codes.py has it and why.
    wide: tl.constexpr = tl.float64 if kind == tl.float32 else tl.float32
    if LIMIT > 0 and GROUP == 0:
        scale = tl.load(scales + row, mask=row_in, other=0)
        unit = _unit(scale.to(wide), LIMIT)[:, None, None]
    word = tl.arange(0, WORDS)
    mask = mask_words(mask_rows, row_in, word, words, WORD)
    for begin in range(0, words, WORDS):
        ahead = mask_words(mask_rows, row_in, word + begin + WORDS, words, WORD)
        w0, w1, w2, w3, count = four_columns(value_rows, left, mask, taken, BITS, WORD, SAFE)
        if LIMIT > 0:
            if GROUP > 0:
                scale = scales_of_fours(scales, row, row_in, word + begin, columns, GROUP, WORD)
                factor = _unit(scale.to(wide), LIMIT)
            else:
                factor = unit
            w0 = w0.to(wide) * factor
            w1 = w1.to(wide) * factor
            w2 = w2.to(wide) * factor
            w3 = w3.to(wide) * factor
        tile = in_order(w0.to(kind), w1.to(kind), w2.to(kind), w3.to(kind))
        column = begin * WORD + tl.arange(0, COLUMNS)
        written = row_in[:, None] & (column < columns)[None, :]
        tl.store(output_rows[:, None] + column[None, :], tile, mask=written)
        taken += count
        mask = ahead


@triton.jit(do_not_specialize=["first_row", "count"])
def decompress_kernel(
    bitmask, values, row_offsets, scales, output, first_row, count, rows, columns, output_stride,
    BITS: tl.constexpr, WORD: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write ``count`` of the weight's rows, from ``first_row`` on, to ``output``."""
    first = tl.program_id(0) * ROWS
    place = first + tl.arange(0, ROWS)
    row_in = place < count
    row = first_row + place
    row_bytes = (columns + 7) // 8
    words = row_bytes // (WORD // 8)
    mask_rows = bitmask + row.to(tl.int64) * row_bytes
    output_rows = output + place.to(tl.int64) * output_stride
    value_rows, taken, left = row_starts(values, row_offsets, row, row_in, rows, BITS)
    if are_safe(row_offsets, first_row + first, rows, ROWS):
        _write_rows(
            mask_rows, value_rows, left, taken, scales, output_rows, row, row_in, columns, words,
            BITS, WORD, GROUP, LIMIT, ROWS, COLUMNS, True,
        )  # fmt: skip
    else:
        _write_rows(
            mask_rows, value_rows, left, taken, scales, output_rows, row, row_in, columns, words,
            BITS, WORD, GROUP, LIMIT, ROWS, COLUMNS, False,
        )  # fmt: skip
