"""Turns a trial's parameters into the profile that is evaluated: sample, then project.

A new kind of choice adds its parameters to `suggest` and to `uniform_params`, and its projection
to `candidate_projection.project`; nothing else in the search knows what a parameter means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from hf_adaptive_sparse.search.candidate import Candidate
from hf_adaptive_sparse.search.candidate_projection import Draw, project
from hf_adaptive_sparse.search.kv_split import LayerBits
from hf_adaptive_sparse.search.shape import Group, ModelShape
from hf_adaptive_sparse.search.space import SearchSpace


class Suggests(Protocol):
    """What a profile is drawn from: any of Optuna's trials."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None
    ) -> float:
        """Return the value of a parameter."""


def suggest(trial: Suggests, space: SearchSpace, shape: ModelShape) -> Candidate:
    """Draw a profile: sample every free choice, then project onto the budget.

    Args:
        trial: Gives the parameters.
        space: The search space.
        shape: The space applied to the model.

    Returns:
        A candidate that meets the budget.
    """
    ratios = [space.low if space.is_free else space.target] * len(shape.groups)
    if _chooses_ratios(space, shape):
        low, high = space.grid
        ratios = [
            trial.suggest_float(_ratio_name(group), low, high, step=space.step)
            for group in shape.groups
        ]
    weights = []
    if space.weight_bits is not None and space.searches_weight_bits:
        top = float(len(space.weight_bits) - 1)
        weights = [
            trial.suggest_float(_width_name(group), 0.0, top) for group in shape.weight_groups
        ]
    kv = {}
    if shape.kv is not None:
        for name, (low, high) in shape.kv.parameters.items():
            kv[name] = trial.suggest_float(name, low, high)
    return project(Draw(tuple(ratios), kv, tuple(weights)), space, shape)


def uniform_params(space: SearchSpace, shape: ModelShape) -> dict[str, float]:
    """Return the parameters of the baseline: one ratio everywhere, one KV width or two in turns.

    An equal split has no single width: there the widths take turns from layer to layer. Under a
    budget in bytes with weight bits to choose, the weights take the widest width at which no more
    than the middle of the range of ratios has to go.
    """
    params: dict[str, float] = {}
    if _chooses_ratios(space, shape):
        ratio = space.grid[0] if space.is_free else round(space.target, 12)  # as the grid is
        params = {_ratio_name(group): ratio for group in shape.groups}
    if shape.kv is not None:
        params |= shape.kv.uniform_parameters()
    if space.searches_weight_bits:
        wishes = _uniform_widths(params, space, shape)
        params |= {
            _width_name(group): wish
            for group, wish in zip(shape.weight_groups, wishes, strict=True)
        }
    return params


def _uniform_widths(
    params: Mapping[str, float], space: SearchSpace, shape: ModelShape
) -> list[float]:
    if shape.weight_allocation is not None:
        return [float(wish) for wish in shape.weight_allocation.uniform_wishes()]
    palette = space.weight_bits or ()
    low = space.low if space.is_free else space.target
    for place in reversed(range(len(palette))):
        wishes = (float(place),) * len(shape.weight_groups)
        draw = Draw((low,) * len(shape.groups), params, wishes)
        found = project(draw, space, shape)
        moderate = not space.is_free or (found.mean_sparsity or 0.0) <= (low + space.high) / 2
        if moderate and set(found.weight_bits.values()) == {palette[place]}:
            return list(wishes)
    return [0.0] * len(shape.weight_groups)


def uniform_candidate(space: SearchSpace, shape: ModelShape) -> Candidate:
    """Return the baseline as a profile."""
    from optuna.trial import FixedTrial

    return suggest(FixedTrial(uniform_params(space, shape)), space, shape)


def params_for(
    space: SearchSpace,
    shape: ModelShape,
    ratios: Sequence[float] | None = None,
    kv_bits: Sequence[LayerBits] | None = None,
    weight_bits: Sequence[int] | None = None,
) -> dict[str, float]:
    """Return parameters that `suggest` turns into a given profile, if it is on the budget.

    What is not given is the baseline's. This is how a search starts from a profile of its own.

    Args:
        space: The search space.
        shape: The space applied to the model.
        ratios: One per group of linears; they are moved to the grid, then onto the budget.
        kv_bits: ``(key bits, value bits)`` per decoder layer, from the space's palette.
        weight_bits: One per group that shares a weight width, from the space's palette.
    """
    params = uniform_params(space, shape)
    if ratios is not None and _chooses_ratios(space, shape):
        low, high = space.grid
        for group, ratio in zip(shape.groups, ratios, strict=True):
            steps = round((min(max(ratio, low), high) - low) / space.step)
            params[_ratio_name(group)] = round(min(low + steps * space.step, high), 12)
    if kv_bits is not None and shape.kv is not None:
        params |= shape.kv.parameters_for(kv_bits)
    if weight_bits is not None and space.weight_bits is not None and space.searches_weight_bits:
        params |= {
            _width_name(group): float(space.weight_bits.index(bits))
            for group, bits in zip(shape.weight_groups, weight_bits, strict=True)
        }
    return params


def _chooses_ratios(space: SearchSpace, shape: ModelShape) -> bool:
    # A single group under an exact mean has that mean, whatever is sampled.
    return space.searches_sparsity and len(shape.groups) > 1


def _ratio_name(group: Group) -> str:
    return f"sparsity_{group.label}"


def _width_name(group: Group) -> str:
    return f"weight_wish_{group.label}"
