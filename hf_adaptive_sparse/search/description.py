"""What follows from a profile alone: what it changes in each layer, and the bytes it leaves."""

from __future__ import annotations

from collections.abc import Hashable

from hf_adaptive_sparse.architecture import layer_index
from hf_adaptive_sparse.search.candidate import Candidate


def candidate_bytes(candidate: Candidate, value_bytes: int) -> int:
    """Return the bytes of the prunable weights as a checkpoint stores them.

    Those are values and a bitmask; a weight that keeps all its values and their dtype has none.

    Args:
        candidate: The profile. Of weights of 8 or 4 bits, the few bytes of their scales are left
            out.
        value_bytes: Bytes of a value in the model's dtype.
    """
    bits = 0
    for name, numel in candidate.numel.items():
        width = candidate.weight_bits.get(name, 16)
        kept = numel - candidate.removed.get(name, 0)
        bits += kept * (8 * value_bytes if width == 16 else width)
        bits += 0 if kept == numel and width == 16 else numel
    return -(-bits // 8)


def layer_settings(candidate: Candidate, layers_name: str, num_layers: int) -> tuple[Hashable, ...]:
    """Return, per decoder layer, all that a profile changes in it: what it removes, its bits."""
    changes: list[list[tuple[str, int, int]]] = [[] for _ in range(num_layers)]
    for name in candidate.numel:
        change = (name, candidate.removed.get(name, 0), candidate.weight_bits.get(name, 16))
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
