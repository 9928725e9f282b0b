"""The relative increase of perplexity between two profiles on the same windows, with bounds."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.errors import NonFiniteError
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice
from hf_adaptive_sparse.evaluation.perplexity import negative_log_likelihood
from hf_adaptive_sparse.profiles import CompressionProfile, KVCacheConfig
from hf_adaptive_sparse.pruning.apply import masked, rank_model
from hf_adaptive_sparse.pruning.quantising import quantised
from hf_adaptive_sparse.search.losses import Loss

logger = logging.getLogger(__name__)

Batches = Sequence[Mapping[str, torch.Tensor]]

CONFIDENCE = 0.95
"""Level of every interval and bound that a search states."""

HIGHEST = 700.0
"""Largest difference of mean losses whose exponential is still a float."""


@dataclass(frozen=True)
class Increase:
    """A relative increase of perplexity, 0.01 being 1 %.

    Attributes:
        mean: The estimate.
        low: Where the true increase is above, with the confidence that was asked for.
        high: Where it is below, with that confidence. Both at once hold with less.
    """

    mean: float
    low: float
    high: float


def increase_of(before: Sequence[Loss], after: Sequence[Loss], confidence: float) -> Increase:
    """Return the increase of perplexity and its one-sided bounds, from paired windows.

    The mean loss per token is a ratio of sums over windows; its standard error is that of a ratio
    estimator, the quantile Student's t. Windows are taken to be independent of each other.

    Args:
        before: Loss and tokens of each window under one profile.
        after: The same under the other, in the same order; a loss that is not finite makes the
            increase infinite.
        confidence: Of each bound by itself.

    Raises:
        ValueError: If fewer than two windows score a token, or a loss of ``before`` is not finite.
    """
    pairs = [(b - a, n) for (a, n), (b, _) in zip(before, after, strict=True) if n]
    if not all(math.isfinite(loss) for loss, _ in before):
        raise ValueError("The loss of a window is not finite under the profile compared with.")
    if len(pairs) < 2:
        raise ValueError(f"At least two windows must score a token, got {len(pairs)}.")
    if not all(math.isfinite(difference) for difference, _ in pairs):
        return Increase(math.inf, math.inf, math.inf)
    tokens = sum(n for _, n in pairs)
    centre = sum(difference for difference, _ in pairs) / tokens
    squares = sum((difference - centre * n) ** 2 for difference, n in pairs)
    error = math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / tokens
    half = student_t(confidence, len(pairs) - 1) * error
    return Increase(*(math.expm1(min(x, HIGHEST)) for x in (centre, centre - half, centre + half)))


def student_t(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t distribution.

    The expansion in powers of 1 / ``freedom`` around the normal quantile (Abramowitz and Stegun,
    26.7.5); from 5 degrees of freedom on it is right to 0.2 % between 0.9 and 0.99.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(
        term / float(freedom) ** power for power, term in zip((1, 2, 3, 4), terms, strict=True)
    )


def losses_under(
    model: PreTrainedModel,
    batches: Batches,
    profile: CompressionProfile,
    calibration: Batches | None = None,
    *,
    metric: str = "lognorm",
    modules_to_not_convert: Sequence[str] = (),
) -> list[Loss]:
    """Return the `losses_of` batches under a profile: one-shot masks, codes, KV bits.

    Args:
        model: The dense model; as before afterwards.
        batches: Batches to score.
        profile: The profile; an empty one scores the dense model.
        calibration: Batches that the weights are ranked on, where the profile prunes.
        metric: Metric that ranks them.
        modules_to_not_convert: Names or globs of linears that stay dense.
    """
    kv_cache: KVCacheConfig | bool = profile.kv_cache or False
    with contextlib.ExitStack() as stack:
        if profile.sparsity is not None:
            ratios = profile.sparsity.ratios
            rankings = rank_model(
                model,
                calibration,
                metric=metric,
                low=min(ratios.values()),
                high=max(ratios.values()),
                modules_to_not_convert=modules_to_not_convert,
                progress=False,
            )
            stack.enter_context(masked(model, rankings)).apply(ratios)
        if profile.weight_bits:
            codes = stack.enter_context(quantised(model, profile.weight_bits))
            codes.apply(profile.weight_bits)
        return losses_of(model, batches, kv_cache)


def losses_of(model: PreTrainedModel, batches: Batches, kv_cache: KVCacheChoice) -> list[Loss]:
    """Return loss and tokens of each batch; all infinite if keys or values are not finite."""
    try:
        return [negative_log_likelihood(model, batch, kv_cache) for batch in batches]
    except NonFiniteError as error:
        logger.warning("The loss of a profile counts as infinite: %s", error)
        return [(math.inf, 0)] * len(batches)
