"""A search as a value that every worker, in its own process, can load and carry out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.data import Batch
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.compressor.data_source import DataSource, held_out_batches
from hf_adaptive_sparse.compressor.final_prune import final_config, pruned_for_now, ranking_metric
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.pruning.metrics import get_metric
from hf_adaptive_sparse.search.errors import NothingToChoose, StudyMismatch, TrialsFailed
from hf_adaptive_sparse.search.loss_budgets import check_bound
from hf_adaptive_sparse.search.max_loss import FinalPrune, search_within
from hf_adaptive_sparse.search.max_loss_result import WithinLoss
from hf_adaptive_sparse.search.objectives import ObjectiveSpec
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.samplers import DEFAULT_SAMPLER
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.space_rules import check_has_budget
from hf_adaptive_sparse.search.storage import JOURNAL
from hf_adaptive_sparse.search.study import search
from hf_adaptive_sparse.staging import is_partial


class Loaded(NamedTuple):
    """What a worker has in memory: the dense model, and the batches.

    ``calibration`` is ``None`` where nothing that the plan does reads it. ``held_out`` is
    ``searched`` where the data make a single batch.
    """

    model: PreTrainedModel
    processor: Any
    calibration: list[Batch] | None
    searched: list[Batch]
    held_out: list[Batch]


@dataclass(frozen=True)
class SearchPlan:
    """A search, the same for all its workers.

    Attributes:
        space: What to search.
        storage: Optuna storage URL, or path of a journal or SQLite file. ``None``: a journal in
            the folder that the job writes.
        study_name: Name of the study there; with ``max_loss`` the start of the names, one per
            budget. ``None``: ``"hf-adaptive-sparse"``.
        metric: Metric of the final prune; one that updates weights is ranked by ``lognorm``.
        n_trials: Trials of all workers together; with ``max_loss`` of each budget.
        calibration: Data to rank on. ``None``: WikiText-2, training split.
        evaluation: Data to evaluate on: the search sees ``num_samples`` of them, as many others
            are held out. ``None``: WikiText-2, validation split.
        objective: What is minimised, see ``has.search``.
        timeout_seconds: Time after which a worker starts no further trial.
        seed: Seed of the search, the same for all workers.
        sampler: As for ``has.search``.
        excluded: Names or globs of linears that stay dense.
        max_loss: Search the smallest budget whose perplexity rises by this at most, 0.005 being
            0.5 %; `search_within` does.
        final: Config of the final prune; the bound of ``max_loss`` then holds for a model pruned
            so. ``None``: it holds for one-shot masks.

    Raises:
        ValueError: If the space lacks a budget or, with ``max_loss``, fixes one.
    """

    space: SearchSpace
    storage: str | None = None
    study_name: str | None = None
    metric: str = "lognorm"
    n_trials: int = 50
    calibration: DataSource | None = None
    evaluation: DataSource | None = None
    objective: ObjectiveSpec = "perplexity"
    timeout_seconds: float | None = None
    seed: int = 0
    sampler: str = DEFAULT_SAMPLER
    excluded: tuple[str, ...] = ()
    max_loss: float | None = None
    final: SparsityConfig | None = None

    def __post_init__(self) -> None:
        if self.max_loss is None:
            check_has_budget(self.space)
        else:
            check_bound(self.max_loss, self.space, self.objective, self.timeout_seconds)

    @contextmanager
    def kept_in(self, folder: Path) -> Iterator[SearchPlan]:
        """Yield the plan with its journal in ``folder``, if it names no storage.

        A search that failed as a whole would fail at once if it was resumed, and nothing else can
        be: its journal is removed.
        """
        if self.storage is not None:
            yield self
            return
        journal = folder / JOURNAL
        try:
            yield replace(self, storage=str(journal))
        except (NothingToChoose, TrialsFailed):
            journal.unlink(missing_ok=True)
            raise

    def load(self, source: ModelSource) -> Loaded:
        """Load the model and the data.

        Raises:
            ValueError: If the data are invalid.
            OSError: If the model cannot be found.
        """
        processor = source.load_processor()
        model = source.load_dense()
        calibration = None
        if self.needs_calibration:
            calibration = self.calibration_data.batches(processor, model.config, "train")
        searched, held_out = held_out_batches(self.evaluation, processor, model.config)
        if self.max_loss is not None and searched is held_out:
            raise ValueError(
                "The evaluation data make a single batch, and the bound needs data that no search "
                "saw. Give more data."
            )
        return Loaded(model, processor, calibration, searched, held_out)

    @property
    def calibration_data(self) -> DataSource:
        """The calibration data; WikiText-2 where none are named."""
        return self.calibration or DataSource()

    @property
    def calibration_label(self) -> str | None:
        """The calibration data in words; ``None`` where none are read."""
        return self.calibration_data.label if self.needs_calibration else None

    @property
    def needs_calibration(self) -> bool:
        """Whether the search, or the final prune, reads calibration data."""
        if self.space.prunes and get_metric(ranking_metric(self.metric)).needs_calibration:
            return True
        if self.final is None or not self.final.needs_calibration:
            return False
        return self.space.prunes or self.final.removes_weights

    def search(self, loaded: Loaded, *, progress: bool = True) -> SearchResult:
        """Carry the search out, together with the other workers of its study."""
        if self.max_loss is not None:
            raise ValueError(
                f"A plan with max_loss={self.max_loss} searches the smallest budget: call "
                "search_within, or leave max_loss out."
            )
        held_out = None if loaded.held_out is loaded.searched else loaded.held_out
        with self._leftover_named():
            return search(
                loaded.model,
                loaded.calibration,
                loaded.searched,
                self.space,
                held_out=held_out,
                objective=self.objective,
                timeout_seconds=self.timeout_seconds,
                **self._settings(progress),
            )

    def search_within(self, loaded: Loaded, *, progress: bool = True) -> WithinLoss:
        """Find the smallest budget within ``max_loss``, together with the other workers."""
        if self.max_loss is None:
            raise ValueError("max_loss must be set for a search of the smallest budget.")
        with self._leftover_named():
            return search_within(
                loaded.model,
                loaded.calibration,
                loaded.searched,
                loaded.held_out,
                self.space,
                max_loss=self.max_loss,
                final=self._final_prune(loaded),
                **self._settings(progress),
            )

    def work(self, source: ModelSource) -> None:
        """Do a further worker's share, in a process of its own."""
        loaded = self.load(source)
        if self.max_loss is None:
            self.search(loaded, progress=False)
        else:
            self.search_within(loaded, progress=False)

    @contextmanager
    def _leftover_named(self) -> Iterator[None]:
        """Add to a `StudyMismatch` that an interrupted job left the study, if one did."""
        try:
            yield
        except StudyMismatch as error:
            if self.storage is None or not is_partial(Path(self.storage).parent):
                raise
            raise StudyMismatch(
                f"{error} An interrupted job left the study in {self.storage}: delete that file "
                "if you do not want to resume it."
            ) from error

    def _settings(self, progress: bool) -> dict[str, Any]:
        return {
            "metric": ranking_metric(self.metric),
            "n_trials": self.n_trials,
            "storage": self.storage,
            "study_name": self.study_name,
            "seed": self.seed,
            "sampler": self.sampler,
            "modules_to_not_convert": self.excluded,
            "progress": progress,
        }

    def _final_prune(self, loaded: Loaded) -> FinalPrune | None:
        if self.final is None:
            return None
        asked = self.final

        def final_prune(result: SearchResult) -> Any:
            config = final_config(asked, result.space, result, data=self.calibration_label)
            return pruned_for_now(loaded.model, config, loaded.calibration, loaded.processor)

        return final_prune
