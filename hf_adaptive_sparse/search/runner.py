"""Running the trials of a study: draw, project, skip what is known, evaluate, store."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from hf_adaptive_sparse.search.candidate import (
    Candidate,
    suggest,
    uniform_candidate,
    uniform_params,
)
from hf_adaptive_sparse.search.errors import SearchError, TrialFailure
from hf_adaptive_sparse.search.evaluator import Evaluation, Reporter
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.storage import WORKER_ATTRIBUTE, worker_name
from hf_adaptive_sparse.search.trials import (
    DUPLICATE_OF,
    FAILURE,
    REPEATABLE,
    UNIFORM,
    Tally,
    tally,
)

if TYPE_CHECKING:
    from optuna.exceptions import TrialPruned
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

logger = logging.getLogger(__name__)

REPEATS_UNTIL_RANDOM = 10
"""Duplicates in a row after which the next trial is drawn at random, not by TPE."""

REPEATS_UNTIL_EXHAUSTED = 100
"""Duplicates in a row after which the space is taken to hold no further profile."""

FEWEST_TO_GIVE_UP = 5
HIGHEST_FAILED_SHARE = 0.8

STOPPING_P = 0.1
"""A trial is stopped once a one-sided Wilcoxon test of its batches against the best trial's says
that it is worse, at this level."""

FEWEST_BATCHES = 4
"""Batches that every trial is evaluated on before it may be stopped."""

Objective = Callable[[Candidate, Reporter], Evaluation]
"""Evaluates a profile; reports each batch, and stops when the reporter says so."""


def goes_on(count: Tally, n_trials: int) -> bool:
    """Return whether a further trial is to be run."""
    return count.attempts < n_trials and count.repeats < REPEATS_UNTIL_EXHAUSTED


class TrialRunner:
    """Runs trials one after the other until enough profiles were tried.

    Args:
        study: The study that trials are drawn from and stored in.
        space: The search space.
        shape: The space laid over the model.
        objective: Evaluates a profile.
        seed: Seed of the draws.
        sampler: Used instead of a seeded TPE sampler.
        early_stopping: Stop trials that are worse than the best one on the batches seen so far.
    """

    def __init__(
        self,
        study: Study,
        space: SearchSpace,
        shape: ModelShape,
        objective: Objective,
        seed: int,
        sampler: BaseSampler | None,
        *,
        early_stopping: bool = True,
    ) -> None:
        self.study, self.space, self.shape = study, space, shape
        self.objective, self.seed, self.sampler = objective, seed, sampler
        study.pruner = _pruner(early_stopping)
        self.known = tally(study).known
        self.uniform = uniform_candidate(space, shape).digest

    def run(self, n_trials: int, *, progress: bool) -> None:
        """Run trials until ``n_trials`` profiles were tried, former runs of the study included.

        Raises:
            SearchError: If nearly all trials fail.
        """
        count = tally(self.study)
        self._enqueue_uniform(count)
        bar = tqdm(
            total=n_trials,
            initial=count.attempts,
            desc="Search",
            unit="trial",
            disable=not progress,
        )
        with bar:
            while goes_on(count, n_trials):
                self.known = count.known
                self.study.sampler = self.sampler or self._seeded_sampler(count)
                self.study.optimize(self._run_trial, n_trials=1, catch=(TrialFailure,))
                count = tally(self.study)
                bar.update(count.attempts - bar.n)
                if count.best is not None:
                    bar.set_postfix_str(f"best {count.best.value:.4f}")
                _give_up_if_hopeless(count)

    def _enqueue_uniform(self, count: Tally) -> None:
        from optuna.trial import TrialState

        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        tried = any(t.user_attrs.get(UNIFORM) for t in (*count.completed, *count.failed))
        params = uniform_params(self.space, self.shape)
        if params and not waiting and not tried:
            self.study.enqueue_trial(params)

    def _seeded_sampler(self, count: Tally) -> BaseSampler:
        from optuna.samplers import RandomSampler, TPESampler

        seed = int(np.random.SeedSequence([self.seed, count.finished]).generate_state(1)[0])
        stuck = count.repeats >= REPEATS_UNTIL_RANDOM
        return RandomSampler(seed=seed) if stuck else TPESampler(seed=seed)

    def _run_trial(self, trial: Trial) -> float:
        trial.set_user_attr(WORKER_ATTRIBUTE, worker_name())
        candidate = suggest(trial, self.space, self.shape)
        for key, value in candidate.to_attributes().items():
            trial.set_user_attr(key, value)
        trial.set_user_attr(UNIFORM, candidate.digest == self.uniform)
        former = self.known.get(candidate.digest)
        if former is not None:
            return self._repeat(trial, former)
        start = time.perf_counter()
        try:
            evaluation = self.objective(candidate, trial)
        except TrialFailure as failure:
            logger.warning("Trial %d failed: %s", trial.number, failure.reason)
            raise self._failed(trial, failure.reason, repeatable=failure.repeatable) from failure
        finally:
            trial.set_user_attr("seconds", time.perf_counter() - start)
        for key, value in evaluation.to_attributes().items():
            trial.set_user_attr(key, value)
        if evaluation.stopped:
            raise self._stopped(trial, evaluation.value, evaluation.of_batches)
        return evaluation.value

    def _repeat(self, trial: Trial, former: FrozenTrial) -> float:
        """Give ``trial`` the outcome of a former one of the same profile."""
        from optuna.trial import TrialState

        trial.set_user_attr(DUPLICATE_OF, former.number)
        if former.value is None:
            raise self._failed(trial, former.user_attrs[FAILURE], repeatable=True)
        if former.state == TrialState.PRUNED:
            raise self._stopped(trial, former.value, former.last_step or 0)
        return former.value

    @staticmethod
    def _stopped(trial: Trial, estimate: float, step: int) -> TrialPruned:
        from optuna.exceptions import TrialPruned

        # Optuna takes the last step's value for the trial's: samplers then sort stopped trials,
        # always behind complete ones, by the estimates of their values.
        trial.report(estimate, step)
        return TrialPruned()

    @staticmethod
    def _failed(trial: Trial, reason: str, *, repeatable: bool) -> TrialFailure:
        trial.set_user_attr(REPEATABLE, repeatable)
        trial.set_user_attr(FAILURE, reason)
        return TrialFailure(reason, repeatable=repeatable)


def _pruner(early_stopping: bool) -> BasePruner:
    import optuna

    if not early_stopping:
        return optuna.pruners.NopPruner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.pruners.WilcoxonPruner(p_threshold=STOPPING_P, n_startup_steps=FEWEST_BATCHES)


def _give_up_if_hopeless(count: Tally) -> None:
    if (
        count.attempts >= FEWEST_TO_GIVE_UP
        and len(count.failed) > HIGHEST_FAILED_SHARE * count.attempts
    ):
        raise SearchError(
            f"{len(count.failed)} of {count.attempts} trials failed, so the search was stopped. "
            f"Most often: {count.reasons()}"
        )
