"""Objectives that need nothing but the predicted tokens."""

from __future__ import annotations

from collections.abc import Sequence

from hf_adaptive_sparse.evaluation.scoring import Predictions, perplexity_of
from hf_adaptive_sparse.search.objectives.base import Batch, Objective, register_objective


@register_objective
class Perplexity(Objective):
    """``exp`` of the mean negative log-likelihood of all scored tokens, as `perplexity` has it."""

    name = "perplexity"

    def score(self, index: int, predictions: Predictions) -> tuple[float, int]:
        """Return the negative log-likelihood in nats and the tokens scored."""
        return predictions.sum_nll(), predictions.count

    def value(self, loss: float) -> float:
        """Return the perplexity."""
        return perplexity_of(loss)


class _OnAnswers(Objective):
    """An objective of the batches that say, by their labels, what the answer is."""

    def __init__(self) -> None:
        self._answered: set[int] = set()

    def check(self, batches: Sequence[Batch]) -> None:
        """Check that there are answers.

        Raises:
            ValueError: If no batch has labels.
        """
        self._answered = {index for index, batch in enumerate(batches) if "labels" in batch}
        if not self._answered:
            raise ValueError(
                f"The objective {self.name!r} needs questions with answers: evaluation data with "
                "the columns image, question and answer, or batches with labels (-100 but on the "
                "answer). These have no labels; use 'perplexity' or 'kl' for text."
            )


@register_objective
class AnswerLoss(_OnAnswers):
    """Mean negative log-likelihood, in nats, of the tokens of the right answers."""

    name = "answers"

    def score(self, index: int, predictions: Predictions) -> tuple[float, int]:
        """Return the negative log-likelihood in nats and the tokens of the answers."""
        if index not in self._answered:
            return 0.0, 0
        return predictions.sum_nll(), predictions.count


@register_objective
class AnswerErrors(_OnAnswers):
    """Fraction of the questions whose answer greedy decoding would miss: 1 - accuracy.

    One forward over question and answer decides it: an answer is reproduced exactly if each of its
    tokens is the likeliest behind the ones before it. It counts steps of one question, so it tells
    profiles apart only on many questions; the loss of the answers sees more of a difference.
    """

    name = "accuracy"
    label = "questions missed"

    def score(self, index: int, predictions: Predictions) -> tuple[float, int]:
        """Return the questions missed and the questions asked."""
        if index not in self._answered:
            return 0.0, 0
        wrong, asked = predictions.wrong_rows()
        return float(wrong), asked
