"""The smallest model, or KV cache, whose loss on held-out data stays within a bound.

The reverse of a search under a budget. Budgets are bisected, each with a search of its own on the
evaluation data, for the smallest whose best profile stays within the bound there. That profile is
then held against the dense model on held-out data, which no search saw; if the upper bound of its
increase passes, the next larger budget is looked at.

What is bisected need not be monotonic, since a search can be unlucky: a smaller budget than the one
returned may hold, too. That the one returned holds does not depend on it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from transformers import PreTrainedModel

from hf_adaptive_sparse.profiles import CompressionProfile
from hf_adaptive_sparse.search.comparison import windows_of
from hf_adaptive_sparse.search.errors import NothingToChoose, SearchError, TrialsFailed
from hf_adaptive_sparse.search.increase import Batches, Increase, increase_of, losses_under
from hf_adaptive_sparse.search.loss_budgets import (
    BYTES,
    budget_text,
    check_bound,
    check_lengths,
    chooses,
    spaces_by_budget,
)
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import STUDY_NAME, search

logger = logging.getLogger(__name__)

CONFIDENCE = 0.95
"""Probability, at least, that the increase of the perplexity is below the bound that is stated."""

LOOKS = 3
"""Budgets that are held against the held-out data at most; the error is shared among them."""

FEWEST_WINDOWS = 16
"""Windows that a bound needs."""


@dataclass(frozen=True)
class WithinLoss:
    """What was found.

    Attributes:
        search: The search at the smallest budget that holds.
        budget: That budget.
        unit: ``"mean KV bits"`` or ``"bytes on disk"``.
        max_loss: The bound that was asked for.
        held_out: The increase of the perplexity on the held-out data. Its ``high`` holds with
            `CONFIDENCE`, however many budgets were looked at.
        windows: Held-out windows it was measured on.
        tried: Budget -> increase on the evaluation data, in the order tried.
        indistinct: Per pair of KV widths that no difference could be measured between: the wider,
            which was left out, and the narrower.
    """

    search: SearchResult = field(repr=False)
    budget: float
    unit: str
    max_loss: float
    held_out: Increase
    windows: int
    tried: Mapping[float, float]
    indistinct: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        lines = [
            f"No difference could be measured between {wide} and {narrow} KV bits: {narrow} taken."
            for wide, narrow in self.indistinct
        ]
        lines.append(
            f"Smallest found within {self.max_loss:.4%}: {budget_text(self.budget, self.unit)}. "
            f"Perplexity on {self.windows} held-out windows {self.held_out.mean:+.3%}, below "
            f"{self.held_out.high:+.3%} at {CONFIDENCE:.0%} confidence."
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "max_loss": self.max_loss,
            "budget": self.budget,
            "unit": self.unit,
            "study_name": self.search.study.study_name,
            "held_out": {
                "increase": self.held_out.mean,
                "at_most": self.held_out.high,
                "confidence": CONFIDENCE,
                "windows": self.windows,
            },
            # A budget whose every trial failed has no figure.
            "tried": [
                {"budget": budget, "increase": value if math.isfinite(value) else None}
                for budget, value in self.tried.items()
            ],
            "indistinct_kv_bits": [list(pair) for pair in self.indistinct],
        }


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
    study_name: str | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    **settings: Any,
) -> WithinLoss:
    """Find the smallest budget whose best profile stays within a loss.

    A space that neither prunes nor quantises weights is searched for the fewest mean KV bits of its
    palette, in a free split; any other one for the smallest checkpoint. KV widths that lose nothing
    measurable on the evaluation data against the widest are preferred to it, before all else.

    The bound is on profiles as a search evaluates them, with one-shot masks: what calibrates anew
    while it prunes makes another model, whose loss is its own.

    Args:
        model: The dense model; unchanged afterwards.
        calibration: Batches that the weights are ranked on.
        evaluation: Batches that the searches see.
        held_out: Other batches, that the bound is checked on. The confidence assumes that their
            windows are independent of each other.
        space: What may be chosen; with weights to prune, ``target_sparsity="free"`` and any
            ``size_bytes``. Its budget is replaced.
        max_loss: Relative increase of the dense model's perplexity that is allowed: 0.005 is 0.5 %.
        metric: Metric that ranks the weights.
        n_trials: Trials of each search, of which there are about five.
        study_name: Start of the studies' names; each budget has one of its own, so that a storage
            resumes them all.
        modules_to_not_convert: Names or globs of linears that stay dense.
        **settings: As for `search`: storage, seed, sampler, progress, warm_start, ...

    Raises:
        ValueError: If the bound is out of range, the space fixes what is to be found, or the data
            do not suffice.
        SearchError: If no budget that was tried holds.
    """
    check_bound(max_loss, space, settings)
    seen, unseen = windows_of(evaluation), windows_of(held_out)
    if len(unseen) < FEWEST_WINDOWS:
        raise ValueError(
            f"A bound on the loss needs at least {FEWEST_WINDOWS} held-out windows, got "
            f"{len(unseen)}. Give more data, or shorter windows."
        )
    for what, windows in (("evaluation", seen), ("held-out", unseen)):
        check_lengths(windows, space, what)
    excluded = tuple(modules_to_not_convert or ())
    spaces, unit = spaces_by_budget(model, space, excluded)
    dense = losses_under(model, seen, CompressionProfile())
    space, indistinct = _drop_indistinct(model, seen, space)
    if indistinct:
        spaces, unit = spaces_by_budget(model, space, excluded)
    tokens = sum(count for _, count in dense)
    perplexity = math.exp(sum(loss for loss, _ in dense) / tokens)
    budgets = list(spaces)
    tried: dict[float, float] = {}
    found: dict[float, SearchResult] = {}

    def run(budget: float, trials: int) -> SearchResult:
        suffix = f"{budget:.0f}" if unit == BYTES else f"{budget:g}"
        return search(
            model,
            calibration,
            evaluation,
            spaces[budget],
            metric=metric,
            n_trials=trials,
            study_name=f"{study_name or STUDY_NAME}-{suffix}",
            modules_to_not_convert=excluded,
            **settings,
        )

    def at(budget: float) -> float:
        """Return the increase on the evaluation data of the best profile under a budget."""
        if budget in tried:
            return tried[budget]
        trials = n_trials if chooses(model, spaces[budget], excluded) else 1
        try:
            try:
                found[budget] = run(budget, trials)
            except NothingToChoose:
                found[budget] = run(budget, 1)
            tried[budget] = found[budget].best_value / perplexity - 1.0
        except TrialsFailed as error:
            logger.warning("%s does not hold: %s", budget_text(budget, unit), error)
            tried[budget] = math.inf
        return tried[budget]

    first, last = 0, len(budgets)
    while first < last:
        middle = (first + last) // 2
        if at(budgets[middle]) <= max_loss:
            last = middle
        else:
            first = middle + 1
    measured = []
    reference = losses_under(model, unseen, CompressionProfile())
    # Which budgets these are depends on the evaluation data alone, so that sharing the error among
    # them is enough.
    for budget in islice((b for b in budgets[first:] if at(b) <= max_loss), LOOKS):
        losses = losses_under(
            model,
            unseen,
            found[budget].best_profile,
            calibration,
            metric=metric,
            modules_to_not_convert=excluded,
        )
        increase = increase_of(reference, losses, 1.0 - (1.0 - CONFIDENCE) / LOOKS)
        measured.append(
            f"{budget_text(budget, unit)}: {increase.mean:+.3%}, below {increase.high:+.3%}"
        )
        if increase.high <= max_loss:
            return WithinLoss(
                found[budget], budget, unit, max_loss, increase, len(unseen), tried, indistinct
            )
    raise SearchError(_refusal(max_loss, unit, measured, tried, indistinct))


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
            nearest = "none, as all trials failed"
        what = f"even on the evaluation data; the nearest was {nearest}"
    wider = ", ".join(str(wide) for wide, _ in indistinct)
    left_out = f" KV bits left out as making no measurable difference: {wider}." if wider else ""
    return (
        f"No budget that was tried keeps the perplexity within {max_loss:.3%} of the dense model's "
        f"{what}.{left_out} Allow a higher max_loss, more held-out data (the bound gets tighter), "
        "more trials, or wider KV or weight bits."
    )


def _drop_indistinct(
    model: PreTrainedModel, windows: Batches, space: SearchSpace
) -> tuple[SearchSpace, tuple[tuple[int, int], ...]]:
    """Leave KV widths out that a narrower one loses nothing measurable against.

    All are compared with the widest, so that small losses from width to width do not add up unseen.
    """
    palette = space.kv_bits or ()
    if len(palette) < 2 or len(windows) < FEWEST_WINDOWS or space.kv_mean_bits is not None:
        return space, ()
    losses = {
        bits: losses_under(model, windows, CompressionProfile(kv_cache=space.kv_config(bits, bits)))
        for bits in palette
    }
    widest, dropped = palette[-1], []
    for index in range(len(palette) - 1, 0, -1):
        wide, narrow = palette[index], palette[index - 1]
        increase = increase_of(losses[widest], losses[narrow], CONFIDENCE)
        if increase.low > 0.0:
            break
        logger.warning(
            "%d and %d KV bits make no measurable difference on %d windows (%+.4f %%, above "
            "%+.4f %%): %d is left out.",
            widest,
            narrow,
            len(windows),
            100 * increase.mean,
            100 * increase.low,
            wide,
        )
        dropped.append((wide, narrow))
    kept = palette[: len(palette) - len(dropped)]
    return replace(space, kv_bits=kept), tuple(dropped)
