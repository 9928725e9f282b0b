"""Where a model's decoder layers are, found by what transformers guarantees for every model."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_adaptive_sparse.architecture.config_facts import config_of, text_config


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the decoder layers of the model's language model.

    Args:
        model: A `transformers` model: a causal language model, a vision-language model around
            one, or the bare decoder.

    Returns:
        The runtime name of the list (``"model.language_model.layers"``) and the list itself.

    Raises:
        ValueError: If the model has no language model with a list of decoder layers, or no forward
            pass.
    """
    if type(model).forward is nn.Module.forward:
        parts = ", ".join(type(part).__name__ for part in generating_parts(model))
        raise ValueError(
            f"The model must have a forward pass; {type(model).__name__} only leads its parts "
            f"({parts}). Load the part that reads text, with its own class."
        )
    decoder = _language_decoder(model)
    config = text_config(config_of(model))
    expected = getattr(config, "num_hidden_layers", None)
    kinds: dict[str, type] = {}
    best: tuple[tuple[bool, bool, int], nn.ModuleList] | None = None
    for name, module in decoder.named_modules():
        kinds[name] = _config_type(module) or kinds.get(name.rpartition(".")[0], type(config))
        if not isinstance(module, nn.ModuleList) or not len(module) or _inside_a_list(name):
            continue
        # Size comes last: Phi-4-multimodal and GIT keep encoders inside the decoder, and
        # Qwen2.5-Omni's get_decoder() is the whole model, which speaks, too.
        rank = (
            kinds[name] is type(config),
            len(module) == expected,
            sum(p.numel() for p in module.parameters()),
        )
        if best is None or rank > best[0]:
            best = rank, module
    if best is None:
        raise _no_layers(model, f"{type(decoder).__name__} holds no nn.ModuleList of layers")
    layers = best[1]
    names = [name for name, module in model.named_modules() if module is layers]
    if not names:
        raise _no_layers(model, "its decoder is not one of its own modules")
    return names[0], layers


def _config_type(module: nn.Module) -> type | None:
    """Return the kind of config that a model inside the model was made from."""
    return type(module.config) if isinstance(module, PreTrainedModel) else None


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
    if getattr(text_config(config), "vocab_size", None) is None:
        raise _no_layers(model, "its config has no vocab_size, so it holds no language model")
    found = inner if isinstance(inner, nn.Module) else decoder
    if not any(isinstance(module, nn.ModuleList) for module in found.modules()):
        # ModernBertDecoder's output head is called "decoder", and get_decoder() goes by that.
        return getattr(model, "base_model", model)
    return found


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


def layer_of(name: str) -> tuple[str, int] | None:
    """Return ``(stack, position)`` of a module, as in ``("model.layers", 3)``.

    The first numeric part of the name is the position: experts inside a layer count as the layer.
    None for a module outside any stack.
    """
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:place]), int(part)
    return None


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


def generating_parts(model: nn.Module) -> list[nn.Module]:
    """Return the models inside ``model`` that it leaves ``generate()`` to (BLIP-2, Kosmos-2)."""
    return [
        module
        for module in model.modules()
        if module is not model and isinstance(module, PreTrainedModel) and module.can_generate()
    ]
