"""The job of finding the smallest model whose loss stays within a bound."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from hf_adaptive_sparse.compressor.companions import companions
from hf_adaptive_sparse.compressor.saving import save_search
from hf_adaptive_sparse.compressor.search_plan import JOURNAL, SearchPlan
from hf_adaptive_sparse.compressor.sources import DataSource, ModelSource
from hf_adaptive_sparse.search.max_loss_result import WithinLoss
from hf_adaptive_sparse.search.samplers import DEFAULT_SAMPLER
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.staging import check_output, staged_folder

BOUND_FILE = "max_loss.json"


def search_within_to_folder(
    model: ModelSource,
    output: str | os.PathLike[str],
    space: SearchSpace,
    *,
    max_loss: float,
    metric: str = "lognorm",
    trials: int = 50,
    calibration: DataSource | None = None,
    evaluation: DataSource | None = None,
    storage: str | None = None,
    study_name: str | None = None,
    seed: int = 0,
    sampler: str = DEFAULT_SAMPLER,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> WithinLoss:
    """Find the smallest budget within a loss; write profile, history, plots and the bound.

    Args:
        model: The dense model.
        output: Folder to write, complete or not at all. A killed run resumes its searches.
        space: As for `search.max_loss.search_within`.
        max_loss: Relative increase of the perplexity that is allowed, 0.005 being 0.5 %.
        metric: Metric of the final prune; one that updates weights is ranked by ``lognorm``.
        trials: Trials of each search.
        calibration: Data to rank on. ``None``: WikiText-2, training split.
        evaluation: Data to evaluate on: the searches see ``num_samples`` of them, the bound is
            checked on as many others. ``None``: WikiText-2, validation split.
        storage: Optuna storage URL, or path of a journal. ``None``: a journal in ``output``.
        study_name: Start of the names of the studies there, one per budget.
        seed: Seed of the searches.
        sampler: As for ``has.search``.
        workers: Processes to search with on this machine, this one included.
        overwrite: Replace what is in ``output`` when the job is done.
        progress: Show progress bars on stderr.

    Raises:
        ValueError: If an argument or the data are invalid.
        SearchError: If no budget that was tried holds.
        OSError: If the model cannot be found, or the output cannot be written.
    """
    target = Path(output)
    check_output(target, overwrite=overwrite)
    with staged_folder(target, overwrite=overwrite, keep=(JOURNAL,)) as folder:
        plan = SearchPlan(
            space=space,
            storage=storage or str(folder / JOURNAL),
            study_name=study_name,
            metric=metric,
            trials=trials,
            calibration=calibration,
            evaluation=evaluation,
            seed=seed,
            sampler=sampler,
            max_loss=max_loss,
        )
        with companions(model, plan.work, workers) as own:
            found = plan.search_within(plan.load(own), progress=progress)
        save_search(found.search, folder)
        save_bound(found, folder)
        # The journal moves with the folder; the result must not read it from its old place.
        found = replace(found, search=found.search.detached())
    return found


def save_bound(found: WithinLoss, folder: Path) -> None:
    """Write what was found into ``max_loss.json``."""
    text = json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n"
    (folder / BOUND_FILE).write_text(text, encoding="utf-8")
