"""Products with a sparse weight on a GPU by Triton, and its decompression.

One to ``MAX_TOKENS`` tokens are vector products; for more the weight is decompressed by tiles
(``sparse_tiles``). Each kernel reads the weight once, as it lies::

    bytes = nnz * bits / 8 + rows * columns * (1 + 1 / 4) / 8
                                             0.578, 0.328, 0.203 of 16-bit dense ones
                                             with values of 16, 8 and 4 bits

beside scales, row offsets (4 bytes a row), x and the output. ``benchmarks/gpu_sparse.py`` measures.
With ``TRITON_INTERPRET=1`` the kernels run on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from hf_adaptive_sparse.kernels import triton_device
from hf_adaptive_sparse.kernels.triton_device import (
    Call,
    Launch,
    LaunchError,
    compile_and_launch,
    launch,
    launch_call,
    on_device,
    serves,
)
from hf_adaptive_sparse.kernels.triton_sizes import power_of_two
from hf_adaptive_sparse.kernels.triton_sparse_plan import (
    ROWS,
    decompress_constants,
    is_packed,
    vector_constants,
    vector_tiles,
)
from hf_adaptive_sparse.packing.offsets import count_block_offsets
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight

__all__ = [
    "MAX_TOKENS",
    "LaunchError",
    "decompress",
    "is_supported",
    "linear",
    "say_what_failed",
]

logger = logging.getLogger(__name__)

MAX_TOKENS = 8
"""Tokens up to which reading the sparse weight beats decompressing it."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SERVED = "triton serves"
_TUNED_ELEMENTS = 1 << 20  # of a weight: smaller ones take no time worth measuring


def is_supported(weight: SparseWeight) -> bool:
    """Return whether ``linear`` and ``decompress`` can take a weight."""
    if weight.codebook is not None:
        return False
    asked = (_SERVED, weight.device)
    if asked not in weight.prepared:
        weight.prepared[asked] = weight.dtype in _DTYPES and serves(weight.device)
    served: bool = weight.prepared[asked]
    return served


def linear(x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x @ W.T + bias`` for a few tokens.

    Products and sums are float32, and scales are applied to sums: the result is as close to the
    float32 reference as rounding it to its dtype allows.

    Args:
        x: ``(tokens, columns)``, 1 to ``MAX_TOKENS`` tokens, in the weight's dtype, on its device.
        weight: ``(rows, columns)``, contiguous tensors; see ``is_supported``.
        bias: ``(rows,)`` in that dtype, or None.

    Returns:
        ``(tokens, rows)`` in that dtype, contiguous.

    Raises:
        LaunchError: If Triton fails to compile or launch the kernel for this call, now or before:
            what failed once is not tried again.
    """
    output = x.new_empty((x.shape[0], weight.shape[0]))
    if output.numel() == 0 or x.shape[1] == 0:
        return output.zero_() if bias is None else output.copy_(bias)
    if x.stride(-1) != 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    with on_device(weight.device):
        _product(x, weight, bias, output)
    return output


def decompress(weight: SparseWeight, start: int, stop: int, output: torch.Tensor) -> None:
    """Write rows ``start`` to ``stop - 1`` of the weight to ``output``, on the current stream.

    Nothing is read back to the host, so that tiles can be enqueued one after the other.

    Args:
        weight: See ``is_supported``.
        start: First row.
        stop: Last row plus one.
        output: ``(stop - start, columns)`` in the weight's dtype, contiguous rows; codes times
            scales are rounded to it.

    Raises:
        LaunchError: As ``linear`` does.
    """
    if output.numel() == 0:
        return
    arguments = (
        *(weight.bitmask, weight.values, weight.row_offsets, _block_offsets(weight)),
        weight.values if weight.scales is None else weight.scales,
        *(output, start, *weight.shape, output.stride(0)),
    )
    written = ("decompress", is_packed(output), output.data_ptr() % 16, output.stride(0))
    asked = (*written, weight.values.data_ptr())  # another where the weight was moved
    with on_device(weight.device):
        known = weight.prepared.get(asked)
        if known is None:
            constants = decompress_constants(weight, output)
            kernel = ("decompress", weight.device, weight.dtype, *sorted(constants.items()))
            kind = (
                *(weight.device, weight.dtype, weight.shape, weight.row_offsets.dtype),
                *(*_alignments(arguments), *written),
            )
            call = Call("decompress", (stop - start, 1, 1), arguments, constants, kind)
            again = launch(_failures, kernel, lambda: launch_call(call, _chosen, _kernels))
            weight.prepared[asked] = (kernel, again)
            return
        kernel, again = known
        launch(_failures, kernel, lambda: again((stop - start, 1, 1), arguments))


def _alignments(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(part.data_ptr() % 16 for part in arguments if torch.is_tensor(part))


def say_what_failed(error: LaunchError) -> None:
    """Log, once per error, that a kernel failed and torch computes in its place."""
    triton_device.say_what_failed(
        logger,
        "for sparse weights",
        "Results stay right, but torch decompresses them for every product instead",
        str(error),
    )


_failures: dict[object, str] = {}
"""Kernels that failed to compile or launch on a device, and the error."""

_chosen: dict[object, Launch] = {}
"""What launches a kernel again, ``vector_kernel`` with the fastest tile, by what is called."""


def _product(
    x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None, output: torch.Tensor
) -> None:
    # As little as can be is done per call: a small layer takes a GPU less time than this.
    rows, columns = weight.shape
    tokens = x.shape[0]
    stride = x.stride(0) if tokens > 1 else columns
    arguments = (
        *(x, weight.bitmask, weight.values, weight.row_offsets, _block_offsets(weight)),
        weight.values if weight.scales is None else weight.scales,
        x if bias is None else bias,
        *(output, rows, columns, stride, tokens),
    )
    asked = (
        *(tokens, stride, x.data_ptr() % 16, None if bias is None else bias.data_ptr() % 16),
        *(weight.values.dtype, weight.values.data_ptr()),  # others where the weight was moved
    )
    known = weight.prepared.get(asked)
    if known is None:
        kernel = (
            *(x.device, x.dtype, weight.values.dtype, weight.row_offsets.dtype, weight.group_size),
            *(power_of_two(tokens), rows, columns, stride, bias is None),
        )
        call = (*kernel, *_alignments(arguments))
        if call not in _chosen:
            tiles = [vector_constants(weight, x, tile) for tile in vector_tiles(weight)]
            tiles = [{**tile, "BIAS": bias is not None} for tile in tiles]
            launch(_failures, kernel, lambda: _choose(call, weight, tiles, arguments))
            return
        known = weight.prepared[asked] = (kernel, _chosen[call])
    kernel, again = known
    launch(_failures, kernel, lambda: again(_grid(rows), arguments))


def _grid(rows: int) -> tuple[int, int, int]:
    return -(-rows // ROWS), 1, 1


def _choose(
    call: object, weight: SparseWeight, tiles: list[dict[str, int]], arguments: tuple[Any, ...]
) -> None:
    """Launch, and remember, the fastest of what can be compiled for, measured where it can be."""
    kernel, grid = _kernels().vector_kernel, _grid(weight.shape[0])
    # What fails here fails for good; of the others, those that run take part.
    fastest = compile_and_launch(kernel, grid, arguments, tiles[0])
    if weight.shape[0] * weight.shape[1] >= _TUNED_ELEMENTS:
        if not _can_measure(weight.device):
            return
        try:
            least = _seconds(functools.partial(fastest, grid, arguments))
        except torch.OutOfMemoryError:  # measuring takes some that the product does not need
            _chosen[call] = fastest
            return
        for constants in tiles[1:]:
            with contextlib.suppress(Exception):
                other = compile_and_launch(kernel, grid, arguments, constants)
                seconds = _seconds(functools.partial(other, grid, arguments))
                if seconds < least:
                    fastest, least = other, seconds
    _chosen[call] = fastest


def _can_measure(device: torch.device) -> bool:
    # Nothing may be waited for while a graph of launches is recorded.
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _seconds(function: Callable[[], None]) -> float:
    """Return what a call takes on the GPU when the weight is not in its cache."""
    testing = importlib.import_module("triton.testing")
    return float(testing.do_bench(function, warmup=2, rep=10, return_mode="median")) / 1000


def _block_offsets(weight: SparseWeight) -> torch.Tensor:
    offsets = weight.block_offsets
    if offsets is None:
        return count_block_offsets(weight.bitmask, weight.shape[1])
    return offsets


@functools.cache
def _kernels() -> ModuleType:
    # Not at the head of this module: Triton is optional and slow to import.
    return importlib.import_module("hf_adaptive_sparse.kernels.triton_sparse_kernels")
