"""What each command does: options in, an :class:`Answer` out."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_adaptive_sparse.checkpoint.config import RUNTIMES, SparsityConfig
from hf_adaptive_sparse.cli.space_arguments import space_of
from hf_adaptive_sparse.compressor import (
    DataSource,
    ModelSource,
    compress,
    evaluate,
    evaluate_tasks,
    prune_offloaded,
    prune_to_folder,
    search_space,
    search_study,
    search_to_folder,
    search_within_to_folder,
)
from hf_adaptive_sparse.compressor.jobs import SearchSettings
from hf_adaptive_sparse.compressor.saving import library_versions, table_rows
from hf_adaptive_sparse.compressor.tasks import task_rows
from hf_adaptive_sparse.demo.run import run_demo
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice
from hf_adaptive_sparse.evaluation.tasks.task import Setting
from hf_adaptive_sparse.hub import inspect, push_folder
from hf_adaptive_sparse.kernels import triton_attention
from hf_adaptive_sparse.kernels.library import describe as describe_kernels
from hf_adaptive_sparse.profiles import CalibrationConfig, CompressionProfile, KVCacheConfig
from hf_adaptive_sparse.report import format_bytes, read_study, text_table, write_study_report
from hf_adaptive_sparse.report.study_analysis import failure_signs
from hf_adaptive_sparse.search.loss_budgets import budget_text
from hf_adaptive_sparse.search.objectives import Goal
from hf_adaptive_sparse.search.space import SearchSpace

OWN_PROFILE: tuple[int, ...] = ()
"""Default of ``evaluate --kv-bits``: what the model's config says."""

DEPENDENCIES = ("accelerate", "datasets", "huggingface_hub", "optimum-quanto", "optuna")


@dataclass(frozen=True)
class Answer:
    """What a command prints: ``text`` for a person, ``data`` (plain JSON types) for ``--json``."""

    text: str
    data: dict[str, Any]


def run_demo_command(options: argparse.Namespace) -> Answer:
    """Compress the bundled model and compare it with the dense one."""
    result = run_demo(
        options.output,
        trials=options.trials,
        seed=options.seed,
        overwrite=options.overwrite,
        progress=not options.no_progress,
    )
    return Answer(result.text(), result.to_dict())


def run_compress(options: argparse.Namespace) -> Answer:
    """Search, prune, save, and push if asked."""
    if options.max_loss is not None:
        raise ValueError(
            "--max-loss is an option of search: its bound holds for the masks that a search sees, "
            "and compress prunes with others. Use search --max-loss, then prune --one-shot "
            "--profile with what it found."
        )
    config = _config(options)
    result = compress(
        _model(options),
        options.output,
        config=config,
        quality=options.quality,
        space=space_of(options, config, search_space(config, options.kv_bits, options.quality)),
        trials=options.trials,
        objective=Goal.parse(options.objective).to_json(),
        timeout_seconds=options.timeout,
        calibration=_calibration(options),
        evaluation=_evaluation(options),
        questions=_questions(options),
        storage=options.storage,
        study_name=options.study,
        seed=options.seed,
        sampler=options.sampler,
        overwrite=options.overwrite,
        push_to_hub=options.push_to_hub,
        private=options.private,
        progress=not options.no_progress,
    )
    lines = [text_table(table_rows(result.measurements)), "", f"Saved to {result.output}"]
    if result.search is not None and result.search.baseline is not None:
        lines.insert(
            1,
            f"Search: one-shot {result.search.goal.labels[0]} {result.search.best_value:.3f}, "
            f"uniform {result.search.baseline:.3f}, {len(result.search.history)} trials.",
        )
    if result.commit_url is not None:
        lines.append(f"Pushed: {result.commit_url}")
    return Answer("\n".join(lines), result.to_dict())


def run_prune(options: argparse.Namespace) -> Answer:
    """Prune at uniform ratios, by globs, or by a profile, and save."""
    sparsity = sparsity_globs(options.sparsity)
    kv_cache, weight_bits = None, None
    if options.profile is not None:
        if sparsity is not None:
            raise ValueError("Give --profile or --sparsity, not both.")
        profile = CompressionProfile.load(options.profile)
        sparsity = None if profile.sparsity is None else dict(profile.sparsity.ratios)
        kv_cache, weight_bits = profile.kv_cache, profile.weight_bits
    config = _config(options, sparsity=sparsity, kv_cache=kv_cache, weight_bits=weight_bits)
    if options.offload and options.device_map is not None:
        raise ValueError("Give --offload or --device-map, not both: it computes on the CPU.")
    prune = prune_offloaded if options.offload else prune_to_folder
    result = prune(
        _model(options),
        options.output,
        config,
        calibration=_calibration(options),
        seed=options.seed,
        overwrite=options.overwrite,
        progress=not options.no_progress,
    )
    text = (
        f"Removed {result.report.mean_sparsity:.4%} of the decoder's weights "
        f"({len(result.report.modules)} linears, {config.method}).\n"
        f"Weights on disk: {format_bytes(result.weight_bytes)}, dense "
        f"{format_bytes(result.dense_bytes)}.\nSaved to {result.output}"
    )
    return Answer(text, result.to_dict())


def run_search(options: argparse.Namespace) -> Answer:
    """Search a profile and write it."""
    target = 0.5 if options.target_sparsity is None else options.target_sparsity
    config = SparsityConfig(target_sparsity=target, metric=options.metric)
    space = space_of(options, config, search_space(config, options.kv_bits))
    if options.max_loss is not None:
        return _run_within(options, space)
    settings: SearchSettings = {
        "study_name": options.study,
        "metric": options.metric,
        "trials": options.trials,
        "objective": Goal.parse(options.objective).to_json(),
        "timeout_seconds": options.timeout,
        "calibration": _calibration(options),
        "evaluation": _evaluation(options),
        "seed": options.seed,
        "sampler": options.sampler,
        "workers": options.workers,
        "progress": not options.no_progress,
    }
    if options.output is not None:
        result = search_to_folder(
            _model(options),
            options.output,
            space,
            storage=options.storage,
            overwrite=options.overwrite,
            **settings,
        )
        where = f"Profile written to {os.path.join(options.output, 'profile.json')}"
    elif options.storage is not None:
        result = search_study(_model(options), space, storage=options.storage, **settings)
        where = f"Study {result.study.study_name!r}; --output DIR writes its profile to a folder."
    else:
        raise ValueError("Give --output DIR, or --storage for a study, or both; got neither.")
    uniform = "failed" if result.baseline is None else f"{result.baseline:.3f}"
    text = (
        f"Best {result.goal.labels[0]} {result.best_value:.3f} (one-shot masks; uniform: "
        f"{uniform}) in {len(result.history)} trials.\n{where}"
    )
    if result.goal.is_front:
        front = [{"trial": point.trial, **point.values} for point in result.pareto]
        text += "\n\n" + text_table(front)
    return Answer(text, result.to_dict())


def _run_within(options: argparse.Namespace, space: SearchSpace) -> Answer:
    if options.output is None:
        raise ValueError("--max-loss needs --output DIR: the profile found is written there.")
    if options.workers != 1:
        raise ValueError(f"--max-loss searches with one worker, got --workers {options.workers}.")
    found = search_within_to_folder(
        _model(options),
        options.output,
        space,
        max_loss=options.max_loss,
        metric=options.metric,
        trials=options.trials,
        calibration=_calibration(options),
        evaluation=_evaluation(options),
        storage=options.storage,
        study_name=options.study,
        seed=options.seed,
        sampler=options.sampler,
        overwrite=options.overwrite,
        progress=not options.no_progress,
    )
    rows = [
        {
            "budget": budget_text(budget, found.unit),
            "perplexity, evaluation data": "failed" if math.isinf(loss) else f"{loss:+.3%}",
        }
        for budget, loss in sorted(found.tried.items())
    ]
    where = f"Profile written to {os.path.join(options.output, 'profile.json')}"
    if space.prunes:
        where += (
            f"\nThe bound is that of one-shot masks: prune MODEL --one-shot --metric "
            f"{options.metric} --profile {os.path.join(options.output, 'profile.json')}"
        )
    return Answer(f"{found}\n\n{text_table(rows)}\n\n{where}", found.to_dict())


def run_report(options: argparse.Namespace) -> Answer:
    """Write a study's report."""
    facts = read_study(options.source, options.study)
    page = write_study_report(facts, options.output)
    best = None if facts.best is None else facts.best["value"]
    signs = failure_signs(facts)
    data = {
        "page": str(page),
        "study_name": facts.name,
        "trials": len(facts.rows),
        "objective": list(facts.labels),
        "best_value": best,
        "uniform_value": None if facts.uniform is None else facts.uniform["value"],
        "held_out": None if facts.held_out is None else dict(facts.held_out),
        "warnings": signs,
    }
    return Answer("\n".join([f"Report: {page}", *signs]), data)


def run_evaluate(options: argparse.Namespace) -> Answer:
    """Measure a model, by benchmarks if any are named."""
    if options.tasks is not None:
        return _run_tasks(options)
    for option in ("task_data", "task_samples", "results"):
        if getattr(options, option):
            raise ValueError(f"--{option.replace('_', '-')} needs --tasks.")
    row = evaluate(
        _model(options),
        evaluation=_evaluation(options),
        questions=_questions(options),
        kv_cache=_kv_choice(options.kv_bits),
        progress=not options.no_progress,
    )
    return Answer(text_table(table_rows([row])), row.to_dict())


def _run_tasks(options: argparse.Namespace) -> Answer:
    found = evaluate_tasks(
        _model(options),
        options.tasks.split(","),
        data=task_data(options.task_data),
        setting=Setting(
            kv_cache=_kv_choice(options.kv_bits), sequence_length=options.sequence_length
        ),
        batch_size=options.task_batch_size,
        num_samples=options.task_samples,
        results=options.results,
        progress=not options.no_progress,
    )
    data = {"tasks": [result.to_dict() for result in found]}
    return Answer(text_table(task_rows(found)), data)


def run_inspect(options: argparse.Namespace) -> Answer:
    """Describe a checkpoint from its config and headers."""
    found = inspect(options.model, revision=options.revision)
    return Answer(str(found), found.to_dict())


def run_push(options: argparse.Namespace) -> Answer:
    """Push a folder."""
    url = push_folder(
        options.folder,
        options.repo,
        private=options.private,
        revision=options.revision,
        commit_message=options.message,
    )
    return Answer(f"Pushed: {url}", {"commit_url": url})


def run_env(_options: argparse.Namespace) -> Answer:
    """Say what is installed and which code path does the work."""
    versions = library_versions()
    for name in DEPENDENCIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    devices += [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    kernels = {"KV cache, CPU": describe_kernels(), "sparse weights": ", ".join(RUNTIMES)}
    if torch.cuda.is_available():
        kernels["KV cache, GPU"] = "Triton" if triton_attention.is_available() else "torch"
    data = {
        "platform": platform.platform(),
        "versions": versions,
        "devices": devices,
        "kernels": kernels,
    }
    rows = [("platform", data["platform"]), *versions.items()]
    rows += [("device", device) for device in devices]
    rows += [(f"kernels: {part}", path) for part, path in kernels.items()]
    width = max(len(name) for name, _ in rows)
    return Answer("\n".join(f"{name:<{width}}  {value}" for name, value in rows), data)


def sparsity_globs(pairs: list[str]) -> dict[str, float] | None:
    """Parse ``GLOB=RATIO`` pairs.

    Raises:
        ValueError: If a pair is not of that form.
    """
    ratios = {}
    for pair in pairs:
        glob, separator, ratio = pair.rpartition("=")
        try:
            ratios[glob] = float(ratio)
        except ValueError:
            separator = ""
        if not separator or not glob:
            raise ValueError(f"--sparsity must be GLOB=RATIO, such as '*.mlp.*=0.6', got {pair!r}.")
    return ratios or None


def task_data(pairs: list[str]) -> dict[str, str]:
    """Parse ``TASK=DATA`` pairs.

    Raises:
        ValueError: If a pair is not of that form.
    """
    split = [pair.partition("=") for pair in pairs]
    for pair, (task, _, source) in zip(pairs, split, strict=True):
        if not task or not source:
            raise ValueError(
                f"--task-data must be TASK=DATA, such as vqav2=questions.parquet, got {pair!r}."
            )
    return {task: source for task, _, source in split}


def _model(options: argparse.Namespace) -> ModelSource:
    return ModelSource(options.model, options.revision, options.dtype, options.device_map)


def _calibration(options: argparse.Namespace) -> DataSource:
    return DataSource(
        options.calibration,
        options.calibration_samples,
        options.sequence_length,
        options.batch_size,
        options.seed,
    )


def _evaluation(options: argparse.Namespace) -> DataSource:
    return DataSource(
        options.evaluation,
        options.evaluation_samples,
        options.sequence_length,
        options.batch_size,
    )


def _questions(options: argparse.Namespace) -> DataSource | None:
    if options.questions is None:
        return None
    return replace(_evaluation(options), source=options.questions)


def _config(
    options: argparse.Namespace,
    sparsity: dict[str, float] | None = None,
    kv_cache: KVCacheConfig | None = None,
    weight_bits: Mapping[str, int] | None = None,
) -> SparsityConfig:
    fields: dict[str, Any] = {}
    wanted = options.weight_bits if options.weight_bits is not None else weight_bits
    if wanted is not None:
        fields |= {"weight_bits": wanted, "weight_group_size": options.weight_group_size}
    if options.target_sparsity is not None:
        fields["target_sparsity"] = options.target_sparsity
    if options.metric is not None:
        fields["metric"] = options.metric
    if options.weight_update is not None:
        fields["weight_update"] = options.weight_update
    return SparsityConfig(
        pattern=options.pattern,
        sparsity=sparsity,
        kv_cache=kv_cache,
        calibration=CalibrationConfig(sequential=not options.one_shot, seed=options.seed),
        checkpoint_format=options.checkpoint_format,
        **fields,
    )


def _kv_choice(bits: tuple[int, ...] | None) -> KVCacheChoice:
    if bits is None:
        return False
    if bits == OWN_PROFILE:
        return None
    return KVCacheConfig(bits=bits[0] if len(bits) == 1 else bits)
