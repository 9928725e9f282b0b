"""The main job: a dense model goes in, a compressed one comes out, complete and measured."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.loading import apply_config
from hf_adaptive_sparse.compressor.companions import companions
from hf_adaptive_sparse.compressor.final_prune import final_config
from hf_adaptive_sparse.compressor.measuring import Measurement, measure
from hf_adaptive_sparse.compressor.presets import DEFAULT_QUALITY, Quality, get_quality
from hf_adaptive_sparse.compressor.saving import Recipe, save_model, save_report
from hf_adaptive_sparse.compressor.search_plan import JOURNAL, Loaded, SearchPlan
from hf_adaptive_sparse.compressor.sources import DataSource, ModelSource, parameter_bytes
from hf_adaptive_sparse.compressor.within import save_bound
from hf_adaptive_sparse.evaluation.resources import weight_bytes_on_disk
from hf_adaptive_sparse.hub import push_folder
from hf_adaptive_sparse.profiles import KVCacheConfig
from hf_adaptive_sparse.pruning.report import PruningReport
from hf_adaptive_sparse.search.objectives import ObjectiveSpec
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.samplers import DEFAULT_SAMPLER
from hf_adaptive_sparse.search.space import FREE, SearchSpace
from hf_adaptive_sparse.search.within_loss import WithinLoss
from hf_adaptive_sparse.staging import check_output, staged_folder


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


def compress(
    model: ModelSource | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    config: SparsityConfig | None = None,
    space: SearchSpace | None = None,
    quality: str = DEFAULT_QUALITY,
    trials: int | None = None,
    calibration: DataSource | None = None,
    evaluation: DataSource | None = None,
    questions: DataSource | None = None,
    objective: ObjectiveSpec = "perplexity",
    timeout_seconds: float | None = None,
    max_loss: float | None = None,
    workers: int = 1,
    storage: str | None = None,
    study_name: str | None = None,
    seed: int = 0,
    sampler: str = DEFAULT_SAMPLER,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    progress: bool = True,
) -> CompressionResult:
    """Search, prune and save: the whole method of arXiv 2507.20613 on one model.

    The model is loaded once and never copied. The search masks it without changing it; the best
    profile is then pruned in place, layer by layer. ``output`` appears only when everything in it
    is written: weights, processor, generation config, ``profile.json``, the search's history and
    plots, and a model card. A killed run resumes its search when it is called again.

    Args:
        model: The dense model, or its name or path.
        output: Folder to write; it must be missing or empty, unless ``overwrite``.
        config: Metric, pattern, format and calibration mode. Its target sparsity must be the
            space's; its KV profile is the space's to find. A metric that updates weights
            (sparsegpt, alps) does the final prune, while the search ranks with ``lognorm``.
        space: What to search. ``None``: the quality's space at the config's target sparsity.
        quality: Name of a preset (`compressor.presets`), which says what ``config``, ``space`` and
            ``trials`` leave open.
        trials: Trials of the search, the first of which is the uniform profile. ``None``: the
            quality's.
        calibration: Data to calibrate on. ``None``: WikiText-2, training split.
        evaluation: Data to evaluate on: the search sees ``num_samples`` of them, the final
            figures as many others. ``None``: WikiText-2, validation split.
        questions: Visual questions for the final figures. ``None``: those that ``evaluation``
            holds, if it does.
        objective: What the search minimises, see ``has.search``.
        timeout_seconds: Time after which the search starts no further trial.
        max_loss: Make the smallest checkpoint (or, where the space chooses KV bits alone, the
            fewest KV bits) whose perplexity on held-out data rises by this at most, 0.005 being
            0.5 %. Each budget that is tried is pruned as the final one is, so that the bound is
            that of what is saved; meanwhile a copy of the decoder's weights is in CPU memory.
        workers: Processes to search with on this machine, this one included.
        storage: Optuna storage URL, or path of a journal. ``None``: a journal beside ``output``.
        study_name: Name of the study there. ``None``: ``"hf-adaptive-sparse"``.
        seed: Seed of the search.
        sampler: As for ``has.search``.
        overwrite: Replace what is in ``output`` when the job is done.
        push_to_hub: Repo id to push to.
        private: Make the pushed repo private.
        progress: Show progress bars on stderr.

    Raises:
        ValueError: If an argument or the data are invalid; before any weight is touched.
        OSError: If the model cannot be found, or the output cannot be written.
    """
    target = Path(output)
    check_output(target, overwrite=overwrite)
    origin = model if isinstance(model, ModelSource) else ModelSource(model)
    preset = get_quality(quality)
    config = preset.config(config)
    space = space or _default_space(preset, config, max_loss)
    check_goal(config, space, max_loss, workers)
    evaluation = evaluation or DataSource(num_samples=64)
    asked = questions or evaluation
    plan = SearchPlan(
        space=space,
        storage=storage or "",
        study_name=study_name,
        metric=config.metric,
        trials=preset.trials if trials is None else trials,
        calibration=calibration,
        evaluation=evaluation,
        objective=objective,
        timeout_seconds=timeout_seconds,
        seed=seed,
        sampler=sampler,
        excluded=tuple(config.modules_to_not_convert or ()),
        max_loss=max_loss,
        final=config,
    )
    with staged_folder(target, overwrite=overwrite, keep=(JOURNAL,)) as folder:
        plan = replace(plan, storage=storage or str(folder / JOURNAL))
        with companions(origin, plan.work, workers) as own:
            loaded = plan.load(own)
            measured = _Measuring(loaded, asked, progress)
            rows = [measured("dense", 0.0, parameter_bytes(loaded.model))]
            started = perf_counter()
            within, result = _search(plan, loaded, progress)
        config = final_config(config, space, result, data=plan.calibration_data.label)
        report = apply_config(
            loaded.model, config, loaded.calibration, loaded.processor, progress=progress
        )
        seconds = perf_counter() - started
        save_model(loaded.model, loaded.processor, folder)
        config = loaded.model.config.quantization_config
        size = weight_bytes_on_disk(folder)
        row = measured("compressed", report.mean_sparsity, size, config, rows[0].match)
        rows.append(replace(row, seconds=seconds))
        recipe = Recipe(
            str(origin.name), plan.calibration_data.label, evaluation.label, seed, push_to_hub
        )
        if within is not None:
            save_bound(within, folder)
        save_report(
            folder,
            loaded.model,
            report,
            recipe,
            processor=loaded.processor,
            measurements=rows,
            result=result,
            bound=None if within is None else str(within),
        )
        # The journal moves with the folder; the result must not read it from its old place.
        result = None if result is None else result.detached()
        if within is not None and result is not None:
            within = replace(within, search=result)
    commit_url = None
    if push_to_hub is not None:
        commit_url = push_folder(target, push_to_hub, private=private)
    return CompressionResult(target, config, report, tuple(rows), result, within, commit_url)


def _default_space(preset: Quality, config: SparsityConfig, max_loss: float | None) -> SearchSpace:
    space = preset.space(config)
    if max_loss is None or not space.prunes:
        return space
    # A budget is what is looked for; the space wants one.
    return replace(space, target_sparsity=FREE, size_bytes=1)


def check_goal(
    config: SparsityConfig, space: SearchSpace, max_loss: float | None, workers: int
) -> None:
    """Check that what is searched, what is pruned in the end, and how, belong together.

    Raises:
        ValueError: If they do not; the message says what to change.
    """
    if space.prunes and not space.is_free and space.target != config.target_sparsity:
        raise ValueError(
            f"The config and the space must have one target_sparsity, got "
            f"{config.target_sparsity} and {space.target}."
        )
    if space.size_bytes is not None:
        if config.checkpoint_format == "dense":
            raise ValueError(
                "A budget in bytes on disk needs checkpoint_format='bitmask', got 'dense', which "
                "stores the removed weights, too. Change one of them."
            )
        if config.quantises_weights:
            raise ValueError(
                f"A budget in bytes on disk counts the weight bits of the space, got weight_bits="
                f"{config.weight_bits!r} in the config. Search them instead "
                "(SearchSpace(weight_bits=...), --search-weight-bits), one width being enough."
            )
    if workers != 1 and not space.searches and max_loss is None:
        raise ValueError(
            f"There is nothing to search, so workers must be 1, got {workers}. Leave it out."
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


class _Measuring:
    """Measures the model, as it is at the time, on the held-out data."""

    def __init__(self, loaded: Loaded, asked: DataSource, progress: bool) -> None:
        self._loaded, self._asked, self._progress = loaded, asked, progress
        self._records = asked.questions(loaded.model.config, "validation")

    def __call__(
        self,
        name: str,
        sparsity: float,
        size: int,
        config: SparsityConfig | None = None,
        match: Literal["whole", "prefix"] | None = None,
    ) -> Measurement:
        kv_cache = None if config is None else config.kv_cache
        return measure(
            name,
            self._loaded.model,
            self._loaded.held_out,
            sparsity=sparsity,
            weight_bytes=size,
            kv_cache=kv_cache if isinstance(kv_cache, KVCacheConfig) else None,
            processor=self._loaded.processor,
            questions=self._records,
            num_questions=self._asked.num_samples,
            match=match,
            progress=self._progress,
        )
