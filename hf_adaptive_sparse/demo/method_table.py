"""The method's table: every metric, the searched profile, and the KV profiles, on one model.

Shared by the demo and by ``benchmarks/method_table.py``. Every row is measured on the same
held-out data; the search saw none of them. Each row's model is loaded anew, pruned by sequential
calibration, and saved, so that its bytes are those of real files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import kv_widths
from hf_adaptive_sparse.calibration.data import Batch, Records
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.compressor import Measurement, ModelSource, measure, prune
from hf_adaptive_sparse.evaluation.resources import weight_bytes_on_disk
from hf_adaptive_sparse.profiles import CompressionProfile, KVCacheConfig

METRICS = ("magnitude", "wanda", "ria", "sparsegpt", "lognorm")
"""The rows of uniform sparsity, in the order of the table."""


@dataclass(frozen=True)
class TableData:
    """What the table is measured on.

    Attributes:
        calibration: Batches that the pruning is calibrated on.
        held_out: Batches for the perplexity, disjoint from calibration and search.
        processor: The model's processor.
        questions: Visual questions for the accuracy, or ``None``.
        num_questions: The first so many of them; ``None``: all.
        match: How answers are compared; the dense row decides for all.
    """

    calibration: Sequence[Batch]
    held_out: Sequence[Batch]
    processor: Any = None
    questions: Records | None = None
    num_questions: int | None = None
    match: Literal["whole", "prefix"] | None = None


def method_table(
    source: ModelSource,
    data: TableData,
    profile: CompressionProfile,
    *,
    target_sparsity: float = 0.5,
    search_seconds: float = 0.0,
    metrics: Sequence[str] = METRICS,
    kv_caches: bool = True,
    dense: Measurement | None = None,
    progress: bool = False,
) -> list[Measurement]:
    """Measure the rows dense, each metric, searched sparsity, and KV 8, 6 and searched.

    Args:
        source: The dense model.
        data: What to calibrate and measure on.
        profile: The searched profile: its ratios, and its KV bits where it has any.
        target_sparsity: Mean ratio of every pruned row.
        search_seconds: Time of the search, counted in the searched rows.
        metrics: Metrics of the uniform rows.
        kv_caches: Also measure the searched model with KV caches of 8, 6 and searched bits.
        dense: The dense row, where it was measured on ``data`` already.
        progress: Show progress bars on stderr.
    """
    if dense is None:
        model = source.load_dense()
        dense = _row("dense", model, data, sparsity=0.0, size=_saved_bytes(model))
    rows = [dense]
    data = replace(data, match=rows[0].match)
    for metric in metrics:
        config = SparsityConfig(target_sparsity=target_sparsity, metric=metric)
        name = f"{metric}, uniform"
        rows.append(_pruned_row(name, source, config, data, progress=progress)[0])
    if profile.sparsity is None:
        return rows
    config = SparsityConfig(target_sparsity=target_sparsity, sparsity=dict(profile.sparsity.ratios))
    row, model = _pruned_row("lognorm, searched", source, config, data, progress=progress)
    row = replace(row, seconds=(row.seconds or 0.0) + search_seconds)
    rows.append(row)
    if not kv_caches:
        return rows
    caches = {"KV all 8": KVCacheConfig(bits=8), "KV all 6": KVCacheConfig(bits=6)}
    if profile.kv_cache is not None:
        mean = profile.kv_cache.mean_bits(kv_widths(model))
        caches[f"KV searched (mean {mean:g})"] = profile.kv_cache
    for name, kv_cache in caches.items():
        measured = _row(
            f"lognorm, searched + {name}",
            model,
            data,
            sparsity=row.sparsity,
            size=row.weight_bytes,
            kv_cache=kv_cache,
        )
        rows.append(replace(measured, seconds=row.seconds))
    return rows


def _pruned_row(
    name: str, source: ModelSource, config: SparsityConfig, data: TableData, *, progress: bool
) -> tuple[Measurement, PreTrainedModel]:
    model = source.load_dense()
    started = perf_counter()
    report = prune(model, config, data.calibration, progress=progress)
    seconds = perf_counter() - started
    row = _row(name, model, data, sparsity=report.mean_sparsity, size=_saved_bytes(model))
    return replace(row, seconds=seconds), model


def _row(
    name: str,
    model: PreTrainedModel,
    data: TableData,
    *,
    sparsity: float,
    size: int,
    kv_cache: KVCacheConfig | None = None,
) -> Measurement:
    return measure(
        name,
        model,
        data.held_out,
        sparsity=sparsity,
        weight_bytes=size,
        kv_cache=kv_cache,
        processor=data.processor,
        questions=data.questions,
        num_questions=data.num_questions,
        match=data.match,
    )


def _saved_bytes(model: PreTrainedModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return weight_bytes_on_disk(Path(folder))
