"""How far the compressed model's distribution over the next token is from the dense model's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_adaptive_sparse.evaluation.scoring import Predictions
from hf_adaptive_sparse.search.objectives.base import Objective, register_objective

KEPT_TOKENS = 64
"""Likeliest tokens whose dense probability is kept per scored token."""


@dataclass(frozen=True)
class _Dense:
    """The dense distributions of one batch, the tail of each summed up.

    Attributes:
        tokens: ``(scored, kept)``, int32: the likeliest tokens.
        log_probs: ``(scored, kept)``, float32: their log-probabilities.
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor


@register_objective
class Divergence(Objective):
    """Mean Kullback–Leibler divergence KL(dense || compressed) in nats per scored token.

    Kept of the dense model are its `KEPT_TOKENS` likeliest tokens per scored token and, implied,
    the probability of all others together: 8 bytes · min(64, vocabulary) per scored token, in CPU
    memory (67 MB for the default 64 windows of 2048 tokens). The divergence is that of these
    coarser distributions: a lower bound of the full one, exact for up to 64 tokens. It needs no
    labels, and differs less from batch to batch than perplexity does.
    """

    name = "kl"
    needs_dense = True

    def __init__(self) -> None:
        self._dense: dict[int, _Dense] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held of the dense model's predictions."""
        return sum(d.tokens.nbytes + d.log_probs.nbytes for d in self._dense.values())

    def observe(self, index: int, dense: Predictions) -> None:
        """Keep the likeliest tokens of a batch."""
        parts = []
        for logits, _ in dense.chunks():
            log_probs = logits.log_softmax(-1)
            parts.append(log_probs.topk(min(KEPT_TOKENS, log_probs.shape[-1]), dim=-1))
        self._dense[index] = _Dense(
            torch.cat([part.indices.to("cpu", torch.int32) for part in parts]),
            torch.cat([part.values.cpu() for part in parts]),
        )

    def score(self, index: int, predictions: Predictions) -> tuple[float, int]:
        """Return the summed divergence in nats and the tokens scored."""
        dense = self._dense[index]
        total, start = 0.0, 0
        for logits, _ in predictions.chunks():
            stop = start + len(logits)
            tokens = dense.tokens[start:stop].to(logits.device, torch.int64)
            theirs = dense.log_probs[start:stop].to(logits.device).double()
            ours = logits.log_softmax(-1).gather(1, tokens).double()
            divergence = (theirs.exp() * (theirs - ours)).sum(1)
            if tokens.shape[1] < logits.shape[-1]:
                divergence += _tail(theirs, ours)
            total += float(divergence.sum())
            start = stop
        return total, start


def _tail(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """Return what all other tokens together add: p log(p / q), 0 where p is."""
    # Rounding can leave a sum a little above 1.
    tiny = torch.finfo(torch.float32).tiny
    p = (1.0 - theirs.exp().sum(1)).clamp_min(0.0)
    q = (1.0 - ours.exp().sum(1)).clamp_min(tiny)
    return torch.where(p > tiny, p * (p.clamp_min(tiny).log() - q.log()), torch.zeros_like(p))
