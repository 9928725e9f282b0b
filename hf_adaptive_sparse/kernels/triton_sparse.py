"""Products with a sparse weight on a GPU by Triton, and its decompression.

One token is a vector product, up to ``MAX_TOKENS`` go through the matrix units, and for more the
weight is decompressed by tiles (``sparse_tiles``). Each kernel reads the weight once, as it lies.
For one token that is all that is moved::

    bytes = nnz * bits / 8 + rows * columns / 8        0.5625, 0.3125, 0.1875 of 16-bit dense ones
                                                       with values of 16, 8 and 4 bits

beside scales, row offsets (4 bytes a row), x and the output. What it may gain at best over a dense
product follows from these and from the instructions per column and thread of the compiled inner
loop, which are 10.4, 12.1 and 14.5. An H100 (3.35 TB/s, 132 x 128 lanes at 1.76 GHz) issues 10 in
the time in which it reads a column with 16-bit values, 17.7 in that of a dense column: so at most
1.7, 1.5 and 1.2 times as fast as a dense product at full bandwidth.

**Not run on a GPU yet**: interpreted against the reference and compiled for sm_80 and sm_90;
``benchmarks/gpu_sparse.py`` measures. With ``TRITON_INTERPRET=1`` the kernels run on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType

import torch

from hf_adaptive_sparse.kernels.library import ENVIRONMENT_VARIABLE
from hf_adaptive_sparse.kernels.triton_device import LaunchError, interprets, launch, serves
from hf_adaptive_sparse.kernels.triton_sparse_plan import (
    decompress_tile,
    fixed_arguments,
    tokens_plan,
    vector_tiles,
)
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

MAX_TOKENS = 64
"""Tokens up to which reading the sparse weight is meant to beat decompressing it."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TUNED_ELEMENTS = 1 << 20  # of a weight: smaller ones take no time worth measuring
_JOINED_ROWS = 256


def is_supported(weight: SparseWeight) -> bool:
    """Return whether ``linear`` and ``decompress`` can take a weight."""
    return weight.dtype in _DTYPES and serves(weight.device)


def linear(x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x @ W.T + bias`` for a few tokens.

    Products and sums are float32 for one token, and what the matrix units make of the weight's
    dtype for more (float32 by three products of TF32); codes are exact there. Scales are applied to
    sums. So the result is as close to the float32 reference as rounding it to its dtype allows.

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
    with _on(weight.device):
        if x.shape[0] == 1:
            _vector(x, weight, bias, output)
        else:
            _tokens(x, weight, bias, output)
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
    tile = decompress_tile(weight)
    constants = {**fixed_arguments(weight), "ROWS": tile.rows, "COLUMNS": tile.columns}
    rows = stop - start

    def run() -> None:
        _kernels().decompress_kernel[(-(-rows // tile.rows),)](
            *_tensors(weight),
            output,
            *(start, rows, *weight.shape, output.stride(0)),
            **constants,
            num_warps=tile.warps,
        )

    with _on(weight.device):
        launch(_failures, _name("decompress", weight, constants), run)


@functools.cache
def say_what_failed(error: str) -> None:
    """Log, once per error, that a kernel failed and torch computes in its place."""
    logger.warning(
        "A Triton kernel for sparse weights failed. Results stay right, but torch decompresses "
        "them for every product instead, which is slow. %s=none switches the kernels off. The "
        "failure was: %s",
        ENVIRONMENT_VARIABLE,
        error,
    )


_failures: dict[object, str] = {}
"""Kernels that cannot be had on a device, and why."""

_chosen: dict[object, dict[str, int]] = {}
"""What ``vector_kernel`` is compiled for and launched with, by what is called."""


def _vector(
    x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None, output: torch.Tensor
) -> None:
    # As little as can be is done per call: a small layer takes a GPU less time than this.
    rows, columns = weight.shape
    formats = (weight.values.dtype, x.dtype, weight.group_size, weight.bitmask.data_ptr() % 4)
    call = (x.device, weight.shape, *formats, bias is None)

    def run(constants: dict[str, int]) -> None:
        _kernels().vector_kernel[(-(-rows // constants["ROWS"]),)](
            x,
            *_tensors(weight),
            x if bias is None else bias,
            output,
            *(rows, columns),
            **constants,
        )

    def choose_and_run() -> None:
        constants = _chosen.get(call)
        if constants is None:
            fixed = {**fixed_arguments(weight), "BIAS": bias is not None}
            constants = _choose(call, weight, fixed, run)
        run(constants)

    launch(_failures, call, choose_and_run)


def _choose(
    call: object,
    weight: SparseWeight,
    fixed: dict[str, int],
    run: Callable[[dict[str, int]], None],
) -> dict[str, int]:
    """Return the constants to launch with: of the fastest tile, measured where that can be done."""
    tiles = [
        {**fixed, "ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps}
        for tile in vector_tiles(weight)
    ]
    if weight.shape[0] * weight.shape[1] < _TUNED_ELEMENTS:
        _chosen[call] = tiles[0]
        return tiles[0]
    if not _can_measure(weight.device):
        return tiles[0]
    # What fails here fails for good; of the others, those that run take part.
    try:
        fastest, least = tiles[0], _seconds(functools.partial(run, tiles[0]))
    except torch.OutOfMemoryError:  # measuring takes some that the product does not need
        return tiles[0]
    for tile in tiles[1:]:
        with contextlib.suppress(Exception):
            seconds = _seconds(functools.partial(run, tile))
            if seconds < least:
                fastest, least = tile, seconds
    _chosen[call] = fastest
    return fastest


def _can_measure(device: torch.device) -> bool:
    # Nothing may be waited for while a graph of launches is recorded.
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _seconds(function: Callable[[], None]) -> float:
    """Return what a call takes on the GPU when the weight is not in its cache."""
    testing = importlib.import_module("triton.testing")
    return float(testing.do_bench(function, warmup=2, rep=10, return_mode="median")) / 1000


def _tokens(
    x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None, output: torch.Tensor
) -> None:
    (tokens, columns), rows = x.shape, weight.shape[0]
    plan = tokens_plan(weight, tokens)
    constants = {
        **fixed_arguments(weight),
        "ROWS": plan.tile.rows,
        "COLUMNS": plan.tile.columns,
        "TOKENS": plan.tokens,
        "WIDEN": x.dtype == torch.bfloat16 and interprets(),
    }

    def run() -> None:
        kernels = _kernels()
        partial = x.new_empty((plan.splits, tokens, rows), dtype=torch.float32)
        kernels.tokens_kernel[(-(-rows // plan.tile.rows), plan.splits)](
            x,
            *_tensors(weight),
            partial,
            *(rows, columns, tokens, x.stride(0), plan.words_per_split),
            **constants,
            num_warps=plan.tile.warps,
        )
        kernels.join_kernel[(-(-rows // _JOINED_ROWS), tokens)](
            partial,
            x if bias is None else bias,
            output,
            *(rows, tokens, plan.splits),
            BIAS=bias is not None,
            ROWS=_JOINED_ROWS,
            num_warps=4,
        )

    launch(_failures, (*_name("tokens", weight, constants), bias is not None), run)


def _name(kernel: str, weight: SparseWeight, constants: dict[str, int]) -> tuple[object, ...]:
    """Return what a kernel is compiled for."""
    return (kernel, weight.device, weight.dtype, *sorted(constants.items()))


def _tensors(weight: SparseWeight) -> tuple[torch.Tensor, ...]:
    scales = weight.values if weight.scales is None else weight.scales
    return weight.bitmask, weight.values, weight.row_offsets, scales


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@functools.cache
def _kernels() -> ModuleType:
    # Not at the head of this module: Triton is optional and slow to import.
    return importlib.import_module("hf_adaptive_sparse.kernels.triton_sparse_kernels")
