"""Attention over what a cache layer holds: straight from the packed blocks, or decoded.

``attend`` has the arguments of torch's ``scaled_dot_product_attention`` with the cache in place of
keys and values, and computes from the packed blocks where a kernel supports the call. Where none
does, the caller decodes both for torch, to the same result within the kernels' error bound.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch

from hf_adaptive_sparse.kernels import attention as native
from hf_adaptive_sparse.kernels import triton_attention
from hf_adaptive_sparse.kernels.library import MAX_CODES, active_path
from hf_adaptive_sparse.kernels.packed import (
    PackedBlocks,
    PackedCache,
    PackedKeys,
    PackedValues,
)
from hf_adaptive_sparse.kernels.triton_device import say_what_failed
from hf_adaptive_sparse.kvcache.pinned import Blocks, Pinned
from hf_adaptive_sparse.kvcache.store import TokenStore

logger = logging.getLogger(__name__)

MAX_ROWS = 64
"""Queries per KV head up to which the kernels are faster than decoding for torch's attention."""


@dataclass(slots=True)
class PinnedPair:
    """Keys and values of one layer as they were at one moment.

    Attributes:
        keys: The keys.
        values: The values, of the same tokens.
        blocks: What kernels read of both, see ``packed_blocks``.
    """

    keys: Pinned
    values: Pinned
    blocks: PackedBlocks | None

    @property
    def packed(self) -> PackedCache | None:
        """All that kernels read, None where they cannot."""
        keys, values = self.keys, self.values
        if self.blocks is None or (keys.sinks, keys.skip) != (values.sinks, values.skip):
            return None
        if keys.raw.shape[2] != values.raw.shape[2]:
            return None
        return PackedCache(self.blocks, keys.raw, values.raw, keys.sinks, keys.skip)


def pin_pair(keys: TokenStore, values: TokenStore, newest: int | None = None) -> PinnedPair:
    """Return the newest tokens of keys and values, or all of them, as they are now."""
    return PinnedPair(keys.pin(newest), values.pin(newest), packed_blocks(keys, values))


def packed_blocks(keys: TokenStore, values: TokenStore) -> PackedBlocks | None:
    """Return what kernels read; None where that is not blocks of the same tokens in both.

    As where one of the two is not quantised, no block is full, or the keys alone were quantised
    anew.

    It is the same object until blocks are added, removed or moved.
    """
    if not keys.lengths or not values.lengths:
        return None
    key_blocks, value_blocks = keys.blocks, values.blocks
    known = key_blocks.packed_with
    if known is None or known[0] is not value_blocks:
        packed = _pack(key_blocks, value_blocks, keys.head_dim, values.head_dim)
        known = key_blocks.packed_with = (value_blocks, packed)
    return known[1]


def _pack(keys: Blocks, values: Blocks, key_dim: int, value_dim: int) -> PackedBlocks | None:
    if keys.codec is None or values.codec is None or keys.lengths != values.lengths:
        return None
    packed_keys = keys.codec.packed(keys.parts, key_dim)
    packed_values = values.codec.packed(values.parts, value_dim)
    if not isinstance(packed_keys, PackedKeys) or not isinstance(packed_values, PackedValues):
        return None
    lengths = keys.lengths if keys.has_short_ones else None
    return PackedBlocks(packed_keys, packed_values, keys.block_length, lengths)


def attend(
    pair: PinnedPair,
    query: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor | None:
    """Return attention over the packed cache, or None where that is for torch, on decoded states.

    Kernels have no gradient, no dropout and no autocasting, and more than ``MAX_ROWS`` queries per
    KV head, a prompt, are faster on decoded states.

    Args:
        pair: Keys and values ``(batch, kv_heads, tokens, head_dim)``.
        query: ``(batch, heads, queries, key head_dim)``, ``heads`` a multiple of ``kv_heads``.
        mask: Broadcastable to ``(batch, heads, queries, tokens)``, bool or added to the scores.
        is_causal: Whether query ``i`` sees tokens 0 to ``i`` only, as torch has it.
        scale: Factor of the scores; None: ``1 / sqrt(key head_dim)``.

    Returns:
        ``(batch, heads, queries, value head_dim)`` in the query's dtype.
    """
    packed = pair.packed
    if packed is None or query.ndim != 4:
        return None
    batch, kv_heads, _, key_dim = packed.raw_keys.shape
    queries_of, heads, queries, query_dim = query.shape
    if heads % kv_heads or queries_of != batch or query_dim != key_dim:
        return None
    if heads // kv_heads * queries > MAX_ROWS:
        return None
    needs_gradient = query.requires_grad or (mask is not None and mask.requires_grad)
    if needs_gradient and torch.is_grad_enabled():
        return None
    if query.dtype != packed.raw_keys.dtype or torch.is_autocast_enabled(query.device.type):
        return None
    if mask is not None and not _fits(mask, query, packed.length):
        return None
    if native.is_supported(query, packed, mask):
        return native.compute(query, packed, mask, is_causal=is_causal, scale=scale)
    if triton_attention.is_supported(query, packed, mask):
        try:
            return triton_attention.compute(query, packed, mask, is_causal=is_causal, scale=scale)
        except triton_attention.LaunchError as error:
            say_what_failed(
                logger,
                "for attention over the quantised cache",
                "Results stay right, but torch decodes all of the cache at every step instead",
                str(error),
            )
            return None
    _say_why_not(_why_not(query, packed, mask))
    return None


def _fits(mask: torch.Tensor, query: torch.Tensor, tokens: int) -> bool:
    """Return whether the mask broadcasts to (batch, heads, queries, tokens)."""
    if mask.ndim > 4:
        return False
    wanted = (*query.shape[:3], tokens)
    sizes = zip(reversed(mask.shape), reversed(wanted), strict=False)
    return all(size in (1, whole) for size, whole in sizes)


def _why_not(query: torch.Tensor, packed: PackedCache, mask: torch.Tensor | None) -> str:
    """Return, for people, what keeps the kernels from serving a call."""
    device = query.device.type
    if device == "cpu" and active_path() is None:
        return "the native kernels are not built, or are switched off"
    if device == "cpu" and packed.blocks.block_length > MAX_CODES:
        return (
            f"the kernels read blocks of up to {MAX_CODES} tokens; choose a smaller residual_length"
        )
    if device == "cpu" and query.shape[3] > MAX_CODES:
        return f"the kernels read keys of up to {MAX_CODES} channels, these have {query.shape[3]}"
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        return f"no kernel supports masks in {mask.dtype} with queries in {query.dtype}"
    return f"no kernel supports {query.dtype} on {device}"


@functools.cache
def _say_why_not(why: str) -> None:
    """Log, once per cause, that attention decodes the cache at every step."""
    logger.warning(
        "Attention over the quantised cache decodes all of it at every step, which is slow: %s "
        "(hf-adaptive-sparse env shows what there is).",
        why,
    )
