"""Prune a model that is larger than the memory: one decoder layer at a time, from disk to disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import (
    decoder_layers,
    layer_index,
    prunable_weights,
)
from hf_adaptive_sparse.calibration.data import Batch
from hf_adaptive_sparse.checkpoint.applying import asked_ratios, prune_and_resolve
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.loading import attach
from hf_adaptive_sparse.checkpoint.offloaded import STATE_NAME, OffloadedLayers
from hf_adaptive_sparse.checkpoint.profile import parameter_formats, resolve_weight_bits
from hf_adaptive_sparse.checkpoint.weight_files import WeightFiles
from hf_adaptive_sparse.compressor.checks import on_cpu
from hf_adaptive_sparse.compressor.jobs import PrunedFolder
from hf_adaptive_sparse.compressor.saving import Recipe, library_versions, save_report
from hf_adaptive_sparse.compressor.sources import DataSource, ModelSource, parameter_bytes
from hf_adaptive_sparse.evaluation.digests import batches_digest
from hf_adaptive_sparse.evaluation.resources import weight_bytes_on_disk
from hf_adaptive_sparse.packing.stored_weight import ValueFormat
from hf_adaptive_sparse.pruning.apply import prune_model
from hf_adaptive_sparse.pruning.experts import experts_without_data
from hf_adaptive_sparse.pruning.report import ModuleReport, PruningReport
from hf_adaptive_sparse.staging import check_output, resumable_folder


def prune_offloaded(
    model: ModelSource,
    output: str | os.PathLike[str],
    config: SparsityConfig,
    *,
    calibration: DataSource | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> PrunedFolder:
    """Prune a dense checkpoint into ``output`` with one decoder layer in memory at a time.

    The result is that of `prune_to_folder`, bit for bit, in shards of one layer each. An
    interrupted run leaves its finished layers in a partial folder beside ``output``; the same call
    goes on with the layer it had reached. Only models are off by a rounding whose decoder is given
    further visual features between layers (Qwen3-VL).

    Arguments, result and errors are those of `prune_to_folder`; besides:

    Raises:
        ValueError: If the model has a ``device_map``.
        CheckpointError: If the checkpoint has no safetensors files, or transformers makes
            weights of it, other than experts, by a conversion.
    """
    target = Path(output)
    check_output(target, overwrite=overwrite)
    model = on_cpu(model)
    empty = model.load_empty()
    files = weight_files(model, empty)
    processor = model.load_processor()
    data = calibration or DataSource()
    batches = None
    if config.removes_weights and config.needs_calibration:
        batches = data.batches(processor, empty.config, "train")
    with resumable_folder(target, (STATE_NAME,), overwrite=overwrite) as folder:
        report = prune_into(
            folder, files, empty, config, batches, processor=processor, progress=progress
        )
        recipe = Recipe(str(model.name), None if batches is None else data.label, None, seed)
        save_report(folder, empty, report, recipe, processor=processor)
        weight_bytes = weight_bytes_on_disk(folder)
    return PrunedFolder(target, report, parameter_bytes(empty), weight_bytes)


def prune_into(
    folder: Path,
    files: WeightFiles,
    empty: PreTrainedModel,
    config: SparsityConfig,
    batches: list[Batch] | None,
    *,
    processor: Any = None,
    progress: bool = True,
) -> PruningReport:
    """Prune a dense checkpoint into a folder that may hold an interrupted run of the same.

    Args:
        folder: Where weights, configs and processor go.
        files: The dense checkpoint, from `weight_files`.
        empty: The model, from `ModelSource.load_empty`; afterwards it carries the resolved config.
        config: How to prune.
        batches: Calibration batches, if it needs any.
        processor: The processor, or ``None``.
        progress: Show a progress bar on stderr.

    Raises:
        ValueError: As `prune_offloaded`.
    """
    ratios = asked_ratios(empty, config)
    layers = OffloadedLayers(
        empty,
        files,
        folder,
        _formats(empty, config, ratios),
        _fingerprint(empty, config, files, batches),
        sequential=config.calibration is None or config.calibration.sequential,
    )

    def prune(whole: PreTrainedModel, **settings: Any) -> PruningReport:
        return _prune_rest(whole, layers, **settings)

    report, resolved = prune_and_resolve(
        empty, config, batches, processor, progress=progress, pruner=prune
    )
    layers.finish()
    attach(empty, resolved)
    _save_configs(empty, folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return report


def _prune_rest(
    model: PreTrainedModel,
    layers: OffloadedLayers,
    *,
    ratios: Mapping[str, float],
    **settings: Any,  # those of prune_model
) -> PruningReport:
    """Prune the layers that are not done, and report on all."""
    layers_name, _ = decoder_layers(model)
    rest = {n: r for n, r in ratios.items() if layer_index(n, layers_name) not in layers.done}
    report = prune_model(model, ratios=rest, residence=layers, **settings)
    weights = prunable_weights(model)
    modules = (
        ModuleReport(name, weights[name].weight.numel(), layers.removed.get(name, 0), ratio)
        for name, ratio in ratios.items()
    )
    return replace(
        report,
        modules=tuple(modules),
        experts_without_data=experts_without_data(layers.without_data, warn=False),
    )


def weight_files(model: ModelSource, empty: PreTrainedModel) -> WeightFiles:
    """Return the files of a dense checkpoint; what is on the Hub is downloaded.

    Args:
        model: The dense model.
        empty: The same, from `ModelSource.load_empty`.

    Raises:
        CheckpointError: If it has no safetensors files, or transformers makes weights of it,
            other than experts, by a conversion.
    """
    name, revision = os.fspath(model.name), model.revision
    if Path(name).is_dir():
        return WeightFiles(empty, Path(name))
    wanted = ["*.json", "*.safetensors"]
    return WeightFiles(
        empty, Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    )


def _formats(
    model: PreTrainedModel, config: SparsityConfig, ratios: Mapping[str, float]
) -> dict[str, ValueFormat]:
    """Return how weights are stored, by the config that the result will carry."""
    bits = resolve_weight_bits(config, ratios)
    coded: dict[str, Any] = {}
    if bits:
        coded = {"weight_bits": bits, "weight_group_size": config.weight_group_size}
    carried = SparsityConfig(sparsity=ratios, checkpoint_format=config.checkpoint_format, **coded)
    return parameter_formats(model, carried)


def _save_configs(model: PreTrainedModel, folder: Path) -> None:
    # As in save_pretrained.
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _fingerprint(
    model: PreTrainedModel,
    config: SparsityConfig,
    files: WeightFiles,
    batches: list[Batch] | None,
) -> dict[str, Any]:
    """Return what makes a run the same as an earlier one that was interrupted."""
    return {
        "config": config.to_dict(),
        "dtype": str(model.config.dtype),
        "weights": files.digest(),
        "calibration": batches_digest(batches or ()),
        "versions": library_versions(),
    }
