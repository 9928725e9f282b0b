"""What every evaluation needs around a forward: device, dtype, eval mode, and which cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    PretrainedConfig,
    PreTrainedModel,
)

from hf_adaptive_sparse.calibration.forward import evaluation_mode
from hf_adaptive_sparse.calibration.token_ids import check_token_ids
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.carrying import carried_profile
from hf_adaptive_sparse.kvcache.generation import AdaptiveEncoderDecoderCache
from hf_adaptive_sparse.profiles import KVCacheConfig

KVCacheChoice = KVCacheConfig | bool | None
"""``None``: the KV profile of the model's own config, if any. ``False``: none. Else that one;
``True`` is refused, as it names none."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, without gradients; restore each module's mode afterwards."""
    with evaluation_mode(model), torch.no_grad():
        yield


def resolve_kv_cache(config: PretrainedConfig, kv_cache: KVCacheChoice) -> KVCacheConfig | None:
    """Return the KV profile to evaluate with, ``None`` for an unquantised cache.

    Raises:
        TypeError: If ``kv_cache`` is neither ``None``, ``False`` nor a `KVCacheConfig`.
    """
    if kv_cache is None:
        return carried_profile(config)
    if kv_cache is False:
        return None
    if isinstance(kv_cache, KVCacheConfig):
        return kv_cache
    raise TypeError(
        "kv_cache must be None (the model's own profile), False (none) or a KVCacheConfig, got "
        f"{kv_cache!r}."
    )


def new_cache(model: PreTrainedModel, kv_cache: KVCacheChoice) -> Cache | None:
    """Return a fresh adaptive cache for one batch, or ``None`` where no profile applies."""
    config = resolve_kv_cache(model.config, kv_cache)
    if config is None:
        return None
    cache = AdaptiveQuantizedCache(model.config, config)
    if model.config.is_encoder_decoder:
        return AdaptiveEncoderDecoderCache(cache, DynamicCache())
    return cache


def plain_cache(model: PreTrainedModel) -> Cache:
    """Return a fresh cache that quantises nothing, as transformers makes it."""
    cache = DynamicCache(config=model.config)
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(cache, DynamicCache())
    return cache


def to_model(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Move a batch to where the model takes its inputs; floating tensors get the model's dtype.

    Raises:
        DataError: If ids lie beyond the model's vocabulary.
    """
    check_token_ids(batch, model)
    device = model.device
    if device.type == "meta":  # offloaded weights: accelerate's hooks move the inputs on
        device = torch.device("cpu")
    moved = {}
    for key, value in batch.items():
        dtype = model.dtype if value.is_floating_point() else value.dtype
        moved[key] = value.to(device=device, dtype=dtype)
    return moved
