"""Conversations as text, with the places of the answers in it.

The text comes from the chat template, rendered whole. Where there is none, each question is asked
and answered as `questions` does, one behind the other. A template needs no ``{% generation %}``: an
answer ends where a mark behind it is rendered. Answers that a template leaves out or changes (of
earlier ones Qwen3 drops the thoughts) have no place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_adaptive_sparse.calibration.chat_templates import (
    MARK,
    Message,
    Part,
    holds_all,
    is_text,
    rendered,
    text_part,
)
from hf_adaptive_sparse.calibration.conversations import MESSAGES, places_of, text_of
from hf_adaptive_sparse.calibration.media import Medium, medium_of, needed_placeholder
from hf_adaptive_sparse.calibration.questions import (
    PLAIN_PROMPT,
    format_answer,
    format_question,
    without_placeholders,
)
from hf_adaptive_sparse.calibration.tables import Row


@dataclass(frozen=True)
class Answer:
    """Where an answer is.

    Attributes:
        start: Its first character, or token.
        end: What comes behind its last.
        shown: How many images, videos or sounds are shown before it.
    """

    start: int
    end: int
    shown: int


def line_of_conversation(processor: Any, row: Row) -> str:
    """Return a conversation of text alone as a line of a corpus.

    It is in the chat template of the processor or else of its tokenizer, with the special tokens
    that this writes; where neither has one, in a plain form without any.
    """
    messages = _cleaned(processor, row[MESSAGES])
    for owner in (processor, getattr(processor, "tokenizer", processor)):
        if getattr(owner, "chat_template", None):
            return rendered(owner, messages, prompt=False)
    form = {"user": PLAIN_PROMPT, "assistant": " {question}", "system": "\n{question}"}
    return "".join(
        form[message["role"]].replace("{question}", text_of(message)) for message in messages
    ).strip()


def told_text(processor: Any, row: Row) -> str:
    """Return all that is said in a conversation about something."""
    messages = _cleaned(processor, row[MESSAGES])
    if not getattr(processor, "chat_template", None):
        return _told_plainly(processor, messages, medium_of(row))[0]
    return rendered(processor, messages, prompt=False)


def told(processor: Any, row: Row) -> tuple[str, list[Answer]]:
    """Return the `told_text` of a conversation, and where its answers are.

    Where a template leaves a turn out, it is no whole conversation, and has no answers.
    """
    messages = _cleaned(processor, row[MESSAGES])
    if not getattr(processor, "chat_template", None):
        return _told_plainly(processor, messages, medium_of(row))
    text = rendered(processor, messages, prompt=False)
    answers: list[Answer] = []
    if not holds_all(processor, messages):
        return text, answers
    for index, message in enumerate(messages):
        said = text_of(message)
        if message["role"] != "assistant" or not said:
            continue
        marked = {**message, "content": [text_part(said + MARK)]}
        parts = [*messages[:index], marked, *messages[index + 1 :]]
        before, _, behind = rendered(processor, parts, prompt=False).partition(MARK)
        if before + behind == text and before.endswith(said):
            start, end = len(before) - len(said), len(before)
            answers.append(Answer(start, end, places_of(messages[:index])))
    return text, answers


def _told_plainly(
    processor: Any, messages: Sequence[Message], medium: Medium | None
) -> tuple[str, list[Answer]]:
    """Return what `told` does, where there is no chat template."""
    eos = getattr(processor, "tokenizer", processor).eos_token or ""
    text, system, shown = "", "", 0
    answers = []
    for message in messages:
        said, count = text_of(message), places_of([message])
        shown += count
        if message["role"] == "system":
            system = said
        elif message["role"] == "assistant":
            answer = format_answer(processor, text, said)
            if said:
                answers.append(Answer(len(text), len(text) + len(answer), shown))
            text += answer + eos
        elif not text:
            text = format_question(processor, said, medium=medium, count=count, system=system)
        else:
            places = needed_placeholder(processor, medium) * count
            text += places + PLAIN_PROMPT.replace("{question}", said)
    return text, answers


def _cleaned(processor: Any, messages: Sequence[Message]) -> list[Message]:
    """Return messages whose words ask for no image, video or sound."""

    def cleaned(part: Part) -> Part:
        if not is_text(part):
            return part
        return {**part, "text": without_placeholders(processor, part["text"])}

    return [{**m, "content": [cleaned(part) for part in m["content"]]} for m in messages]
