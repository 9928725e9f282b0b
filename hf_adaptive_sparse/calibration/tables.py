"""A source of rows whose columns are known before any row is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final, Self

from hf_adaptive_sparse.errors import AdaptiveSparseError

TEXT = "text"
IMAGE: Final = "image"
IMAGES = "images"
VIDEO: Final = "video"
FRAMES = "frames"
AUDIO: Final = "audio"
CONVERSATION_COLUMNS = ("messages", "conversations", "texts")
"""Columns a conversation is taken from, the first that is there."""

Row = Mapping[str, Any]


class DataError(AdaptiveSparseError, ValueError):
    """Calibration or evaluation data cannot be read, or do not suffice."""


@dataclass(frozen=True)
class Table:
    """Rows in a file or on the Hub.

    Attributes:
        name: The source, for messages.
        columns: Names of its columns.
        scan: Starts a pass over the rows, given the columns that are wanted.
        folder: What relative paths of images, videos and sounds in it refer to.
        first_columns: Those of the first row, where rows may differ.
    """

    name: str
    columns: Sequence[str]
    scan: Callable[[Sequence[str]], Iterable[Row]]
    folder: Path | None = None
    first_columns: Sequence[str] = ()

    @classmethod
    def of_dicts(
        cls,
        name: str,
        rows: Iterable[Row],
        scan: Callable[[Sequence[str]], Iterable[Row]],
        folder: Path | None = None,
    ) -> Self:
        """Return the table of rows of which each has columns of its own.

        Args:
            name: The source, for messages.
            rows: The rows to learn the columns from.
            scan: As for the class.
            folder: As for the class.
        """
        different = list(dict.fromkeys(tuple(row) for row in rows))
        columns = list(dict.fromkeys(chain.from_iterable(different)))
        return cls(name, columns, scan, folder, different[0] if different else ())
