"""Checks of the states that a cache layer is given."""

from __future__ import annotations

import torch

from hf_adaptive_sparse.kvcache.store import TokenStore


def check_rank(states: torch.Tensor, kind: str, layer_idx: int) -> None:
    """Refuse states that have not four dimensions.

    Args:
        states: What was given.
        kind: "keys" or "values".
        layer_idx: Number of the decoder layer.

    Raises:
        ValueError: If they have not.
    """
    if states.ndim != 4:
        raise ValueError(
            f"Layer {layer_idx} of the cache takes {kind} of shape (batch, kv_heads, seq, "
            f"head_dim), got {tuple(states.shape)}."
        )


def refuse_misfits(store: TokenStore, states: torch.Tensor, kind: str, layer_idx: int) -> None:
    """Say what of the states does not fit the store, if anything; see ``TokenStore.fits``.

    Args:
        store: What is stored already.
        states: What was given.
        kind: "keys" or "values".
        layer_idx: Number of the decoder layer.

    Raises:
        ValueError: If they differ from what is stored in more than the number of tokens.
    """
    check_rank(states, kind, layer_idx)
    if states.device != store.device:
        raise ValueError(
            f"Layer {layer_idx} of the cache holds {kind} on {store.device}, got "
            f"states on {states.device}. A layer's cache stays where its first states were; "
            "after offload() call prefetch(), after moving the model reset()."
        )
    batch, kv_heads, _, head_dim = states.shape
    held = (store.batch_size, store.kv_heads, store.head_dim, store.dtype)
    if (batch, kv_heads, head_dim, states.dtype) != held:
        raise ValueError(
            f"Layer {layer_idx} of the cache holds {kind} of batch size {held[0]}, "
            f"{held[1]} heads of {held[2]} in {held[3]}; got batch size {batch}, {kv_heads} "
            f"heads of {head_dim} in {states.dtype}. A cache serves the model and the batch it "
            "was filled with: call reset() or make a new one (batch_repeat_interleave and "
            "batch_select_indices change the batch of a filled cache)."
        )
