"""The config of the final prune, and a trial of it that leaves the model unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import prunable_weights
from hf_adaptive_sparse.checkpoint.applying import prune_and_resolve
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice
from hf_adaptive_sparse.pruning.metrics import get_metric
from hf_adaptive_sparse.pruning.storage import stored_weight
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.space import SearchSpace

RANKING_METRIC = "lognorm"
"""What a search ranks with where the chosen metric changes weights while it prunes."""


def ranking_metric(metric: str) -> str:
    """Return the metric that a search ranks with for a final prune by ``metric``."""
    return RANKING_METRIC if get_metric(metric).updates_weights else metric


def final_config(
    config: SparsityConfig, space: SearchSpace, result: SearchResult | None, *, data: str | None
) -> SparsityConfig:
    """Return the config of the final prune: the caller's, with the profile that was found.

    Where the space leaves the KV cache alone, it keeps the caller's KV profile.

    Args:
        config: What the caller asked for.
        space: The space, which fixes the KV bits where there was nothing to search.
        result: The search, if there was one.
        data: Name of the calibration data, recorded in the checkpoint; ``None``: none were read.
    """
    ratios, kv_cache, target = config.sparsity, config.kv_cache, config.target_sparsity
    weight_bits: int | Mapping[str, int] = config.weight_bits
    provenance = dict(config.provenance)
    if result is not None:
        profile = result.best_profile
        ratios = dict(profile.sparsity.ratios) if profile.sparsity is not None else ratios
        kv_cache = kv_cache if space.kv_bits is None else profile.kv_cache
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
        provenance=provenance if data is None else provenance | {"calibration": data},
    )


@contextlib.contextmanager
def pruned_for_now(
    model: PreTrainedModel,
    config: SparsityConfig,
    batches: Sequence[Mapping[str, torch.Tensor]] | None,
    processor: Any,
) -> Iterator[KVCacheChoice]:
    """Prune a model as `checkpoint.plugin.apply_config` does, and restore it afterwards.

    Args:
        model: The dense model. A copy of its prunable weights is kept in CPU memory.
        config: How to prune.
        batches: Calibration batches.
        processor: As for `apply_config`.

    Yields:
        The KV profile that the model would carry, ``False`` if none.
    """
    with _restored(model):
        _, resolved = prune_and_resolve(model, config, batches, processor, progress=False)
        yield resolved.kv_cache or False


@contextlib.contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    stored = [stored_weight(weight, name) for name, weight in prunable_weights(model).items()]
    kept = [tensor.to("cpu", copy=True) for tensor in stored]
    try:
        yield
    finally:
        for tensor, values in zip(stored, kept, strict=True):
            tensor.copy_(values)
