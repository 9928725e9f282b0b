"""Comparison of the best profile with the uniform one on data that the search did not see.

The best profile is the one that a search returns, which may be the narrower one (see `narrowing`).
Both are scored window by window with the masks that trials are evaluated with, and compared in
pairs, since windows differ far more from each other than profiles do. The interval is a bootstrap
over windows, widened to hold at its level for few of them, too: the plain percentiles of six
windows would hold at 86 % instead of 95 %.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_adaptive_sparse.evaluation.digests import batches_digest
from hf_adaptive_sparse.profiles import CompressionProfile
from hf_adaptive_sparse.search.candidate import Candidate
from hf_adaptive_sparse.search.errors import TrialFailure
from hf_adaptive_sparse.search.evaluator import Batches, Evaluator
from hf_adaptive_sparse.search.increase import CONFIDENCE, HIGHEST, student_t
from hf_adaptive_sparse.search.losses import Loss
from hf_adaptive_sparse.search.narrowing_result import narrowing_of
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.suggesting import suggest
from hf_adaptive_sparse.search.trials import tally

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import BaseTrial

logger = logging.getLogger(__name__)

HELD_OUT = "held_out"
"""Study attribute, and key of ``search.json``, with the comparison."""

NARROWED = "narrowed"
"""Key of the comparison: whether it is of a narrower profile than the best trial's."""

RESAMPLES = 10_000

DRAWS_HELD = 1 << 20
"""Windows drawn at once, 8 bytes each in a few arrays; at least a resample."""

Figures = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Comparison:
    """Perplexity of two profiles on the same windows, and the interval of their difference.

    Attributes:
        trial: Number of the best trial.
        windows: Windows that were compared.
        tokens: Tokens scored in them.
        uniform_perplexity: Of the uniform profile.
        best_perplexity: Of the best trial's profile.
        change_percent: Of the perplexity, best against uniform; below 0 is better.
        low_percent: Lower end of its interval.
        high_percent: Upper end.
        confidence: Level of the interval.
    """

    trial: int
    windows: int
    tokens: int
    uniform_perplexity: float
    best_perplexity: float
    change_percent: float
    low_percent: float
    high_percent: float
    confidence: float = CONFIDENCE

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def compare(trial: int, uniform: Sequence[Loss], best: Sequence[Loss], seed: int = 0) -> Comparison:
    """Compare two profiles by their losses on the same windows.

    Args:
        trial: Number of the best trial.
        uniform: Losses of the uniform profile.
        best: Losses of the best one, window by window in the same order.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If the windows are not the same, or none scores a token.
    """
    tokens = np.array([count for _, count in uniform])
    if [count for _, count in uniform] != [count for _, count in best]:
        raise ValueError("Two profiles are compared on the same windows; these differ.")
    if not tokens.sum():
        raise ValueError("No token of the held-out data is scored.")
    reference = np.array([loss for loss, _ in uniform])
    gain = np.array([loss for loss, _ in best]) - reference
    if not (np.isfinite(reference).all() and np.isfinite(gain).all()):
        raise ValueError("The loss of a held-out window is not finite.")
    scored = int((tokens > 0).sum())
    if scored < 2:
        raise ValueError(
            "At least two windows of held-out data must score a token, or there is nothing to tell "
            "how certain a difference is; got one. Use more data, or smaller batches."
        )
    tail = (1 - CONFIDENCE) / 2
    total = float(tokens.sum())
    mean = float(gain.sum()) / total
    ends = np.quantile(_resampled_means(gain, tokens, seed), [tail, 1 - tail])
    low, high = mean + (ends - mean) * _widening(scored, 1 - tail)
    return Comparison(
        trial=trial,
        windows=len(tokens),
        tokens=int(total),
        uniform_perplexity=math.exp(float(reference.sum()) / total),
        best_perplexity=math.exp(float((reference + gain).sum()) / total),
        change_percent=100 * math.expm1(min(mean, HIGHEST)),
        low_percent=100 * math.expm1(min(float(low), HIGHEST)),
        high_percent=100 * math.expm1(min(float(high), HIGHEST)),
    )


def _widening(windows: int, level: float) -> float:
    """Return how much wider than a bootstrap's an interval has to be for so few windows.

    The spread of resamples is that of the windows around their own mean, and its quantiles are near
    the normal distribution's instead of Student's.
    """
    spread = math.sqrt(windows / (windows - 1))
    return spread * student_t(level, windows - 1) / NormalDist().inv_cdf(level)


def _resampled_means(gain: Figures, tokens: Figures, seed: int) -> Figures:
    """Return the mean gain per token of each resample that scores one, drawn some at a time.

    Args:
        gain: Difference of the losses, (windows,).
        tokens: Tokens that each window scores, (windows,).
        seed: Seed of the draws, which do not depend on how many are held at once.
    """
    generator = np.random.default_rng(seed)
    rows = max(1, DRAWS_HELD // len(tokens))
    means = []
    for start in range(0, RESAMPLES, rows):
        size = (min(rows, RESAMPLES - start), len(tokens))
        draws = generator.integers(len(tokens), size=size)
        counts = tokens[draws].sum(1)
        means.append(gain[draws].sum(1)[counts > 0] / counts[counts > 0])
    return np.concatenate(means)


def windows_of(batches: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Cut batches into their rows; a batch whose tensors do not share rows stays whole.

    Images may lie in another order than rows, so a batch with more than text is left as it is.
    """
    windows: list[dict[str, torch.Tensor]] = []
    for batch in batches:
        rows = {tensor.shape[0] for tensor in batch.values()}
        text = set(batch) <= {"input_ids", "attention_mask", "labels"}
        if not text or len(rows) != 1:
            windows.append(dict(batch))
            continue
        windows += [
            {key: tensor[row : row + 1] for key, tensor in batch.items()}
            for row in range(rows.pop())
        ]
    return windows


def compare_on(
    study: Study,
    evaluator: Evaluator,
    space: SearchSpace,
    shape: ModelShape,
    held_out: Batches,
    draw: Callable[[BaseTrial, SearchSpace, ModelShape], Candidate] = suggest,
) -> None:
    """Compare a study's best profile with the uniform one, and store the outcome with the study.

    Args:
        study: The study, with a complete trial.
        evaluator: Evaluates profiles on the masked model.
        space: The search space.
        shape: The space applied to the model.
        held_out: Batches that the search did not see.
        draw: What makes a profile of a trial's parameters.
    """
    from optuna.trial import FixedTrial

    best = tally(study).best
    if best is None:
        return
    windows = windows_of(held_out)
    profile = _narrower(study.user_attrs, best.number)
    candidate = draw(FixedTrial(best.params), space, shape)
    if profile is not None:
        bits = dict(profile.weight_bits or {})
        candidate = replace(candidate, kv_cache=profile.kv_cache, weight_bits=bits, spent=None)
    try:
        losses = uniform = evaluator.losses(evaluator.uniform, windows)
        if candidate.digest != evaluator.uniform.digest:
            losses = evaluator.losses(candidate, windows)
        comparison = compare(best.number, uniform, losses)
    except (TrialFailure, ValueError) as error:
        logger.warning("The held-out comparison failed: %s", error)
        return
    of_what = {NARROWED: profile is not None, "data": batches_digest(held_out)}
    study.set_user_attr(HELD_OUT, comparison.to_dict() | of_what)


def is_compared(study: Study, held_out: Batches) -> bool:
    """Return whether a study holds the comparison of its best trial on these data."""
    stored = held_out_of(study.user_attrs, tally(study).best_number)
    return stored is not None and stored["data"] == batches_digest(held_out)


def held_out_of(attributes: Mapping[str, Any], best: int | None) -> dict[str, Any] | None:
    """Return the comparison that is stored, if it is of the profile that is the best now.

    Args:
        attributes: Of a study, or what ``search.json`` holds.
        best: Number of the best trial.
    """
    stored: dict[str, Any] | None = attributes.get(HELD_OUT)
    if stored is None or stored["trial"] != best:
        return None
    narrowed = _narrower(attributes, best) is not None
    return stored if stored.get(NARROWED, False) == narrowed else None


def held_out_text(stored: Mapping[str, Any]) -> str:
    """Return a stored comparison in words."""
    return (
        f"perplexity {stored['best_perplexity']:#.5g} (trial {stored['trial']}) against "
        f"{stored['uniform_perplexity']:#.5g} (uniform): {stored['change_percent']:+.2f} %, "
        f"{100 * stored['confidence']:.0f} % interval {stored['low_percent']:+.2f} to "
        f"{stored['high_percent']:+.2f} % (paired bootstrap over {stored['windows']} windows, "
        f"{stored['tokens']:,} tokens)"
    )


def held_out_verdict(stored: Mapping[str, Any]) -> str:
    """Return a warning where a stored comparison does not show that the best profile is better.

    Returns:
        A sentence; empty where the whole interval lies below 0, or the best profile is a narrower
        one, which takes fewer bytes than the uniform one.
    """
    if stored["high_percent"] < 0.0 or stored.get(NARROWED):
        return ""
    if stored["low_percent"] > 0.0:
        return (
            "On held-out data the best profile is worse than the uniform one: the search has found "
            "nothing better. Use more evaluation data, or prune uniformly, without a search."
        )
    return (
        "On held-out data the best profile cannot be told from the uniform one: the interval of "
        "the difference holds 0. Use more evaluation data."
    )


def _narrower(attributes: Mapping[str, Any], best: int | None) -> CompressionProfile | None:
    """Return the profile that replaced the best trial's, if one did."""
    narrowing = narrowing_of(attributes, best)
    return narrowing.profile if narrowing is not None and narrowing.taken else None
