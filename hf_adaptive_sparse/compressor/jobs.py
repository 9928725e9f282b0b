"""The smaller jobs: prune to a folder, search to a folder, evaluate."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.loading import apply_config
from hf_adaptive_sparse.compressor.companions import companions
from hf_adaptive_sparse.compressor.measuring import Measurement, measure
from hf_adaptive_sparse.compressor.saving import Recipe, save_model, save_report, save_search
from hf_adaptive_sparse.compressor.search_plan import JOURNAL, SearchPlan
from hf_adaptive_sparse.compressor.sources import DataSource, ModelSource, parameter_bytes
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice, resolve_kv_cache
from hf_adaptive_sparse.evaluation.resources import (
    SparsityReport,
    sparsity_report,
    weight_bytes_on_disk,
)
from hf_adaptive_sparse.pruning.report import PruningReport
from hf_adaptive_sparse.search.objectives import ObjectiveSpec
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.samplers import DEFAULT_SAMPLER
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.staging import check_output, staged_folder


class SearchSettings(TypedDict, total=False):
    """What :func:`search_to_folder` passes on to :func:`search_study`."""

    study_name: str | None
    metric: str
    trials: int
    calibration: DataSource | None
    evaluation: DataSource | None
    objective: ObjectiveSpec
    timeout_seconds: float | None
    seed: int
    sampler: str
    workers: int
    progress: bool


@dataclass(frozen=True)
class PrunedFolder:
    """What :func:`prune_to_folder` wrote.

    Attributes:
        output: The folder.
        report: What was pruned.
        dense_bytes: Bytes of the dense weights.
        weight_bytes: Bytes of the weights in the folder.
    """

    output: Path
    report: PruningReport
    dense_bytes: int
    weight_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "output": str(self.output),
            "dense_bytes": self.dense_bytes,
            "weight_bytes": self.weight_bytes,
            **self.report.to_dict(),
        }


def prune_to_folder(
    model: ModelSource,
    output: str | os.PathLike[str],
    config: SparsityConfig,
    *,
    calibration: DataSource | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> PrunedFolder:
    """Load a dense model, prune it as ``config`` says, and write it to ``output``.

    Args:
        model: The dense model.
        output: Folder to write, complete or not at all.
        config: How to prune.
        calibration: Data to calibrate on. ``None``: WikiText-2, training split.
        seed: Seed recorded in the model card.
        overwrite: Replace what is in ``output`` when the job is done.
        progress: Show progress bars on stderr.

    Raises:
        ValueError: If the config does not fit the model, or the data do not suffice.
        OSError: If the model cannot be found, or the output cannot be written.
    """
    target = Path(output)
    check_output(target, overwrite=overwrite)
    processor = model.load_processor()
    dense = model.load_dense()
    dense_bytes = parameter_bytes(dense)
    data = calibration or DataSource()
    batches = None
    if config.removes_weights and config.needs_calibration:
        batches = data.batches(processor, dense.config, "train")
    with staged_folder(target, overwrite=overwrite) as folder:
        report = apply_config(dense, config, batches, processor, progress=progress)
        save_model(dense, processor, folder, consume=True)
        recipe = Recipe(str(model.name), None if batches is None else data.label, None, seed)
        save_report(folder, dense, report, recipe, processor=processor)
        weight_bytes = weight_bytes_on_disk(folder)
    return PrunedFolder(target, report, dense_bytes, weight_bytes)


def search_study(
    model: ModelSource,
    space: SearchSpace,
    *,
    storage: str,
    study_name: str | None = None,
    metric: str = "lognorm",
    trials: int = 50,
    calibration: DataSource | None = None,
    evaluation: DataSource | None = None,
    objective: ObjectiveSpec = "perplexity",
    timeout_seconds: float | None = None,
    seed: int = 0,
    sampler: str = DEFAULT_SAMPLER,
    workers: int = 1,
    progress: bool = True,
) -> SearchResult:
    """Work on a study, alone or beside other workers, until it has its trials.

    Started several times, on one machine or many, with the same storage and study, it does one
    search together. The result is that of all workers.

    Args:
        model: The dense model.
        space: What to search.
        storage: Optuna storage URL, or path of a journal or SQLite file.
        study_name: Name of the study there. ``None``: ``"hf-adaptive-sparse"``.
        metric: Metric of the final prune; one that updates weights is ranked by ``lognorm``.
        trials: Trials of all workers together.
        calibration: Data to rank on. ``None``: WikiText-2, training split.
        evaluation: Data to evaluate on: the search sees ``num_samples`` of them, the comparison
            with uniform at the end as many others. ``None``: WikiText-2, validation split.
        objective: What the search minimises, see ``has.search``.
        timeout_seconds: Time after which a worker starts no further trial.
        seed: Seed of the search, the same for all workers.
        sampler: As for ``has.search``.
        workers: Processes to start on this machine, this one included.
        progress: Show progress bars on stderr.

    Raises:
        ValueError: If an argument or the data are invalid, or the study is not of this search.
        OSError: If the model cannot be found, or the storage cannot be used.
    """
    plan = SearchPlan(
        space=space,
        storage=storage,
        study_name=study_name,
        metric=metric,
        trials=trials,
        calibration=calibration,
        evaluation=evaluation,
        objective=objective,
        timeout_seconds=timeout_seconds,
        seed=seed,
        sampler=sampler,
    )
    with companions(model, plan.work, workers) as own:
        return plan.search(plan.load(own), progress=progress)


def search_to_folder(
    model: ModelSource,
    output: str | os.PathLike[str],
    space: SearchSpace,
    *,
    storage: str | None = None,
    overwrite: bool = False,
    **settings: Unpack[SearchSettings],
) -> SearchResult:
    """Search a profile without pruning, and write profile, history and plots to ``output``.

    Args:
        model: The dense model.
        output: Folder to write, complete or not at all.
        space: What to search.
        storage: As for :func:`search_study`. ``None``: a journal in ``output``.
        overwrite: Replace what is in ``output`` when the job is done.
        **settings: As for :func:`search_study`.
    """
    target = Path(output)
    check_output(target, overwrite=overwrite)
    with staged_folder(target, overwrite=overwrite, keep=(JOURNAL,)) as folder:
        result = search_study(model, space, storage=storage or str(folder / JOURNAL), **settings)
        save_search(result, folder)
        # The journal moves with the folder; the result must not read it from its old place.
        result = result.detached()
    return result


def evaluate(
    model: ModelSource,
    *,
    evaluation: DataSource | None = None,
    questions: DataSource | None = None,
    kv_cache: KVCacheChoice = None,
    progress: bool = True,
) -> Measurement:
    """Measure a model, dense or compressed: perplexity, answers, bytes.

    Args:
        model: The model.
        evaluation: Data for the perplexity. ``None``: WikiText-2, validation split.
        questions: Visual questions to answer, or ``None``.
        kv_cache: ``None``: the model's own KV profile; ``False``: none; or one to measure with.
        progress: Show progress bars on stderr.

    Raises:
        ValueError: If the data are unusable, or ``questions`` holds no visual questions.
        OSError: If the model cannot be found.
    """
    processor = model.load_processor()
    loaded = model.load()
    records = None
    if questions is not None:
        records = questions.questions(loaded.config, "validation")
        if records is None:
            raise ValueError(
                f"{questions.label} must hold visual questions (columns image, question, answer) "
                "for a model that takes images; it holds text."
            )
    data = evaluation or DataSource(num_samples=64)
    report = sparsity_report(loaded)
    return measure(
        str(model.name),
        loaded,
        data.batches(processor, loaded.config, "validation"),
        sparsity=report.mean_sparsity,
        weight_bytes=_stored_bytes(model, report),
        kv_cache=resolve_kv_cache(loaded.config, kv_cache),
        processor=processor,
        questions=records,
        num_questions=None if questions is None else questions.num_samples,
        progress=progress,
    )


def _stored_bytes(model: ModelSource, report: SparsityReport) -> int:
    """Return the bytes on disk of a local folder; of a Hub repo, those of its tensors."""
    folder = Path(model.name)
    if folder.is_dir():
        return weight_bytes_on_disk(folder)
    return report.total.stored_bytes + report.other_bytes
