"""Attention of a few queries over a packed cache, on a GPU by Triton.

The sequence is split so that a single sequence fills the device; each part is summed up by itself
and the parts are joined (flash decoding). Keys and values are never decoded in memory. Triton is
optional and imported at the first use; with ``TRITON_INTERPRET=1`` its interpreter runs the same
kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

import torch

from hf_adaptive_sparse.kernels.library import ENVIRONMENT_VARIABLE
from hf_adaptive_sparse.kernels.packed import PackedCache
from hf_adaptive_sparse.kernels.triton_blocks import GENERAL
from hf_adaptive_sparse.kernels.triton_cuts import channel_groups
from hf_adaptive_sparse.kernels.triton_device import (
    Launch,
    LaunchError,
    compile_and_launch,
    is_available,
    launch,
    on_device,
    say_what_failed,
    serves,
)
from hf_adaptive_sparse.kernels.triton_plan import Call, prepare

__all__ = ["LaunchError", "attend", "compute", "is_available", "is_supported"]

logger = logging.getLogger(__name__)

MAX_QUERIES = 64
"""Queries per head up to which reading packed codes is meant to beat decoding them.

More than a draft model's few: transformers may hand over all heads of a KV head as queries of one.
"""

MAX_HEAD_DIM = 256
MAX_GROUPS = 32
"""Groups of channels per head: each is a row of the matrix product."""

_SPLITS_AT_ONCE = 16
_SERVED = "triton serves"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_supported(query: torch.Tensor, cache: PackedCache, mask: torch.Tensor | None) -> bool:
    """Return whether ``attend`` can take these; see there."""
    device, dtype = query.device, query.dtype
    return (
        _serves_blocks(cache, device)
        and dtype in _DTYPES
        and cache.raw_keys.dtype is dtype
        and cache.raw_values.dtype is dtype
        and cache.raw_keys.device == cache.raw_values.device == device
        and 1 <= query.shape[2] <= MAX_QUERIES
        and query.shape[3] <= MAX_HEAD_DIM
        and (
            mask is None
            or (mask.device == device and (mask.dtype == torch.bool or mask.dtype in _DTYPES))
        )
    )


def _serves_blocks(cache: PackedCache, device: torch.device) -> bool:
    """Return whether the kernels read these blocks on a device: asked once, see ``prepared``."""
    known, asked = cache.blocks.prepared, (_SERVED, device)
    if asked not in known:
        known[asked] = (
            serves(device)
            and cache.blocks.keys.codes.device == cache.blocks.values.codes.device == device
            and cache.raw_values.shape[-1] <= MAX_HEAD_DIM
            and channel_groups(cache) <= MAX_GROUPS
        )
    served: bool = known[asked]
    return served


def attend(
    query: torch.Tensor,
    cache: PackedCache,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute ``reference.attention`` of the decoded cache without decoding it.

    Sums are float32. With 16-bit models the matrix units take codes as they are and queries times
    steps, and probabilities times steps, rounded to float16 (11 bits) on a scale of their own per
    query and block; with float32 models all is float32 (by three products of TF32). Raw tokens are
    multiplied in the model's dtype. No gradient.

    Args:
        query: ``(batch, heads, queries, key head_dim)`` in the cache's dtype: float32, bfloat16 or
            float16; ``heads`` a multiple of the cache's KV heads, 1 to ``MAX_QUERIES`` queries.
        cache: Keys and values, head_dim up to ``MAX_HEAD_DIM``, on the query's device. The inner
            dimensions of its parts should be contiguous: parts that are not are copied.
        mask: Broadcastable to ``(batch, heads, queries, cache.length)``: bool, True where a query
            sees a token, or float32, bfloat16, float16, added to the scores.
        is_causal: Whether query ``i`` sees tokens 0 to ``i`` only, as torch has it.
        scale: Factor of the scores; None: ``1 / sqrt(key head_dim)``.

    Returns:
        ``(batch, heads, queries, value head_dim)`` in the query's dtype, contiguous. A query that
        sees no token gets zeros.

    Raises:
        ValueError: If shapes, dtypes or devices are not those above, or Triton cannot run.
        LaunchError: If Triton fails to compile or launch the kernel for this call, now or before:
            what failed once is not tried again.
    """
    if not is_supported(query, cache, mask):
        raise ValueError(
            f"The Triton attention takes 1 to {MAX_QUERIES} queries in float32, bfloat16 or "
            "float16 on a CUDA device with Triton installed and not switched off by "
            f"{ENVIRONMENT_VARIABLE}, heads of up to {MAX_HEAD_DIM} channels in up to "
            f"{MAX_GROUPS} groups, and a mask that is bool or of these dtypes; got "
            f"{query.shape[-2]} queries in {query.dtype} on {query.device}, heads of "
            f"{query.shape[-1]} and {cache.raw_values.shape[-1]} channels, a mask of "
            f"{None if mask is None else mask.dtype}."
        )
    cache.check_query(query)
    return compute(query, cache, mask, is_causal=is_causal, scale=scale)


def compute(
    query: torch.Tensor,
    cache: PackedCache,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Do what ``attend`` does for a call that the caller has checked as ``attend`` would.

    A GPU takes less time for a layer's attention than Python takes to ask for it.
    """
    batch, heads, queries, key_dim = query.shape
    output = query.new_empty((batch, heads, queries, cache.raw_values.shape[3]))
    if output.numel() == 0:
        return output
    if cache.length == 0:  # and a mask may have no memory
        return output.zero_()
    if query.stride(-1) != 1:
        query = query.contiguous()
    factor = key_dim**-0.5 if scale is None else scale
    with on_device(query.device):
        call, partial = prepare(query, cache, mask, is_causal, factor)
        try:
            launch(_failures, call.variant.kernel, lambda: _run(output, call, partial))
        except LaunchError as error:
            if call.variant.name == GENERAL:
                raise
            instead = "Attention goes on with a kernel of ours that takes all calls"
            say_what_failed(logger, "for packed keys and values", instead, str(error))
            call, partial = prepare(query, cache, mask, is_causal, factor, general=True)
            launch(_failures, call.variant.kernel, lambda: _run(output, call, partial))
    return output


_failures: dict[object, str] = {}
"""Kernels that failed to compile or launch on a device, and the error."""


_compiled: dict[object, tuple[Launch, Launch]] = {}
"""What launches the two kernels again, by what they are compiled for."""


def _run(output: torch.Tensor, call: Call, partial: torch.Tensor) -> None:
    arguments, grid, variant = call
    rows, value_dim = output.numel() // output.shape[3], output.shape[3]
    grids, joined = (grid, (rows, 1, 1)), (partial, output, grid[1], rows)
    if variant.launches is None:
        asked = (*variant.kernel, *variant.options.values(), *variant.kind)
        variant.launches = _compiled.get(asked)
    if variant.launches is not None:
        variant.launches[0](grids[0], arguments)
        variant.launches[1](grids[1], joined)
        return
    kernels, constants = _kernels(), {**variant.constants, **variant.options}
    kernel = getattr(
        kernels if variant.name == GENERAL else _warp_kernels(), f"{variant.name}_kernel"
    )
    combined = {"VALUE_DIM": value_dim, "VALUE_PAD": variant.constants["VALUE_PAD"]}
    combined |= {"CHUNK": _SPLITS_AT_ONCE, "num_warps": 4}
    variant.launches = _compiled[asked] = (
        compile_and_launch(kernel, grids[0], arguments, constants),
        compile_and_launch(kernels.combine_kernel, grids[1], joined, combined),
    )


def _kernels() -> ModuleType:
    # Not at the head of this module: Triton is optional and slow to import.
    return importlib.import_module("hf_adaptive_sparse.kernels.triton_kernels")


def _warp_kernels() -> ModuleType:
    return importlib.import_module("hf_adaptive_sparse.kernels.triton_warp_kernels")
