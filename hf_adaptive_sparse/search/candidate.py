"""From a trial's parameters to the profile that is evaluated: sample, then project.

A new kind of choice adds its parameters to `suggest` and to `uniform_params`, and its projection
between the two; nothing else in the search knows what a parameter means.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_adaptive_sparse.profiles import CompressionProfile, KVCacheConfig, SparsityProfile
from hf_adaptive_sparse.search.kv_split import LayerBits
from hf_adaptive_sparse.search.projection import project_ratios, removal_counts
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace

if TYPE_CHECKING:
    from optuna.trial import BaseTrial


@dataclass(frozen=True)
class Candidate:
    """A profile on the budget.

    Attributes:
        block_ratios: Ratio of each block; empty if nothing is pruned.
        removed: Prunable linear -> number of weights it loses. Their sum is exact.
        numel: Prunable linear -> number of its weights.
        kv_cache: The KV profile, ``None`` if the cache is left alone.
        mean_kv_bits: Its width-weighted mean.
    """

    block_ratios: tuple[float, ...]
    removed: Mapping[str, int]
    numel: Mapping[str, int]
    kv_cache: KVCacheConfig | None
    mean_kv_bits: float | None

    @property
    def ratios(self) -> dict[str, float]:
        """Ratio per prunable linear, from which ``removal_count`` gives ``removed`` back."""
        return {name: count / self.numel[name] for name, count in self.removed.items()}

    @property
    def mean_sparsity(self) -> float | None:
        """Removed weights over all prunable weights; ``None`` if nothing is pruned."""
        if not self.numel:
            return None
        return sum(self.removed.values()) / sum(self.numel.values())

    @property
    def profile(self) -> CompressionProfile:
        """The profile as a value."""
        return CompressionProfile(
            sparsity=SparsityProfile(self.ratios) if self.removed else None,
            kv_cache=self.kv_cache,
        )

    @property
    def digest(self) -> str:
        """A key that two candidates share exactly if they compress alike."""
        kv_cache = None if self.kv_cache is None else self.kv_cache.to_dict()
        text = json.dumps([sorted(self.removed.items()), kv_cache], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_attributes(self) -> dict[str, Any]:
        """Return what is stored with a trial: plain JSON types."""
        return {
            "profile": self.profile.to_dict(),
            "profile_digest": self.digest,
            "block_ratios": list(self.block_ratios),
            "mean_sparsity": self.mean_sparsity,
            "mean_kv_bits": self.mean_kv_bits,
        }


def suggest(trial: BaseTrial, space: SearchSpace, shape: ModelShape) -> Candidate:
    """Draw a profile: sample every free choice, then project onto the budget.

    Args:
        trial: Anything with Optuna's ``suggest_float``.
        space: The search space.
        shape: The space laid over the model.

    Returns:
        A candidate that meets the budget.
    """
    sampled = [space.target] * len(shape.blocks)
    if space.searches_sparsity and len(shape.blocks) > 1:
        low, high = space.grid
        sampled = [
            trial.suggest_float(_ratio_name(block), low, high, step=space.step)
            for block in range(len(shape.blocks))
        ]
    priorities = [0.0] * shape.num_layers
    for layer in _free_layers(shape):
        priorities[layer] = trial.suggest_float(_priority_name(layer), 0.0, 1.0)
    return build_candidate(sampled, priorities, space, shape)


def build_candidate(
    sampled_ratios: list[float], priorities: list[float], space: SearchSpace, shape: ModelShape
) -> Candidate:
    """Project sampled ratios (one per block) and KV priorities (one per layer) onto the budget."""
    removed: dict[str, int] = {}
    ratios = []
    if shape.blocks:
        weights = [sum(shape.numel[name] for name in names) for names in shape.blocks]
        ratios = project_ratios(sampled_ratios, weights, space.target, space.low, space.high)
        per_linear = [
            ratio for ratio, names in zip(ratios, shape.blocks, strict=True) for _ in names
        ]
        counts = removal_counts(per_linear, list(shape.numel.values()))
        removed = dict(zip(shape.numel, counts, strict=True))
    kv_cache, mean_kv_bits = None, None
    if shape.kv_split is not None:
        bits = shape.kv_split.assign(priorities)
        mean_kv_bits = shape.kv_split.mean_bits
        kv_cache = _kv_cache(bits, space)
    return Candidate(
        block_ratios=tuple(float(ratio) for ratio in ratios),
        removed=removed,
        numel=shape.numel,
        kv_cache=kv_cache,
        mean_kv_bits=mean_kv_bits,
    )


def _kv_cache(bits: tuple[LayerBits, ...], space: SearchSpace) -> KVCacheConfig:
    return space.kv_config(tuple(keys for keys, _ in bits), tuple(values for _, values in bits))


def uniform_params(space: SearchSpace, shape: ModelShape) -> dict[str, float]:
    """Return the parameters of the baseline: one ratio everywhere, KV widths taking turns."""
    params: dict[str, float] = {}
    if space.searches_sparsity and len(shape.blocks) > 1:
        params = {_ratio_name(block): space.target for block in range(len(shape.blocks))}
    if shape.kv_split is not None and space.kv_bits is not None:
        priorities = shape.kv_split.interleaved_priorities(len(space.kv_bits))
        params |= {_priority_name(layer): priorities[layer] for layer in _free_layers(shape)}
    return params


def uniform_candidate(space: SearchSpace, shape: ModelShape) -> Candidate:
    """Return the baseline as a profile."""
    from optuna.trial import FixedTrial

    return suggest(FixedTrial(uniform_params(space, shape)), space, shape)


def _free_layers(shape: ModelShape) -> list[int]:
    if shape.kv_split is None:
        return []
    return sorted(
        layer for layers, bits in shape.kv_split.groups if len(set(bits)) > 1 for layer in layers
    )


def _ratio_name(block: int) -> str:
    return f"sparsity_block_{block}"


def _priority_name(layer: int) -> str:
    return f"kv_priority_layer_{layer}"
