"""The main job: a dense model goes in, a compressed one comes out, complete and measured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.loading import apply_config
from hf_adaptive_sparse.compressor.measuring import Measurement, measure
from hf_adaptive_sparse.compressor.presets import DEFAULT_QUALITY, get_quality
from hf_adaptive_sparse.compressor.saving import Recipe, save_model, save_report
from hf_adaptive_sparse.compressor.sources import (
    DataSource,
    ModelSource,
    held_out_batches,
    parameter_bytes,
)
from hf_adaptive_sparse.evaluation.resources import weight_bytes_on_disk
from hf_adaptive_sparse.hub import push_folder
from hf_adaptive_sparse.profiles import KVCacheConfig
from hf_adaptive_sparse.pruning.metrics import get_metric
from hf_adaptive_sparse.pruning.report import PruningReport
from hf_adaptive_sparse.search.objectives import ObjectiveSpec
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.samplers import DEFAULT_SAMPLER
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search
from hf_adaptive_sparse.staging import check_output, staged_folder

RANKING_METRIC = "lognorm"
"""What a search ranks with where the chosen metric changes weights while it prunes."""

JOURNAL = "search.journal"
"""The search's Optuna journal: it outlives a killed run, and the next one resumes from it."""


@dataclass(frozen=True)
class CompressionResult:
    """What :func:`compress` did.

    Attributes:
        output: The folder with the compressed model: a complete Hub repo.
        config: The config the checkpoint carries.
        report: What was pruned.
        measurements: The dense model's row and the compressed one's, on held-out data.
        search: The search's result; ``None`` where there was nothing to search.
        commit_url: The Hub commit, where it was pushed.
    """

    output: Path
    config: SparsityConfig
    report: PruningReport
    measurements: tuple[Measurement, ...]
    search: SearchResult | None
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
    space = space or preset.space(config)
    if space.prunes and not space.is_free and space.target != config.target_sparsity:
        raise ValueError(
            f"The config and the space must have one target_sparsity, got "
            f"{config.target_sparsity} and {space.target}."
        )
    calibration = calibration or DataSource()
    evaluation = evaluation or DataSource(num_samples=64)

    processor = origin.load_processor()
    dense = origin.load_dense()
    batches = calibration.batches(processor, dense.config, "train")
    searched, held_out = held_out_batches(evaluation, processor, dense.config)
    asked = questions or evaluation
    records = asked.questions(dense.config, "validation")

    def measured(
        name: str,
        sparsity: float,
        size: int,
        kv_cache: KVCacheConfig | None = None,
        match: Literal["whole", "prefix"] | None = None,
    ) -> Measurement:
        return measure(
            name,
            dense,
            held_out,
            sparsity=sparsity,
            weight_bytes=size,
            kv_cache=kv_cache,
            processor=processor,
            questions=records,
            num_questions=asked.num_samples,
            match=match,
            progress=progress,
        )

    rows = [measured("dense", 0.0, parameter_bytes(dense))]
    with staged_folder(target, overwrite=overwrite, keep=(JOURNAL,)) as folder:
        started = perf_counter()
        result = None
        if space.searches:
            result = search(
                dense,
                batches,
                searched,
                space,
                held_out=held_out if held_out is not searched else None,
                metric=ranking_metric(config.metric),
                n_trials=preset.trials if trials is None else trials,
                objective=objective,
                timeout_seconds=timeout_seconds,
                storage=storage or str(folder / JOURNAL),
                study_name=study_name,
                seed=seed,
                sampler=sampler,
                modules_to_not_convert=config.modules_to_not_convert,
                progress=progress,
            )
        config = final_config(config, space, result, data=calibration.label)
        report = apply_config(dense, config, batches, processor, progress=progress)
        seconds = perf_counter() - started
        save_model(dense, processor, folder)
        config = dense.config.quantization_config
        kv_cache = config.kv_cache if isinstance(config.kv_cache, KVCacheConfig) else None
        size = weight_bytes_on_disk(folder)
        row = measured("compressed", report.mean_sparsity, size, kv_cache, rows[0].match)
        rows.append(replace(row, seconds=seconds))
        recipe = Recipe(str(origin.name), calibration.label, evaluation.label, seed, push_to_hub)
        save_report(
            folder,
            dense,
            report,
            recipe,
            processor=processor,
            measurements=rows,
            result=result,
        )
        # The journal moves with the folder; the result must not read it from its old place.
        result = None if result is None else result.detached()
    commit_url = None
    if push_to_hub is not None:
        commit_url = push_folder(target, push_to_hub, private=private)
    return CompressionResult(target, config, report, tuple(rows), result, commit_url)


def search_space(
    config: SparsityConfig,
    kv_bits: tuple[int, ...] | None = (6, 8),
    quality: str = DEFAULT_QUALITY,
) -> SearchSpace:
    """Return a preset's space at the config's target; a pattern n:m leaves only KV bits to it."""
    return get_quality(quality).space(config, kv_bits)


def ranking_metric(metric: str) -> str:
    """Return the metric that a search ranks with for a final prune by ``metric``."""
    return RANKING_METRIC if get_metric(metric).updates_weights else metric


def final_config(
    config: SparsityConfig, space: SearchSpace, result: SearchResult | None, *, data: str
) -> SparsityConfig:
    """Return the config of the final prune: the caller's, with the profile that was found.

    Args:
        config: What the caller asked for.
        space: The space, which fixes the KV bits where there was nothing to search.
        result: The search, if there was one.
        data: Name of the calibration data, recorded in the checkpoint.
    """
    ratios, kv_cache, target = config.sparsity, None, config.target_sparsity
    weight_bits: int | Mapping[str, int] = config.weight_bits
    provenance = dict(config.provenance)
    if result is not None:
        profile = result.best_profile
        ratios = dict(profile.sparsity.ratios) if profile.sparsity is not None else ratios
        kv_cache = profile.kv_cache
        weight_bits = profile.weight_bits if profile.weight_bits is not None else weight_bits
        provenance |= result.best_config.provenance
        if space.prunes:
            target = result.target_sparsity
        if profile.weight_bits:
            ratios = ratios or dict.fromkeys(profile.weight_bits, 0.0)
    else:
        if space.kv_bits is not None:
            kv_cache = space.kv_config(space.kv_bits[0], space.kv_bits[0])
        if space.weight_bits is not None:
            weight_bits = space.weight_bits[0]
    return SparsityConfig(
        target_sparsity=target,
        metric=config.metric,
        weight_update=config.weight_update,
        sparsity=ratios,
        pattern=config.pattern,
        calibration=config.calibration,
        kv_cache=kv_cache,
        modules_to_not_convert=config.modules_to_not_convert,
        checkpoint_format=config.checkpoint_format,
        weight_bits=weight_bits,
        weight_group_size=config.weight_group_size,
        provenance=provenance | {"calibration": data},
    )
