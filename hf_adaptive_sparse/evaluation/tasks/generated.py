"""Shared by the benchmarks that generate answers: how they prompt, and how they record answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.media import COLUMN, PLACE
from hf_adaptive_sparse.calibration.records import (
    IMAGE,
    QUESTION,
    DataError,
    Row,
    Table,
    check_unicode,
    row_image,
)
from hf_adaptive_sparse.evaluation.answering import generate_answers
from hf_adaptive_sparse.evaluation.tasks.task import (
    Figures,
    Item,
    Outcome,
    Setting,
    Task,
    mean_figures,
)

SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."
"""The prompt that LLaVA-1.5 was trained and is evaluated with on short answers."""


class GeneratedTask(Task):
    """A benchmark that asks a question and scores the generated answer.

    Attributes:
        prompt: Text around ``{question}`` under a chat template; models without one are asked by
            the plain prompt of `format_question`.
        max_new_tokens: Tokens per answer at most.
    """

    metric = "accuracy"
    prompt: ClassVar[str] = SHORT_ANSWER
    max_new_tokens: ClassVar[int] = 16

    @abstractmethod
    def score(self, answer: str, content: Row) -> Outcome:
        """Score one answer.

        Args:
            answer: What the model said, cut at its end of sequence and first newline.
            content: The item's content.

        Returns:
            An outcome with ``score`` in [0, 1].
        """

    def evaluate(
        self, model: PreTrainedModel, processor: Any, items: Sequence[Item], setting: Setting
    ) -> list[Outcome]:
        """Generate and score an answer to each item.

        Raises:
            DataError: If a question is no valid Unicode or does not fit into the model's context.
        """
        for item in items:
            check_unicode(item.content[QUESTION], item.content[PLACE])
        prompt = setting.prompt
        if prompt is None and getattr(processor, "chat_template", None):
            prompt = self.prompt
        answers = generate_answers(
            model,
            processor,
            [item.content for item in items],
            kv_cache=setting.kv_cache,
            max_new_tokens=setting.max_new_tokens or self.max_new_tokens,
            prompt=prompt,
        )
        return [
            {"answer": answer.text, "ended": answer.ended, **self.score(answer.text, item.content)}
            for item, answer in zip(items, answers, strict=True)
        ]

    def figures(self, outcomes: Sequence[Outcome]) -> Figures:
        """Return the mean score, and how many answers the model ended itself."""
        ended = sum(outcome["ended"] for outcome in outcomes) / len(outcomes)
        return mean_figures([outcome["score"] for outcome in outcomes], {"ended_ratio": ended})


def read_question(row: Row, number: int, table: Table, *, needs_image: bool) -> dict[str, Any]:
    """Return the question of a row and its image, if any, as `generate_answers` takes them.

    Raises:
        DataError: Naming the row, if it has no question, or no image where there must be one.
    """
    place = f"row {number} of {table.name}"
    for column, present in (
        (QUESTION, isinstance(row.get(QUESTION), str)),
        (IMAGE, row.get(IMAGE) is not None or not needs_image),
    ):
        if not present:
            raise DataError(f"Every row must have the column {column!r}; {place} lacks it.")
    return {IMAGE: row_image(table, row), QUESTION: row[QUESTION], COLUMN: IMAGE, PLACE: place}
