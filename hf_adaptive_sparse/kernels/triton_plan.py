"""The arguments that kernels of the Triton attention get."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from hf_adaptive_sparse.kernels.packed import PackedCache
from hf_adaptive_sparse.kernels.triton_blocks import (
    WARP,
    Blocks,
    Variant,
    all_divisible,
    blocks_of,
    contiguous_rows,
)
from hf_adaptive_sparse.kernels.triton_sizes import ALIGNMENT

_LOG2E = math.log2(math.e)
_NO_MASK, _BOOL_MASK, _ADDED_MASK = 0, 1, 2


class Call(NamedTuple):
    """Arguments of ``split_kernel`` or ``warp_kernel``, which are the same.

    Attributes:
        arguments: In its order: tensors, scale, strides, counts.
        grid: Programs: (batch, KV head, tile of rows), splits, 1.
        variant: What the kernel is compiled for.
    """

    arguments: tuple[torch.Tensor | float, ...]
    grid: tuple[int, int, int]
    variant: Variant


def prepare(
    query: torch.Tensor,
    cache: PackedCache,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    *,
    general: bool = False,
) -> tuple[Call, torch.Tensor]:
    """Return the call of a kernel, of the general one if so asked, and the tensor it writes.

    That tensor is float32: sums of weighted values ``(splits, rows, value head_dim)``, then highest
    scores and sums of weights, ``(splits, rows)`` each, where rows are ``batch * heads * queries``.
    """
    batch, heads, queries, _ = query.shape
    blocks = blocks_of(query, cache, general)
    raw_keys, raw_values = _tokens(cache.raw_keys), _tokens(cache.raw_values)
    raw_length, value_dim = raw_keys.shape[2], raw_values.shape[3]
    splits = blocks.cut.block_splits + (raw_length > 0)
    if blocks.kernel == WARP:
        splits = blocks.cut.block_splits + -(-raw_length // blocks.cut.raw_tile)
    mask_kind, given_mask, mask_rows = _NO_MASK, query, False
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        given_mask = mask.expand(batch, heads, queries, cache.length)
        mask_strides = given_mask.stride()
        mask_kind = _ADDED_MASK
        if mask.dtype == torch.bool:
            mask_kind, given_mask = _BOOL_MASK, given_mask.view(torch.uint8)
        # transformers may hand over the heads of a KV head as queries, one mask for all of them.
        mask_rows = (heads > 1 and mask_strides[1] != 0) or (queries > 1 and mask_strides[2] != 0)
    partial = query.new_empty(
        splits * batch * heads * queries * (value_dim + 2), dtype=torch.float32
    )
    raw_strides = (*raw_keys.stride()[:2], *raw_values.stride()[:2])
    strides = (*query.stride()[:3], *raw_strides, *mask_strides)
    asked = (
        *(mask_kind, mask_rows, is_causal, cache.skip > 0, given_mask.dtype),
        *(query.data_ptr() % ALIGNMENT, given_mask.data_ptr() % ALIGNMENT),
        *(raw_keys.data_ptr() % ALIGNMENT, raw_values.data_ptr() % ALIGNMENT),
        *(all_divisible(raw_strides), max(strides) >> 31),
    )
    variant = blocks.variants.get(asked)
    if variant is None or asked[-1]:
        variant = _variant(query, blocks, asked, strides)
        blocks.variants[asked] = variant
    arguments: tuple[torch.Tensor | float, ...] = (
        *(query, partial, *blocks.tensors, raw_keys, raw_values, given_mask),
        query if blocks.starts is None else blocks.starts,
        scale * _LOG2E,
        *strides[:3],
        *blocks.strides,
        *strides[3:],
        *blocks.heads,
        *(blocks.count, cache.blocks.length, raw_length, cache.sinks, cache.skip),
        *blocks.cuts,
    )
    return Call(arguments, (blocks.programs, splits, 1), variant), partial


def _variant(
    query: torch.Tensor, blocks: Blocks, asked: tuple[Any, ...], strides: tuple[int, ...]
) -> Variant:
    mask_kind, mask_rows, is_causal, skips, *kind, raw_divisible, _ = asked
    constants = {
        **blocks.constants,
        "MASK": mask_kind,
        "MASK_ROWS": mask_rows,
        "CAUSAL": is_causal,
    }
    options = {"num_warps": blocks.cut.warps, "num_stages": blocks.cut.stages}
    if blocks.kernel == WARP:
        constants["EDGES"] = skips or blocks.starts is not None
    else:
        constants["ALIGNED"] = blocks.is_aligned and raw_divisible
        registers = blocks.cut.registers
        by_channel = constants["KEY_GROUP"] == 0
        if registers and not mask_rows and by_channel and torch.version.hip is None:
            options["maxnreg"] = registers
    return Variant(
        name=blocks.kernel,
        constants=constants,
        options=options,
        kernel=(blocks.kernel, query.device, query.dtype, *constants.values()),
        kind=(*blocks.kind, *kind, *(stride >> 31 for stride in strides)),
    )


def _tokens(part: torch.Tensor) -> torch.Tensor:
    """Return raw tokens with those of a head side by side: themselves, as a rule."""
    _, _, token, channel = part.stride()
    if channel == 1 and token == part.shape[3]:
        return part
    return contiguous_rows(part, 2)
