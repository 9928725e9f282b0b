"""An evolutionary search that exchanges levels between units, after EvoPress (arXiv 2410.14649).

A child is the best profile so far with a few exchanges: one unit goes one level up and another one
level down, so that a profile on the budget stays on it. How many exchanges is the smaller of two
draws from 1 to 3, as in the paper (its section 4.2): mostly one.

Where this differs from the paper, and why:

- No generations: every child has the best profile so far for its parent, whichever worker found it,
  and no worker waits for the others.
- The paper selects in stages, a few tokens for many children and more for the survivors. Here each
  child is given up as soon as a paired test says that it is worse than its parent, which the search
  does for every sampler; what survives is evaluated on all data.
- A child that was tried before is drawn again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import intersection_search_space
from optuna.trial import TrialState

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

MOST_EXCHANGES = 3
"""Upper end of the draws whose smaller one is the number of exchanges."""

CONTINUOUS_LEVELS = 4
"""Levels that a parameter without a step of its own is taken to have."""

ATTEMPTS = 50
"""Draws until a child may be one that was tried before."""


class EvolutionSampler(BaseSampler):
    """Mutates the best complete trial by exchanging levels.

    Until a trial is complete, parameters are drawn at random.

    Args:
        seed: Seed of the draws.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = np.random.default_rng(seed)
        self._fallback = RandomSampler(seed)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that all complete trials have and that leave a choice."""
        space = intersection_search_space(
            study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        )
        return {
            name: distribution
            for name, distribution in space.items()
            if isinstance(distribution, FloatDistribution) and not distribution.single()
        }

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a child of the best complete trial."""
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not complete or not search_space:
            return {}
        best = self._parent(study, complete)
        parent = {name: float(best.params[name]) for name in search_space}
        tried = {_key(t.params, parent) for t in study.get_trials(deepcopy=False) if t.params}
        child = parent
        for attempt in range(ATTEMPTS):
            # The neighbourhood widens where all that is near was tried.
            exchanges = 1 + attempt // 10 + int(self._random.integers(MOST_EXCHANGES, size=2).min())
            child = parent
            for _ in range(exchanges):
                child = self._exchange(child, search_space)
            if _key(child, parent) not in tried:
                break
        return child

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw at random what no complete trial has."""
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Draw from other numbers than before."""
        self._random = np.random.default_rng()
        self._fallback.reseed_rng()

    def _parent(self, study: Study, complete: list[FrozenTrial]) -> FrozenTrial:
        """Return the best trial; of several objectives, any on the front."""
        if len(study.directions) > 1:
            front = sorted(study.best_trials, key=lambda one: one.number)
            return front[int(self._random.integers(len(front)))]
        return min(complete, key=lambda one: (one.values[0], one.number))

    def _exchange(
        self, params: Mapping[str, float], space: Mapping[str, BaseDistribution]
    ) -> dict[str, float]:
        """Move one parameter a level up and another of its kind a level down.

        Parameters are of one kind if they share a distribution. Priorities, of which only the
        order counts, swap their values.
        """
        child = dict(params)
        first = str(self._random.choice(sorted(space)))
        others = [name for name in sorted(space) if name != first and space[name] == space[first]]
        if not others:
            return child
        second = str(self._random.choice(others))
        distribution = space[first]
        assert isinstance(distribution, FloatDistribution)  # as the space was inferred
        if distribution.step is None and child[first] != child[second]:
            child[first], child[second] = child[second], child[first]
            return child
        low, high = distribution.low, distribution.high
        level = distribution.step or (high - low) / CONTINUOUS_LEVELS
        up, down = round(child[first] + level, 12), round(child[second] - level, 12)
        if up <= high + 1e-9 and down >= low - 1e-9:
            child[first], child[second] = min(up, high), max(down, low)
        return child


def _key(params: Mapping[str, Any], names: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(params.get(name) for name in names)
