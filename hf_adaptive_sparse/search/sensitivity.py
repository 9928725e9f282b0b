"""How sensitive the loss is to the ratio of each group of linears, and the profile to start from.

Measured once before the trials: with every other group at the target, one group is set to the
lowest and to the highest ratio of the space, and the change of the loss is measured on some of the
batches. All groups in front of it are as in the uniform profile, so their layers need not be run
again. The damage of a group is modelled as ``strength · ratio ** 5``, with one strength per group;
the loss of a whole model grows like this around 50 % (measured: + 0.044 nats at 50 %, + 0.118 at
60 %). A strength below its own standard error is raised to it, so that noise does not decide. The
profile that minimises the summed damage under the budget becomes the second trial of a search. The
groups are treated as independent, which is only nearly true; the trials decide.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_adaptive_sparse.search.candidate import Candidate
from hf_adaptive_sparse.search.description import layer_settings
from hf_adaptive_sparse.search.errors import TrialFailure
from hf_adaptive_sparse.search.evaluator import Evaluator
from hf_adaptive_sparse.search.failures import failures
from hf_adaptive_sparse.search.losses import Losses
from hf_adaptive_sparse.search.objectives.goal import Quality

logger = logging.getLogger(__name__)

GROWTH = 5
"""Exponent of the damage in the ratio."""

PROBE_SHARE = 4
"""Every so many batches, one is probed."""

FEWEST_PROBED = 4
"""At least so many batches are probed, if there are that many."""

_BISECTIONS = 200


@dataclass(frozen=True)
class Sensitivity:
    """The change of the loss when one group alone differs from the uniform profile.

    Attributes:
        labels: Name of each group.
        low: The lower ratio tried.
        high: The higher ratio tried.
        target: The ratio of the uniform profile.
        at_low: Loss at the lower ratio less that of the uniform profile, per group.
        at_high: The same at the higher ratio.
        errors: Standard error over the batches of each group's strength.
        batches: Batches that it was measured on.
    """

    labels: tuple[str, ...]
    low: float
    high: float
    target: float
    at_low: tuple[float, ...]
    at_high: tuple[float, ...]
    errors: tuple[float, ...]
    batches: int

    @property
    def strengths(self) -> tuple[float, ...]:
        """Least-squares factor of ``ratio ** 5`` through both changes, per group."""
        return tuple(
            strength(lower, higher, self.low, self.high, self.target)
            for lower, higher in zip(self.at_low, self.at_high, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what is stored with a study: plain JSON types."""
        return {
            "labels": list(self.labels),
            "low": self.low,
            "high": self.high,
            "target": self.target,
            "at_low": list(self.at_low),
            "at_high": list(self.at_high),
            "strengths": list(self.strengths),
            "errors": list(self.errors),
            "batches": self.batches,
        }

    def best_ratios(self, weights: Sequence[int]) -> list[float]:
        """Return the ratios in [low, high] of least summed damage with the target as their mean.

        Args:
            weights: Number of weights of each group, by which the mean is weighted.
        """
        strengths = np.maximum(self.strengths, self.errors)
        strengths = np.maximum(strengths, 1e-9 * max(strengths.max(), 1e-12))
        sizes = np.asarray(weights, dtype=float)
        # At the minimum, each removed weight adds the same damage in every group not at an end.
        shape = (sizes / strengths) ** (1 / (GROWTH - 1))

        def ratios(log_price: float) -> Any:
            return np.clip(math.exp(log_price) * shape, self.low, self.high)

        tiny = 1e-12
        least = math.log(max(self.low, tiny)) - math.log(shape.max()) - 1.0
        most = math.log(self.high) - math.log(shape.min()) + 1.0
        for _ in range(_BISECTIONS):
            middle = (least + most) / 2
            if float(ratios(middle) @ sizes) < self.target * sizes.sum():
                least = middle
            else:
                most = middle
        return [float(ratio) for ratio in ratios(most)]


def strength(at_low: float, at_high: float, low: float, high: float, target: float) -> float:
    """Return the least-squares ``s`` of ``s · (ratio**5 - target**5)`` through two changes."""
    x, y = low**GROWTH - target**GROWTH, high**GROWTH - target**GROWTH
    return (at_low * x + at_high * y) / (x * x + y * y)


def measure_sensitivity(
    evaluator: Evaluator,
    groups: Mapping[str, Sequence[str]],
    *,
    low: float,
    high: float,
    target: float,
) -> Sensitivity | None:
    """Probe each group at a lower and a higher ratio than the uniform profile's.

    Args:
        evaluator: What evaluates profiles; the first quality of its goal is measured.
        groups: Label -> names of the linears that share a ratio, in layer order.
        low: Lower ratio.
        high: Higher ratio.
        target: The uniform profile's ratio.

    Returns:
        The sensitivities; ``None`` where a probe gives no finite loss or memory does not suffice.
    """
    batches = probed_batches(evaluator)
    at_low, at_high, errors = [], [], []

    def change(losses: Losses, where: Sequence[int]) -> float:
        return mean_loss(evaluator, losses, where) - mean_loss(evaluator, base, where)

    try:
        base = probe_losses(evaluator, evaluator.uniform, batches)
        for names in groups.values():
            lower, higher = (
                probe_losses(evaluator, _with_ratio(evaluator.uniform, names, ratio), batches)
                for ratio in (low, high)
            )
            at_low.append(change(lower, batches))
            at_high.append(change(higher, batches))
            each = [
                strength(change(lower, [index]), change(higher, [index]), low, high, target)
                for index in batches
            ]
            errors.append(float(np.std(each, ddof=1)) / math.sqrt(len(each)) if each[1:] else 0.0)
    except TrialFailure as error:
        logger.warning("The sensitivity of the blocks cannot be measured: %s", error)
        return None
    return Sensitivity(
        labels=tuple(groups),
        low=low,
        high=high,
        target=target,
        at_low=tuple(at_low),
        at_high=tuple(at_high),
        errors=tuple(errors),
        batches=len(batches),
    )


def probed_batches(evaluator: Evaluator) -> list[int]:
    """Return the batches that are measured on: the first ones in the order of all trials."""
    wanted = max(FEWEST_PROBED, -(-len(evaluator.order) // PROBE_SHARE))
    return evaluator.order[:wanted]


def _with_ratio(uniform: Candidate, names: Sequence[str], ratio: float) -> Candidate:
    counts = {name: round(ratio * uniform.numel[name]) for name in names}
    return replace(uniform, removed={**uniform.removed, **counts})


def probe_losses(evaluator: Evaluator, candidate: Candidate, batches: Sequence[int]) -> Losses:
    """Return a profile's losses on some batches.

    Raises:
        TrialFailure: If a loss is not finite, or memory does not suffice.
    """
    settings = layer_settings(candidate, evaluator.layers_name, evaluator.num_layers)
    losses = Losses()
    with failures():
        evaluator.apply(candidate)
        for index in batches:
            losses.add(index, evaluator.score(index, candidate, settings))
    return losses


def mean_loss(evaluator: Evaluator, losses: Losses, batches: Sequence[int]) -> float:
    """Return the mean loss over some batches: that of the goal's first quality."""
    part = next(part for part in evaluator.goal.parts if isinstance(part, Quality))
    return sum(weight * losses.mean(name, batches) for name, weight in part.terms)
