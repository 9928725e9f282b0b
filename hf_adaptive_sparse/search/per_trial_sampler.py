"""One sampler per trial, seeded by the trial's place among those that count.

A resumed search then draws what an uninterrupted one would have drawn, and workers that draw at the
same time draw differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.samplers import BaseSampler, RandomSampler

from hf_adaptive_sparse.search.trials import DUPLICATE_OF, FAILURE, WITHDRAWN, tally

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, TrialState

REPEATS_UNTIL_RANDOM = 10
"""Duplicates in a row after which a trial is drawn at random."""


class PerTrialSampler(BaseSampler):
    """Makes a fresh sampler for every trial.

    Args:
        make: Takes a seed, returns a sampler.
        seed: Seed of the search.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._sampler = make(self._seed_of(0))

    def _seed_of(self, place: int) -> int:
        """Return the seed of a trial, in the 32 bits that samplers take."""
        return int(np.random.SeedSequence([self._seed, place]).generate_state(1)[0])

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Make the trial's own sampler."""
        seed = self._seed_of(trial_place(study, trial.number))
        stuck = tally(study).repeats >= REPEATS_UNTIL_RANDOM
        self._sampler = RandomSampler(seed) if stuck else self._make(seed)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Ask the trial's sampler."""
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Ask the trial's sampler."""
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Ask the trial's sampler."""
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Tell the trial's sampler."""
        self._sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Do nothing: seeds come from the trials."""


def trial_place(study: Study, number: int) -> int:
    """Return how many trials before this one were carried through or are still under way."""
    return sum(
        trial.number < number and _takes_a_place(trial)
        for trial in study.get_trials(deepcopy=False)
    )


def _takes_a_place(trial: FrozenTrial) -> bool:
    """Return whether a trial counts among those drawn; what was interrupted does not."""
    from optuna.trial import TrialState

    if trial.state == TrialState.WAITING or WITHDRAWN in trial.user_attrs:
        return False
    # Also one that was killed before its draw, which no other trial repeats.
    settled = {FAILURE, DUPLICATE_OF} & set(trial.user_attrs)
    return trial.state != TrialState.FAIL or bool(settled)
