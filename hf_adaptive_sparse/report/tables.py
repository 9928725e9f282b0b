"""Tables and sizes of the command line, model cards and benchmarks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

MISSING = "–"
"""What stands where a row has no value."""

Row = Mapping[str, object]


def format_bytes(size_bytes: float) -> str:
    """Return a size in decimal units with three significant digits: ``4.51 MB``.

    Raises:
        ValueError: If the size is negative.
    """
    if size_bytes < 0:
        raise ValueError(f"A size must be >= 0 bytes, got {size_bytes!r}.")
    if size_bytes < 1000:
        return f"{size_bytes:.0f} B"
    units = ["kB", "MB", "GB", "TB", "PB"]
    unit, value = units.pop(0), size_bytes / 1000
    # From 999.5 on it would round to 1000, which takes the next unit.
    while value >= 999.5 and units:
        unit, value = units.pop(0), value / 1000
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def format_value(value: object, spec: str | None = None) -> str:
    """Return the text of one cell.

    Args:
        value: What to show; None is shown as a dash.
        spec: Format specification for numbers; None: four significant digits for floats,
            thousands separated for whole numbers.
    """
    if value is None:
        return MISSING
    if isinstance(value, Real) and not isinstance(value, bool):
        if spec is None:
            spec = "," if isinstance(value, Integral) else ".4g"
        return format(value, spec)
    return str(value)


def escape_markdown(text: str) -> str:
    """Return ``text`` such that Markdown shows it as it is, on one line, inside a table or out.

    Names of models, datasets and files come from elsewhere: none of them may open a link, a tag,
    a heading or another column.
    """
    text = " ".join(text.split())
    text = re.sub(r"([\\`*\[\]<>|#!~$&])", r"\\\1", text)
    # An underscore inside a word means nothing, and names are full of them.
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def column_names(rows: Sequence[Row]) -> list[str]:
    """Return the keys of all rows in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def _cells(
    rows: Sequence[Row], columns: Sequence[str], formats: Mapping[str, str]
) -> list[list[str]]:
    return [[format_value(row.get(key), formats.get(key)) for key in columns] for row in rows]


def _numeric(rows: Sequence[Row], column: str) -> bool:
    """Whether a column holds numbers (or sizes), so that it reads better flush right."""
    values = [row[column] for row in rows if row.get(column) is not None]
    return bool(values) and all(
        (isinstance(value, Real) and not isinstance(value, bool))
        or (isinstance(value, str) and re.match(r"[-+±]?\d", value) is not None)
        for value in values
    )


def markdown_table(
    rows: Sequence[Row],
    columns: Sequence[str] | None = None,
    formats: Mapping[str, str] | None = None,
) -> str:
    """Return a GitHub Markdown table.

    Args:
        rows: Column name -> value. A missing value or None is shown as a dash.
        columns: Columns in order; None: the keys of the rows.
        formats: Column name -> format specification for its numbers.

    Returns:
        The table without a final newline; empty if there are no columns.
    """
    columns = column_names(rows) if columns is None else columns
    if not columns:
        return ""
    rule = ["---:" if _numeric(rows, column) else "---" for column in columns]
    body = [
        [escape_markdown(cell) for cell in cells] for cells in _cells(rows, columns, formats or {})
    ]
    lines = [[escape_markdown(column) for column in columns], rule, *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def text_table(
    rows: Sequence[Row],
    columns: Sequence[str] | None = None,
    formats: Mapping[str, str] | None = None,
) -> str:
    """Return a table for a terminal: aligned columns, a rule under the header.

    Args:
        rows: Column name -> value. A missing value or None is shown as a dash.
        columns: Columns in order; None: the keys of the rows.
        formats: Column name -> format specification for its numbers.
    """
    columns = column_names(rows) if columns is None else columns
    if not columns:
        return ""
    body = _cells(rows, columns, formats or {})
    widths = [max(len(cell) for cell in column) for column in zip(columns, *body, strict=True)]
    right = [_numeric(rows, column) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(cells, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(columns), "  ".join("-" * width for width in widths), *map(line, body)])
