"""The losses of one profile, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Loss = tuple[float, int]
"""Summed negative log-likelihood of a window in nats, and tokens that it scores."""


class Losses:
    """Summed losses and what divides them, per objective and batch."""

    def __init__(self) -> None:
        self._scores: dict[int, Mapping[str, tuple[float, int]]] = {}

    def add(self, index: int, scores: Mapping[str, tuple[float, int]]) -> None:
        """Enter the batch ``index``: objective -> summed loss and count."""
        self._scores[index] = scores

    def scored(self, index: int) -> bool:
        """Return whether anything in the batch ``index`` counts for any objective."""
        return any(count for _, count in self._scores[index].values())

    def mean(self, objective: str, indices: Sequence[int]) -> float:
        """Return an objective's mean loss over some batches, summed in the order of the data.

        Batches that were not entered, or hold nothing to score, count for nothing; 0 if none does.
        """
        entered = [self._scores[i][objective] for i in sorted(indices) if i in self._scores]
        count = sum(tokens for _, tokens in entered)
        return sum(loss for loss, _ in entered) / count if count else 0.0
