"""Rows of datasets in memory or on the Hub, through `datasets`, which runs no code from there."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_adaptive_sparse.calibration.tables import (
    AUDIO,
    CONVERSATION_COLUMNS,
    FRAMES,
    IMAGE,
    IMAGES,
    VIDEO,
    DataError,
    Row,
    Table,
)

logger = logging.getLogger(__name__)

LARGE_DOWNLOAD_BYTES = 1 << 30
"""Datasets above this size, or of unknown size, are streamed instead of downloaded whole."""


def hub_table(source: str, split: str, revision: str | None, token: str | bool | None) -> Table:
    """Open ``name[:config[:split]]``.

    Args:
        source: The dataset.
        split: Its split, if ``source`` names none.
        revision: Revision of the repo.
        token: Token for private or gated datasets.

    Raises:
        DataError: If it cannot be read: no such dataset or split, no network, no access.
    """
    parts = source.split(":")
    if len(parts) > 3 or not parts[0]:
        raise DataError(
            f"A Hub dataset is written name, name:config or name:config:split; got {source!r}."
        )
    name = parts[0]
    config = parts[1] if len(parts) > 1 and parts[1] else None
    split = parts[2] if len(parts) > 2 and parts[2] else split
    try:
        table = _table(_open_hub_dataset(name, config, split, revision, token), source)
    except DataError:
        raise
    except Exception as error:  # the Hub's clients raise many unrelated types
        raise _hub_error(source, error) from error

    def scan(wanted: Sequence[str]) -> Iterator[Row]:
        try:
            yield from table.scan(wanted)
        except Exception as error:
            raise _hub_error(source, error) from error

    return replace(table, scan=scan)


def is_dataset(source: object) -> bool:
    """Return whether a source is a `datasets.Dataset` or `IterableDataset`.

    Raises:
        DataError: If it is a dict of several of them.
    """
    names = {  # by name: the library takes a second to import
        kind.__name__
        for kind in type(source).__mro__
        if kind.__module__.partition(".")[0] == "datasets"
    }
    if isinstance(source, Mapping) and names & {"DatasetDict", "IterableDatasetDict"}:
        raise DataError(
            f"A dataset must be one split; got the splits {', '.join(source) or '(none)'}. Choose "
            "one of them, as in dataset['train']."
        )
    return not names.isdisjoint({"Dataset", "IterableDataset"})


def dataset_table(data: Any) -> Table:
    """Open a dataset that is in memory; a format of its rows is left aside, a transform is not.

    Args:
        data: What `is_dataset` takes.
    """
    name = "the dataset"
    formatting = getattr(data, "format", None) or {}
    if formatting.get("type") == "custom":
        return Table.of_dicts(name, itertools.islice(data, 1), lambda _: data)
    return _table(data.with_format(None), name)


def _table(data: Any, name: str) -> Table:
    """Return the table of a dataset, its images, videos and sounds encoded.

    Decoding them is left to us, who need no torchcodec for WAV files and decode only what is used.
    """
    features = data.features or {}
    for column in (IMAGE, IMAGES, VIDEO, FRAMES, AUDIO, *CONVERSATION_COLUMNS):
        if column in features and _undecoded(features[column]) != features[column]:
            data = data.cast_column(column, _undecoded(features[column]))
    # A stream may not know its columns before its first row.
    columns = list(data.column_names or next(iter(data), {}))
    return Table(name, columns, lambda wanted: data.select_columns(list(wanted)))


def _open_hub_dataset(
    name: str, config: str | None, split: str, revision: str | None, token: str | bool | None
) -> Any:
    import datasets

    builder = datasets.load_dataset_builder(name, config, revision=revision, token=token)
    splits = builder.info.splits
    if splits and split.split("[")[0] not in splits:
        raise DataError(
            f"{name} has no split {split!r}; it has {', '.join(splits)}. Name one as "
            f"{name}:{config or ''}:{next(iter(splits))}."
        )
    streaming = _is_large(builder.info.download_size)
    logger.info("Reading %s (%s)%s", name, split, ", streamed" if streaming else "")
    return datasets.load_dataset(
        name, config, split=split, revision=revision, token=token, streaming=streaming
    )


def _undecoded(feature: Any) -> Any:
    """Return the feature that leaves images, videos and sounds encoded."""
    import datasets

    for kind in (datasets.Image, datasets.Video, datasets.Audio):
        if isinstance(feature, kind):
            return kind(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _undecoded(part) for name, part in feature.items()}
    return feature


def _is_large(download_bytes: int | None) -> bool:
    return download_bytes is None or download_bytes > LARGE_DOWNLOAD_BYTES


def _hub_error(source: str, error: Exception) -> DataError:
    reason = next((line for line in str(error).splitlines() if line.strip()), "")
    return DataError(
        f"The dataset {source!r} cannot be read from the Hub ({type(error).__name__}: {reason}). "
        "Check its name, the network and your token (`hf auth login`), or give a local file or "
        f"folder: there is none called {source!r}."
    )
