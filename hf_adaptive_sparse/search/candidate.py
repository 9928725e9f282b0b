"""From a trial's parameters to the profile that is evaluated: sample, then project.

A new kind of choice adds its parameters to `suggest` and to `uniform_params`, and its projection
to `project`; nothing else in the search knows what a parameter means.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_adaptive_sparse.profiles import CompressionProfile, KVCacheConfig, SparsityProfile
from hf_adaptive_sparse.search.kv_split import LayerBits
from hf_adaptive_sparse.search.projection import project_ratios, removal_counts
from hf_adaptive_sparse.search.shape import Group, ModelShape
from hf_adaptive_sparse.search.space import SearchSpace

if TYPE_CHECKING:
    from optuna.trial import BaseTrial


@dataclass(frozen=True)
class Candidate:
    """A profile on the budget.

    Attributes:
        block_ratios: Ratio of each group of linears; empty if nothing is pruned.
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


@dataclass(frozen=True)
class Draw:
    """What a trial wishes for, before it is projected onto the budget.

    Attributes:
        ratios: One per group of linears.
        kv: The parameters of the KV plan.
    """

    ratios: tuple[float, ...]
    kv: Mapping[str, float]


def suggest(trial: BaseTrial, space: SearchSpace, shape: ModelShape) -> Candidate:
    """Draw a profile: sample every free choice, then project onto the budget.

    Args:
        trial: Anything with Optuna's ``suggest_float``.
        space: The search space.
        shape: The space laid over the model.

    Returns:
        A candidate that meets the budget.
    """
    ratios = [space.target] * len(shape.groups)
    if _chooses_ratios(space, shape):
        low, high = space.grid
        ratios = [
            trial.suggest_float(_ratio_name(group), low, high, step=space.step)
            for group in shape.groups
        ]
    kv = {}
    if shape.kv is not None:
        for name, (low, high) in shape.kv.parameters.items():
            kv[name] = trial.suggest_float(name, low, high)
    return project(Draw(tuple(ratios), kv), space, shape)


def project(draw: Draw, space: SearchSpace, shape: ModelShape) -> Candidate:
    """Return the profile on the budget that is nearest to what a trial wishes for."""
    removed: dict[str, int] = {}
    ratios = []
    if shape.groups:
        weights = [sum(shape.numel[name] for name in group.names) for group in shape.groups]
        ratios = project_ratios(draw.ratios, weights, space.target, space.low, space.high)
        per_linear = [
            ratio for ratio, group in zip(ratios, shape.groups, strict=True) for _ in group.names
        ]
        counts = removal_counts(per_linear, list(shape.numel.values()))
        removed = dict(zip(shape.numel, counts, strict=True))
    kv_cache, mean_kv_bits = None, None
    if shape.kv is not None:
        keys, values = zip(*shape.kv.assign(draw.kv), strict=True)
        kv_cache = space.kv_config(keys, values)
        mean_kv_bits = shape.kv.mean_bits
    return Candidate(
        block_ratios=tuple(float(ratio) for ratio in ratios),
        removed=removed,
        numel=shape.numel,
        kv_cache=kv_cache,
        mean_kv_bits=mean_kv_bits,
    )


def uniform_params(space: SearchSpace, shape: ModelShape) -> dict[str, float]:
    """Return the parameters of the baseline: one ratio everywhere, one KV width or two in turns.

    An equal split has no single width: there the widths take turns from layer to layer.
    """
    params: dict[str, float] = {}
    if _chooses_ratios(space, shape):
        params = {_ratio_name(group): space.target for group in shape.groups}
    if shape.kv is not None:
        params |= shape.kv.uniform_parameters()
    return params


def uniform_candidate(space: SearchSpace, shape: ModelShape) -> Candidate:
    """Return the baseline as a profile."""
    from optuna.trial import FixedTrial

    return suggest(FixedTrial(uniform_params(space, shape)), space, shape)


def params_for(
    space: SearchSpace,
    shape: ModelShape,
    ratios: Sequence[float] | None = None,
    kv_bits: Sequence[LayerBits] | None = None,
) -> dict[str, float]:
    """Return parameters that `suggest` turns into a given profile, if it is on the budget.

    What is not given is the baseline's. This is how a search starts from a profile of its own.

    Args:
        space: The search space.
        shape: The space laid over the model.
        ratios: One per group of linears; they are moved to the grid, then onto the budget.
        kv_bits: ``(key bits, value bits)`` per decoder layer, from the space's palette.
    """
    params = uniform_params(space, shape)
    if ratios is not None and _chooses_ratios(space, shape):
        low, high = space.grid
        for group, ratio in zip(shape.groups, ratios, strict=True):
            steps = round((min(max(ratio, low), high) - low) / space.step)
            params[_ratio_name(group)] = round(min(low + steps * space.step, high), 12)
    if kv_bits is not None and shape.kv is not None:
        params |= shape.kv.parameters_for(kv_bits)
    return params


def _chooses_ratios(space: SearchSpace, shape: ModelShape) -> bool:
    # A single group under an exact mean has that mean, whatever is sampled.
    return space.searches_sparsity and len(shape.groups) > 1


def _ratio_name(group: Group) -> str:
    return f"sparsity_{group.label}"
