"""Measure one model: quality on held-out data, and bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.data import Batch, Records
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.compressor.data_source import DataSource
from hf_adaptive_sparse.compressor.search_plan import Loaded
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice
from hf_adaptive_sparse.evaluation.perplexity import perplexity
from hf_adaptive_sparse.evaluation.resources import kv_bytes_per_token
from hf_adaptive_sparse.evaluation.vqa import vqa_accuracy
from hf_adaptive_sparse.evaluation.windows import token_shape
from hf_adaptive_sparse.profiles import KVCacheConfig


@dataclass(frozen=True)
class Measurement:
    """A row of the table that a compression ends with.

    Attributes:
        name: What was measured.
        sparsity: Fraction of the decoder's prunable weights that is removed.
        perplexity: Token-weighted.
        accuracy: Visual question answering accuracy in [0, 1]; ``None`` where no questions were
            given.
        questions: Questions that were answered.
        weight_bytes: Bytes of the weights on disk.
        kv_bytes_per_token: Bytes one token takes in the KV cache, all layers together.
        seconds: Time the compression took; ``None`` where nothing was done.
        match: How answers were compared with the references, ``"whole"`` or ``"prefix"`` (see
            `vqa_accuracy`); rows compare only where it is the same.
    """

    name: str
    sparsity: float
    perplexity: float
    accuracy: float | None
    questions: int
    weight_bytes: int
    kv_bytes_per_token: float
    seconds: float | None = None
    match: Literal["whole", "prefix"] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def measure(
    name: str,
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    sparsity: float,
    weight_bytes: int,
    kv_cache: KVCacheConfig | None,
    processor: Any = None,
    questions: Records | None = None,
    num_questions: int | None = None,
    match: Literal["whole", "prefix"] | None = None,
    progress: bool = False,
) -> Measurement:
    """Measure one model: perplexity and answers through its KV cache, and its bytes.

    Args:
        name: Name of the row.
        model: The model as it will be used.
        batches: Batches for the perplexity.
        sparsity: Fraction of the prunable weights that is removed.
        weight_bytes: Bytes of its weights on disk.
        kv_cache: The KV profile to measure with; ``None``: no KV quantisation.
        processor: Processor for ``questions``.
        questions: Visual questions to answer, or ``None``.
        num_questions: The first so many of them; ``None``: all.
        match: The ``match`` of the row to compare with; ``None`` lets the answers decide.
        progress: Show progress bars.
    """
    cache: KVCacheChoice = False if kv_cache is None else kv_cache
    accuracy, asked, matched = None, 0, None
    if questions is not None:
        answers = vqa_accuracy(
            model,
            processor,
            questions,
            kv_cache=cache,
            num_samples=num_questions,
            match=match or "auto",
            progress=progress,
        )
        accuracy, asked, matched = answers.accuracy, answers.count, answers.match
    return Measurement(
        name=name,
        sparsity=sparsity,
        perplexity=perplexity(model, batches, cache, progress=progress),
        accuracy=accuracy,
        questions=asked,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv_bytes_per_token(model.config, cache, dtype=model.dtype),
        match=matched,
    )


class Measuring:
    """Measures a model on the held-out data.

    Args:
        loaded: The model, and the batches of ``evaluation``.
        evaluation: What the search is evaluated on, and the perplexity measured.
        questions: Questions to answer. ``None``: those of ``evaluation`` that the search does not
            see; where the data make a single batch, it sees them all, and they are asked. Of
            conversations none are asked then.
        progress: Show progress bars.
    """

    def __init__(
        self,
        loaded: Loaded,
        evaluation: DataSource,
        questions: DataSource | None,
        progress: bool,
    ) -> None:
        self._held_out, self._processor = loaded.held_out, loaded.processor
        self._asked, self._progress = questions or evaluation, progress
        self._records = self._asked.questions(loaded.model.config, "validation")
        shared = loaded.held_out is loaded.searched
        if self._records is not None and questions is None and self._records.conversations:
            self._records = None  # their answers are seldom such as another model repeats
        elif self._records is not None and questions is None and not shared:
            seen = sum(token_shape(batch)[0] for batch in loaded.searched)
            self._records = _without_first(self._records, seen)

    def __call__(
        self,
        name: str,
        model: PreTrainedModel,
        sparsity: float,
        size: int,
        config: SparsityConfig | None = None,
        match: Literal["whole", "prefix"] | None = None,
    ) -> Measurement:
        """Measure one model.

        Args:
            name: Name of the row.
            model: The model as it will be used.
            sparsity: As for `measure`.
            size: Bytes of its weights on disk.
            config: The config that it carries, with its KV profile.
            match: As for `measure`.
        """
        return measure(
            name,
            model,
            self._held_out,
            sparsity=sparsity,
            weight_bytes=size,
            kv_cache=None if config is None else config.kv_profile,
            processor=self._processor,
            questions=self._records,
            num_questions=self._asked.num_samples,
            match=match,
            progress=self._progress,
        )


def _without_first(records: Records, count: int) -> Records:
    return replace(records, rows=lambda: itertools.islice(records.rows(), count, None))
