"""Running benchmarks on a model: in batches, with progress, resumably."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import accepts_images
from hf_adaptive_sparse.calibration.hub_datasets import is_dataset
from hf_adaptive_sparse.calibration.media import require_processor
from hf_adaptive_sparse.calibration.records import DataError, Row, open_table
from hf_adaptive_sparse.evaluation.digests import source_digest, weights_digest

# The benchmarks register themselves.
from hf_adaptive_sparse.evaluation.tasks import scienceqa, soft_accuracy, wikitext2  # noqa: F401
from hf_adaptive_sparse.evaluation.tasks.outcomes import Outcomes
from hf_adaptive_sparse.evaluation.tasks.task import (
    Item,
    Setting,
    Task,
    TaskResult,
    find_task,
)
from hf_adaptive_sparse.naming import public_name
from hf_adaptive_sparse.profiles import KVCacheConfig, check_count

SPLIT = "validation"
"""Split of data that name none themselves."""


def run_task(
    name: str,
    model: PreTrainedModel,
    processor: Any,
    data: str | os.PathLike[str] | Iterable[Row] | None = None,
    *,
    setting: Setting | None = None,
    batch_size: int = 8,
    num_samples: int | None = None,
    results: str | os.PathLike[str] | None = None,
    model_name: str | None = None,
    weights: str | None = None,
    token: str | bool | None = None,
    progress: bool = False,
) -> TaskResult:
    """Run one benchmark with its official scoring.

    Args:
        name: One of `known_tasks`.
        model: A model, dense or compressed.
        processor: Its processor, or its tokenizer for text.
        data: A Hub dataset, a local file, a `datasets.Dataset` or rows, with the columns of the
            usual dataset; ``None`` is that dataset.
        setting: How to run it; ``None`` is the default.
        batch_size: Questions generated for together.
        num_samples: Only the first so many items; ``None`` for all.
        results: Folder for the outcomes, a file per task. What is there already is not computed
            again.
        model_name: What tells the model from others in that folder; ``None`` is the name it was
            loaded by.
        weights: What `weights_digest` returned for the model, where several tasks share it.
        token: Token for private or gated Hub datasets.
        progress: Show a progress bar.

    Raises:
        ValueError: If an argument is invalid, or the model cannot take the task's data.
        DataError: If the data cannot be read or lack a column.
        OutcomesError: If the folder holds outcomes of another run.
    """
    task = find_task(name)
    setting = Setting() if setting is None else setting
    for argument, value in (("batch_size", batch_size), ("num_samples", num_samples)):
        if value is not None:
            check_count(value, argument)
    started = time.perf_counter()
    if task.needs_images:
        if not accepts_images(model):
            raise ValueError(
                f"{name} needs a model that takes images; {type(model).__name__} takes none."
            )
        require_processor(processor, "image", name)
    if data is not None and not isinstance(data, str | os.PathLike) and not is_dataset(data):
        data = list(data)
    table = open_table(task.default_data if data is None else data, SPLIT, token=token)
    task.check_columns(table)
    about: dict[str, Any] = {
        "task": name,
        "data": _label(data, task),
        "model": model.config.name_or_path if model_name is None else model_name,
        "setting": _plain(setting),
    }
    if results is not None:
        about["content"] = source_digest(data, SPLIT)
        about["weights"] = weights_digest(model) if weights is None else weights
    outcomes = Outcomes(None if results is None else Path(results) / f"{name}.jsonl", about)
    keys: list[str] = []
    items = itertools.islice(task.items(table, processor, model, setting), num_samples)
    with tqdm(desc=name, unit="item", disable=not progress) as bar:
        for batch in _batches(items, batch_size, keys, outcomes.by_key):
            done = task.evaluate(model, processor, batch, setting)
            outcomes.add({item.key: o for item, o in zip(batch, done, strict=True)})
            bar.update(len(batch))
    if not keys:
        raise DataError(f"{about['data']} holds nothing to evaluate {name} on.")
    figures = task.figures([outcomes.by_key[key] for key in keys])
    return TaskResult(
        task=name,
        data=str(about["data"]),
        metric=task.metric,
        value=figures.value,
        count=len(keys),
        standard_error=figures.standard_error,
        details=figures.details,
        seconds=time.perf_counter() - started,
    )


def _batches(
    items: Iterable[Item], size: int, keys: list[str], known: Mapping[str, Any]
) -> Iterator[list[Item]]:
    """Yield batches of items without an outcome, one group each; note every key in ``keys``."""
    waiting: dict[str, list[Item]] = {}
    for item in items:
        keys.append(item.key)
        if item.key in known:
            continue
        batch = waiting.setdefault(item.group, [])
        batch.append(item)
        if len(batch) == size:
            yield waiting.pop(item.group)
    yield from waiting.values()


def _label(data: object, task: Task) -> str:
    """Name the data for people and files: of a local path only its last part."""
    if data is None:
        return task.default_data
    if not isinstance(data, str | os.PathLike):
        return "rows given in memory"
    return public_name(data)


def _plain(setting: Setting) -> dict[str, Any]:
    kv_cache = setting.kv_cache
    return {
        "kv_cache": kv_cache.to_dict() if isinstance(kv_cache, KVCacheConfig) else kv_cache,
        "max_new_tokens": setting.max_new_tokens,
        "prompt": setting.prompt,
        "sequence_length": setting.sequence_length,
    }
