"""Pruning a model as a config asks, and the explicit config that describes the result."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import Prunable, prunable_weights, rewrites_weights
from hf_adaptive_sparse.calibration.data import Batch, Source, as_batches, configured_batches
from hf_adaptive_sparse.calibration.processors import load_processor
from hf_adaptive_sparse.checkpoint.config import SparsityConfig, our_config
from hf_adaptive_sparse.checkpoint.resolving import (
    per_layer_kv_cache,
    resolve_weight_bits,
    runtime_formats,
)
from hf_adaptive_sparse.naming import public_name
from hf_adaptive_sparse.packing.upper_bytes import UPPER_BYTE_BITS
from hf_adaptive_sparse.packing.weight_codes import CODE_BITS, SCALE_DTYPES
from hf_adaptive_sparse.profiles import (
    LOSSLESS_BITS,
    QUANT_METHOD,
    CalibrationConfig,
    SparsityProfile,
)
from hf_adaptive_sparse.pruning.apply import (
    ModuleReport,
    PruningReport,
    prune_model,
    resolve_ratios,
)
from hf_adaptive_sparse.pruning.layer_quantiser import LayerQuantiser
from hf_adaptive_sparse.runtime.choice import check_multiplies, check_only_read
from hf_adaptive_sparse.version import library_versions

logger = logging.getLogger(__name__)

Calibration = Source | CalibrationConfig
"""Where calibration data come from: a dataset's name, a path, a config, a dataset, or batches."""

LOADING_FIELDS = frozenset({"kv_cache", "runtime"})
"""Fields of a config that say how a compressed checkpoint is loaded, and nothing of its weights."""


def check_before_loading(
    model: PreTrainedModel, config: SparsityConfig, calibration: Calibration = None
) -> dict[str, float]:
    """Check what can be checked of a config before the model has weights.

    Args:
        model: The model, possibly on the meta device.
        config: How it will be pruned.
        calibration: Calibration data; ``None``: what the config names.

    Returns:
        Module name -> ratio, of every prunable linear; empty if nothing is to be pruned.

    Raises:
        ValueError: If a name or glob matches nothing, the list of KV bits has the wrong length,
            weights have no dtype for their bits or runtime, or the metric needs calibration data
            and there are none.
    """
    ratios = asked_ratios(model, config)
    per_layer_kv_cache(model, config)
    _check_dtypes(model, config, ratios, resolve_weight_bits(config, ratios))
    if any(ratios.values()):
        _check_calibration(config, config.calibration if calibration is None else calibration)
    return ratios


def prune_and_resolve(
    model: PreTrainedModel,
    config: SparsityConfig,
    calibration: Calibration = None,
    processor: Any = None,
    *,
    progress: bool = True,
    hub_arguments: Mapping[str, Any] | None = None,
    pruner: Callable[..., PruningReport] = prune_model,
) -> tuple[PruningReport, SparsityConfig]:
    """Prune a model in place.

    Args:
        model: The model, with weights.
        config: How to prune it.
        calibration: Calibration data; ``None``: what the config names.
        processor: Processor or tokenizer for data that are not batches yet; ``None``: the one in
            the model's own repository.
        progress: Show a progress bar.
        hub_arguments: Revision, token and so on for that repository.
        pruner: What prunes, with the arguments of `prune_model`.

    Returns:
        The report, and the config with every ratio, every layer's KV bits, and the provenance.
        Where the config asks nothing of the weights it is the one that the model carries, with
        other KV bits.

    Raises:
        ValueError: If the config does not fit the model, or calibration data are needed and
            missing or unusable.
    """
    ratios = asked_ratios(model, config)
    kv_cache = per_layer_kv_cache(model, config)
    weight_bits = resolve_weight_bits(config, ratios)
    _check_dtypes(model, config, ratios, weight_bits)
    source = config.calibration if calibration is None else calibration
    settings = (config.calibration or CalibrationConfig()).for_source(source)
    removes, hub_arguments = any(ratios.values()), hub_arguments or {}
    batches = None
    if removes and config.needs_calibration:
        _check_calibration(config, source)
        batches = _calibration_batches(model, source, settings, processor, hub_arguments)
    coded = {n: config.format_at(b) for n, b in weight_bits.items() if b not in LOSSLESS_BITS}
    quantiser = LayerQuantiser(model, coded)
    weights = prunable_weights(model, config.modules_to_not_convert) if ratios else {}
    if removes:
        report = pruner(
            model,
            metric=config.metric,
            pattern=config.pattern,
            weight_update=config.weight_update,
            ratios=ratios,
            batches=batches,
            sequential=settings.sequential,
            image_weight=settings.image_weight,
            min_expert_tokens=settings.min_expert_tokens,
            progress=progress,
            on_layer=quantiser.layer_,
        )
    else:
        report = _nothing_removed(weights, config)
    quantiser.rest_()
    provenance = {
        **_provenance(model, config, source, settings, batches, hub_arguments),
        **_without_data(report),
    }
    carried = our_config(model)
    if not ratios and carried is not None and carried.sparsity:
        # The weights stay what they were pruned to, and are to be stored so.
        resolved = copy.deepcopy(carried)
        resolved.kv_cache = kv_cache
        resolved.provenance = {**provenance, **carried.provenance, **config.provenance}
        return report, resolved
    resolved = SparsityConfig(
        target_sparsity=_target(weights, config, ratios),
        metric=config.metric,
        sparsity=ratios,
        pattern=config.pattern,
        kv_cache=kv_cache,
        modules_to_not_convert=config.modules_to_not_convert,
        checkpoint_format=config.checkpoint_format,
        provenance=provenance,
        **_optional_fields(config, weight_bits),
    )
    return report, resolved


def asked_ratios(model: PreTrainedModel, config: SparsityConfig) -> dict[str, float]:
    """Return the ratio of every prunable weight; empty if the config leaves the weights alone.

    Args:
        model: The model, possibly on the meta device.
        config: How it will be pruned.

    Raises:
        ValueError: As `resolve_ratios`.
    """
    if config.target_sparsity == 0.0 and not config.sparsity and not config.quantises_weights:
        return {}
    return resolve_ratios(
        model,
        config.target_sparsity,
        config.sparsity,
        config.modules_to_not_convert,
        config.pattern,
    )


def _check_dtypes(
    model: PreTrainedModel,
    config: SparsityConfig,
    ratios: Mapping[str, float],
    weight_bits: Mapping[str, int],
) -> None:
    """Refuse weights in a dtype that their bits, or the sparse runtime, do not take."""
    weights = prunable_weights(model) if ratios else {}
    dtypes = {name: held.weight.dtype for name, held in weights.items()}
    for name, bits in weight_bits.items():
        dtype = dtypes[name]
        if bits in CODE_BITS and dtype not in SCALE_DTYPES:
            raise ValueError(
                f"weight_bits={bits} quantises float32, bfloat16 or float16; {name!r} is {dtype}. "
                "Load the model with another dtype, or choose weight_bits=16."
            )
        if bits == UPPER_BYTE_BITS and dtype != torch.bfloat16:
            raise ValueError(
                f"weight_bits={UPPER_BYTE_BITS} stores bfloat16 without loss; {name!r} is {dtype}. "
                "Load the model with dtype=torch.bfloat16, or choose weight_bits of 16, 8 or 4."
            )
    if config.runtime == "sparse":
        stored = SparsityConfig(sparsity=ratios, **_optional_fields(config, weight_bits))
        formats = runtime_formats(model, stored)
        for name in formats:
            check_multiplies(dtypes[name])
        check_only_read(bool(formats) and rewrites_weights(model))


def _optional_fields(config: SparsityConfig, weight_bits: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields that a config only carries where they say something."""
    fields: dict[str, Any] = {}
    if weight_bits:
        fields |= {"weight_bits": weight_bits, "weight_group_size": config.weight_group_size}
    if config.weight_update is not None:
        fields["weight_update"] = config.weight_update
    return fields


def _without_data(report: PruningReport) -> dict[str, Any]:
    """Return what the provenance says of experts and linears that calibration did not reach."""
    experts = {name: list(found) for name, found in report.experts_without_data.items()}
    linears = list(report.linears_without_data)
    said = {"experts_without_data": experts, "linears_without_data": linears}
    return {key: found for key, found in said.items() if found}


def _nothing_removed(weights: Mapping[str, Prunable], config: SparsityConfig) -> PruningReport:
    modules = tuple(ModuleReport(n, w.weight.numel(), 0, 0.0) for n, w in weights.items())
    return PruningReport(modules, config.metric, config.pattern, 0.0, config.weight_update)


def _check_calibration(config: SparsityConfig, source: object) -> None:
    if source is None and config.needs_calibration:
        what = f"The metric {config.metric!r}"
        if config.weight_update is not None:
            what = f"weight_update={config.weight_update!r}"
        message = (
            f"{what} needs calibration data, and none were given. Pass "
            "calibration= a dataset's name, a file, batches, or CalibrationConfig() for WikiText-2 "
            "from the Hub; or choose a metric that needs none (magnitude) and no weight update."
        )
        if config.passed and config.passed <= LOADING_FIELDS:
            message += (
                f" {' and '.join(sorted(config.passed))} alone would do for a compressed "
                "checkpoint, but the config of this model has no quantization_config of "
                f"quant_method {QUANT_METHOD!r}, so that it would be pruned; target_sparsity=0 "
                "leaves its weights in."
            )
        raise ValueError(message)


def _calibration_batches(
    model: PreTrainedModel,
    source: Calibration,
    settings: CalibrationConfig,
    processor: Any,
    hub_arguments: Mapping[str, Any],
) -> list[Batch]:
    """Return the batches to calibrate on: those that were given, or those of a dataset."""
    if processor is None and as_batches(source) is None:
        processor = load_processor(model.config.name_or_path, **hub_arguments)
    return configured_batches(source, settings, processor, model.config)


def _target(
    weights: Mapping[str, Prunable], config: SparsityConfig, ratios: Mapping[str, float]
) -> float:
    """Return the target; of a profile, its parameter-weighted mean.

    A profile that was given with a target keeps that if it meets it, up to a weight per module.
    """
    if not config.sparsity:
        return config.target_sparsity
    numel = {name: weight.weight.numel() for name, weight in weights.items()}
    mean = SparsityProfile(ratios).mean(numel)
    off = abs(mean - config.target_sparsity) * sum(numel.values())
    met = "target_sparsity" in config.passed and off <= len(numel)
    return config.target_sparsity if met else mean


def _provenance(
    model: PreTrainedModel,
    config: SparsityConfig,
    source: object,
    settings: CalibrationConfig,
    batches: Sequence[Mapping[str, torch.Tensor]] | None,
    hub_arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what is known of the origin; what the config already says of it stands."""
    calibration: dict[str, Any] | None = None
    if batches is not None:
        calibration = {**settings.to_dict(), "dataset": _published(settings.dataset)}
        if not isinstance(source, str | os.PathLike | CalibrationConfig):
            calibration = {"batches": len(batches), "sequential": settings.sequential}
    earlier = our_config(model)
    known = {} if earlier is None else earlier.provenance
    return {
        "base_model": _published(model.config.name_or_path),
        "revision": hub_arguments.get("revision"),
        **{key: known[key] for key in ("base_model", "revision") if known.get(key)},
        "calibration": calibration,
        "seed": settings.seed,
        "versions": library_versions(),
        **config.provenance,
    }


def _published(name: str | None) -> str | None:
    return public_name(name) if name else None
