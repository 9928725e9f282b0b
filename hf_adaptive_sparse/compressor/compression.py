"""The work of `compress`, once its arguments are checked: measure, search, prune, measure again."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.data import Batch
from hf_adaptive_sparse.checkpoint.applying import check_before_loading
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.compressor.companions import companions, thread_count
from hf_adaptive_sparse.compressor.data_source import DataSource
from hf_adaptive_sparse.compressor.final_prune import final_config
from hf_adaptive_sparse.compressor.measuring import Measurement, Measuring
from hf_adaptive_sparse.compressor.model_source import ModelSource, parameter_bytes
from hf_adaptive_sparse.compressor.offload import weight_files
from hf_adaptive_sparse.compressor.pruned_folder import prune_and_save
from hf_adaptive_sparse.compressor.saving import Recipe, copy_processor, save_report
from hf_adaptive_sparse.compressor.search_plan import Loaded, SearchPlan
from hf_adaptive_sparse.evaluation.resources import weight_bytes_on_disk
from hf_adaptive_sparse.memory import release_freed
from hf_adaptive_sparse.pruning.report import PruningReport
from hf_adaptive_sparse.search.max_loss_result import WithinLoss
from hf_adaptive_sparse.search.result import SearchResult


@dataclass(frozen=True)
class CompressionResult:
    """What :func:`compress` did.

    Attributes:
        output: The folder with the compressed model: a complete Hub repo.
        config: The config the checkpoint carries.
        report: What was pruned.
        measurements: The dense model's row and the compressed one's, on held-out data.
        search: The search's result; ``None`` where there was nothing to search.
        within: The smallest budget found within a loss, where one was asked for.
        commit_url: The Hub commit, where it was pushed.
    """

    output: Path
    config: SparsityConfig
    report: PruningReport
    measurements: tuple[Measurement, ...]
    search: SearchResult | None
    within: WithinLoss | None
    commit_url: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "output": str(self.output),
            "mean_sparsity": self.report.mean_sparsity,
            "kv_cache": self.config.to_dict()["kv_cache"],
            "measurements": [row.to_dict() for row in self.measurements],
            "best_value": None if self.search is None else self.search.best_value,
            "uniform_value": None if self.search is None else self.search.baseline,
            "max_loss": None if self.within is None else self.within.to_dict(),
            "commit_url": self.commit_url,
        }


@dataclass(frozen=True)
class Compression:
    """A compression that is to be done.

    Attributes:
        model: The dense model.
        output: What the folder it is done in becomes.
        plan: The search.
        config: How to prune, but for the profile that the search finds.
        evaluation: Data that search and perplexity are evaluated on.
        questions: Questions for the final figures; ``None``: those of ``evaluation``.
        workers: Processes to search with.
        offload: Whether the weights stay in their files.
        repo_id: Where the model is going to be pushed.
        progress: Show progress bars.
    """

    model: ModelSource
    output: Path
    plan: SearchPlan
    config: SparsityConfig
    evaluation: DataSource
    questions: DataSource | None
    workers: int
    offload: bool
    repo_id: str | None
    progress: bool

    def run(self, folder: Path) -> CompressionResult:
        """Do it in a folder, which may hold what an interrupted run of the same left."""
        with (
            self.plan.kept_in(folder) as plan,
            companions(self.model, plan.work, self.workers) as own,
        ):
            loaded = plan.load(own)
            check_before_loading(loaded.model, self.config, loaded.calibration)
            measured = Measuring(loaded, self.evaluation, self.questions, self.progress)
            dense_row = measured("dense", loaded.model, 0.0, parameter_bytes(loaded.model))
            started = perf_counter()
            within, search = _search(plan, loaded, self.progress)
            threads = torch.get_num_threads()
        batches, processor = loaded.calibration, loaded.processor
        dense = None if self.offload else loaded.model
        del loaded  # and with it the mapped files of a model that is offloaded
        # Sums depend on the number of threads, and a bound is that of the very weights that were
        # measured.
        with thread_count(None if within is None else threads):
            model, report = self._prune(dense, search, batches, processor, folder)
        config: SparsityConfig = model.config.quantization_config
        compressed = _load_stored(folder, config) if self.offload else model
        seconds = perf_counter() - started
        size = weight_bytes_on_disk(folder)
        row = measured(
            "compressed", compressed, report.mean_sparsity, size, config, dense_row.match
        )
        rows = (dense_row, replace(row, seconds=seconds))
        save_report(
            folder,
            model,
            report,
            self._recipe(row.questions),
            processor=processor,
            measurements=rows,
            result=search,
            within=within,
        )
        within, search = _detached(within, search)
        return CompressionResult(self.output, config, report, rows, search, within, None)

    def _prune(
        self,
        model: PreTrainedModel | None,
        search: SearchResult | None,
        batches: list[Batch] | None,
        processor: Any,
        folder: Path,
    ) -> tuple[PreTrainedModel, PruningReport]:
        """Prune a model by the profile that was found, and save it.

        Args:
            model: The loaded model; ``None``: it is pruned from its files.
            search: The search, if there was one.
            batches: Calibration batches, if any are needed.
            processor: The processor.
            folder: Where to.

        Returns:
            The model, of which offloading leaves the shapes alone, and what was pruned.
        """
        label = self.plan.calibration_label
        config = final_config(self.config, self.plan.space, search, data=label)
        files = None
        if model is None:
            gc.collect()
            release_freed()
            model = self.model.load_empty()
            files = weight_files(self.model, model)
        report = prune_and_save(
            model, config, batches, processor, folder, files=files, progress=self.progress
        )
        copy_processor(self.model, folder)
        return model, report

    def _recipe(self, answered: int) -> Recipe:
        asked = (self.questions or self.evaluation).label
        return Recipe(
            self.model,
            self.plan.calibration_label,
            self.evaluation.label,
            self.plan.seed,
            questions=f"{answered} questions of {asked}" if answered else None,
            repo_id=self.repo_id,
        )


def _search(
    plan: SearchPlan, loaded: Loaded, progress: bool
) -> tuple[WithinLoss | None, SearchResult | None]:
    if plan.max_loss is not None:
        within = plan.search_within(loaded, progress=progress)
        return within, within.search
    if not plan.space.searches:
        return None, None
    return None, plan.search(loaded, progress=progress)


def _load_stored(folder: Path, config: SparsityConfig) -> PreTrainedModel:
    """Load a model that may be larger than the memory, to be measured as it is stored."""
    runtime = SparsityConfig(runtime="sparse") if config.checkpoint_format == "bitmask" else None
    return ModelSource(folder, device_map="cpu").load(runtime)


def _detached(
    within: WithinLoss | None, result: SearchResult | None
) -> tuple[WithinLoss | None, SearchResult | None]:
    """Return the results without the journal, which moves with the folder."""
    if result is None:
        return None, None
    result = result.detached()
    return None if within is None else replace(within, search=result), result
