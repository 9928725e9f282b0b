"""Calibration and evaluation data of a search, from a name, a path, a config or batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.data import Batch, load_batches
from hf_adaptive_sparse.evaluation.digests import batches_digest
from hf_adaptive_sparse.profiles import CalibrationConfig
from hf_adaptive_sparse.search.space import SearchSpace

logger = logging.getLogger(__name__)

Data = Sequence[Mapping[str, torch.Tensor]] | str | os.PathLike[str] | CalibrationConfig | None

EVALUATION_SAMPLES = 64
"""Windows or questions an evaluation takes unless told otherwise."""


def as_config(data: Data, defaults: CalibrationConfig) -> CalibrationConfig | None:
    """Return how named data are to be made; ``None`` for ready batches."""
    if isinstance(data, CalibrationConfig):
        return data
    if data is None:
        return defaults
    if isinstance(data, str | os.PathLike):
        return replace(defaults, dataset=os.fspath(data))
    return None


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
        raise ValueError(
            f"{what} names a dataset ({config.dataset or 'the default, WikiText-2'}), which needs "
            "processor= (the model's processor or tokenizer). Or pass a list of batches."
        )
    return load_batches(
        config.dataset,
        processor,
        config=model.config,
        num_samples=config.num_samples,
        sequence_length=config.sequence_length,
        batch_size=config.batch_size,
        seed=config.seed,
        split=split,
    )


def warn_of_weak_evaluation(
    evaluation: Sequence[Batch], calibration: Sequence[Batch] | None, space: SearchSpace
) -> None:
    """Log what would make the search's values mean little."""
    windows = sum(_shape(batch)[0] for batch in evaluation)
    if windows < 2:
        logger.warning(
            "The evaluation set holds a single window: its perplexity will hardly tell profiles "
            "apart. Use more data (the default is %d windows).",
            EVALUATION_SAMPLES,
        )
    if space.searches_kv and not fills_a_block(evaluation, space):
        logger.warning(
            "No evaluation window (longest: %d tokens) fills a block of the KV cache "
            "(kv_residual_length=%d), so nothing is quantised and KV bits make no difference. Use "
            "longer windows or a shorter residual.",
            longest_window(evaluation),
            space.kv_residual_length,
        )
    if calibration is not None and batches_digest(calibration) == batches_digest(evaluation):
        logger.warning(
            "Calibration and evaluation data are the same: the best profile will look better than "
            "it is. Evaluate on data that did not calibrate."
        )


def longest_window(batches: Sequence[Mapping[str, torch.Tensor]]) -> int:
    """Return the tokens of the longest window."""
    return max(_shape(batch)[1] for batch in batches)


def fills_a_block(batches: Sequence[Mapping[str, torch.Tensor]], space: SearchSpace) -> bool:
    """Return whether a window is long enough for the KV bits of a space to make a difference."""
    return longest_window(batches) >= space.kv_residual_length


def _shape(batch: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
    return tokens.shape[0], tokens.shape[1]
