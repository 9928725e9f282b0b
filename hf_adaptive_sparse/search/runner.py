"""Runs the trials of a study: draw, project, skip known profiles, evaluate, store."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from hf_adaptive_sparse.search.candidate import Candidate
from hf_adaptive_sparse.search.claims import claim
from hf_adaptive_sparse.search.enqueued import CheckedTrial
from hf_adaptive_sparse.search.errors import TrialFailure, TrialsFailed
from hf_adaptive_sparse.search.evaluation_result import Evaluation, Reporter
from hf_adaptive_sparse.search.front import suggest_on_front
from hf_adaptive_sparse.search.recovery import recover
from hf_adaptive_sparse.search.samplers import as_sampler
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.suggesting import suggest, uniform_candidate
from hf_adaptive_sparse.search.trials import (
    DUPLICATE_OF,
    FAILURE,
    REPEATABLE,
    UNIFORM,
    WITHDRAWN,
    Tally,
    tally,
)
from hf_adaptive_sparse.search.worker import WORKER_ATTRIBUTE, Watch, lease, working

if TYPE_CHECKING:
    from optuna.exceptions import TrialPruned
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
"""How often an idle worker looks for work."""

REPEATS_UNTIL_EXHAUSTED = 100
"""Duplicates in a row after which the space counts as exhausted."""

FEWEST_TO_GIVE_UP = 5
HIGHEST_FAILED_SHARE = 0.8

STOPPING_P = 0.1
"""A trial is stopped once a one-sided Wilcoxon test of its batches against the best trial's says
that it is worse, at this level."""

FEWEST_BATCHES = 4
"""Batches that every trial is evaluated on before it may be stopped."""

Objective = Callable[[Candidate, Reporter | None], Evaluation]
"""Evaluates a profile; reports each batch, and stops when the reporter says so."""


def goes_on(count: Tally, n_trials: int) -> bool:
    """Return whether the search has to go on."""
    return count.attempts < n_trials and count.repeats < REPEATS_UNTIL_EXHAUSTED


def has_work(count: Tally, n_trials: int) -> bool:
    """Return whether a trial may begin: an enqueued one, or one beyond all that are pending."""
    under_way = count.attempts + len(count.running)
    return under_way < n_trials and (bool(count.waiting) or under_way + count.pending < n_trials)


class TrialRunner:
    """Runs trials one after the other until enough profiles were tried.

    Args:
        study: The study that trials are drawn from and stored in.
        space: The search space.
        shape: The space applied to the model.
        objective: Evaluates a profile.
        seed: Seed of the draws.
        sampler: Name of a sampler, made and seeded per trial, or an Optuna sampler.
        early_stopping: Stop trials that are worse than the best one on the batches seen so far.
        sweeps_budget: Let each trial draw the mean ratio it is to have.
    """

    def __init__(
        self,
        study: Study,
        space: SearchSpace,
        shape: ModelShape,
        objective: Objective,
        seed: int,
        sampler: BaseSampler | str,
        *,
        early_stopping: bool = True,
        sweeps_budget: bool = False,
    ) -> None:
        self.study, self.space, self.shape = study, space, shape
        self.objective = objective
        self.suggest = suggest_on_front if sweeps_budget else suggest
        study.pruner = _pruner(early_stopping)
        study.sampler = as_sampler(sampler, seed)
        self.uniform = uniform_candidate(space, shape).digest
        self.watch = Watch()
        self.wanted = 0

    def run(self, n_trials: int, *, progress: bool, ends: float | None = None) -> None:
        """Run trials until ``n_trials`` profiles were tried, by this worker and all others.

        A worker that finds enough trials under way waits for them, in case one has to be repeated.

        Args:
            n_trials: Distinct profiles in all.
            progress: Show a progress bar.
            ends: Time of ``time.monotonic()`` after which no trial is begun, once one succeeded.

        Raises:
            TrialsFailed: If nearly all trials fail.
        """
        self.wanted = n_trials
        recover(self.study, self.watch, opening=True)
        count = tally(self.study)
        bar = tqdm(
            total=n_trials,
            initial=count.attempts,
            desc="Search",
            unit="trial",
            disable=not progress,
        )
        with bar, working() as self.worker:
            while goes_on(count, n_trials) and not (count.completed and _is_past(ends)):
                if has_work(count, n_trials):
                    self._run_one()
                else:
                    time.sleep(POLL_SECONDS)
                recover(self.study, self.watch)
                count = tally(self.study)
                bar.update(count.attempts - bar.n)
                if count.best is not None:
                    bar.set_postfix_str(f"best {count.best.values[0]:.4f}")
                _give_up_if_hopeless(count)

    def _run_one(self) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        self._evaluated = self._ended = False
        try:
            self.study.optimize(self._run_trial, n_trials=1, catch=(TrialFailure,))
        except UpdateFinishedTrialError:
            self._say_that_it_ended()
        except ValueError as error:
            # So Optuna says that a trial which ended meanwhile cannot end again.
            told_twice = self._evaluated and str(error).startswith("Cannot tell a")
            if not told_twice and not self._ended:
                raise
            self._say_that_it_ended()

    @staticmethod
    def _say_that_it_ended() -> None:
        logger.warning(
            "A trial was ended by another worker: either this one did not renew its lease in time, "
            "so that the trial was given to the other, or the database gave it to both."
        )

    def _run_trial(self, trial: Trial) -> float | Sequence[float]:
        from optuna.exceptions import TrialPruned, UpdateFinishedTrialError

        try:
            trial.set_user_attr(WORKER_ATTRIBUTE, str(self.worker))
            with lease(trial):
                outcome = self._evaluate(trial)
        except UpdateFinishedTrialError:
            self._ended = True
            raise
        except (TrialFailure, TrialPruned):
            self._evaluated = True
            raise
        self._evaluated = True
        return outcome

    def _evaluate(self, trial: Trial) -> float | Sequence[float]:
        candidate = self._draw(trial)
        for key, value in candidate.to_attributes().items():
            trial.set_user_attr(key, value)
        trial.set_user_attr(UNIFORM, candidate.digest == self.uniform)
        verdict = claim(self.study, trial, candidate.digest, self.wanted, self.watch)
        if verdict.holder is not None:
            return self._repeat(trial, verdict.holder)
        if verdict.surplus:
            trial.set_user_attr(WITHDRAWN, True)
            raise TrialFailure("Enough trials are under way.", repeatable=False)
        start = time.perf_counter()
        try:
            evaluation = self.objective(candidate, self._reporter(trial))
        except TrialFailure as failure:
            raise self._told(trial, failure) from failure
        finally:
            trial.set_user_attr("seconds", time.perf_counter() - start)
        for key, value in evaluation.to_attributes().items():
            trial.set_user_attr(key, value)
        if evaluation.stopped:
            raise self._stopped(trial, evaluation.value, evaluation.of_batches)
        return evaluation.values[0] if len(evaluation.values) == 1 else evaluation.values

    def _draw(self, trial: Trial) -> Candidate:
        try:
            return self.suggest(CheckedTrial(trial), self.space, self.shape)
        except TrialFailure as failure:
            raise self._told(trial, failure) from failure

    def _reporter(self, trial: Trial) -> Reporter | None:
        # Optuna has no early stopping where several figures are minimised.
        return None if len(self.study.directions) > 1 else trial

    def _repeat(self, trial: Trial, former: FrozenTrial) -> float | Sequence[float]:
        """Give ``trial`` the outcome of a former one of the same profile."""
        from optuna.trial import TrialState

        trial.set_user_attr(DUPLICATE_OF, former.number)
        if not former.state.is_finished():
            raise TrialFailure("Another worker evaluates this profile.", repeatable=False)
        values: list[float] | None = former.values
        if values is None:
            raise self._failed(trial, former.user_attrs[FAILURE], repeatable=True)
        if former.state == TrialState.PRUNED:
            raise self._stopped(trial, values[0], former.last_step or 0)
        # Of equals, a database may take this one for the best, which others are stopped against.
        for step, value in former.intermediate_values.items():
            trial.report(value, step)
        return values[0] if len(values) == 1 else values

    @staticmethod
    def _stopped(trial: Trial, estimate: float, step: int) -> TrialPruned:
        from optuna.exceptions import TrialPruned

        # Optuna takes the last step's value for the trial's: samplers then sort stopped trials,
        # always behind complete ones, by the estimates of their values.
        trial.report(estimate, step)
        return TrialPruned()

    def _told(self, trial: Trial, failure: TrialFailure) -> TrialFailure:
        logger.warning("Trial %d failed: %s", trial.number, failure.reason)
        return self._failed(trial, failure.reason, repeatable=failure.repeatable)

    @staticmethod
    def _failed(trial: Trial, reason: str, *, repeatable: bool) -> TrialFailure:
        trial.set_user_attr(REPEATABLE, repeatable)
        trial.set_user_attr(FAILURE, reason)
        return TrialFailure(reason, repeatable=repeatable)


def _is_past(ends: float | None) -> bool:
    return ends is not None and monotonic() >= ends


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
        raise TrialsFailed(
            f"{len(count.failed)} of {count.attempts} trials failed, so the search was stopped. "
            f"Most often: {count.reasons()}"
        )
