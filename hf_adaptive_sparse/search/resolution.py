"""Whether the evaluation data can tell the best profile from the uniform one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_adaptive_sparse.evaluation.windows import token_shape
from hf_adaptive_sparse.search.trials import Tally

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

CERTAIN = 2.0
"""Standard errors that a difference must be worth to be taken for one."""


@dataclass(frozen=True)
class Gain:
    """How much better the best profile is than the uniform one, on the evaluation data.

    Found by pairing batch with batch. It is a little optimistic: the best of many trials is chosen
    by the same data. What held-out data say is the measure.

    Attributes:
        value: Uniform's value less the best one's.
        standard_error: Of ``value``, over the batches.
        batches: Batches compared.
    """

    value: float
    standard_error: float
    batches: int

    @property
    def is_certain(self) -> bool:
        """Whether the gain is worth at least `CERTAIN` standard errors."""
        return self.value >= CERTAIN * self.standard_error

    def sufficient(self, tokens: int) -> int | None:
        """Return how many tokens would make this gain certain; ``None`` where there is no gain.

        Args:
            tokens: Tokens that it was found on. The error falls with their square root.
        """
        if self.value <= 0.0:
            return None
        return math.ceil(tokens * (CERTAIN * self.standard_error / self.value) ** 2)


def gain_over_uniform(count: Tally) -> Gain | None:
    """Return the gain of the best trial, ``None`` where its batches or uniform's are not known."""
    best, baseline = count.best, count.baseline
    if best is None or baseline is None or best.number == baseline.number:
        return None
    steps = sorted(set(best.intermediate_values) & set(baseline.intermediate_values))
    if len(steps) < 2:
        return None
    differences = [_difference(baseline, best, step) for step in steps]
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    value = float(baseline.values[0] - best.values[0])
    return Gain(value, error, len(differences))


def _difference(baseline: FrozenTrial, best: FrozenTrial, step: int) -> float:
    return baseline.intermediate_values[step] - best.intermediate_values[step]


def resolution_warning(
    count: Tally, evaluation: Sequence[Mapping[str, torch.Tensor]]
) -> str | None:
    """Return what to say where the data cannot tell the best profile from the uniform one."""
    gain = gain_over_uniform(count)
    if gain is None or gain.is_certain:
        return None
    tokens = sum(_tokens(batch) for batch in evaluation)
    needed = gain.sufficient(tokens)
    enough = "" if needed is None else f" About {needed:,} tokens would tell them apart."
    return (
        f"The best profile gains {gain.value:.4g} over the uniform one, which is less than "
        f"{CERTAIN:g} standard errors ({gain.standard_error:.2g} each, from {gain.batches} batches "
        f"with {tokens:,} tokens): it may be chance.{enough}"
    )


def _tokens(batch: Mapping[str, torch.Tensor]) -> int:
    if "attention_mask" in batch and "decoder_input_ids" not in batch:
        return int(batch["attention_mask"].sum())
    return math.prod(token_shape(batch))
