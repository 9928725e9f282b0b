"""What the attention kernels compute, in torch, to read and to test against."""

from __future__ import annotations

import math

import torch


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention in float32; a query that sees no token gets zeros.

    Args:
        query: ``(batch, heads, queries, key head_dim)``.
        keys: ``(batch, kv_heads, tokens, key head_dim)``, ``heads`` a multiple of ``kv_heads``.
        values: ``(batch, kv_heads, tokens, value head_dim)``.
        mask: Broadcastable to ``(batch, heads, queries, tokens)``: bool, True where a query sees a
            token, or a float that is added to the scores.
        is_causal: Whether query ``i`` sees tokens 0 to ``i`` only, as torch has it.
        scale: Factor of the scores; None: ``1 / sqrt(key head_dim)``.

    Returns:
        float32 ``(batch, heads, queries, value head_dim)``.
    """
    repeats = query.shape[1] // keys.shape[1]
    k = keys.float().repeat_interleave(repeats, dim=1)
    v = values.float().repeat_interleave(repeats, dim=1)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query.float() @ k.mT * factor
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.float()
    blind = scores.amax(dim=-1, keepdim=True) == -torch.inf
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return weights @ v
