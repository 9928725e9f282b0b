"""The calibration and evaluation data of a search, from a name, a path, a config or batches."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.data import (
    Batch,
    Source,
    as_batches,
    configured_batches,
    load_batches,
)
from hf_adaptive_sparse.calibration.hub_datasets import is_dataset
from hf_adaptive_sparse.evaluation.digests import batches_digest
from hf_adaptive_sparse.evaluation.windows import longest_window, token_shape, unfilled_block
from hf_adaptive_sparse.profiles import CalibrationConfig
from hf_adaptive_sparse.search.space import SearchSpace

logger = logging.getLogger(__name__)

Data = Source | CalibrationConfig

EVALUATION_SAMPLES = 64
"""Windows or questions an evaluation takes unless told otherwise."""

SPLITS = {"calibration": "train", "evaluation": "validation", "held_out": "test"}
"""Splits of a Hub dataset that names none itself."""


@dataclass(frozen=True)
class SearchData:
    """The batches of a search.

    Attributes:
        calibration: What the weights are ranked on; ``None`` where none are needed.
        evaluation: What profiles are scored on.
        held_out: What the best profile is compared on in the end; ``None``: it is not.
        calibration_config: How the calibration batches were made; ``None`` for ready batches and
            of a dataset in memory, which no config names.
    """

    calibration: list[Batch] | None
    evaluation: list[Batch]
    held_out: list[Batch] | None
    calibration_config: CalibrationConfig | None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        processor: Any,
        *,
        calibration: Data,
        evaluation: Data,
        held_out: Data,
        ranks: bool,
    ) -> SearchData:
        """Make the batches of what `search` was given.

        Args:
            model: The model that they are for.
            processor: Its processor or tokenizer.
            calibration: As for `search`.
            evaluation: As for `search`.
            held_out: As for `search`.
            ranks: Whether calibration data are needed.

        Raises:
            ValueError: If data are named but there is no processor.
            DataError: If data cannot be read or do not suffice.
        """

        def batches(what: str, data: Data, config: CalibrationConfig | None) -> list[Batch]:
            return resolve(data, config, model, processor, what=what, split=SPLITS[what])

        config = as_config(calibration, CalibrationConfig()) if ranks else None
        defaults = CalibrationConfig(num_samples=EVALUATION_SAMPLES)
        return cls(
            calibration=batches("calibration", calibration, config) if ranks else None,
            evaluation=batches("evaluation", evaluation, as_config(evaluation, defaults)),
            held_out=None
            if held_out is None
            else batches("held_out", held_out, as_config(held_out, defaults)),
            calibration_config=None if is_dataset(calibration) else config,
        )

    @property
    def image_weight(self) -> float:
        """Weight of an image token in the statistics."""
        return 1.0 if self.calibration_config is None else self.calibration_config.image_weight


def as_config(data: Data, defaults: CalibrationConfig) -> CalibrationConfig | None:
    """Return how to make the batches of data that are read; ``None`` for ready batches."""
    return defaults.for_source(data) if as_batches(data) is None else None


def resolve(
    data: Data,
    config: CalibrationConfig | None,
    model: PreTrainedModel,
    processor: Any,
    *,
    what: str,
    split: str,
) -> list[Batch]:
    """Return the batches that ``data`` (with ``config`` from `as_config`) stand for.

    Args:
        data: Ready batches, or anything where ``config`` is given.
        config: How to make them.
        model: The model that they are for.
        processor: Its processor or tokenizer.
        what: Name of the argument, for messages.
        split: Split of a Hub dataset that names none itself.

    Raises:
        ValueError: If the data are named but there is no processor.
        DataError: If they cannot be read or do not suffice.
    """
    if config is None:
        return load_batches(data, None, config=model.config)  # type: ignore[arg-type]
    if processor is None:
        given = f"names a dataset ({config.dataset or 'the default, WikiText-2'})"
        if is_dataset(data):
            given = "is a dataset"
        raise ValueError(
            f"{what} {given}, which needs processor= (the model's processor or tokenizer). Or pass "
            "a list of batches."
        )
    return configured_batches(data, config, processor, model.config, split=split)


def warn_of_weak_evaluation(
    evaluation: Sequence[Batch], calibration: Sequence[Batch] | None, space: SearchSpace
) -> None:
    """Log what makes the search's values unreliable."""
    windows = sum(token_shape(batch)[0] for batch in evaluation)
    if windows < 2:
        logger.warning(
            "The evaluation set holds a single window: its perplexity will hardly tell profiles "
            "apart. Use more data (the default is %d windows).",
            EVALUATION_SAMPLES,
        )
    remark = short_windows(evaluation, space) if space.searches_kv else None
    if remark is not None:
        logger.warning("Evaluation data: %s", remark)
    if calibration is not None and batches_digest(calibration) == batches_digest(evaluation):
        logger.warning(
            "Calibration and evaluation data are the same: the best profile will look better than "
            "it is. Evaluate on data that did not calibrate."
        )


def short_windows(batches: Sequence[Mapping[str, torch.Tensor]], space: SearchSpace) -> str | None:
    """Return why the KV bits of a space make no difference on data; ``None`` if they make one."""
    return unfilled_block(longest_window(batches), space.kv_config(8, 8))
