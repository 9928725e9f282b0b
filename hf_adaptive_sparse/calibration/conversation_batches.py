"""Batches of whole conversations about images, videos or sounds, every answer labelled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hf_adaptive_sparse.architecture import UNLIMITED_CONTEXT
from hf_adaptive_sparse.calibration.conversation_texts import Answer, told, told_text
from hf_adaptive_sparse.calibration.conversations import (
    MESSAGES,
    exchanges,
    first_exchange,
    kept,
    places_of,
)
from hf_adaptive_sparse.calibration.media import Media, takes_suffix
from hf_adaptive_sparse.calibration.questions import (
    IGNORED,
    MOST_ADDED,
    check_fits,
    encode_questions,
    question_batch,
    shared_tokens,
    token_ids,
)
from hf_adaptive_sparse.calibration.tables import Row

HEADER_TOKENS = 3
"""Tokens in front of an answer that are looked for with it: an answer alone may be "no"."""


def conversation_batch(
    processor: Any, rows: Sequence[Row], *, context: int = UNLIMITED_CONTEXT
) -> dict[str, torch.Tensor]:
    """Make a batch of conversations, padded on the right.

    What does not fit into the context is left out, from the end by whole questions and answers.
    Only the first question of each row is used, as `question_batch` does, where a processor takes
    no more (PaliGemma), and where no answer of some row is found in what a processor makes of it.

    Args:
        processor: The model's processor.
        rows: Conversations about something, as `Records` has them.
        context: Most tokens that the model takes.

    Returns:
        The processor's output and ``labels`` (batch, seq) int64: -100 but on the tokens of the
        answers. What ends an answer is read but not scored, as in `question_batch`.

    Raises:
        DataError: If a first question with its answer is longer than the context, its answer leaves
            no token to score, or something cannot be opened.
    """
    if not takes_suffix(processor) and all(told(processor, row)[1] for row in rows):
        rows, batch = _fitting(processor, rows, context)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for index, row in enumerate(rows):
            places = batch["attention_mask"][index].nonzero().flatten()
            check_fits(row, len(places), context)
            ids = batch["input_ids"][index, places]
            for answer in _read_answers(processor, row, ids.tolist()):
                labels[index, places[answer.start : answer.end]] = ids[answer.start : answer.end]
        if bool((labels != IGNORED).any(1).all()):
            return {**batch, "labels": labels}
    return question_batch(processor, [first_exchange(row) for row in rows], context=context)


def _fitting(
    processor: Any, rows: Sequence[Row], context: int
) -> tuple[Sequence[Row], dict[str, torch.Tensor]]:
    """Return rows cut to the context, as far as that goes, and what the processor makes of them."""
    while True:
        texts = [told_text(processor, row) for row in rows]
        batch = encode_questions(processor, texts, Media.of(rows), "right")
        lengths = batch["attention_mask"].sum(1).tolist()
        before = [exchanges(row) for row in rows]
        rows = [
            _shortened(processor, row, length - context)
            for row, length in zip(rows, lengths, strict=True)
        ]
        if [exchanges(row) for row in rows] == before:
            return rows, batch


def _shortened(processor: Any, row: Row, excess: int) -> Row:
    """Return a conversation with so many tokens of text less, or its first question and answer."""
    if excess <= 0:
        return row
    most = len(token_ids(processor, told_text(processor, row))) - excess
    while exchanges(row) > 1:
        row = kept(row, exchanges(row) - 1)
        if len(token_ids(processor, told_text(processor, row))) <= most:
            break
    return row


def _read_answers(processor: Any, row: Row, read: Sequence[int]) -> list[Answer]:
    """Return where the answers of a conversation are among the tokens that are read.

    A processor makes many tokens of the place of an image. Behind the last of these all is as the
    tokenizer makes it; before it, an answer is looked for in front of the one that comes next.

    Args:
        processor: The model's processor.
        row: The conversation.
        read: Ids of the tokens, without padding.
    """
    text, spoken = told(processor, row)
    whole = token_ids(processor, text)
    surplus = len(read) - len(whole)
    shown, limit = places_of(row[MESSAGES]), len(read)
    shifts: Iterable[int] = range(surplus, surplus - MOST_ADDED - 1, -1)
    found = []
    for characters in reversed(spoken):
        answer = _tokens_of(processor, text, whole, characters)
        if answer.shown != shown:
            shown, shifts = answer.shown, range(limit - answer.end, -1, -1)
        shift = _shift(read, whole, answer, shifts)
        if shift is not None:
            shifts, limit = [shift], answer.start + shift
            found.append(Answer(limit, answer.end + shift, answer.shown))
    return found


def _shift(
    read: Sequence[int], whole: Sequence[int], answer: Answer, shifts: Iterable[int]
) -> int | None:
    """Return by how much an answer lies further behind where it is read; ``None``: not found."""
    first = max(0, answer.start - HEADER_TOKENS)
    wanted = whole[first : answer.end]
    for shift in shifts:
        if first + shift >= 0 and read[first + shift : answer.end + shift] == wanted:
            return shift
    return None


def _tokens_of(processor: Any, text: str, whole: Sequence[int], answer: Answer) -> Answer:
    """Return the tokens of an answer, given its characters in a text of tokens ``whole``."""
    before = token_ids(processor, text[: answer.start])
    until = token_ids(processor, text[: answer.end])
    end = shared_tokens(until, whole)
    # What follows may have become one token with the answer's end.
    return Answer(shared_tokens(before, whole), end + (end < len(until)), answer.shown)
