"""The jobs that change no model: search and evaluate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hf_adaptive_sparse.compressor.companions import check_workers, companions
from hf_adaptive_sparse.compressor.data_source import DataSource
from hf_adaptive_sparse.compressor.measuring import Measurement, measure
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.compressor.saving import save_bound, save_search
from hf_adaptive_sparse.compressor.search_plan import SearchPlan
from hf_adaptive_sparse.compressor.targets import checked_target
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice, resolve_kv_cache
from hf_adaptive_sparse.evaluation.resources import (
    SparsityReport,
    sparsity_report,
    weight_bytes_on_disk,
)
from hf_adaptive_sparse.search.data import EVALUATION_SAMPLES
from hf_adaptive_sparse.search.max_loss_result import WithinLoss
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.storage import JOURNAL
from hf_adaptive_sparse.staging import staged_folder


def search_study(
    model: ModelSource, plan: SearchPlan, *, workers: int = 1, progress: bool = True
) -> SearchResult:
    """Run trials of a study, alone or with other workers, until it is complete.

    Started several times, on one machine or many, with the same storage and study, it does one
    search together. The result is that of all workers; its comparison with uniform is made on the
    data that are held out.

    Args:
        model: The dense model.
        plan: The search, with a storage.
        workers: Processes to search with on this machine, this one included. A script that asks for
            several does so below ``if __name__ == "__main__":``.
        progress: Show progress bars on stderr.

    Raises:
        ValueError: If an argument or the data are invalid, or the study is not of this search.
        OSError: If the model cannot be found, or the storage cannot be used.
    """
    check_workers(workers)
    if plan.storage is None:
        raise ValueError(
            "search_study needs a storage that all workers read, got storage=None: set "
            "SearchPlan(storage=...), or call search_to_folder."
        )
    with companions(model, plan.work, workers) as own:
        return plan.search(plan.load(own), progress=progress)


def search_to_folder(
    model: ModelSource,
    output: str | os.PathLike[str],
    plan: SearchPlan,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> SearchResult:
    """Search a profile without pruning, and write profile, history and plots to ``output``.

    Args:
        model: The dense model.
        output: Folder to write, complete or not at all. A killed run resumes its search.
        plan: The search.
        workers: As for :func:`search_study`.
        overwrite: Replace what is in ``output`` when the job is done.
        progress: Show progress bars on stderr.

    Raises:
        ValueError: As :func:`search_study`.
        OSError: As :func:`search_study`, or if the output cannot be written.
    """
    check_workers(workers)
    with _begun(model, output, plan, overwrite=overwrite) as (folder, kept):
        result = search_study(model, kept, workers=workers, progress=progress)
        save_search(result, folder)
        # The journal moves with the folder; the result must not read it from its old place.
        return result.detached()


def search_within_to_folder(
    model: ModelSource,
    output: str | os.PathLike[str],
    plan: SearchPlan,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> WithinLoss:
    """Find the smallest budget within a loss; write profile, history, plots and the bound.

    Args:
        model: The dense model.
        output: As for :func:`search_to_folder`.
        plan: The search, with ``max_loss``.
        workers: As for :func:`search_study`.
        overwrite: Replace what is in ``output`` when the job is done.
        progress: Show progress bars on stderr.

    Raises:
        ValueError: If an argument or the data are invalid.
        SearchError: If no budget that was tried holds.
        OSError: If the model cannot be found, or the output cannot be written.
    """
    check_workers(workers)
    with _begun(model, output, plan, overwrite=overwrite) as (folder, kept):
        with companions(model, kept.work, workers) as own:
            found = kept.search_within(kept.load(own), progress=progress)
        save_search(found.search, folder)
        save_bound(found, folder)
        return replace(found, search=found.search.detached())  # as in search_to_folder


@contextmanager
def _begun(
    model: ModelSource, output: str | os.PathLike[str], plan: SearchPlan, *, overwrite: bool
) -> Iterator[tuple[Path, SearchPlan]]:
    """Yield the folder that becomes ``output``, and the plan with its journal in it."""
    target = checked_target(output, (model, plan.calibration, plan.evaluation), overwrite=overwrite)
    with (
        staged_folder(target, overwrite=overwrite, keep=(JOURNAL,)) as folder,
        plan.kept_in(folder) as kept,
    ):
        yield folder, kept


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
    data = DataSource.of(evaluation, "evaluation", EVALUATION_SAMPLES)
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
