"""Rows of text, of questions or of conversations, read lazily from a Hub dataset or a local file.

A source is ``name``, ``name:config`` or ``name:config:split`` on the Hub, or a local ``.parquet``,
``.jsonl``, ``.json`` or ``.txt`` file or a folder of parquet files. Rows come one after the other,
only the columns that are used are read, and images, videos and sounds stay encoded until a batch is
made of them (`media`), so a corpus of any size costs what is taken from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal

from hf_adaptive_sparse.calibration.conversations import conversation_rows, medium_inside
from hf_adaptive_sparse.calibration.hub_datasets import dataset_table, hub_table, is_dataset
from hf_adaptive_sparse.calibration.local_files import (
    FILE_TYPES,
    OTHER_FILE_TYPES,
    local_table,
)
from hf_adaptive_sparse.calibration.media import MEDIA, PLURAL, Medium
from hf_adaptive_sparse.calibration.pictures import load_image
from hf_adaptive_sparse.calibration.rows import (
    QUESTION,
    TRANSCRIBE,
    check_unicode,
    question_rows,
    read_answers,
    row_image,
    text_rows,
)
from hf_adaptive_sparse.calibration.tables import (
    AUDIO,
    CONVERSATION_COLUMNS,
    FRAMES,
    IMAGE,
    IMAGES,
    TEXT,
    VIDEO,
    DataError,
    Row,
    Table,
)
from hf_adaptive_sparse.naming import expanded, looks_like_path

__all__ = [
    "IMAGE",
    "QUESTION",
    "TEXT",
    "TRANSCRIBE",
    "DataError",
    "Records",
    "Row",
    "Table",
    "check_unicode",
    "load_image",
    "open_table",
    "read_answers",
    "read_records",
    "row_image",
    "text_rows",
]

DEFAULT_DATASET = "Salesforce/wikitext:wikitext-2-raw-v1"
"""What is read when no source is named."""

ANSWER_COLUMNS = ("answers", "answer", "multiple_choice_answer")
"""Columns an answer is taken from, the first that is there: ten human answers before one."""
MEDIA_COLUMNS: Mapping[Medium, tuple[str, ...]] = {
    "image": (IMAGE, IMAGES),
    "video": (VIDEO, FRAMES),
    "audio": (AUDIO,),
}
"""Columns a medium is taken from, the first that is there."""
TRANSCRIPT_COLUMNS = ("transcript", "transcription", "sentence", TEXT)
"""Columns of what is said in a sound; then `TRANSCRIBE` is the question."""

Kind = Literal["text", "visual_question", "video_question", "audio_question"]
_KINDS: Mapping[Medium, Kind] = {
    "image": "visual_question",
    "video": "video_question",
    "audio": "audio_question",
}


@dataclass(frozen=True)
class Records:
    """Rows that can be iterated over again and again.

    Attributes:
        name: The source, for messages.
        kind: ``"text"``: rows have ``text`` (str). Else they have ``question`` (str), ``answers``
            (tuple of str, not empty), ``column`` and ``place`` (str, for messages) and what is
            asked about: ``image``, ``video`` or ``audio``, as `media` opens them.
        rows: Starts a new pass over the rows.
        conversations: Rows have ``messages`` instead of ``text`` or ``answers``, as chat templates
            of processors take them; ``question`` is the first that the user asks.
    """

    name: str
    kind: Kind
    rows: Callable[[], Iterator[Row]]
    conversations: bool = False

    @property
    def medium(self) -> Medium | None:
        """What is asked about; ``None`` for text."""
        return next((medium for medium, kind in _KINDS.items() if kind == self.kind), None)

    def __iter__(self) -> Iterator[Row]:
        return self.rows()


def read_records(
    source: str | os.PathLike[str] | Iterable[Row] | None,
    split: str = "train",
    *,
    media: Collection[Medium] = MEDIA,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Records:
    """Open a data source.

    Args:
        source: ``None`` (WikiText-2 from the Hub), a Hub dataset as ``name[:config[:split]]``, the
            path of a local file or folder, a `datasets.Dataset` or `IterableDataset`, or an
            iterable of rows.
        split: Split of a Hub dataset that names none itself. Local files have no splits; in a
            folder, files are preferred whose name, or that of a folder they lie in, begins with it.
        media: What the model takes. Questions about these, then conversations about them, win over
            a ``text`` column, and that over conversations without any; others are ignored.
        revision: Revision of a Hub dataset.
        token: Token for private or gated Hub datasets.

    Returns:
        Records of text, of questions or of conversations (columns `CONVERSATION_COLUMNS`): of what
        the first row holds, if that is usable.

    Raises:
        DataError: If the source cannot be read or has no usable columns.
    """
    return _select(open_table(source, split, revision=revision, token=token), media)


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
        path = expanded(text)
        is_file = path.suffix.lower() in FILE_TYPES + OTHER_FILE_TYPES
        # A colon comes before the config of a dataset, but also after the letter of a drive.
        is_path = (
            isinstance(source, os.PathLike)
            or "\\" in text
            or looks_like_path(text.partition(":")[0])
        )
        if path.exists() or is_file or is_path:
            return local_table(path, split)
        return hub_table(text, split, revision, token)
    if is_dataset(source):
        return dataset_table(source)
    rows = list(source)
    if not all(isinstance(row, Mapping) for row in rows):
        raise DataError("A list of records must hold dicts, one per row.")
    return Table.of_dicts("the list of records", rows, lambda _: rows)


# Which columns are used


def _select(table: Table, media: Collection[Medium] = MEDIA) -> Records:
    """Return the records of a table: what its first row holds, else what any row does.

    Raises:
        DataError: If there are no usable columns.
    """
    for columns in (table.first_columns, table.columns):
        records = _of_columns(columns, table, media)
        if records is not None:
            return records
    if not table.columns:
        raise DataError(f"Data must have rows; {table.name} has none.")
    found = f"{table.name} has the columns {', '.join(table.columns)}"
    shown = [medium for medium in MEDIA if _first(MEDIA_COLUMNS[medium], table.columns)]
    if any(_asked_about(medium, table.columns) for medium in shown):
        about = " or ".join(PLURAL[medium] for medium in shown)
        raise DataError(
            f"{found}: questions about {about}, but the model takes none beside text. Use data "
            "with a 'text' column, or give batches that it takes."
        )
    raise DataError(
        "Data must have a column 'text', a conversation ('messages', 'conversations' or 'texts'), "
        "or the columns 'image', 'images', 'video', 'frames' or 'audio' with 'question' and "
        f"'answer' (or 'answers'); {found}."
    )


def _of_columns(
    columns: Collection[str], table: Table, media: Collection[Medium]
) -> Records | None:
    """Return the records that some columns of a table make, if they do."""
    shown = {
        medium: column
        for medium in MEDIA
        if medium in media and (column := _first(MEDIA_COLUMNS[medium], columns))
    }
    for medium, column in shown.items():
        asked = _asked_about(medium, columns)
        if asked is not None:
            rows = partial(question_rows, table, medium, column, *asked)
            return Records(table.name, _KINDS[medium], rows)
    told = _first(CONVERSATION_COLUMNS, columns)
    about = None
    if told is not None:
        about = next(iter(shown), None) or medium_inside(table, told, media)
    if TEXT in columns and about is None:
        return Records(table.name, "text", lambda: text_rows(table))
    if told is None:
        return None
    names = MEDIA_COLUMNS[about] if about else tuple(chain.from_iterable(MEDIA_COLUMNS.values()))
    beside = [name for name in names if name in table.columns]
    kind: Kind = "text" if about is None else _KINDS[about]
    return Records(table.name, kind, partial(conversation_rows, table, told, about, beside), True)


def _asked_about(medium: Medium, columns: Collection[str]) -> tuple[str | None, str] | None:
    """Return the columns of the question and of its answer, if both are there.

    Of sounds a transcript is enough: then there is no question.
    """
    answer = _first(ANSWER_COLUMNS, columns)
    if answer is not None and QUESTION in columns:
        return QUESTION, answer
    said = _first(TRANSCRIPT_COLUMNS, columns) if medium == "audio" else None
    return None if said is None else (None, said)


def _first(names: Iterable[str], columns: Collection[str]) -> str | None:
    return next((name for name in names if name in columns), None)
