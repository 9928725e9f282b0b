"""What a config says of modules and layers, brought to one model: names, and bits per layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import num_decoder_layers
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.headers import CheckpointError
from hf_adaptive_sparse.profiles import KVCacheConfig


def storable_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears whose weight belongs to them alone, by runtime name."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    tied: set[str] = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and uses[id(module.weight)] == 1
        and f"{name}.weight" not in tied
    }


def profile_for_model(model: PreTrainedModel, config: SparsityConfig) -> dict[str, float]:
    """Return a checkpoint's sparsity profile under the names of the class it is loaded into.

    The names in a checkpoint are those of the class that was saved. A bare decoder, or a causal
    language model made of a vision-language checkpoint, has the same modules under shorter names.

    Raises:
        CheckpointError: If there is no profile, or a module of it is not in the model.
    """
    if config.sparsity is None:
        raise CheckpointError(
            "The config of a compressed checkpoint must name the pruned modules and their ratios "
            "in 'sparsity'; it does not. Save the model again with save_pretrained."
        )
    linears = storable_linears(model)
    profile = {}
    for name, ratio in config.sparsity.items():
        local = _local_name(name, linears, model.base_model_prefix)
        if local is None or local in profile:
            raise CheckpointError(
                f"The checkpoint's sparsity names {name!r}, which is no linear of "
                f"{type(model).__name__}. Names look like: {', '.join(list(linears)[:3])}."
            )
        profile[local] = ratio
    return profile


def _local_name(name: str, linears: dict[str, nn.Linear], prefix: str) -> str | None:
    if name in linears:
        return name
    parts = name.split(".")
    for start in range(len(parts)):
        tail = ".".join(parts[start:])
        for candidate in (tail, f"{prefix}.{tail}"):
            if candidate in linears:
                return candidate
    return None


def per_layer_kv_cache(model: PreTrainedModel, config: SparsityConfig) -> KVCacheConfig | None:
    """Return the config's KV profile with one number of bits per decoder layer.

    Raises:
        ValueError: If a list of bits has another length than the model has layers.
    """
    kv_cache = config.kv_cache
    if not isinstance(kv_cache, KVCacheConfig):
        return None
    keys, values = zip(*kv_cache.layer_bits(num_decoder_layers(model.config)), strict=True)
    return replace(kv_cache, key_bits=keys, value_bits=values)
