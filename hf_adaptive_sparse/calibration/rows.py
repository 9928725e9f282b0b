"""Rows of a table as they are used: of text, or of questions with what they are about."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_adaptive_sparse.calibration.media import COLUMN, PLACE, Medium
from hf_adaptive_sparse.calibration.tables import (
    AUDIO,
    IMAGE,
    IMAGES,
    TEXT,
    DataError,
    Row,
    Table,
)

logger = logging.getLogger(__name__)

QUESTION = "question"
TRANSCRIBE = "Transcribe the audio."

SYSTEM = "system"
"""Key of a row: what the system says before the question; none of a plain question."""

ROWS_TO_JUDGE = 1000
"""Rows that are looked at for one that can be used."""


class Unusable(Exception):
    """Why a row is left out, in words that follow its name."""


def text_rows(table: Table) -> Iterator[Row]:
    """Start a pass over the rows of a table that have a ``text``.

    Raises:
        DataError: If one holds something other than text, or a lone surrogate.
    """
    for number, row in enumerate(table.scan([TEXT])):
        text = row.get(TEXT)
        if text is None:
            continue
        if not isinstance(text, str):
            raise DataError(
                f"Column 'text' must hold text; row {number} of {table.name} holds "
                f"{type(text).__name__}."
            )
        check_unicode(text, f"row {number} of {table.name}")
        yield {TEXT: text}


def question_rows(
    table: Table, medium: Medium, column: str, question: str | None, answer: str
) -> Iterator[Row]:
    """Start a pass over the rows that have all of a question; those that lack a part are left out.

    Args:
        table: The table.
        medium: What the questions are about.
        column: Its column.
        question: Column of the question; ``None``: what is said is asked for.
        answer: Column of the answer.

    Yields:
        Rows as `Records` has them.

    Raises:
        DataError: If none of the first `ROWS_TO_JUDGE` has all, or one is no valid Unicode.
    """

    def read(row: Row, place: str) -> Row:
        answers = read_answers(row.get(answer))
        asked = TRANSCRIBE if question is None else row.get(question)
        lacking = {
            column: row.get(column) is None or row[column] == [],
            str(question): not isinstance(asked, str),
            answer: not any(text.strip() for text in answers),
        }
        if any(lacking.values()):
            names = " and ".join(repr(name) for name, missing in lacking.items() if missing)
            raise Unusable(f"has nothing usable in {names}")
        check_unicode("".join((str(asked), *answers)), place)
        return {
            medium: resolved(row[column], table.folder),
            QUESTION: asked,
            "answers": answers,
            COLUMN: column,
            PLACE: place,
        }

    wanted = [column, *([] if question is None else [question]), answer]
    needed = f"{_article(column)}, a question and an answer"
    return usable_rows(table, wanted, read, "question", needed)


def usable_rows(
    table: Table,
    wanted: Sequence[str],
    read: Callable[[Row, str], Row],
    what: str,
    needed: str,
) -> Iterator[Row]:
    """Start a pass over the rows that can be used; the first that cannot is named in a warning.

    Args:
        table: The table.
        wanted: Columns that are read.
        read: Returns a row as it is used, given the table's and its place. It raises `Unusable` for
            one that is left out.
        what: What a row holds, for the warning.
        needed: What it must have for that, for the error.

    Raises:
        DataError: If none of the first `ROWS_TO_JUDGE` can be used.
    """
    usable, lacks = False, ""
    for number, row in enumerate(table.scan(wanted)):
        if number == ROWS_TO_JUDGE and not usable:
            break
        place = f"row {number} of {table.name}"
        try:
            found = read(row, place)
        except Unusable as reason:
            if not lacks:
                lacks = f"{place} {reason}"
                logger.warning("Rows without all of a %s are left out: %s.", what, lacks)
            continue
        usable = True
        yield found
    if lacks and not usable:
        raise DataError(f"Rows must have {needed}; {lacks}, and no other of them has all.")


def check_unicode(text: str, place: str) -> None:
    """Refuse lone surrogates, which JSON can spell and no tokenizer takes.

    Raises:
        DataError: If the text has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"Text must be valid Unicode; {place} has the lone surrogate "
            f"{text[error.start]!r}. Remove it, or write the pair that it is a half of."
        ) from error


def _article(column: str) -> str:
    return {IMAGE: "an image", IMAGES: "images", AUDIO: "a sound"}.get(column, "a video")


def row_image(table: Table, row: Row) -> Any:
    """Return the image of a row for `load_image`, or ``None`` if the row has none.

    Args:
        table: The table that the row is from; relative paths lie in its folder.
        row: A row with the column ``image``.
    """
    return resolved(row.get(IMAGE), table.folder)


def read_answers(value: Any) -> tuple[str, ...]:
    """Return the answers of a cell: text, a list of texts, or a list of ``{"answer": text}``."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, bool | int | float):
        return (str(value),)
    if isinstance(value, Mapping):  # `datasets` turns a list of dicts into a dict of lists
        return read_answers(value.get("answer"))
    if isinstance(value, Sequence):
        return tuple(text for item in value for text in read_answers(item))
    return ()


def resolved(value: Any, folder: Path | None) -> Any:
    """Place relative paths in the folder: of an image, a sound, a video, or each frame of one."""
    if folder is None:
        return value
    if isinstance(value, str):
        return folder / value
    if isinstance(value, Mapping) and value.get("path") and value.get("bytes") is None:
        return value if value.get("array") is not None else folder / str(value["path"])
    if isinstance(value, list):
        return [resolved(frame, folder) for frame in value]
    return value
