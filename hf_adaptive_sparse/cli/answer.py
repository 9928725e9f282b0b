"""What a command returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a command prints.

    Attributes:
        text: For a person.
        data: For ``--json``, of plain JSON types.
        error: An error that the user has to fix (exit code 2), if there is one.
    """

    text: str
    data: dict[str, Any]
    error: str | None = None
