"""Attention over what a cache layer holds: straight from the packed blocks, or decoded.

``attend`` has the arguments of torch's ``scaled_dot_product_attention`` with the cache in place of
keys and values, and computes from the packed blocks where a kernel serves the call. Where none does
the caller decodes both for torch, to the same result within the kernels' error bound.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch

from hf_adaptive_sparse.kernels import attention as native
from hf_adaptive_sparse.kernels import triton_attention
from hf_adaptive_sparse.kernels.library import active_path
from hf_adaptive_sparse.kernels.packed import PackedCache, PackedKeys, PackedValues
from hf_adaptive_sparse.kvcache.channel import ChannelCodec
from hf_adaptive_sparse.kvcache.grouped import GroupCodec
from hf_adaptive_sparse.kvcache.store import Pinned
from hf_adaptive_sparse.kvcache.transposed import TransposedCodec

logger = logging.getLogger(__name__)

MAX_ROWS = 64
"""Queries per KV head up to which the kernels are faster than decoding for torch's attention."""


@dataclass(frozen=True)
class PinnedPair:
    """Keys and values of one layer as they were at one moment.

    Attributes:
        keys: The keys.
        values: The values, of the same tokens.
    """

    keys: Pinned
    values: Pinned

    @functools.cached_property
    def packed(self) -> PackedCache | None:
        """What kernels read; None where one of the two is not quantised, or no block is full."""
        keys, values = self.keys, self.values
        if not keys.lengths or not values.lengths:
            return None
        if not isinstance(values.codec, TransposedCodec):
            return None
        group = None
        if isinstance(keys.codec, GroupCodec):
            group = min(keys.codec.group_size, keys.raw.shape[-1])
        elif not isinstance(keys.codec, ChannelCodec):
            return None
        codes, step, minimum = keys.parts
        value_codes, step_codes, min_codes, scales = values.parts
        return PackedCache(
            keys=PackedKeys(keys.codec.bits, codes, step, minimum, group),
            values=PackedValues(
                values.codec.bits,
                value_codes,
                step_codes,
                min_codes,
                scales,
                min(values.codec.group_size, values.raw.shape[-1]),
            ),
            raw_keys=keys.raw,
            raw_values=values.raw,
            block_length=keys.block_length,
            lengths=keys.lengths if keys.has_short_blocks else None,
            sinks=keys.sinks,
            skip=keys.skip,
        )


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
    heads, queries = query.shape[1], query.shape[2]
    if heads % kv_heads or (query.shape[0], query.shape[-1]) != (batch, key_dim):
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
        return native.attend(query, packed, mask, is_causal=is_causal, scale=scale)
    if triton_attention.is_supported(query, packed, mask):
        return triton_attention.attend(query, packed, mask, is_causal=is_causal, scale=scale)
    _say_why_not(query.device.type, query.dtype)
    return None


def _fits(mask: torch.Tensor, query: torch.Tensor, tokens: int) -> bool:
    """Return whether the mask broadcasts to (batch, heads, queries, tokens)."""
    if mask.ndim > 4:
        return False
    wanted = (*query.shape[:3], tokens)
    sizes = zip(reversed(mask.shape), reversed(wanted), strict=False)
    return all(size in (1, whole) for size, whole in sizes)


@functools.cache
def _say_why_not(device: str, dtype: torch.dtype) -> None:
    """Log, once per device and dtype, that attention decodes the cache at every step."""
    if device == "cpu" and active_path() is None:
        why = "the native kernels are not built or switched off"
    else:
        why = f"no kernel serves {dtype} on {device}"
    logger.warning(
        "Attention over the quantised cache decodes all of it at every step, which is slow: %s "
        "(hf-adaptive-sparse env shows what there is).",
        why,
    )
