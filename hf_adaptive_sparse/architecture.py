"""Where a model's decoder layers and prunable weights are: the only file that knows model families.

Nearly everything is found by what `transformers` guarantees for every model (``get_decoder()``,
``get_text_config()``, module lists), so that a family needs an entry here only where its config
says something in words of its own.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_adaptive_sparse.experts import ExpertStack, expert_stacks

_Value = TypeVar("_Value")

Prunable = nn.Linear | ExpertStack
"""What is pruned as a whole: a linear's matrix, or one kind of matrix of a layer's experts."""

UNLIMITED_CONTEXT = 2**31 - 1
"""What `context_length` returns for a model whose config names no limit."""

_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index", "media_placeholder_token_id")
_OTHER_TOKEN_FIELDS = ("video_token_id", "video_token_index", "audio_token_id", "audio_token_index")
_KV_HEAD_FIELDS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_WITHOUT_KV = ("linear_attention", "mamba", "conv", "recurrent")
_INTERLEAVED_QKV = ("codegen",)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the decoder layers of the model's language model.

    Args:
        model: A `transformers` model: a causal language model, a vision-language model around
            one, or the bare decoder.

    Returns:
        The runtime name of the list (``"model.language_model.layers"``) and the list itself.

    Raises:
        ValueError: If the model has no language model with a list of decoder layers.
    """
    decoder = _language_decoder(model)
    expected = getattr(_text_config(_config(model)), "num_hidden_layers", None)
    best: tuple[tuple[bool, int], nn.ModuleList] | None = None
    for name, module in decoder.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or _inside_a_list(name):
            continue
        # The length first: Phi-4-multimodal keeps its encoders inside the decoder.
        rank = len(module) == expected, sum(p.numel() for p in module.parameters())
        if best is None or rank > best[0]:
            best = rank, module
    if best is None:
        raise _no_layers(model, f"{type(decoder).__name__} holds no nn.ModuleList of layers")
    layers = best[1]
    names = [name for name, module in model.named_modules() if module is layers]
    if not names:
        raise _no_layers(model, "its decoder is not one of its own modules")
    return names[0], layers


def _language_decoder(model: nn.Module) -> nn.Module:
    decoder = model
    while True:
        get_decoder = getattr(decoder, "get_decoder", None)
        if get_decoder is None:
            raise _no_layers(model, f"{type(decoder).__name__} has no get_decoder()")
        inner = get_decoder()
        if inner is None:
            raise _no_layers(model, f"get_decoder() of {type(decoder).__name__} returned None")
        if inner is decoder or not hasattr(inner, "get_decoder"):
            break
        decoder = inner
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise _no_layers(model, "it has no `transformers` config")
    if getattr(_text_config(config), "vocab_size", None) is None:
        raise _no_layers(model, "its config has no vocab_size, so it holds no language model")
    return inner if isinstance(inner, nn.Module) else decoder


def _no_layers(model: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"The model must have decoder layers of a language model; {type(model).__name__} has none "
        f"that could be found: {why}. Looked for the largest nn.ModuleList in model.get_decoder(). "
        "Load it with AutoModelForCausalLM or AutoModelForImageTextToText."
    )


def _inside_a_list(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def layer_index(name: str, layers_name: str) -> int:
    """Return the decoder layer that a module belongs to.

    Args:
        name: Runtime name of the module, ``"model.layers.3.mlp.up_proj"``.
        layers_name: Name of the list of layers, as `decoder_layers` returns it.

    Raises:
        ValueError: If the module is not inside the list.
    """
    prefix = layers_name + "."
    index = name[len(prefix) :].split(".", 1)[0] if name.startswith(prefix) else ""
    if not index.isdigit():
        raise ValueError(f"{name!r} must be the name of a module inside {layers_name!r}.")
    return int(index)


def linear_role(name: str, layers_name: str) -> str:
    """Return what a linear does in its layer: its name below the layer, without numbers.

    Linears of one role correspond from layer to layer (``"self_attn.q_proj"``), and so do those of
    one layer's experts (``"mlp.experts.up_proj"``).

    Args:
        name: Runtime name of the linear.
        layers_name: Name of the list of layers, as `decoder_layers` returns it.

    Raises:
        ValueError: If the linear is not inside the list.
    """
    layer_index(name, layers_name)
    inner = name[len(layers_name) + 1 :].split(".")[1:]
    return ".".join(part for part in inner if not part.isdigit())


def prunable_weights(
    model: nn.Module, modules_to_not_convert: Iterable[str] | None = ()
) -> dict[str, Prunable]:
    """Return the weights that are counted and pruned, in layer order.

    These are the ``nn.Linear`` inside the decoder layers of the language model, and the 3-D
    parameters that hold the matrices of a layer's experts. Vision tower, projector, embeddings and
    output head lie outside; weights that are shared with another module, or stored in something
    else than floating point of shape (out, in), are left out, and linears with a forward of their
    own.

    Args:
        model: The model.
        modules_to_not_convert: Names or globs of modules to leave alone. A name also stands for
            all that lies below it.

    Returns:
        Runtime name -> linear or stack of experts: a linear by its module's name, a stack by its
        parameter's (``"model.layers.0.mlp.experts.down_proj"``).

    Raises:
        ValueError: If there are no decoder layers, nothing prunable in them, or an exclusion
            matches none of it.
    """
    layers_name, layers = decoder_layers(model)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found: dict[str, Prunable] = {}
    for name, module in layers.named_modules(prefix=layers_name):
        if not isinstance(module, nn.Linear):
            for stack in expert_stacks(module):
                if stack.weight.is_floating_point() and uses[id(stack.weight)] == 1:
                    found[f"{name}.{stack.key}"] = stack
            continue
        # A router that is a linear by descent returns choices: nothing may stand in for it.
        if type(module).forward is not nn.Linear.forward:
            continue
        weight = module.weight
        plain = tuple(weight.shape) == (module.out_features, module.in_features)
        if plain and weight.is_floating_point() and uses[id(weight)] == 1:
            found[name] = module
    if not found:
        raise _nothing_prunable(model, layers_name, layers)
    excluded: set[str] = set()
    for pattern in modules_to_not_convert or ():
        excluded |= set(match_names(pattern, found, "modules_to_not_convert"))
    return {name: module for name, module in found.items() if name not in excluded}


def _nothing_prunable(model: nn.Module, layers_name: str, layers: nn.ModuleList) -> ValueError:
    if any(isinstance(module, Conv1D) for module in layers.modules()):
        return ValueError(
            f"Pruning works on nn.Linear; the decoder layers {layers_name!r} of "
            f"{type(model).__name__} hold their weights in Conv1D instead, transposed (as GPT-2 "
            "does). Only the KV cache can be quantised: target_sparsity=0 with a kv_cache."
        )
    own = {
        type(module).__name__
        for module in layers.modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and any(key == "weight" and p.is_floating_point() for key, p in module.named_parameters())
    }
    if own:
        return ValueError(
            f"Pruning works on nn.Linear with torch's own forward; the linears in {layers_name!r} "
            f"of {type(model).__name__} have another one ({', '.join(sorted(own))}), which the "
            "sparse runtime would not run. Only the KV cache can be quantised: target_sparsity=0 "
            "with a kv_cache."
        )
    return ValueError(
        f"No prunable linears in {layers_name!r} of {type(model).__name__}: its decoder layers "
        "must hold nn.Linear with floating-point weights of their own (already quantised linears "
        "are not supported; weights that the sparse runtime keeps compressed are plain with "
        "runtime='dense')."
    )


def parameter_name(name: str, weight: object) -> str:
    """Return the name of the parameter of the weight called ``name``.

    Args:
        name: The name.
        weight: A linear, or a stack of experts, plain or compressed in memory.
    """
    return f"{name}.weight" if isinstance(weight, nn.Module) else name


def weight_place(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """Return the place of the weight called ``name``, whether it may be pruned or not.

    Args:
        model: The model.
        name: Runtime name of a linear, or of a 3-D parameter.

    Returns:
        The module that owns the parameter, and its name there; ``None`` if there is none.
    """
    owner_name, _, key = name.rpartition(".")
    try:
        owner = model.get_submodule(owner_name)
    except AttributeError:
        return None
    found = getattr(owner, key, None)
    if isinstance(found, nn.Linear):
        return found, "weight"
    return (owner, key) if isinstance(found, torch.Tensor) and found.ndim == 3 else None


def fused_rows(model: nn.Module, name: str) -> tuple[int, ...]:
    """Return the rows of each matrix that one prunable linear stacks along its outputs.

    Query, key and value in one (Phi-3's ``qkv_proj``), gate and up in one (``gate_up_proj``);
    one entry for a linear that is a single matrix. Experts have `ExpertStack.fused_rows`.

    Args:
        model: The model.
        name: Runtime name of the linear.
    """
    module: Any = model.get_submodule(name)
    rows = int(module.weight.shape[0])
    kind = name.rpartition(".")[2]
    if kind == "gate_up_proj" and rows % 2 == 0:
        return rows // 2, rows // 2
    interleaved = getattr(_config(model), "model_type", None) in _INTERLEAVED_QKV
    if kind == "qkv_proj" and not interleaved:
        keys, values = kv_widths(model)[layer_index(name, decoder_layers(model)[0])]
        if keys and rows - keys - values > 0:
            return rows - keys - values, keys, values
    return (rows,)


def match_names(pattern: str, names: Iterable[str], what: str) -> list[str]:
    """Return the ``names`` that a name or glob stands for.

    Args:
        pattern: A module name, the name of a module that contains some of them, or a glob
            (``*`` also crosses dots, as in `fnmatch`).
        names: Known module names.
        what: Where the pattern came from, for the message.

    Raises:
        ValueError: If nothing matches; examples of real names are listed.
    """
    known = list(names)
    matched = [n for n in known if n == pattern or n.startswith(pattern + ".")]
    if not matched:
        matched = [n for n in known if fnmatch.fnmatchcase(n, pattern)]
    if not matched:
        raise ValueError(
            f"{what} must name prunable modules of the model, or be a glob that matches some; "
            f"{pattern!r} matches none. Names look like: {', '.join(known[:4])}."
        )
    return matched


def spread_by_name(
    entries: Mapping[str, _Value], names: Iterable[str], default: _Value, what: str
) -> dict[str, _Value]:
    """Return the value of every name, from entries by name or glob.

    An exact name wins over a glob or the name of a containing module, and among those a later entry
    over an earlier one.

    Args:
        entries: Module name, name of a containing module, or glob -> value.
        names: Known module names.
        default: The value of a name that no entry matches.
        what: Where the entries came from, for the message.

    Returns:
        Name -> value, in the order of ``names``.

    Raises:
        ValueError: As `match_names`.
    """
    values = dict.fromkeys(names, default)
    exact = {name: value for name, value in entries.items() if name in values}
    for pattern, value in entries.items():
        if pattern not in exact:
            values |= dict.fromkeys(match_names(pattern, values, what), value)
    return values | exact


def dense_expert_weights(model: nn.Module) -> list[str]:
    """Return the names of 3-D expert parameters in the decoder layers that stay dense.

    They look like experts, but lie in a way that `expert_stacks` does not know.
    """
    layers_name, layers = decoder_layers(model)
    return [
        f"{name}.{key}"
        for name, module in layers.named_modules(prefix=layers_name)
        if not isinstance(module, _CONVOLUTIONS) and not expert_stacks(module)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.shape[0] > 1 and min(parameter.shape[1:]) > 1
    ]


def _config(model_or_config: nn.Module | PretrainedConfig) -> PretrainedConfig:
    if isinstance(model_or_config, PretrainedConfig):
        return model_or_config
    config = getattr(model_or_config, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise ValueError(
            "A `transformers` model or its config is needed, got "
            f"{type(model_or_config).__name__}, which has no config."
        )
    return config


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    text = config.get_text_config(decoder=True)
    return text if isinstance(text, PretrainedConfig) else config


def num_decoder_layers(model_or_config: nn.Module | PretrainedConfig) -> int:
    """Return the number of decoder layers of the language model.

    Raises:
        ValueError: If the config does not say.
    """
    config = _config(model_or_config)
    layers = getattr(_text_config(config), "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ValueError(f"{type(config).__name__} names no num_hidden_layers.")
    return layers


def kv_widths(model_or_config: nn.Module | PretrainedConfig) -> list[tuple[int, int]]:
    """Return how many elements one token adds to the cache, per decoder layer.

    Returns:
        ``(elements of the keys, elements of the values)`` per layer: ``kv_heads * head_dim``
        each; ``(0, 0)`` for a layer that keeps no keys and values.

    Raises:
        ValueError: If the config does not say.
    """
    config = _config(model_or_config)
    text = _text_config(config)
    layers = num_decoder_layers(config)
    kinds = getattr(text, "layer_types", None)
    own = getattr(text, "per_layer_config", None)  # Gemma 4: heads differ between layers
    return [
        _layer_kv_width(own[index] if own else text, index, kinds[index] if kinds else "")
        for index in range(layers)
    ]


def cross_attention_layers(model_or_config: nn.Module | PretrainedConfig) -> frozenset[int]:
    """Return the decoder layers that attend to images instead of tokens (Mllama).

    Their keys and values are made once per image and read from the cache without an update.
    """
    listed = getattr(_text_config(_config(model_or_config)), "cross_attention_layers", None)
    return frozenset(listed if isinstance(listed, Sequence) else ())


def generating_parts(model: nn.Module) -> list[nn.Module]:
    """Return the models inside ``model`` that it leaves ``generate()`` to (BLIP-2, Kosmos-2)."""
    return [
        module
        for module in model.modules()
        if module is not model and isinstance(module, PreTrainedModel) and module.can_generate()
    ]


def kv_heads(model_or_config: nn.Module | PretrainedConfig, width: int) -> int:
    """Return the heads that a layer's keys, or values, of ``width`` elements per token have.

    1 where the config's head size does not divide the width.
    """
    text = _text_config(_config(model_or_config))
    head_dim = getattr(text, "head_dim", None)
    if not isinstance(head_dim, int):
        head_dim = int(text.hidden_size) // int(text.num_attention_heads)
    return width // head_dim if width % head_dim == 0 else 1


def _layer_kv_width(text: PretrainedConfig, index: int, kind: str) -> tuple[int, int]:
    if kind in _WITHOUT_KV or index in cross_attention_layers(text):
        return 0, 0
    heads = _per_layer(getattr(text, "num_attention_heads", None), index)
    kv_heads = next(
        (_per_layer(v, index) for v in (getattr(text, f, None) for f in _KV_HEAD_FIELDS) if v),
        heads,
    )
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1  # Falcon-7B and GPT-BigCode: one key-value head, whatever num_kv_heads says
    head_dim = _per_layer(getattr(text, "head_dim", None), index)
    if head_dim is None and heads:
        head_dim = int(text.hidden_size) // heads
    if not kv_heads or not head_dim:
        raise ValueError(f"{type(text).__name__} names no attention heads, so no cache width.")
    if getattr(text, "qk_nope_head_dim", None) and getattr(text, "v_head_dim", None):
        # Multi-head latent attention is cached expanded, with keys wider than values.
        key_dim = int(text.qk_nope_head_dim) + int(text.qk_rope_head_dim)
        return kv_heads * key_dim, kv_heads * int(text.v_head_dim)
    return kv_heads * head_dim, kv_heads * head_dim


def _per_layer(value: object, index: int) -> int | None:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[index]
    return value if isinstance(value, int) else None


def context_length(model_or_config: nn.Module | PretrainedConfig) -> int:
    """Return the most tokens the language model takes; `UNLIMITED_CONTEXT` if it names no limit."""
    text = _text_config(_config(model_or_config))
    for field in _CONTEXT_FIELDS:
        value = getattr(text, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return UNLIMITED_CONTEXT


def image_token_id(model_or_config: nn.Module | PretrainedConfig) -> int | None:
    """Return the id that stands for image features in ``input_ids``, if there is one."""
    config = _config(model_or_config)
    for field in _IMAGE_TOKEN_FIELDS:
        value = getattr(config, field, None)
        if isinstance(value, int):
            return value
    return None


def cache_argument(model: nn.Module) -> str:
    """Return the name under which the model's forward takes its cache.

    That is ``"past_key_values"``, and from transformers 5.24 on ``"cache"``.
    """
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def accepts_images(model_or_config: nn.Module | PretrainedConfig) -> bool:
    """Return whether the model's forward takes images beside text."""
    config = _config(model_or_config)
    vision = getattr(config, "vision_config", None)
    return vision is not None or image_token_id(config) is not None


def accepts_audio(model_or_config: nn.Module | PretrainedConfig) -> bool:
    """Return whether the model's forward takes sounds beside text."""
    config = _config(model_or_config)
    fields = ("audio_config", "audio_token_id", "audio_token_index")
    return any(getattr(config, field, None) is not None for field in fields)


def media_token_ids(model_or_config: nn.Module | PretrainedConfig) -> tuple[int, ...]:
    """Return the ids that stand for features of images, videos and sounds in ``input_ids``."""
    config = _config(model_or_config)
    parts = (config, *(getattr(config, f"{part}_config", None) for part in ("vision", "audio")))
    fields = (*_IMAGE_TOKEN_FIELDS, *_OTHER_TOKEN_FIELDS)
    found = (getattr(part, field, None) for part in parts for field in fields)
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int)))
