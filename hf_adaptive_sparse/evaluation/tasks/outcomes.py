"""Outcomes, written to a file as they come, so that an interrupted run resumes where it stopped.

One file per benchmark, JSON lines: what the run is about, then a line per item. A last line that a
killed run left torn is cut off; a file of another run, or of no run, is refused unchanged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_adaptive_sparse.errors import AdaptiveSparseError
from hf_adaptive_sparse.evaluation.tasks.task import Outcome
from hf_adaptive_sparse.files import replacing

VERSION = 1


class OutcomesError(AdaptiveSparseError, ValueError):
    """A file of outcomes is damaged or belongs to another run."""


class Outcomes:
    """The outcomes of one benchmark, in memory and, if there is a path, on disk.

    Args:
        path: The file; ``None`` keeps them in memory only.
        about: What decides an outcome: task, data, model, settings. Plain JSON types.

    Attributes:
        by_key: Key of an item -> its outcome, those of earlier runs first.

    Raises:
        OutcomesError: If the file is of another run or none, or damaged before its last line.
        OSError: If it cannot be read or written.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.path = path
        self.by_key: dict[str, Outcome] = {}
        if path is None:
            return
        about = {"version": VERSION, **about}
        if path.exists() and path.stat().st_size:
            self._read(path, json.loads(json.dumps(about)))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:  # a file without a whole first line is not ours
            partial.write_text(json.dumps(about) + "\n", encoding="utf-8")

    def _read(self, path: Path, about: dict[str, Any]) -> None:
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if not whole:
            raise OutcomesError(
                f"{path} holds no outcomes: its first line does not end. Use another folder of "
                "results, or move the file away."
            )
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                value = json.loads(line)
                if number > 1:
                    self.by_key[value["key"]] = value["outcome"]
            except (ValueError, TypeError, KeyError) as error:
                raise OutcomesError(
                    f"Line {number} of {path} is damaged. Move the file away to begin anew."
                ) from error
            if number == 1 and value != about:
                keys = sorted({*about, *(value if isinstance(value, dict) else {})})
                found = value if isinstance(value, dict) else {}
                named = next(key for key in keys if found.get(key) != about.get(key))
                raise OutcomesError(
                    f"{path} is of another run: its {named} is {found.get(named)!r}, now "
                    f"{about.get(named)!r}. Use another folder of results, or move the file away."
                )
        if len(whole) < len(raw):
            os.truncate(path, len(whole))

    def add(self, outcomes: Mapping[str, Outcome]) -> None:
        """Keep the outcomes of a batch; they are on disk when this returns."""
        self.by_key |= outcomes
        if self.path is None:
            return
        lines = [json.dumps({"key": key, "outcome": value}) for key, value in outcomes.items()]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
