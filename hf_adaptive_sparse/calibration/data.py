"""Batches for calibration and evaluation, from a dataset's name, a path or a ready list.

`load_batches` is the one way in: it opens the source (`records`), and makes of what it finds
windows of text (`text_windows`), or answered questions (`questions`) or conversations
(`conversation_batches`) about images, videos or sounds.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from hf_adaptive_sparse.architecture import context_length, media_token_ids
from hf_adaptive_sparse.calibration.conversation_batches import conversation_batch
from hf_adaptive_sparse.calibration.conversations import first_exchange
from hf_adaptive_sparse.calibration.hub_datasets import is_dataset
from hf_adaptive_sparse.calibration.media import accepted_media, require_processor
from hf_adaptive_sparse.calibration.processors import load_processor
from hf_adaptive_sparse.calibration.questions import format_question, question_batch
from hf_adaptive_sparse.calibration.records import (
    DataError,
    Records,
    Row,
    read_records,
)
from hf_adaptive_sparse.calibration.sequence_pairs import with_decoder_inputs
from hf_adaptive_sparse.calibration.text_windows import read_windows, window_length
from hf_adaptive_sparse.profiles import CalibrationConfig, check_count

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]
"""Keyword arguments of the model's forward: ``input_ids`` (batch, seq) int64 and so on."""

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None
"""A name, a path, a dataset in memory, or batches."""

POOL_FACTOR = 4
"""Shuffled samples are drawn from the first ``POOL_FACTOR * num_samples`` of the source."""


def load_batches(
    source: Source,
    processor: Any,
    *,
    config: PretrainedConfig,
    num_samples: int | None = 128,
    sequence_length: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    split: str = "train",
    shuffle: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    halves: bool = False,
) -> list[Batch]:
    """Make the batches of a calibration or an evaluation.

    Text: the lines joined by newlines, tokenised without special tokens, cut into consecutive
    windows of ``sequence_length`` tokens; the rest is dropped. Questions: prompt, answer and end
    of sequence, padded on the right, with ``labels`` of -100 everywhere but on the answer
    (see `questions`). Conversations about something: the whole in the chat template, with
    ``labels`` on every answer (see `conversation_batches`); those of text alone are lines of a
    text, each in the chat template. Rows without a text, or without all of a question or of a
    conversation, are left out.

    Args:
        source: ``None`` (WikiText-2 from the Hub), a Hub dataset as ``name[:config[:split]]``, a
            local parquet, jsonl, json or text file, a `datasets.Dataset` or `IterableDataset`, or a
            list of batches, which is checked and returned.
        processor: Processor or tokenizer of the model. Not used for a list of batches.
        config: The model's config.
        num_samples: Windows, questions or conversations at most; ``None`` takes all there are.
        sequence_length: Tokens per window of text. ``None``: ``min(2048, the model's context)``.
        batch_size: Windows, questions or conversations per batch.
        seed: Seed of the choice of samples.
        split: Split of a Hub dataset that names none itself; ``shuffle`` goes by it, too.
        shuffle: Draw the samples from the first ``POOL_FACTOR * num_samples`` (``True``), or take
            the first ones in order (``False``). ``None``: ``True`` where ``split`` is
            ``"train"``, whatever split ``source`` names, so that calibration varies with the seed
            and an evaluation, which is asked for with another ``split``, never does.
        revision: Revision of a Hub dataset.
        token: Token for private or gated Hub datasets.
        halves: Batch the first half of the samples and the rest apart, each in half of the batches.

    Returns:
        Batches of ``input_ids`` and ``attention_mask``, both (batch, seq) int64. For questions and
        conversations also ``labels`` (batch, seq) int64 and what the processor makes of the images,
        videos or sounds.

    Raises:
        DataError: If the data cannot be read or do not suffice.
        ValueError: If an argument is invalid, or the data have images, videos or sounds
            and the processor takes none.
        TypeError: If a ready batch holds something other than tensors.
    """
    ready = as_batches(source)
    if ready is not None:
        return [_for_model(batch, i, config) for i, batch in enumerate(check_batches(ready))]
    check_count(batch_size, "batch_size")
    if num_samples is not None:
        check_count(num_samples, "num_samples", also=", or None for all there are")
    shuffle = split == "train" if shuffle is None else shuffle
    records = read_records(
        source, split, media=accepted_media(config), revision=revision, token=token
    )
    pool = None if num_samples is None else num_samples * (POOL_FACTOR if shuffle else 1)
    samples: list[Any]
    medium = records.medium
    if medium is None:
        length = window_length(sequence_length, config)
        samples = read_windows(
            records, processor, length=length, count=pool, left_out=media_token_ids(config)
        )
    else:
        require_processor(processor, medium, records.name)
        samples = list(itertools.islice(records, pool))
        if not samples:
            raise DataError(f"{records.name} holds no questions.")
    if shuffle:
        # Order within the draw is kept: neighbouring batches then share lengths and images.
        rng = random.Random(seed)
        count = len(samples) if num_samples is None else min(num_samples, len(samples))
        samples = [samples[i] for i in sorted(rng.sample(range(len(samples)), count))]
    if num_samples is not None and len(samples) < num_samples:
        logger.warning("%s holds %d of %d samples.", records.name, len(samples), num_samples)
    middle = len(samples) // 2 if halves else 0
    chunks = [*_chunks(samples[:middle], batch_size), *_chunks(samples[middle:], batch_size)]
    if medium is None:
        return [_window_batch(chunk) for chunk in chunks]
    context = context_length(config)
    if records.conversations and not config.is_encoder_decoder:
        return [conversation_batch(processor, chunk, context=context) for chunk in chunks]
    # What a decoder of its own predicts, its encoder has not read: it takes one question.
    questions = [[first_exchange(row) for row in chunk] for chunk in chunks]
    return [question_batch(processor, chunk, context=context) for chunk in questions]


def _chunks(samples: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (samples[start : start + size] for start in range(0, len(samples), size))


def _window_batch(windows: Sequence[torch.Tensor]) -> Batch:
    input_ids = torch.stack(list(windows))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def configured_batches(
    data: Source | CalibrationConfig,
    settings: CalibrationConfig,
    processor: Any,
    config: PretrainedConfig,
    *,
    split: str = "train",
) -> list[Batch]:
    """Make the batches of data as settings say, which also hold the name of named data.

    Args:
        data: As for `load_batches`, or settings.
        settings: How to make them, and of what, unless ``data`` are in memory.
        processor: As for `load_batches`.
        config: The model's config.
        split: As for `load_batches`.

    Raises:
        DataError: As `load_batches`.
    """
    if data is None or isinstance(data, str | os.PathLike | CalibrationConfig):
        data = settings.dataset
    return load_batches(
        data,
        processor,
        config=config,
        num_samples=settings.num_samples,
        sequence_length=settings.sequence_length,
        batch_size=settings.batch_size,
        seed=settings.seed,
        split=split,
    )


def as_batches(
    source: Source | CalibrationConfig,
) -> Iterable[Mapping[str, torch.Tensor]] | None:
    """Return a source that is batches already; ``None`` of one that they are made from.

    Raises:
        DataError: If it is a dict of datasets.
    """
    if source is None or isinstance(source, str | os.PathLike | CalibrationConfig):
        return None
    if is_dataset(source):
        return None
    return source


def check_batches(batches: Iterable[Mapping[str, torch.Tensor]]) -> list[Batch]:
    """Check ready batches as far as no model is known, and return them as a list of dicts.

    Raises:
        DataError: If there are none, or one is of mismatched shapes or of a dtype that ids and
            labels cannot have.
        TypeError: If a batch is not a dict of tensors.
    """
    checked: list[Batch] = []
    for index, batch in enumerate(batches):
        _check_batch(batch, index)
        checked.append(dict(batch))
    if not checked:
        raise DataError("At least one batch is needed; the list is empty.")
    return checked


def ready_batch(batch: Mapping[str, torch.Tensor], index: int, config: PretrainedConfig) -> Batch:
    """Check a ready batch for a model, and return it with all that the model's decoder reads.

    Args:
        batch: The batch.
        index: Its place among all, for messages.
        config: The model's config.

    Raises:
        DataError: If it holds no tokens, is of mismatched shapes, or its ids or labels are of
            another dtype than int64 and int32.
        TypeError: If it is not a dict of tensors.
    """
    _check_batch(batch, index)
    return _for_model(batch, index, config)


def _for_model(batch: Mapping[str, torch.Tensor], index: int, config: PretrainedConfig) -> Batch:
    """Return a batch that was checked as far as no model is known; see `ready_batch`."""
    batch = with_decoder_inputs(batch, config)
    if "decoder_input_ids" in batch:  # labels are those of the decoder: `sequence_pairs`
        return batch
    if _tokens(batch) is None:
        raise DataError(
            "A batch must hold input_ids or inputs_embeds, or beside an encoder's features "
            f"labels; batch {index} holds {', '.join(batch) or 'nothing'}."
        )
    _check_shape("labels", batch, index)
    return batch


def _check_batch(batch: Mapping[str, torch.Tensor], index: int) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"A batch must be a dict of tensors; batch {index} is {type(batch).__name__}."
        )
    for key, value in batch.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"A batch must hold tensors; {key!r} of batch {index} is {type(value).__name__}. "
                "Rows are given as a dataset (datasets.Dataset.from_list) or as a file of them."
            )
    tokens = _tokens(batch)
    dims = 2 if "input_ids" in batch else 3
    if tokens is not None and (tokens.ndim != dims or tokens.numel() == 0):
        raise DataError(
            f"input_ids must have the shape (batch, seq), inputs_embeds (batch, seq, width), "
            f"none of them 0; batch {index} has {tuple(tokens.shape)}."
        )
    _check_shape("attention_mask", batch, index)
    for key in ("input_ids", "decoder_input_ids", "labels"):
        if key in batch and batch[key].dtype not in (torch.int64, torch.int32):
            raise DataError(
                f"{key} must be whole numbers of dtype torch.int64 or torch.int32; batch {index} "
                f"has {batch[key].dtype}."
            )


def _check_shape(key: str, batch: Mapping[str, torch.Tensor], index: int) -> None:
    tokens = _tokens(batch)
    if tokens is not None and key in batch and batch[key].shape != tokens.shape[:2]:
        raise DataError(
            f"{key} must have the shape {tuple(tokens.shape[:2])} of the tokens; batch {index} "
            f"has {tuple(batch[key].shape)}."
        )


def _tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    return batch.get("input_ids", batch.get("inputs_embeds"))


__all__ = [
    "Batch",
    "DataError",
    "Records",
    "Row",
    "Source",
    "as_batches",
    "check_batches",
    "configured_batches",
    "format_question",
    "load_batches",
    "load_processor",
    "read_records",
    "ready_batch",
]
