"""The main job: make a complete, measured, compressed model of a dense one."""

from __future__ import annotations

import gc
import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.data import Source
from hf_adaptive_sparse.checkpoint.applying import check_before_loading
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.compressor.checks import (
    check_goal,
    check_offloadable,
    check_pushed,
    on_cpu,
)
from hf_adaptive_sparse.compressor.companions import companions, thread_count
from hf_adaptive_sparse.compressor.final_prune import final_config
from hf_adaptive_sparse.compressor.measuring import Measurement, Measuring
from hf_adaptive_sparse.compressor.offload import weight_files
from hf_adaptive_sparse.compressor.presets import DEFAULT_QUALITY, Preset, get_preset
from hf_adaptive_sparse.compressor.pruned_folder import output_folder, prune_and_save
from hf_adaptive_sparse.compressor.saving import Recipe, save_report
from hf_adaptive_sparse.compressor.search_plan import Loaded, SearchPlan
from hf_adaptive_sparse.compressor.sources import DataSource, ModelSource, parameter_bytes
from hf_adaptive_sparse.errors import AdaptiveSparseError
from hf_adaptive_sparse.evaluation.resources import weight_bytes_on_disk
from hf_adaptive_sparse.hub import push_folder
from hf_adaptive_sparse.memory import release_freed
from hf_adaptive_sparse.naming import expanded
from hf_adaptive_sparse.pruning.report import PruningReport
from hf_adaptive_sparse.search.data import EVALUATION_SAMPLES
from hf_adaptive_sparse.search.max_loss_result import WithinLoss
from hf_adaptive_sparse.search.objectives import ObjectiveSpec
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.samplers import DEFAULT_SAMPLER
from hf_adaptive_sparse.search.space import FREE, SearchSpace
from hf_adaptive_sparse.search.storage import JOURNAL
from hf_adaptive_sparse.staging import check_output


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


class PushError(AdaptiveSparseError, OSError):
    """The model was compressed and is complete in its folder, but could not be pushed.

    Attributes:
        result: What `compress` did before.
    """

    def __init__(
        self, result: CompressionResult, repo_id: str, *, private: bool, reason: Exception
    ) -> None:
        command = ["hf-adaptive-sparse", "push", str(result.output), repo_id]
        command += ["--private"] if private else []
        super().__init__(
            f"{reason} The model is complete in {result.output}; push it later by "
            f"`{shlex.join(command)}`."
        )
        self.result = result


def compress(
    model: ModelSource | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    config: SparsityConfig | None = None,
    space: SearchSpace | None = None,
    quality: str = DEFAULT_QUALITY,
    n_trials: int | None = None,
    calibration: DataSource | Source = None,
    evaluation: DataSource | Source = None,
    questions: DataSource | str | os.PathLike[str] | None = None,
    objective: ObjectiveSpec = "perplexity",
    timeout_seconds: float | None = None,
    max_loss: float | None = None,
    workers: int = 1,
    storage: str | None = None,
    study_name: str | None = None,
    seed: int = 0,
    sampler: str = DEFAULT_SAMPLER,
    overwrite: bool = False,
    offload: bool = False,
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
            space's; its KV profile is the space's to find, and kept where that leaves the cache
            alone. A metric that updates weights (sparsegpt, alps) does the final prune, while the
            search ranks with ``lognorm``.
        space: What to search. ``None``: the quality's space at the config's target sparsity.
        quality: Name of a preset (`compressor.presets`), which says what ``config``, ``space`` and
            ``n_trials`` leave open.
        n_trials: Trials of the search, the first of which is the uniform profile. ``None``: the
            quality's.
        calibration: Data to calibrate on: a dataset's name, a path, batches, or a `DataSource`,
            which says how much of them. ``None``: WikiText-2, training split.
        evaluation: Data to evaluate on, likewise: the search sees ``num_samples`` of them (64), the
            final figures as many others; of batches, half each. ``None``: WikiText-2, validation
            split.
        questions: Visual questions for the final figures. ``None``: those that ``evaluation``
            holds, if it does, without the ones that the search sees.
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
        offload: For a model larger than the memory, on the CPU. The search reads the weights from
            the checkpoint's files, which stay mapped, and holds only the order in which they may
            go (4 bytes for each weight within the range of the ratios, a bit for each of all); the
            final prune is that of `prune_to_folder`, and resumes at the layer it had reached.
        push_to_hub: Repo id to push to.
        private: Make the pushed repo private.
        progress: Show progress bars on stderr.

    Raises:
        ValueError: If an argument or the data are invalid; before any weight is touched.
        TypeError: If a batch is not a dict of tensors.
        OSError: If the model cannot be found, or the output cannot be written.
        HubError: If ``push_to_hub`` is given and there is no token; before any work is done.
        PushError: If the model is complete but the Hub did not take it.
    """
    target = expanded(output)
    check_output(target, overwrite=overwrite)
    check_pushed(push_to_hub, private)
    origin = model if isinstance(model, ModelSource) else ModelSource(model)
    preset = get_preset(quality)
    calibration = DataSource.of(calibration, "calibration", DataSource.num_samples)
    evaluation = DataSource.of(evaluation, "evaluation", EVALUATION_SAMPLES)
    if questions is not None:
        questions = DataSource.of(questions, "questions", EVALUATION_SAMPLES, batches=False)
    config = preset.config(config)
    space = space or _default_space(preset, config, max_loss)
    check_goal(config, space, max_loss, workers)
    if offload:
        check_offloadable(max_loss)
        origin = on_cpu(origin)
    plan = SearchPlan(
        space=space,
        storage=storage,
        study_name=study_name,
        metric=config.metric,
        n_trials=preset.n_trials if n_trials is None else n_trials,
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
    with output_folder(target, offload=offload, overwrite=overwrite, keep=(JOURNAL,)) as folder:
        with plan.kept_in(folder) as kept, companions(origin, kept.work, workers) as own:
            loaded = kept.load(own)
            check_before_loading(loaded.model, config, loaded.calibration)
            measured = Measuring(loaded, evaluation, questions, progress)
            dense_row = measured("dense", loaded.model, 0.0, parameter_bytes(loaded.model))
            started = perf_counter()
            within, result = _search(kept, loaded, progress)
            searched_with = torch.get_num_threads()

        config = final_config(config, space, result, data=plan.calibration_label)
        batches, processor = loaded.calibration, loaded.processor
        if offload:
            del loaded  # and with it the mapped files
            gc.collect()
            release_freed()
            dense = origin.load_empty()
            files = weight_files(origin, dense)
        else:
            dense, files = loaded.model, None
        # Sums depend on the number of threads, and a bound is that of the very weights that were
        # measured.
        with thread_count(None if within is None else searched_with):
            report = prune_and_save(
                dense, config, batches, processor, folder, files=files, progress=progress
            )
        compressed = _load_stored(folder, config) if offload else dense
        seconds = perf_counter() - started

        config = dense.config.quantization_config
        size = weight_bytes_on_disk(folder)
        row = measured(
            "compressed", compressed, report.mean_sparsity, size, config, dense_row.match
        )
        rows = (dense_row, replace(row, seconds=seconds))
        asked = (questions or evaluation).label
        recipe = Recipe(
            origin,
            plan.calibration_label,
            evaluation.label,
            seed,
            questions=f"{row.questions} questions of {asked}" if row.questions else None,
            repo_id=push_to_hub,
        )
        save_report(
            folder,
            dense,
            report,
            recipe,
            processor=processor,
            measurements=rows,
            result=result,
            within=within,
        )
        within, result = _detached(within, result)
    done = CompressionResult(target, config, report, rows, result, within, None)
    return done if push_to_hub is None else _push(done, push_to_hub, private)


def _default_space(preset: Preset, config: SparsityConfig, max_loss: float | None) -> SearchSpace:
    space = preset.space(config)
    if max_loss is None or not space.prunes:
        return space
    return replace(space, target_sparsity=FREE)


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


def _push(done: CompressionResult, repo_id: str, private: bool) -> CompressionResult:
    try:
        commit_url = push_folder(done.output, repo_id, private=private)
    except (OSError, ValueError) as error:
        raise PushError(done, repo_id, private=private, reason=error) from error
    return replace(done, commit_url=commit_url)
