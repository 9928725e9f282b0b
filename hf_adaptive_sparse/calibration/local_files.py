"""Rows of local parquet, jsonl, json and text files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_adaptive_sparse.calibration.tables import TEXT, DataError, Row, Table

FILE_TYPES = (".parquet", ".jsonl", ".json", ".txt")

OTHER_FILE_TYPES = (
    *(".csv", ".tsv", ".xlsx", ".xml", ".yaml", ".yml", ".md", ".arrow", ".pkl"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar"),
)
"""Not read; what ends so is meant as a file. Repos have dots too ("owner/data-v1.5")."""

ROWS_WITH_COLUMNS = 1000
"""Rows of a jsonl or json file that are read to learn its columns: a row need not have them all."""

_ENCODING = "utf-8-sig"  # with or without a byte order mark


def local_table(path: Path, split: str) -> Table:
    """Open a file, or the parquet files of a folder.

    Args:
        path: File or folder.
        split: In a folder, files are preferred whose name, or that of a folder they lie in, begins
            with this.

    Raises:
        DataError: If there is no such file, or not one that can be read.
    """
    if path.is_dir():
        return _parquet_table(data_files(path, split), str(path), path)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist. Give a local {', '.join(FILE_TYPES)} file, or a Hub dataset "
            "as name:config:split."
        )
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet_table([path], str(path), path.parent)
    if kind == ".txt":
        return Table(str(path), [TEXT], lambda _: _text_lines(path))
    if kind in (".jsonl", ".json"):
        read = _json_lines if kind == ".jsonl" else _json_rows
        rows = itertools.islice(read(path), ROWS_WITH_COLUMNS)
        return Table.of_dicts(str(path), rows, lambda _: read(path), path.parent)
    raise DataError(
        f"Data files must be {', '.join(FILE_TYPES)}; got {path.name}. Convert it, or load it in "
        "Python with datasets.load_dataset and give the dataset."
    )


def data_files(path: Path, split: str) -> list[Path]:
    """Return the files that `local_table` reads: itself, or of a folder its parquet files.

    Args:
        path: File or folder.
        split: As for `local_table`.

    Raises:
        DataError: If a folder holds no parquet file.
    """
    if not path.is_dir():
        return [path]
    files = sorted(path.rglob("*.parquet"))
    if not files:
        raise DataError(
            f"A folder of data must hold parquet files; {path} holds none. Name a file in it, or "
            "write its rows as such (datasets: load_from_disk, then to_parquet)."
        )
    return [
        file
        for file in files
        if any(part.startswith(split) for part in file.relative_to(path).parts)
    ] or files


def _parquet_table(files: Sequence[Path], name: str, folder: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_schema(files[0]).names
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{files[0]} is not a readable parquet file: {error}") from error

    def scan(wanted: Sequence[str]) -> Iterator[Row]:
        for file in files:
            try:
                with pq.ParquetFile(file) as parquet:
                    # Small batches: a row may hold an image, and few rows may be wanted.
                    for batch in parquet.iter_batches(256, columns=list(wanted)):
                        yield from batch.to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file} cannot be read: {error}") from error

    return Table(name, columns, scan, folder)


def _text_lines(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding=_ENCODING) as lines:
            for line in lines:
                yield {TEXT: line}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not readable UTF-8 text: {error}") from error


def _json_lines(path: Path) -> Iterator[Row]:
    for number, row in enumerate(_text_lines(path), start=1):
        if not row[TEXT].strip():
            continue
        try:
            value = json.loads(row[TEXT])
        except ValueError as error:
            raise DataError(f"Line {number} of {path} is not JSON: {error}") from error
        yield _json_row(value, path, number)


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        values = json.loads(path.read_text(encoding=_ENCODING))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not readable UTF-8 text: {error}") from error
    except ValueError:  # many ".json" files hold one object per line
        yield from _json_lines(path)
        return
    if isinstance(values, Mapping):
        values = values.get("data", [values])
    if not isinstance(values, list):
        raise DataError(f"{path} must hold a list of objects, one per row.")
    for number, value in enumerate(values, start=1):
        yield _json_row(value, path, number)


def _json_row(value: Any, path: Path, number: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"Every row of {path} must be a JSON object; row {number} is not.")
    return value
