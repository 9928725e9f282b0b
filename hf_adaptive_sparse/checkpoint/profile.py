"""What a config says of modules and layers, brought to one model: names, and bits per layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import match_names, num_decoder_layers
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


def rename_for_model(model: PreTrainedModel, config: SparsityConfig) -> None:
    """Give a checkpoint's config the module names of the class it is loaded into.

    The names in a checkpoint are those of the class that was saved. A bare decoder, or a causal
    language model made of a vision-language checkpoint, has the same modules under shorter names.

    Args:
        model: The model, possibly on the meta device.
        config: The checkpoint's config; its ``sparsity`` and ``weight_bits`` are renamed.

    Raises:
        CheckpointError: If there is no profile, or a module of it is not in the model.
    """
    if config.sparsity is None:
        raise CheckpointError(
            "The config of a compressed checkpoint must name the pruned modules and their ratios "
            "in 'sparsity'; it does not. Save the model again with save_pretrained."
        )
    linears = storable_linears(model)
    names: dict[str, str] = {}
    for name in config.sparsity:
        local = _local_name(name, linears, model.base_model_prefix)
        if local is None or local in names.values():
            raise CheckpointError(
                f"The checkpoint's sparsity names {name!r}, which is no linear of "
                f"{type(model).__name__}. Names look like: {', '.join(list(linears)[:3])}."
            )
        names[name] = local
    if not isinstance(config.weight_bits, int):
        for name in config.weight_bits:
            if name not in names:
                raise CheckpointError(
                    f"The checkpoint's weight_bits name {name!r}, which its sparsity does not."
                )
        config.weight_bits = {names[name]: bits for name, bits in config.weight_bits.items()}
    config.sparsity = {names[name]: ratio for name, ratio in config.sparsity.items()}


def resolve_weight_bits(config: SparsityConfig, modules: Iterable[str]) -> dict[str, int]:
    """Return the bits of every module whose values are quantised.

    An exact module name wins over a glob or the name of a containing module, and a later entry
    over an earlier one.

    Args:
        config: The config.
        modules: The prunable linears it applies to.

    Returns:
        Module name -> 8 or 4, in the order of ``modules``; a module that is not in it keeps 16.

    Raises:
        ValueError: If a name or glob matches no module.
    """
    names = list(modules)
    if isinstance(config.weight_bits, int):
        bits = dict.fromkeys(names, config.weight_bits)
    else:
        bits, exact = dict.fromkeys(names, 16), {}
        for key, width in config.weight_bits.items():
            if key in bits:
                exact[key] = width
            else:
                bits.update(dict.fromkeys(match_names(key, names, "weight_bits"), width))
        bits |= exact
    return {name: width for name, width in bits.items() if width < 16}


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
