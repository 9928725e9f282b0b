"""VQAv2 and TextVQA: soft accuracy against ten human answers.

Both score an answer by how many humans gave it, each human left out once (`mean_agreement`);
they differ in how an answer is cleaned before it is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.records import (
    IMAGE,
    QUESTION,
    DataError,
    Row,
    Table,
    read_answers,
)
from hf_adaptive_sparse.evaluation.tasks.generated import GeneratedTask, read_question
from hf_adaptive_sparse.evaluation.tasks.task import Item, Outcome, Setting, register_task
from hf_adaptive_sparse.evaluation.vqa_answers import mean_agreement, normalize_answer

ANSWERS = "answers"
QUESTION_ID = "question_id"


class SoftAccuracyTask(GeneratedTask):
    """A benchmark of visual questions with several human answers each."""

    columns: ClassVar[tuple[str, ...]] = (IMAGE, QUESTION, ANSWERS)
    needs_images = True

    def items(
        self, table: Table, processor: Any, model: PreTrainedModel, setting: Setting
    ) -> Iterator[Item]:
        """Yield the questions."""
        ids = [QUESTION_ID] if QUESTION_ID in table.columns else []
        for number, row in enumerate(table.scan([*self.columns, *ids])):
            content = read_question(row, number, table, needs_image=True)
            answers = read_answers(row[ANSWERS])
            if not answers:
                raise DataError(
                    f"Every question must have at least one answer; row {number} of {table.name} "
                    "has none (the test splits' answers are not public: use the validation split)."
                )
            key = f"{number}:{row[QUESTION_ID]}" if ids else str(number)
            yield Item(key, {**content, ANSWERS: answers})

    def score(self, answer: str, content: Row) -> Outcome:
        """Score by the share of humans who agree."""
        said = self.normalize(answer)
        return {"score": mean_agreement([self.normalize(a) == said for a in content[ANSWERS]])}

    def normalize(self, answer: str) -> str:
        """Return an answer as it is compared."""
        return normalize_answer(answer)


@register_task
class VQAv2(SoftAccuracyTask):
    """VQA v2 (Goyal et al. 2017), with the official normalisation and accuracy."""

    name = "vqav2"
    default_data = "lmms-lab/VQAv2::validation"


@register_task
class TextVQA(SoftAccuracyTask):
    """TextVQA (Singh et al. 2019), with the normalisation of its challenge's evaluation.

    That one drops every comma and question mark and sets a possessive apart before it goes on as
    VQA v2 does.
    """

    name = "textvqa"
    default_data = "lmms-lab/textvqa::validation"

    def normalize(self, answer: str) -> str:
        """Return an answer as the challenge compares it.

        Example:
            >>> TextVQA().normalize("Joe's, diner?")
            "joe 's diner"
        """
        lowered = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
        return normalize_answer(lowered)
