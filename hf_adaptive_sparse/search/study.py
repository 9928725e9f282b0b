"""`search`: find the best profile under an exact budget with Optuna, resumably.

Every trial is stored as it ends. The draw of a trial depends on the seed and on how many trials
were carried out before it, so that a search that was killed and resumed tries the same profiles as
an uninterrupted one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from hf_adaptive_sparse.checkpoint.fields import module_names
from hf_adaptive_sparse.evaluation.reuse import DEFAULT_BYTES
from hf_adaptive_sparse.pruning.metrics import get_metric
from hf_adaptive_sparse.search.checks import (
    check_arguments,
    check_left_to_choose,
    check_limits,
    check_model,
    check_outcome,
    check_weights,
)
from hf_adaptive_sparse.search.comparison import compare_on, is_compared
from hf_adaptive_sparse.search.data import (
    Data,
    SearchData,
    warn_of_weak_evaluation,
)
from hf_adaptive_sparse.search.errors import SearchError, StorageError
from hf_adaptive_sparse.search.evaluator import Evaluator, open_evaluator
from hf_adaptive_sparse.search.exclusion import alone_with
from hf_adaptive_sparse.search.fingerprint import config_fields, fingerprint
from hf_adaptive_sparse.search.front import uniform_params_on_front
from hf_adaptive_sparse.search.narrowing import is_due, narrow_on
from hf_adaptive_sparse.search.objectives import Goal, ObjectiveSpec
from hf_adaptive_sparse.search.opening import open_study
from hf_adaptive_sparse.search.resolution import resolution_warning
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.runner import TrialRunner, goes_on
from hf_adaptive_sparse.search.samplers import DEFAULT_SAMPLER, check_sampler
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.start import suggest_start
from hf_adaptive_sparse.search.storage import (
    open_storage,
    quiet_optuna,
    storage_errors,
)
from hf_adaptive_sparse.search.suggesting import uniform_candidate, uniform_params
from hf_adaptive_sparse.search.trials import tally

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from hf_adaptive_sparse.search.storage import Storage

logger = logging.getLogger(__name__)

STUDY_NAME = "hf-adaptive-sparse"


def search(
    model: PreTrainedModel,
    calibration: Data = None,
    evaluation: Data = None,
    space: SearchSpace | None = None,
    *,
    held_out: Data = None,
    metric: str = "lognorm",
    n_trials: int = 50,
    storage: Storage = None,
    study_name: str | None = None,
    seed: int = 0,
    processor: Any = None,
    sampler: BaseSampler | str = DEFAULT_SAMPLER,
    modules_to_not_convert: Sequence[str] | None = None,
    objective: ObjectiveSpec = "perplexity",
    timeout_seconds: float | None = None,
    warm_start: bool = True,
    early_stopping: bool = True,
    reuse_bytes: int = DEFAULT_BYTES,
    compare_widths: bool = True,
    progress: bool = True,
) -> SearchResult:
    """Search the sparsity and KV profile of lowest perplexity under an exact budget.

    The first trial is the uniform profile. Each further one is sampled (TPE), projected onto the
    budget, and evaluated on masks from a ranking made once; a profile that was evaluated before
    takes its stored value and does not count. The model is unchanged afterwards, also if the
    search is interrupted; the same call then resumes it.

    Args:
        model: The dense model. It is masked until the search ends, so nothing else, such as another
            thread, may use it meanwhile; a second search of it is refused.
        calibration: Data that the weights are ranked on: batches, a dataset name, a path, a
            `datasets.Dataset`, a `CalibrationConfig`; ``None`` is WikiText-2's training split.
            Unused for metrics that need none and for a search of KV bits alone.
        evaluation: Data whose perplexity is minimised; ``None`` is WikiText-2's validation split.
        held_out: Data that the best profile is compared with the uniform one on when the search
            ends; the interval of the difference is stored with the study. ``None``: none is made,
            as for a front of quality and bytes, whose profiles differ in size.
        space: What may be chosen, and the budget; ``None`` is the paper's ``SearchSpace()``.
        metric: Pruning metric that ranks the weights.
        n_trials: Distinct profiles tried in all, those of former runs of the study and failed ones
            included.
        storage: Where trials are kept: ``None`` (in memory), an Optuna URL, a journal file
            (``.log``, ``.journal``), an SQLite file (``.db``, ``.sqlite``), or an Optuna storage.
        study_name: Name of the study in the storage; ``None`` is ``"hf-adaptive-sparse"``.
        seed: Seed of the sampler.
        processor: The model's processor or tokenizer; needed where data are named.
        sampler: ``"tpe"``, ``"tpe-univariate"``, ``"evolution"``, ``"gp"``, ``"cmaes"``,
            ``"random"``, or an Optuna sampler, which keeps its own seed. Workers may differ in it.
        modules_to_not_convert: Names or globs of linears that stay dense and do not count.
        objective: What is minimised: ``"perplexity"``, ``"answers"`` (loss of the right answers),
            ``"kl"`` (divergence from the dense model) or ``"accuracy"`` (questions missed); weights
            by name for a sum of losses; or a sequence of these and ``"bytes"`` for a Pareto front.
        timeout_seconds: Start no further trial once the trials of this call took so long, the
            measurement of ``warm_start`` included; ``None``: go on to ``n_trials``.
        warm_start: Measure on some of the evaluation data how each block takes a lower and a higher
            ratio (in a free split, how each layer's keys and values take fewer bits), and try as
            the second profile what that suggests.
        early_stopping: Give a trial up as soon as a paired test on the batches seen so far says
            that it is worse than the best one. Its profile is stored with an estimate, and counts
            as tried. A Pareto front is always evaluated in full.
        reuse_bytes: Hidden states kept at most, in bytes, so that a profile which begins like
            an earlier one is run from its first other layer on; 0: none.
        compare_widths: Compare the best profile with its widest KV and weight bits cut down, and
            say where that makes no measurable difference (`SearchResult.narrowing`). Under a budget
            in bytes the narrower profile is then the best one. It takes two evaluations in full or
            a few more, and 8 windows at least.
        progress: Show progress bars, with the best value so far.

    Returns:
        The best profile, its config and the history.

    Raises:
        ValueError: If an argument is invalid or does not fit the model.
        SearchError: If nothing can be chosen, nearly all trials fail, or the study was made for
            another model, space or data.
        StorageError: If the storage cannot be used.
    """
    check_model(model)
    with alone_with(model), quiet_optuna(), storage_errors(_storage_name(storage)):
        space = SearchSpace() if space is None else space
        goal = Goal.of(objective)
        check_arguments(n_trials, seed, metric, space)
        check_limits(timeout_seconds, goal, space)
        check_sampler(sampler)
        excluded = tuple(module_names(modules_to_not_convert))
        shape = ModelShape.of(model, space, excluded)
        check_weights(model, shape.numel)
        check_left_to_choose(n_trials, goal, space, shape)
        # A budget that cannot be met is refused here, so that it leaves no study behind.
        uniform = uniform_candidate(space, shape)
        data = SearchData.of(
            model,
            processor,
            calibration=calibration,
            evaluation=evaluation,
            # Under a front's budgets a profile may well be better for its size alone.
            held_out=None if goal.sweeps_budget else held_out,
            ranks=space.prunes and get_metric(metric).needs_calibration,
        )
        for asked in goal.objectives().values():  # here for the same reason
            asked.check(data.evaluation)
        warn_of_weak_evaluation(data.evaluation, data.calibration, space)
        baseline = uniform_params_on_front if goal.sweeps_budget else uniform_params
        made_for = fingerprint(
            model,
            space=space.to_dict(),
            objective=goal.to_json(),
            metric=metric,
            image_weight=data.image_weight,
            excluded=excluded,
            calibration=data.calibration,
            evaluation=data.evaluation,
        )
        study = open_study(
            open_storage(storage),
            study_name or STUDY_NAME,
            made_for=made_for,
            baseline=baseline(space, shape),
            attributes={
                "seed": seed,
                "layout": shape.to_dict(),
                "config": config_fields(model.config),
            },
            values=len(goal.parts),
        )
        compared = data.held_out is None or is_compared(study, data.held_out)
        narrows = compare_widths and is_due(study, space, goal, data.evaluation)
        if goes_on(tally(study), n_trials) or narrows or not compared:
            with open_evaluator(
                model,
                space,
                shape,
                uniform,
                calibration=data.calibration,
                evaluation=data.evaluation,
                metric=metric,
                goal=goal,
                reuse_bytes=reuse_bytes,
                modules_to_not_convert=excluded,
                image_weight=data.image_weight,
                progress=progress,
            ) as evaluator:
                runner = TrialRunner(
                    study,
                    space,
                    shape,
                    evaluator,
                    seed,
                    sampler,
                    early_stopping=early_stopping,
                    sweeps_budget=goal.sweeps_budget,
                )
                _run(
                    runner,
                    evaluator,
                    data,
                    n_trials,
                    timeout_seconds=timeout_seconds,
                    warm_start=warm_start,
                    compare_widths=compare_widths,
                    progress=progress,
                )
        check_outcome(tally(study), n_trials, goal, space)
        too_small = None if goal.is_front else resolution_warning(tally(study), data.evaluation)
        if too_small is not None:
            logger.warning(too_small)
    return SearchResult(
        study=study,
        space=space,
        metric=metric,
        seed=seed,
        blocks=shape.block_layers,
        modules_to_not_convert=excluded,
        calibration_config=data.calibration_config,
        calibration=data.calibration,
        fingerprint=made_for,
        goal=goal,
    )


def _run(
    runner: TrialRunner,
    evaluator: Evaluator,
    data: SearchData,
    n_trials: int,
    *,
    timeout_seconds: float | None,
    warm_start: bool,
    compare_widths: bool,
    progress: bool,
) -> None:
    """Try profiles until there are enough, then compare the best one with others."""
    study, space, shape = runner.study, runner.space, runner.shape
    ends = None if timeout_seconds is None else monotonic() + timeout_seconds
    if warm_start and n_trials > 1 and goes_on(tally(study), n_trials):
        suggest_start(study, evaluator, space, shape)
    runner.run(n_trials, progress=progress, ends=ends)
    if compare_widths and is_due(study, space, evaluator.goal, data.evaluation):
        narrow_on(study, evaluator, space, shape, draw=runner.suggest)
    # Last, as it is of the profile that is returned.
    if data.held_out is not None and not is_compared(study, data.held_out):
        compare_on(study, evaluator, space, shape, data.held_out, draw=runner.suggest)


def _storage_name(storage: Storage) -> str:
    if isinstance(storage, str | os.PathLike):
        return os.fspath(storage)
    return type(storage).__name__


__all__ = ["SearchError", "SearchResult", "SearchSpace", "StorageError", "search"]
