"""Products of many tokens with a sparse weight: decompressed by tiles, multiplied by torch.

Rows of the weight are decompressed into a buffer of at most ``TILE_BYTES``, tile after tile, and
each tile goes through the matrix product that torch has for the device, and no dense copy of the
weight exists. With hundreds of tokens that product takes so long on a CPU that decompressing hardly
shows; an H100 multiplies 2,048 so fast that it adds 10 to 25 %.

A CPU that does not multiply 16-bit numbers itself leaves it to torch to widen them, and that takes
two to eight times as long as a product of float32. There, tiles are decompressed to float32, and
only the product is rounded to the weight's dtype: x and the product of a tile are there in float32.

On a GPU all of it is enqueued on the current stream, in order: a tile is overwritten after the
product that reads it. Tiles are larger there, because a product of few rows leaves most of the
device idle. They have as many rows as keep all of its processors busy, or a multiple: with few more
than that, a second round would take as long as the first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hf_adaptive_sparse.kernels import sparse_native, triton_sparse
from hf_adaptive_sparse.kernels.library import multiplies
from hf_adaptive_sparse.kernels.scratch import KEPT_BYTES, scratch
from hf_adaptive_sparse.kernels.triton_device import processors
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight

TILE_BYTES = KEPT_BYTES
"""Bytes of a tile at most, unless a single row is longer."""

GPU_TILE_BYTES = 64 << 20
"""The same on a GPU, but twice that where fewer rows would leave processors idle.

And what ``_GPU_ROWS`` rows take at least.
"""

_GPU_ROWS = 128  # that a program of a matrix product takes
_GPU_TOKENS = 256  # the same
_CPU_ROWS = 64  # of which torch's product wants whole multiples: 762 rows take 1.3 times as long


def linear(x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x @ W.T + bias``: ``(tokens, rows)`` of ``x`` ``(tokens, columns)``.

    Args:
        x: In the weight's dtype and on its device.
        weight: ``(rows, columns)``; codes times scales are rounded to the weight's dtype.
        bias: ``(rows,)`` in that dtype, or None.
    """
    tokens, rows = x.shape[0], weight.shape[0]
    result, dtype = x.dtype, _product_dtype(weight)
    if dtype is not result:
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    output: torch.Tensor | None = None
    for start, stop, tile in _tiles(weight, dtype, tokens):
        if stop - start == rows:  # what takes a host microseconds shows on a GPU
            return _multiply(x, tile, bias).to(result)
        if output is None:
            output = x.new_empty((tokens, rows), dtype=result)
        part = output[:, start:stop]
        product = part if dtype is result else tile.new_empty(part.shape)
        _multiply(x, tile, None if bias is None else bias[start:stop], out=product)
        if product is not part:
            part.copy_(product)
    return x.new_empty((tokens, rows), dtype=result) if output is None else output


def _multiply(
    x: torch.Tensor,
    tile: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if bias is None:
        return torch.mm(x, tile.t(), out=out)
    return torch.addmm(bias, x, tile.t(), out=out)


def input_gradient(gradient: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
    """Return ``gradient @ W``: ``(tokens, columns)`` of ``gradient`` ``(tokens, rows)``.

    Summed up over the tiles in float32.
    """
    total = gradient.new_zeros((gradient.shape[0], weight.shape[1]), dtype=torch.float32)
    dtype = _product_dtype(weight)
    for start, stop, tile in _tiles(weight, dtype, gradient.shape[0]):
        total += gradient[:, start:stop].to(dtype) @ tile
    return total.to(gradient.dtype)


def _product_dtype(weight: SparseWeight) -> torch.dtype:
    if weight.device.type == "cpu" and not multiplies(weight.dtype):
        return torch.float32
    return weight.dtype


def _tiles(
    weight: SparseWeight, dtype: torch.dtype, tokens: int
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield first row, last row + 1 and the decompressed rows, which the next tile overwrites."""
    rows, columns = weight.shape
    step = _tile_rows(weight, dtype, tokens)
    buffer = _buffer((step, columns), dtype, weight.device)
    for start in range(0, rows, max(1, step)):
        stop = min(rows, start + step)
        tile = buffer if stop - start == step else buffer[: stop - start]
        _decompress(weight, start, stop, tile)
        yield start, stop, tile


def _tile_rows(weight: SparseWeight, dtype: torch.dtype, tokens: int) -> int:
    rows, columns = weight.shape
    row_bytes = max(1, columns * dtype.itemsize)
    if weight.device.type == "cpu":
        most = max(1, TILE_BYTES // row_bytes)
        return min(rows, most - most % _CPU_ROWS if most > _CPU_ROWS else most)
    most = GPU_TILE_BYTES // row_bytes
    programs = -(-max(1, tokens) // _GPU_TOKENS)
    busy = max(1, processors(weight.device) // programs) * _GPU_ROWS
    if busy <= most:
        return min(rows, most - most % busy)
    if busy <= 2 * most:
        return min(rows, busy)
    return min(rows, max(_GPU_ROWS, most - most % _GPU_ROWS))


def _decompress(weight: SparseWeight, start: int, stop: int, tile: torch.Tensor) -> None:
    if sparse_native.is_supported(weight):
        sparse_native.decompress(weight, start, stop, tile)
        return
    if triton_sparse.is_supported(weight):
        try:
            triton_sparse.decompress(weight, start, stop, tile)
            return
        except triton_sparse.LaunchError as error:
            triton_sparse.say_what_failed(error)
    tile.copy_(weight.dense_rows(start, stop).to(weight.dtype))  # codes times scales are rounded


def _buffer(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return memory of a shape: on the CPU of one buffer per thread, kept for reuse."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)  # that allocator reuses by itself
    return scratch(shape[0] * shape[1] * dtype.itemsize).view(dtype).view(shape)
