"""The data of a job, by name or path, and what of them is kept from a search."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from hf_adaptive_sparse.calibration.data import (
    Batch,
    Records,
    Source,
    as_batches,
    check_batches,
    load_batches,
    read_records,
)
from hf_adaptive_sparse.calibration.media import accepted_media
from hf_adaptive_sparse.naming import public_name
from hf_adaptive_sparse.search.data import EVALUATION_SAMPLES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSource:
    """Data by name or path, and how many samples of it.

    Attributes:
        source: Dataset name, path, dataset in memory, or ready batches. ``None``: WikiText-2 from
            the Hub.
        num_samples: Windows of text, questions or conversations at most.
        sequence_length: Tokens per window; ``None``: ``min(2048, the model's context)``.
        batch_size: Windows, questions or conversations per batch.
        seed: Seed of the choice of samples.
        name: What model cards call the data; ``None``: the dataset's or the file's name.
    """

    source: Source = None
    num_samples: int = 128
    sequence_length: int | None = None
    batch_size: int = 1
    seed: int = 0
    name: str | None = None

    @classmethod
    def of(
        cls,
        data: DataSource | Source,
        what: str,
        num_samples: int,
        *,
        batches: bool = True,
    ) -> DataSource:
        """Return what a job was given.

        Args:
            data: Dataset, its name, path, ready batches or ``None``, if it is no `DataSource` yet.
            what: Name of the argument, for messages.
            num_samples: Samples of data that are no batches yet.
            batches: Whether ready batches will do.

        Raises:
            ValueError: If it is nothing of these.
            DataError: If there are no batches, or one is empty or of mismatched shapes.
            TypeError: If a batch is not a dict of tensors.
        """
        if isinstance(data, DataSource):
            return data
        if batches and isinstance(data, list | tuple):
            return cls(check_batches(data))
        if as_batches(data) is None:
            return cls(data, num_samples)
        raise ValueError(
            f"{what} must be a dataset's name, a path, a datasets.Dataset"
            f"{', a list of batches' if batches else ''} or a DataSource, got "
            f"{type(data).__name__}."
        )

    @property
    def label(self) -> str:
        """The name for model cards, without local folders."""
        if self.name is not None:
            return self.name
        if self.source is None:
            return "Salesforce/wikitext (wikitext-2-raw-v1)"
        if not isinstance(self.source, str | os.PathLike):
            kind = "batches" if as_batches(self.source) is not None else "a dataset"
            return f"{kind} given in memory"
        return public_name(self.source)

    def batches(
        self, processor: Any, config: PreTrainedConfig, split: str, *, halves: bool = False
    ) -> list[Batch]:
        """Load the batches; ``split`` is used where the source names none itself.

        With ``halves`` no batch holds samples of both halves, see `load_batches`.
        """
        return load_batches(
            self.source,
            processor,
            config=config,
            num_samples=self.num_samples,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            seed=self.seed,
            split=split,
            halves=halves,
        )

    def questions(self, config: PreTrainedConfig, split: str) -> Records | None:
        """Return the questions about images, videos or sounds, ``None`` of text or batches."""
        if self.source is None or as_batches(self.source) is not None:
            return None
        records = read_records(self.source, split, media=accepted_media(config))
        return None if records.kind == "text" else records


def split_held_out(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Split batches into those a search may see and those kept for the final figures.

    The first half is searched on. A single batch serves both, and a warning says so.
    """
    if len(batches) < 2:
        logger.warning(
            "The evaluation data make a single batch: the search and the final figures share it. "
            "Give more data for figures on text that the search has not seen."
        )
        return batches, batches
    middle = len(batches) // 2
    return batches[:middle], batches[middle:]


def held_out_batches(
    evaluation: DataSource | None, processor: Any, config: PreTrainedConfig
) -> tuple[list[Batch], list[Batch]]:
    """Load twice the samples that are asked for, and split them as `split_held_out` does."""
    evaluation = DataSource.of(evaluation, "evaluation", EVALUATION_SAMPLES)
    twice = replace(evaluation, num_samples=2 * evaluation.num_samples)
    return split_held_out(twice.batches(processor, config, "validation", halves=True))
