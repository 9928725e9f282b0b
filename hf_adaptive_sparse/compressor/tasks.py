"""The job behind ``evaluate --tasks``: benchmarks with their official scoring, on one model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.evaluation.digests import weights_digest
from hf_adaptive_sparse.evaluation.tasks.run import run_task
from hf_adaptive_sparse.evaluation.tasks.task import Setting, TaskResult, find_task
from hf_adaptive_sparse.files import replacing
from hf_adaptive_sparse.naming import expanded

RESULTS = "results.json"


def evaluate_tasks(
    model: ModelSource,
    tasks: Sequence[str],
    *,
    data: Mapping[str, str] | None = None,
    setting: Setting | None = None,
    batch_size: int = 8,
    num_samples: int | None = None,
    results: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[TaskResult]:
    """Run benchmarks on a model, dense or compressed.

    Args:
        model: The model.
        tasks: Names of benchmarks.
        data: Name of a benchmark -> dataset or local file instead of its usual dataset.
        setting: How to run them.
        batch_size: Questions generated for together.
        num_samples: Only the first so many items of each.
        results: Folder for outcomes and for ``results.json``; a run that was stopped goes on
            from what is there.
        progress: Show progress bars on stderr.

    Raises:
        ValueError: If a name is unknown, or data or model do not fit.
        OSError: If the model cannot be found, or the folder cannot be written.
    """
    data = data or {}
    for name in (*tasks, *data):
        find_task(name)
    for name in data:
        if name not in tasks:
            raise ValueError(
                f"Data may be given for the tasks that are run ({', '.join(tasks)}); got some for "
                f"{name!r}."
            )
    processor = model.load_processor()
    loaded = model.load()
    results = None if results is None else expanded(results)
    weights = None if results is None else weights_digest(loaded)
    found: list[TaskResult] = []
    for task in tasks:
        result = run_task(
            task,
            loaded,
            processor,
            data.get(task),
            setting=setting,
            batch_size=batch_size,
            num_samples=num_samples,
            results=results,
            model_name=os.fspath(model.name) + (f"@{model.revision}" if model.revision else ""),
            weights=weights,
            progress=progress,
        )
        found.append(result)
        if results is not None:
            with replacing(results / RESULTS) as partial:
                partial.write_text(json.dumps([r.to_dict() for r in found], indent=2) + "\n")
    return found


def task_rows(results: Sequence[TaskResult]) -> list[dict[str, str]]:
    """Return one row per benchmark for a table."""
    rows = []
    for result in results:
        scale, unit = (100.0, " %") if result.metric == "accuracy" else (1.0, "")
        error = result.standard_error
        spread = "" if error is None else f" ± {error * scale:.2f}"
        rows.append(
            {
                "task": result.task,
                "metric": result.metric,
                "value": f"{result.value * scale:.2f}{spread}{unit}",
                "items": str(result.count),
                "data": result.data,
                "seconds": f"{result.seconds:.1f}",
            }
        )
    return rows
