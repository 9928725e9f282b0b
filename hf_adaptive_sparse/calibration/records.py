"""Rows of text or of visual questions, read lazily from a Hub dataset or a local file.

A source is ``name``, ``name:config`` or ``name:config:split`` on the Hub, or a local ``.parquet``,
``.jsonl``, ``.json`` or ``.txt`` file or a folder of parquet files. Rows come one after the other,
only the columns that are used are read, and images stay encoded until `load_image` opens them, so
a corpus of any size costs what is taken from it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from hf_adaptive_sparse.calibration.hub_datasets import hub_table
from hf_adaptive_sparse.calibration.local_files import FILE_TYPES, local_table
from hf_adaptive_sparse.calibration.tables import IMAGE, TEXT, DataError, Row, Table

__all__ = [
    "IMAGE",
    "QUESTION",
    "TEXT",
    "DataError",
    "Records",
    "Row",
    "Table",
    "load_image",
    "open_table",
    "read_answers",
    "read_records",
    "row_image",
]

DEFAULT_DATASET = "Salesforce/wikitext:wikitext-2-raw-v1"
"""What is read when no source is named."""

QUESTION = "question"
ANSWER_COLUMNS = ("answers", "answer", "multiple_choice_answer")
"""Columns an answer is taken from, the first that is there: ten human answers before one."""


@dataclass(frozen=True)
class Records:
    """Rows that can be iterated over again and again.

    Attributes:
        name: The source, for messages.
        kind: ``"text"``: rows have ``text`` (str). ``"visual_question"``: rows have ``image``
            (anything that `load_image` opens), ``question`` (str) and ``answers`` (tuple of str,
            not empty).
        rows: Starts a new pass over the rows.
    """

    name: str
    kind: Literal["text", "visual_question"]
    rows: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.rows()


def read_records(
    source: str | os.PathLike[str] | Iterable[Row] | None,
    split: str = "train",
    *,
    images: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Records:
    """Open a data source.

    Args:
        source: ``None`` (WikiText-2 from the Hub), a Hub dataset as ``name[:config[:split]]``, the
            path of a local file or folder, or an iterable of rows.
        split: Split of a Hub dataset that names none itself. Local files have no splits; in a
            folder, files whose name begins with the split are preferred.
        images: Whether visual questions are wanted. They win over a ``text`` column if so and are
            ignored otherwise.
        revision: Revision of a Hub dataset.
        token: Token for private or gated Hub datasets.

    Returns:
        Records of text or of visual questions.

    Raises:
        DataError: If the source cannot be read or has no usable columns.
    """
    return _select(open_table(source, split, revision=revision, token=token), images)


def open_table(
    source: str | os.PathLike[str] | Iterable[Row] | None,
    split: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Table:
    """Open a data source as it is, whatever its columns; arguments and errors of `read_records`."""
    if source is None:
        return hub_table(f"{DEFAULT_DATASET}:{split}", split, revision, token)
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        path = Path(text).expanduser()
        if path.exists() or _looks_like_path(text):
            return local_table(path, split)
        return hub_table(text, split, revision, token)
    rows = list(source)
    if not all(isinstance(row, Mapping) for row in rows):
        raise DataError("A list of records must hold dicts, one per row.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return Table("the list of records", columns, lambda _: rows)


def _looks_like_path(source: str) -> bool:
    return (
        source.startswith(("/", ".", "~"))
        or "\\" in source
        or Path(source).suffix.lower() in FILE_TYPES
    )


# Which columns are used


def _select(table: Table, images: bool) -> Records:
    answer = next((c for c in ANSWER_COLUMNS if c in table.columns), None)
    asks = answer is not None and IMAGE in table.columns and QUESTION in table.columns
    if asks and images:
        return Records(table.name, "visual_question", lambda: _questions(table, str(answer)))
    if TEXT in table.columns:
        return Records(table.name, "text", lambda: _texts(table))
    found = f"{table.name} has the columns {', '.join(table.columns) or '(none)'}"
    if asks:
        raise DataError(
            f"{found}: images and questions, but the model takes no images. Use data with a "
            "'text' column."
        )
    raise DataError(
        f"Data must have a column 'text', or the columns 'image', 'question' and 'answer' (or "
        f"'answers'); {found}."
    )


def _texts(table: Table) -> Iterator[Row]:
    for number, row in enumerate(table.scan([TEXT])):
        text = row.get(TEXT)
        if text is None:
            continue
        if not isinstance(text, str):
            raise DataError(
                f"Column 'text' must hold text; row {number} of {table.name} holds "
                f"{type(text).__name__}."
            )
        yield {TEXT: text}


def _questions(table: Table, answer: str) -> Iterator[Row]:
    for number, row in enumerate(table.scan([IMAGE, QUESTION, answer])):
        answers = read_answers(row.get(answer))
        if row.get(IMAGE) is None or not isinstance(row.get(QUESTION), str) or not answers:
            raise DataError(
                f"Every row must have an image, a question and an answer; row {number} of "
                f"{table.name} lacks one."
            )
        yield {IMAGE: row_image(table, row), QUESTION: row[QUESTION], "answers": answers}


def row_image(table: Table, row: Row) -> Any:
    """Return the image of a row for `load_image`, or ``None`` if the row has none.

    Args:
        table: The table that the row is from; relative paths lie in its folder.
        row: A row with the column ``image``.
    """
    image = row.get(IMAGE)
    return image if table.folder is None else _resolve(image, table.folder)


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


def _resolve(image: Any, folder: Path) -> Any:
    if isinstance(image, str):
        return folder / image
    if isinstance(image, Mapping) and image.get("bytes") is None and image.get("path"):
        return folder / str(image["path"])
    return image


def load_image(image: Any) -> Image.Image:
    """Open an image of a record.

    Args:
        image: A PIL image, encoded bytes, a path, or ``{"bytes": ..., "path": ...}``.

    Returns:
        The image in RGB.

    Raises:
        DataError: If it cannot be opened.
    """
    try:
        if isinstance(image, Mapping):
            encoded = image.get("bytes")
            image = encoded if encoded is not None else image.get("path")
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, str | os.PathLike):
            image = Image.open(image)
        if isinstance(image, Image.Image):
            return image.convert("RGB")
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"An image cannot be opened: {error}") from error
    raise DataError(
        "An image must be a PIL image, encoded bytes, a path, or {'bytes', 'path'}; got "
        f"{type(image).__name__}."
    )
