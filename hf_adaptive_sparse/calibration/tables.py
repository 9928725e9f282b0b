"""A source of rows whose columns are known before any row is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

TEXT = "text"
IMAGE: Final = "image"
VIDEO: Final = "video"
FRAMES = "frames"
AUDIO: Final = "audio"

Row = Mapping[str, Any]


class DataError(ValueError):
    """Calibration or evaluation data cannot be read, or do not suffice."""


@dataclass(frozen=True)
class Table:
    """Rows in a file or on the Hub.

    Attributes:
        name: The source, for messages.
        columns: Names of its columns.
        scan: Starts a pass over the rows, given the columns that are wanted.
        folder: What relative paths of images, videos and sounds in it refer to.
    """

    name: str
    columns: Sequence[str]
    scan: Callable[[Sequence[str]], Iterable[Row]]
    folder: Path | None = None
