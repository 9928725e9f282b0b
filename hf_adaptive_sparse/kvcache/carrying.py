"""The KV profile that the config of a model carries, also for the parts that generate for it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PretrainedConfig

from hf_adaptive_sparse.architecture import generating_parts
from hf_adaptive_sparse.profiles import QUANT_METHOD, KVCacheConfig

_WHOLE_CONFIG = "_hf_adaptive_sparse_config"
"""Where a part of a model keeps the config of the whole, which carries the KV profile."""


def carried_profile(config: PretrainedConfig) -> KVCacheConfig | None:
    """Return the KV profile that a model's config carries, or None.

    Args:
        config: The model's own config (of a vision-language model: the whole, not its text part).
            Its ``quantization_config`` may be an object or the dict of a ``config.json``.

    Raises:
        ValueError: If the profile is invalid.
        TypeError: If the profile is of no known type.
    """
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, Mapping):
        method, profile = quantization.get("quant_method"), quantization.get("kv_cache")
    else:
        method = getattr(quantization, "quant_method", None)
        profile = getattr(quantization, "kv_cache", None)
    if getattr(method, "value", method) != QUANT_METHOD or profile is None or profile is False:
        return None
    if isinstance(profile, Mapping):
        return KVCacheConfig.from_dict(profile)
    return check_profile(profile)


def check_profile(profile: object) -> KVCacheConfig:
    """Return ``profile`` if it is one.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(profile, KVCacheConfig):
        raise TypeError(
            "kv_cache must be a KVCacheConfig, for example KVCacheConfig(bits=8), got "
            f"{type(profile).__name__}."
        )
    return profile


def share_profile(model: nn.Module) -> None:
    """Let the parts of a model that generate in its place use the KV profile of its config."""
    for part in generating_parts(model):
        setattr(part, _WHOLE_CONFIG, model.config)


def profile_to_generate_with(model: nn.Module) -> KVCacheConfig | None:
    """Return the profile of a model's own config, else of the model that it is a part of."""
    profile = carried_profile(model.config)
    if profile is None and hasattr(model, _WHOLE_CONFIG):
        profile = carried_profile(getattr(model, _WHOLE_CONFIG))
    return profile
