"""ScienceQA: multiple choice, with and without an image."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.records import (
    IMAGE,
    QUESTION,
    DataError,
    Row,
    Table,
)
from hf_adaptive_sparse.evaluation.tasks.generated import GeneratedTask, read_question
from hf_adaptive_sparse.evaluation.tasks.task import (
    Figures,
    Item,
    Outcome,
    Setting,
    register_task,
)
from hf_adaptive_sparse.evaluation.vqa_answers import normalize_answer

CHOICES, ANSWER, HINT = "choices", "answer", "hint"
LETTERS = string.ascii_uppercase

_LETTER_FIRST = re.compile(r"\(?([A-Z])(?:[.):]|\)?$)")
_ANSWER_IS = re.compile(r"\banswer is:?\s*\(?([A-Z])\b", re.IGNORECASE)


@register_task
class ScienceQA(GeneratedTask):
    """ScienceQA (Lu et al. 2022): accuracy by choice.

    The choices are lettered and the model is asked for a letter, as LLaVA is evaluated. An answer
    that names no choice is wrong; how many did is among the figures.
    """

    name = "scienceqa"
    default_data = "derek-thomas/ScienceQA::test"
    columns: ClassVar[tuple[str, ...]] = (IMAGE, QUESTION, CHOICES, ANSWER)
    prompt = "{question}\nAnswer with the option's letter from the given choices directly."
    needs_images = True

    def items(
        self, table: Table, processor: Any, model: PreTrainedModel, setting: Setting
    ) -> Iterator[Item]:
        """Yield the questions; those with an image and those without are batched apart."""
        hints = [HINT] if HINT in table.columns else []
        for number, row in enumerate(table.scan([*self.columns, *hints])):
            content = read_question(row, number, table, needs_image=False)
            choices, answer = row[CHOICES], row[ANSWER]
            if not _is_choice(choices, answer):
                raise DataError(
                    "Every question must have 1 to 26 choices, and as its answer the number of one "
                    f"of them, from 0; row {number} of {table.name} has {len(choices or ())} "
                    f"choices and the answer {answer!r}."
                )
            content |= {
                QUESTION: lettered_question(row[QUESTION], choices, row.get(HINT)),
                CHOICES: list(choices),
                ANSWER: int(answer),
            }
            yield Item(str(number), content, "text" if content[IMAGE] is None else "image")

    def score(self, answer: str, content: Row) -> Outcome:
        """Score 1 for the right choice."""
        choice = chosen(answer, content[CHOICES])
        return {
            "score": float(choice == content[ANSWER]),
            "choice": choice,
            "image": content[IMAGE] is not None,
        }

    def figures(self, outcomes: Sequence[Outcome]) -> Figures:
        """Return the accuracy; in the details also with and without images apart."""
        figures = super().figures(outcomes)
        details = dict(figures.details)
        details["no_choice_ratio"] = sum(o["choice"] is None for o in outcomes) / len(outcomes)
        for name, wanted in (("accuracy_with_image", True), ("accuracy_without_image", False)):
            scores = [o["score"] for o in outcomes if o["image"] is wanted]
            if scores:
                details[name] = sum(scores) / len(scores)
        return Figures(figures.value, figures.standard_error, details)


def lettered_question(question: str, choices: Sequence[str], hint: str | None = None) -> str:
    """Return a question with its context, if any, before it and its choices behind it."""
    context = f"Context: {hint.strip()}\n" if hint and hint.strip() else ""
    options = "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(choices))
    return f"{context}{question.strip()}\n{options}"


def chosen(answer: str, choices: Sequence[str]) -> int | None:
    """Return the number of the choice that an answer names, or ``None``.

    In this order: a letter by itself or in front of ``.``, ``)`` or ``:``; "the answer is" and a
    letter; the text of exactly one choice.

    Example:
        >>> chosen("(B)", ["up", "down"]), chosen("down.", ["up", "down"]), chosen("a", ["up"])
        (1, 1, 0)
    """
    said = answer.strip()
    first = _LETTER_FIRST.match(said) or _ANSWER_IS.search(said)
    letter = first.group(1).upper() if first else said.upper()
    if len(letter) == 1 and letter in LETTERS[: len(choices)]:
        return LETTERS.index(letter)
    same = [i for i, c in enumerate(choices) if normalize_answer(c) == normalize_answer(said)]
    return same[0] if len(same) == 1 else None


def _is_choice(choices: Any, answer: Any) -> bool:
    return (
        isinstance(choices, Sequence)
        and 1 <= len(choices) <= len(LETTERS)
        and isinstance(answer, int)
        and not isinstance(answer, bool)
        and 0 <= answer < len(choices)
    )
