"""Turn a command's options into model, data, search plan and config."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.compressor import DataSource, ModelSource, SearchPlan
from hf_adaptive_sparse.profiles import LOSSLESS_BITS, CalibrationConfig, KVCacheConfig
from hf_adaptive_sparse.search.objectives import Goal
from hf_adaptive_sparse.search.space import SearchSpace


def model_of(options: argparse.Namespace) -> ModelSource:
    """Return the model of `options.add_model`."""
    return ModelSource(options.model, options.revision, options.dtype, options.device_map)


def calibration_of(options: argparse.Namespace) -> DataSource:
    """Return the data of `options.add_calibration` and `options.add_batches`."""
    return DataSource(
        options.calibration,
        options.calibration_samples,
        options.sequence_length,
        options.batch_size,
        options.seed,
    )


def evaluation_of(options: argparse.Namespace) -> DataSource:
    """Return the data of `options.add_evaluation` and `options.add_batches`."""
    return DataSource(
        options.evaluation,
        options.evaluation_samples,
        options.sequence_length,
        options.batch_size,
    )


def questions_of(options: argparse.Namespace) -> DataSource | None:
    """Return the data of `options.add_questions`; ``None`` where there are none."""
    if options.questions is None:
        return None
    return replace(evaluation_of(options), source=options.questions)


def kv_config(
    bits: tuple[int, ...] | None, profile: KVCacheConfig | None = None
) -> KVCacheConfig | None:
    """Return the KV profile of `options.add_kv_bits`.

    Args:
        bits: The option's bits; ``None`` leaves the cache alone.
        profile: The profile whose bits are replaced; ``None``: the default one.
    """
    if bits is None:
        return None
    return replace(
        profile or KVCacheConfig(),
        bits=bits[0] if len(bits) == 1 else bits,
        key_bits=None,
        value_bits=None,
    )


def plan_of(options: argparse.Namespace, space: SearchSpace) -> SearchPlan:
    """Return the search of `options.SEARCHED` in a space."""
    return SearchPlan(
        space,
        storage=options.storage,
        study_name=options.study,
        metric=options.metric,
        n_trials=options.trials,
        calibration=calibration_of(options),
        evaluation=evaluation_of(options),
        objective=Goal.parse(options.objective).to_json(),
        timeout_seconds=options.timeout,
        seed=options.seed,
        sampler=options.sampler,
        max_loss=options.max_loss,
    )


def config_of(
    options: argparse.Namespace,
    sparsity: dict[str, float] | None = None,
    kv_cache: KVCacheConfig | None = None,
    weight_bits: Mapping[str, int] | None = None,
    target_sparsity: float | None = None,
) -> SparsityConfig:
    """Return the config of the final prune.

    Args:
        options: Those of `options.add_pruning` and `options.add_final_prune`.
        sparsity: Ratios by module name or glob.
        kv_cache: The KV profile.
        weight_bits: Bits by module name; ``--weight-bits`` overrides them.
        target_sparsity: Mean ratio; ``--target-sparsity`` overrides it.

    Raises:
        ValueError: If a field is invalid, or no weights have groups to which a size applies.
    """
    fields: dict[str, Any] = {}
    wanted = options.weight_bits if options.weight_bits is not None else weight_bits
    _check_group_size(options.weight_group_size, wanted)
    if wanted is not None:
        fields |= {"weight_bits": wanted, "weight_group_size": options.weight_group_size}
    target = options.target_sparsity if options.target_sparsity is not None else target_sparsity
    if target is not None:
        fields["target_sparsity"] = target
    if options.metric is not None:
        fields["metric"] = options.metric
    if options.weight_update is not None:
        fields["weight_update"] = options.weight_update
    return SparsityConfig(
        pattern=options.pattern,
        sparsity=sparsity,
        kv_cache=kv_cache,
        calibration=CalibrationConfig(
            sequential=not options.one_shot,
            seed=options.seed,
            min_expert_tokens=options.min_expert_tokens,
        ),
        checkpoint_format=options.checkpoint_format,
        **fields,
    )


def _check_group_size(size: int | None, bits: int | Mapping[str, int] | None) -> None:
    widths = bits.values() if isinstance(bits, Mapping) else () if bits is None else (bits,)
    if size is not None and set(widths) <= set(LOSSLESS_BITS):
        raise ValueError(
            f"--weight-group-size is for weights of 8 or 4 bits, got {size} and no such weights. "
            "Give --weight-bits 8 or 4, too, or leave it out."
        )
