"""HTML elements of a report. Titles and cells are escaped; bodies are HTML already."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hf_adaptive_sparse.report.tables import format_value


def section(title: str, body: str) -> str:
    """Return a titled section of HTML."""
    return f"<h2>{escape(title)}</h2>\n{body}"


def plot(folder: Path, name: str, draw: Callable[[Path], None]) -> str:
    """Draw ``<name>.png`` into a folder and return it as an image that needs no file."""
    path = folder / f"{name}.png"
    draw(path)
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table; its columns are the keys of the rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join(
        "<tr>"
        + "".join(f"<td>{escape(format_value(row.get(column)))}</td>" for column in columns)
        + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><tr>{head}</tr>\n{body}</table></div>'


def duration(seconds: float) -> str:
    """Return a time for a person to read."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.3g} min"
    return f"{minutes / 60:.3g} h"
