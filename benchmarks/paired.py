"""Held-out losses batch by batch, and differences between models on the very same batches."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.data import Batch
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice
from hf_adaptive_sparse.evaluation.perplexity import negative_log_likelihood

RESAMPLES = 2000


@dataclass(frozen=True)
class Losses:
    """Held-out losses of one model.

    Attributes:
        sums: Negative log-likelihood of each batch, in nats.
        tokens: Tokens scored in each batch.
    """

    sums: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Nats per token."""
        return sum(self.sums) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """The exponential of it."""
        return math.exp(self.mean)


def held_out_losses(
    model: PreTrainedModel, batches: Sequence[Batch], kv_cache: KVCacheChoice = None
) -> Losses:
    scored = [negative_log_likelihood(model, batch, kv_cache) for batch in batches]
    return Losses([loss for loss, _ in scored], [tokens for _, tokens in scored])


class Bootstrap:
    """The same resampled batches for every comparison, so that intervals are comparable too."""

    def __init__(self, batches: int, seed: int, resamples: int = RESAMPLES) -> None:
        generator = random.Random(seed)
        self._all = range(batches)
        self._draws = [
            [generator.randrange(batches) for _ in range(batches)] for _ in range(resamples)
        ]

    def gap(self, losses: Losses, to: Losses) -> tuple[float, tuple[float, float]]:
        """Return the mean loss above ``to``'s in nats per token, and its 95 % interval."""
        gaps = [_gap(losses, to, draw) for draw in self._draws]
        return _gap(losses, to, self._all), _interval(gaps)

    def share(self, losses: Losses, rival: Losses, to: Losses) -> tuple[float, tuple[float, float]]:
        """Return the gap to ``to`` over the rival's gap to it, and its 95 % interval."""
        shares = [_gap(losses, to, draw) / _gap(rival, to, draw) for draw in self._draws]
        whole = _gap(losses, to, self._all) / _gap(rival, to, self._all)
        return whole, _interval(shares)


def _gap(losses: Losses, to: Losses, draw: Sequence[int]) -> float:
    return sum(losses.sums[i] - to.sums[i] for i in draw) / sum(to.tokens[i] for i in draw)


def _interval(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[int(0.025 * len(ordered))], ordered[int(0.975 * len(ordered)) - 1]
