"""What follows from a profile alone: its settings per layer, and its bytes in a checkpoint."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from hf_adaptive_sparse.architecture import layer_index
from hf_adaptive_sparse.search.candidate import Candidate
from hf_adaptive_sparse.search.linear_bytes import LinearBytes
from hf_adaptive_sparse.search.space import OWN_DTYPE


def candidate_bytes(candidate: Candidate, linears: Mapping[str, LinearBytes]) -> int:
    """Return the bytes of the prunable weights as a checkpoint stores them.

    Args:
        candidate: The profile.
        linears: Prunable linear -> its formats.
    """
    return sum(
        linears[name].on_disk(
            numel - candidate.removed.get(name, 0), candidate.weight_bits.get(name, OWN_DTYPE)
        )
        for name, numel in candidate.numel.items()
    )


def layer_settings(candidate: Candidate, layers_name: str, num_layers: int) -> tuple[Hashable, ...]:
    """Return, per decoder layer, everything that a profile sets in it: weights removed and bits."""
    changes: list[list[tuple[str, int, int]]] = [[] for _ in range(num_layers)]
    for name in candidate.numel:
        change = (name, candidate.removed.get(name, 0), candidate.weight_bits.get(name, OWN_DTYPE))
        changes[layer_index(name, layers_name)].append(change)
    kv_cache = candidate.kv_cache
    if kv_cache is None:
        return tuple(map(tuple, changes))
    rest = (
        kv_cache.group_size,
        kv_cache.residual_length,
        kv_cache.key_mode,
        kv_cache.sink_length,
    )
    bits = kv_cache.layer_bits(num_layers)
    return tuple(zip(map(tuple, changes), bits, [rest] * num_layers, strict=True))
