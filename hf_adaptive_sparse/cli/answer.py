"""What a command returns."""

from __future__ import annotations

import json
import math
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

    def json(self) -> str:
        """Return the data as JSON, which has no numbers beyond the finite ones: null for those."""
        return json.dumps(_finite(self.data), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
