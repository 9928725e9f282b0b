"""Finds the smallest model, or KV cache, whose loss on held-out data stays within a bound.

This is the reverse of a search under a budget. Budgets are bisected, each with a search of its own
on the evaluation data, for the smallest one whose best profile stays within the bound there. That
profile is then compared with the dense model on held-out data, which no search saw. If the upper
bound of its increase exceeds the allowed loss, the next larger budget is tried.

Profiles are measured as a search evaluates them, with one-shot masks, or pruned as the final model
will be, where the caller says how.

The loss need not fall steadily with the budget, since a search can be unlucky: a budget smaller
than the one returned may hold, too. That the returned one holds does not depend on this.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from hf_adaptive_sparse.checkpoint.fields import module_names
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice
from hf_adaptive_sparse.evaluation.reuse import DEFAULT_BYTES
from hf_adaptive_sparse.search.comparison import windows_of
from hf_adaptive_sparse.search.errors import NothingToChoose, SearchError, TrialsFailed
from hf_adaptive_sparse.search.increase import (
    CONFIDENCE,
    Batches,
    increase_of,
    losses_of,
    losses_under,
)
from hf_adaptive_sparse.search.indistinct_widths import without_indistinct
from hf_adaptive_sparse.search.loss_budgets import (
    BYTES,
    budget_text,
    check_bound,
    check_lengths,
    chooses,
    spaces_by_budget,
)
from hf_adaptive_sparse.search.losses import Loss
from hf_adaptive_sparse.search.max_loss_result import WithinLoss
from hf_adaptive_sparse.search.objectives import ObjectiveSpec
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.samplers import DEFAULT_SAMPLER
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import STUDY_NAME, search

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from hf_adaptive_sparse.search.storage import Storage

logger = logging.getLogger(__name__)

LOOKS = 3
"""Budgets that are checked on the held-out data at most; the error is divided among them."""

FEWEST_TO_BOUND = 16
"""Windows that a bound needs."""

FEWEST_TO_COMPARE = 2
"""Windows that an estimate for a final prune needs."""

FinalPrune = Callable[[SearchResult], AbstractContextManager[KVCacheChoice]]
"""Prunes the searched model with a search's best profile while its context is open; yields the KV
profile that the model then has."""


def search_within(
    model: PreTrainedModel,
    calibration: Batches | None,
    evaluation: Batches,
    held_out: Batches,
    space: SearchSpace,
    *,
    max_loss: float,
    metric: str = "lognorm",
    n_trials: int = 50,
    storage: Storage = None,
    study_name: str | None = None,
    seed: int = 0,
    sampler: BaseSampler | str = DEFAULT_SAMPLER,
    modules_to_not_convert: Sequence[str] | None = None,
    objective: ObjectiveSpec = "perplexity",
    timeout_seconds: float | None = None,
    warm_start: bool = True,
    early_stopping: bool = True,
    reuse_bytes: int = DEFAULT_BYTES,
    final: FinalPrune | None = None,
    progress: bool = True,
) -> WithinLoss:
    """Find the smallest budget whose best profile stays within a loss.

    A space that neither prunes nor quantises weights is searched for the fewest mean KV bits of its
    palette, in a free split; any other one for the smallest checkpoint. KV widths that lose nothing
    measurable on the evaluation data against the widest are preferred to it, before all else.

    Without ``final`` the bound is on profiles as a search evaluates them, with one-shot masks: what
    calibrates anew while it prunes makes another model, whose loss is its own. With it, every
    budget's best profile is pruned so, and the bound is on that.

    Args:
        model: The dense model; unchanged afterwards.
        calibration: Batches that the weights are ranked on.
        evaluation: Batches that the searches see.
        held_out: Other batches, that the bound is checked on. The confidence assumes that their
            windows are independent of each other.
        space: What may be chosen, without a budget; with weights to prune,
            ``target_sparsity="free"``.
        max_loss: Relative increase of the dense model's perplexity that is allowed: 0.005 is 0.5 %.
        metric: Metric that ranks the weights.
        n_trials: Trials of each search, of which there are about five.
        storage: As for `search`.
        study_name: Start of the studies' names; each budget has one of its own, so that a storage
            resumes them all.
        seed: Seed of each search.
        sampler: As for `search`.
        modules_to_not_convert: Names or globs of linears that stay dense.
        objective: ``"perplexity"``, which the bound is on.
        timeout_seconds: ``None``, as the searches have to be complete.
        warm_start: As for `search`.
        early_stopping: As for `search`.
        reuse_bytes: As for `search`.
        final: How a profile is made into a model; ``None``: one-shot masks.
        progress: Show progress bars.

    Raises:
        ValueError: If the bound is out of range, the space fixes what is to be found, or the data
            do not suffice.
        SearchError: If no budget that was tried holds.
    """
    check_bound(max_loss, space, objective, timeout_seconds)
    seen, unseen = windows_of(evaluation), windows_of(held_out)
    _check_count(len(unseen), FEWEST_TO_BOUND, "held-out windows")
    for what, windows in (("Evaluation", seen), ("Held-out", unseen)):
        check_lengths(windows, space, what)
    excluded = tuple(module_names(modules_to_not_convert))
    spaces, unit = spaces_by_budget(model, space, excluded)
    dense, reference = (losses_of(model, windows, False) for windows in (seen, unseen))
    if not all(math.isfinite(loss) for loss, _ in (*dense, *reference)):
        raise ValueError(
            "The dense model's loss must be finite on all windows, or nothing can be compared with "
            "it: the model computes NaN or infinity. Load it in a wider dtype."
        )
    scored, bounding = (sum(count > 0 for _, count in found) for found in (dense, reference))
    if not scored:
        raise ValueError("No token of the evaluation data is scored: are all labels -100?")
    _check_count(bounding, FEWEST_TO_BOUND, "held-out windows with a token to score")
    if final is not None:
        _check_count(scored, FEWEST_TO_COMPARE, "evaluation windows with a token to score")
    indistinct: tuple[tuple[int, int], ...] = ()
    if scored >= FEWEST_TO_BOUND:
        space, indistinct = without_indistinct(
            space, lambda profile: losses_under(model, seen, profile)
        )
    if indistinct:
        spaces, unit = spaces_by_budget(model, space, excluded)
    searches = _Searches(
        run=partial(
            search,
            model,
            calibration,
            evaluation,
            metric=metric,
            storage=storage,
            seed=seed,
            sampler=sampler,
            modules_to_not_convert=excluded,
            warm_start=warm_start,
            early_stopping=early_stopping,
            reuse_bytes=reuse_bytes,
            compare_widths=False,
            progress=progress,
        ),
        model=model,
        calibration=calibration,
        metric=metric,
        excluded=excluded,
        seen=seen,
        unseen=unseen,
        dense=dense,
        spaces=spaces,
        unit=unit,
        final=final,
        n_trials=n_trials,
        study_name=study_name or STUDY_NAME,
    )
    budgets = list(spaces)
    smallest = bisect_left(budgets, True, key=lambda budget: searches.at(budget) <= max_loss)
    within = (budget for budget in budgets[smallest:] if searches.at(budget) <= max_loss)
    measured = []
    # The budgets were chosen on the evaluation data alone, so dividing the error among them is
    # enough.
    for budget in islice(within, LOOKS):
        losses = searches.held_out_losses(budget)
        increase = increase_of(reference, losses, 1.0 - (1.0 - CONFIDENCE) / LOOKS)
        measured.append(
            f"{budget_text(budget, unit)}: {increase.mean:+.3%}, below {increase.high:+.3%}"
        )
        if increase.high <= max_loss:
            return WithinLoss(
                searches.found[budget],
                budget,
                unit,
                max_loss,
                increase,
                len(unseen),
                searches.tried,
                indistinct,
            )
    raise SearchError(_refusal(max_loss, unit, measured, searches.tried, indistinct))


@dataclass
class _Searches:
    """A search for each budget that is asked for, and the loss of its best profile.

    Attributes:
        run: Carries out a search, given its space, its study's name and its trials.
        model: The dense model.
        calibration: As for `search_within`.
        metric: Metric that ranks the weights.
        excluded: Names or globs of linears that stay dense.
        seen: The windows of the evaluation data.
        unseen: The held-out windows.
        dense: The dense model's losses on the windows that are seen.
        spaces: Budget -> space.
        unit: Unit of the budgets.
        final: As for `search_within`.
        n_trials: Trials of each search.
        study_name: Start of the studies' names.
        found: Budget -> its search; without those whose trials all failed.
        tried: Budget -> increase of the perplexity on the evaluation data, in the order tried;
            infinite where all trials failed, or a loss is not finite.
    """

    run: Callable[..., SearchResult]
    model: PreTrainedModel
    calibration: Batches | None
    metric: str
    excluded: Sequence[str]
    seen: Batches
    unseen: Batches
    dense: Sequence[Loss]
    spaces: Mapping[float, SearchSpace]
    unit: str
    final: FinalPrune | None
    n_trials: int
    study_name: str
    found: dict[float, SearchResult] = field(default_factory=dict, init=False)
    tried: dict[float, float] = field(default_factory=dict, init=False)
    _after_final: dict[float, list[Loss]] = field(default_factory=dict, init=False)

    def at(self, budget: float) -> float:
        """Return the increase on the evaluation data of the best profile under a budget."""
        if budget not in self.tried:
            try:
                self.found[budget] = self._search(budget)
                self.tried[budget] = self._increase(budget)
            except TrialsFailed as error:
                logger.warning("No profile of %s works: %s", budget_text(budget, self.unit), error)
                self.tried[budget] = math.inf
        return self.tried[budget]

    def held_out_losses(self, budget: float) -> list[Loss]:
        """Return the losses on the held-out windows of the best profile under a budget tried."""
        if self.final is not None:
            return self._after_final[budget]
        profile = self.found[budget].best_profile
        return losses_under(
            self.model,
            self.unseen,
            profile,
            self.calibration,
            metric=self.metric,
            modules_to_not_convert=self.excluded,
        )

    def _search(self, budget: float) -> SearchResult:
        space = self.spaces[budget]
        suffix = f"{budget:.0f}" if self.unit == BYTES else f"{budget:g}"
        run = partial(self.run, space, study_name=f"{self.study_name}-{suffix}")
        if not chooses(self.model, space, self.excluded):
            return run(n_trials=1)
        try:
            return run(n_trials=self.n_trials)
        except NothingToChoose:
            return run(n_trials=1)

    def _increase(self, budget: float) -> float:
        if self.final is None:
            tokens = sum(count for _, count in self.dense)
            perplexity = math.exp(sum(loss for loss, _ in self.dense) / tokens)
            return self.found[budget].best_value / perplexity - 1.0
        with self.final(self.found[budget]) as kv_cache:
            after = losses_of(self.model, self.seen, kv_cache)
            self._after_final[budget] = losses_of(self.model, self.unseen, kv_cache)
        return increase_of(self.dense, after, CONFIDENCE).mean


def _check_count(count: int, fewest: int, what: str) -> None:
    if count < fewest:
        raise ValueError(
            f"A bound on the loss needs at least {fewest} {what}, got {count}. Take more windows "
            "of the data (num_samples, --evaluation-samples) or shorter ones (sequence_length, "
            "--sequence-length), or give more data."
        )


def _refusal(
    max_loss: float,
    unit: str,
    measured: Sequence[str],
    tried: Mapping[float, float],
    indistinct: Sequence[tuple[int, int]],
) -> str:
    if measured:
        what = f"on the held-out data: {'; '.join(measured)} at {CONFIDENCE:.0%} confidence"
    else:
        budget = min(tried, key=lambda one: tried[one])
        nearest = f"{budget_text(budget, unit)} with {tried[budget]:+.3%}"
        if math.isinf(tried[budget]):
            nearest = "none, as no loss is finite"
        what = f"even on the evaluation data; the nearest was {nearest}"
    wider = ", ".join(str(wide) for wide, _ in indistinct)
    left_out = f" KV bits left out as making no measurable difference: {wider}." if wider else ""
    return (
        f"No budget that was tried keeps the perplexity within {max_loss:.3%} of the dense model's "
        f"{what}.{left_out} Allow a higher max_loss, more held-out data (the bound gets tighter), "
        "more trials, or wider KV or weight bits."
    )
