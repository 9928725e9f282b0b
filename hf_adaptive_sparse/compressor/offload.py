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
from hf_adaptive_sparse.checkpoint.offloaded import OffloadedLayers
from hf_adaptive_sparse.checkpoint.plugin import attach
from hf_adaptive_sparse.checkpoint.resolving import parameter_formats, resolve_weight_bits
from hf_adaptive_sparse.checkpoint.weight_files import WeightFiles
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.compressor.saving import save_processor
from hf_adaptive_sparse.evaluation.digests import batches_digest
from hf_adaptive_sparse.packing.stored_weight import ValueFormat
from hf_adaptive_sparse.pruning.apply import prune_model
from hf_adaptive_sparse.pruning.experts import experts_without_data
from hf_adaptive_sparse.pruning.report import ModuleReport, PruningReport
from hf_adaptive_sparse.pruning.unreached import linears_without_data
from hf_adaptive_sparse.version import library_versions


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
        ValueError: If the config does not fit the model.
        OutputError: If a file cannot be written, for example because the disk is full.
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
    save_processor(processor, folder)
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
        experts_without_data=experts_without_data(layers.without_data),
        linears_without_data=linears_without_data(layers.without_data),
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
