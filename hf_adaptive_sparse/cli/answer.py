"""What a command returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a command prints: ``text`` for a person, ``data`` (plain JSON types) for ``--json``."""

    text: str
    data: dict[str, Any]
