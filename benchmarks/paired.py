"""Held-out losses batch by batch, and differences between models on the very same batches."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.data import Batch
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice
from hf_adaptive_sparse.evaluation.perplexity import negative_log_likelihood
from hf_adaptive_sparse.evaluation.scoring import predict

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


@dataclass(frozen=True)
class Scores:
    """What a model makes of held-out questions, batch by batch.

    Attributes:
        losses: Of the tokens of the answers.
        errors: The questions that greedy decoding would miss, as "losses" per question.
    """

    losses: Losses
    errors: Losses

    @property
    def accuracy(self) -> float:
        """Share of the questions that are answered right."""
        return 1 - self.errors.mean


def score(model: PreTrainedModel, batches: Sequence[Batch]) -> Scores:
    """Score answered questions; every batch must have an answer."""
    sums, tokens, wrong, asked = [], [], [], []
    for batch in batches:
        predictions = predict(model, batch)
        if predictions is None:
            raise ValueError("Every batch must have an answer.")
        missed, rows = predictions.wrong_rows()
        sums.append(predictions.sum_nll())
        tokens.append(predictions.count)
        wrong.append(float(missed))
        asked.append(rows)
    return Scores(Losses(sums, tokens), Losses(wrong, asked))


def scores_against(scores: Mapping[str, Scores], to: str) -> dict[str, dict[str, Any]]:
    """Set scores against those of one row: gap of the loss and of the accuracy, with intervals."""
    bootstrap = Bootstrap(len(scores[to].losses.sums), seed=0)
    rows = {}
    for name, one in scores.items():
        gap, interval = bootstrap.gap(one.losses, scores[to].losses)
        fewer, (low, high) = bootstrap.gap(one.errors, scores[to].errors)
        rows[name] = {
            "loss": one.losses.mean,
            "gap": gap,
            "interval": interval,
            "accuracy": one.accuracy,
            "accuracy_gap": 0.0 - fewer,
            "accuracy_interval": (0.0 - high, 0.0 - low),
        }
    return rows


def _gap(losses: Losses, to: Losses, draw: Sequence[int]) -> float:
    return sum(losses.sums[i] - to.sums[i] for i in draw) / sum(to.tokens[i] for i in draw)


def _interval(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[int(0.025 * len(ordered))], ordered[int(0.975 * len(ordered)) - 1]
