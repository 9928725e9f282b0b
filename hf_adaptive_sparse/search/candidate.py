"""A profile that meets the budget: what a trial evaluates and stores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_adaptive_sparse.profiles import CompressionProfile, KVCacheConfig, SparsityProfile
from hf_adaptive_sparse.search.byte_budget import Spent


@dataclass(frozen=True)
class Candidate:
    """A profile on the budget.

    Attributes:
        block_ratios: Ratio of each group of linears; empty if nothing is pruned.
        removed: Prunable linear -> number of weights it loses. Their sum is exact. Empty if
            nothing is pruned.
        numel: Prunable linear -> number of its weights.
        kv_cache: The KV profile, ``None`` if the cache is left alone.
        mean_kv_bits: Its width-weighted mean.
        weight_bits: Prunable linear -> bits of its weights; empty if all keep their dtype.
        spent: Bytes, where the space has a limit in bytes.
    """

    block_ratios: tuple[float, ...]
    removed: Mapping[str, int]
    numel: Mapping[str, int]
    kv_cache: KVCacheConfig | None
    mean_kv_bits: float | None
    weight_bits: Mapping[str, int] = field(default_factory=dict)
    spent: Spent | None = None

    @property
    def ratios(self) -> dict[str, float]:
        """Ratio per prunable linear, from which ``removal_count`` gives ``removed`` back."""
        return {name: count / self.numel[name] for name, count in self.removed.items()}

    @property
    def mean_sparsity(self) -> float | None:
        """Removed weights over all prunable weights; ``None`` if nothing is pruned."""
        if not self.removed:
            return None
        return sum(self.removed.values()) / sum(self.numel.values())

    @property
    def mean_weight_bits(self) -> float | None:
        """Mean bits of the prunable weights, removed ones included; ``None`` if not chosen."""
        if not self.weight_bits:
            return None
        stored = sum(bits * self.numel[name] for name, bits in self.weight_bits.items())
        return stored / sum(self.numel.values())

    @property
    def profile(self) -> CompressionProfile:
        """The profile as a value."""
        return CompressionProfile(
            sparsity=SparsityProfile(self.ratios) if self.removed else None,
            kv_cache=self.kv_cache,
            weight_bits=dict(self.weight_bits) or None,
        )

    @property
    def digest(self) -> str:
        """A key that two candidates share exactly if they compress a model in the same way."""
        kv_cache = None if self.kv_cache is None else self.kv_cache.to_dict()
        parts: list[Any] = [sorted(self.removed.items()), kv_cache]
        if self.weight_bits:
            parts.append(sorted(self.weight_bits.items()))
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_attributes(self) -> dict[str, Any]:
        """Return what is stored with a trial: plain JSON types."""
        attributes = {
            "profile": self.profile.to_dict(),
            "profile_digest": self.digest,
            "block_ratios": list(self.block_ratios),
            "mean_sparsity": self.mean_sparsity,
            "mean_kv_bits": self.mean_kv_bits,
        }
        if self.weight_bits:
            attributes["mean_weight_bits"] = self.mean_weight_bits
        if self.spent is not None:
            attributes["bytes"] = self.spent.to_dict()
        return attributes
