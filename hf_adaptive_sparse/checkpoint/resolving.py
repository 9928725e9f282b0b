"""A config resolved against a model: module names, value formats, and KV bits per layer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile

from torch import nn
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import (
    match_names,
    num_decoder_layers,
    prunable_weights,
    spread_by_name,
    stack_names,
)
from hf_adaptive_sparse.checkpoint.config import SparsityConfig, our_config
from hf_adaptive_sparse.checkpoint.headers import CheckpointError
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.generation import check_takes_profile
from hf_adaptive_sparse.packing.stored_weight import ValueFormat
from hf_adaptive_sparse.profiles import KVCacheConfig
from hf_adaptive_sparse.runtime.sparse_experts import compressible_stacks, sparse_stacks

logger = logging.getLogger(__name__)


def storable_weights(model: nn.Module) -> dict[str, str]:
    """Return the weights that can be stored compressed, which belong to one module alone.

    Returns:
        Runtime name of a linear -> that of its parameter; name of a stack of experts -> the same.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, parameters.values()))
    tied: set[str] = set(getattr(model, "all_tied_weights_keys", None) or ())
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = f"{name}.weight"
    found |= {key: key for key, parameter in parameters.items() if parameter.ndim == 3}
    found |= {key: key for key in sparse_stacks(model)}
    return {
        name: key
        for name, key in found.items()
        if key not in tied and (key not in parameters or uses[id(parameters[key])] == 1)
    }


def parameter_formats(model: nn.Module, config: SparsityConfig) -> dict[str, ValueFormat]:
    """Return the value formats of a config by the names of a model's parameters."""
    formats = config.value_formats
    stacks = set(stack_names(model, formats))
    return {n if n in stacks else f"{n}.weight": form for n, form in formats.items()}


def runtime_formats(model: nn.Module, config: SparsityConfig) -> dict[str, ValueFormat]:
    """Return the value formats of what the sparse runtime keeps compressed.

    That is linears, by the names of the modules, and the stacks of experts that it can, by theirs.
    """
    formats = config.value_formats
    stacks = stack_names(model, formats)
    dense = set(stacks) - compressible_stacks(model, stacks).keys() - sparse_stacks(model).keys()
    return {name: form for name, form in formats.items() if name not in dense}


def rename_for_model(model: PreTrainedModel, config: SparsityConfig) -> None:
    """Give a checkpoint's config the module names of the class it is loaded into.

    The names in a checkpoint are those of the class that was saved. A bare decoder, or a causal
    language model made of a vision-language checkpoint, has the same modules under shorter names.

    Args:
        model: The model, possibly on the meta device.
        config: The checkpoint's config; its ``sparsity``, ``weight_bits`` and
            ``modules_to_not_convert`` are renamed.

    Raises:
        CheckpointError: If there is no profile, or a module of it is not in the model.
    """
    if config.sparsity is None:
        raise CheckpointError(
            "The config of a compressed checkpoint must name the pruned modules and their ratios "
            "in 'sparsity'; it does not. Save the model again with save_pretrained."
        )
    weights = storable_weights(model)
    names: dict[str, str] = {}
    for name in config.sparsity:
        local = _local_name(name, weights, model.base_model_prefix)
        if local is None or local in names.values():
            raise CheckpointError(
                f"The checkpoint's sparsity names {name!r}, which is no linear of "
                f"{type(model).__name__}. {_way_out(model, weights)}"
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
    if config.modules_to_not_convert:
        config.modules_to_not_convert = _local_patterns(
            config.modules_to_not_convert, names, list(prunable_weights(model))
        )


def _way_out(model: PreTrainedModel, weights: Collection[str]) -> str:
    """Say what may be wrong with names that a model does not have."""
    part = model.config.get_text_config(decoder=True)
    if part is not model.config and our_config(part) is not None:
        return (
            "Its config.json has them in that of a part, as where has.prune was given the language "
            "model alone and the whole was saved, with plain weights: remove 'quantization_config' "
            "from the part's config to load it. A model that is pruned as a whole is saved "
            "compressed."
        )
    return f"Names look like: {', '.join(list(weights)[:3])}."


def resolve_weight_bits(config: SparsityConfig, modules: Iterable[str]) -> dict[str, int]:
    """Return the bits of every module whose values take fewer than 16, as `spread_by_name` has it.

    Args:
        config: The config.
        modules: The prunable linears it applies to.

    Returns:
        Module name -> 12, 8 or 4, in the order of ``modules``; a module that is not in it keeps 16.

    Raises:
        ValueError: If a name or glob matches no module.
    """
    if isinstance(config.weight_bits, int):
        bits = dict.fromkeys(modules, config.weight_bits)
    else:
        bits = spread_by_name(config.weight_bits, modules, 16, "weight_bits")
    return {name: width for name, width in bits.items() if width < 16}


def _local_name(name: str, weights: Collection[str], prefix: str) -> str | None:
    if name in weights:
        return name
    parts = name.split(".")
    for start in range(len(parts)):
        tail = ".".join(parts[start:])
        for candidate in (tail, f"{prefix}.{tail}"):
            if candidate in weights:
                return candidate
    return None


def _local_patterns(
    patterns: Iterable[str], names: Mapping[str, str], weights: Collection[str]
) -> list[str]:
    """Translate patterns for the class that was saved into patterns for the model.

    A pattern that does already stays; others become the names they stand for, if there are any.

    Args:
        patterns: Names or globs of the class that was saved.
        names: Name in that class -> name in the model, of some modules.
        weights: The model's prunable weights.
    """
    saved_prefix, prefix = _differing_starts(*next(iter(names.items()), ("", "")))
    locals_ = {saved_prefix + n.removeprefix(prefix): n for n in weights if n.startswith(prefix)}
    found: list[str] = []
    for pattern in patterns:
        meant = [locals_[name] for name in _matches(pattern, locals_)]
        found += [pattern] if meant and _matches(pattern, weights) == meant else meant
    return found


def _differing_starts(first: str, second: str) -> tuple[str, str]:
    """Return what stands before the modules that two dotted names end with alike."""
    parts = zip(reversed(first.split(".")), reversed(second.split(".")), strict=False)
    shared = list(takewhile(lambda pair: pair[0] == pair[1], parts))
    tail = ".".join(part for part, _ in reversed(shared))
    return first.removesuffix(tail), second.removesuffix(tail)


def _matches(pattern: str, names: Iterable[str]) -> list[str]:
    with suppress(ValueError):
        return match_names(pattern, names, "modules_to_not_convert")
    return []


def per_layer_kv_cache(model: PreTrainedModel, config: SparsityConfig) -> KVCacheConfig | None:
    """Return the config's KV profile with one number of bits per decoder layer.

    Raises:
        ValueError: If a list of bits has another length than the model has layers, or the model
            makes a cache of its own kind.
    """
    kv_cache = config.kv_profile
    if kv_cache is None:
        return None
    check_takes_profile(model)
    keys, values = zip(*kv_cache.layer_bits(num_decoder_layers(model.config)), strict=True)
    resolved = replace(kv_cache, key_bits=keys, value_bits=values)
    if not AdaptiveQuantizedCache(model.config, resolved).quantizes:
        logger.warning(
            "The KV profile has no effect on %s: nothing that its layers keep is quantised. "
            "Leave kv_cache out.",
            type(model).__name__,
        )
    return resolved
