"""Whether windows are long enough for the bits of a KV cache to make a difference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from hf_adaptive_sparse.profiles import KVCacheConfig


def longest_window(batches: Iterable[Mapping[str, torch.Tensor]]) -> int:
    """Return the tokens of the longest window; 0 where no batch holds tokens."""
    return max((window_tokens(batch) for batch in batches), default=0)


def window_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Return the tokens of each window of a batch; 0 where it holds none."""
    return token_shape(batch)[1]


def token_shape(batch: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Return how many windows a batch holds, and of how many tokens; zeros where it holds none.

    Of a batch with ``decoder_input_ids`` these are counted: the encoder may read no tokens.
    """
    for name in ("decoder_input_ids", "input_ids", "inputs_embeds"):
        if name in batch:
            return batch[name].shape[0], batch[name].shape[1]
    return 0, 0


def unfilled_block(longest: int, kv_cache: KVCacheConfig) -> str | None:
    """Return the remark that no window fills a block of the KV cache; ``None`` if one does.

    Args:
        longest: Tokens of the longest window.
        kv_cache: The KV profile.
    """
    if longest >= kv_cache.sink_length + kv_cache.residual_length:
        return None
    sinks = f" and sink_length={kv_cache.sink_length}" if kv_cache.sink_length else ""
    return (
        f"No window (longest: {longest} tokens) fills a block of the KV cache (residual_length="
        f"{kv_cache.residual_length}{sinks}), so nothing is quantised and its bits make no "
        "difference. Use longer windows or a shorter residual."
    )
