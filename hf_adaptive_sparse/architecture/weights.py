"""Which weights of the decoder layers are pruned, and where they lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_adaptive_sparse.architecture.adapters import adapter_modules
from hf_adaptive_sparse.architecture.config_facts import config_of, kv_widths
from hf_adaptive_sparse.architecture.layers import decoder_layers, layer_index
from hf_adaptive_sparse.architecture.names import match_names
from hf_adaptive_sparse.experts import ExpertStack, expert_stacks

Prunable = nn.Linear | ExpertStack
"""What is pruned as a whole: a linear's matrix, or one kind of matrix of a layer's experts."""

_INTERLEAVED_QKV = ("codegen",)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prunable_weights(
    model: nn.Module, modules_to_not_convert: Iterable[str] | None = ()
) -> dict[str, Prunable]:
    """Return the weights that are counted and pruned, in layer order.

    These are the ``nn.Linear`` inside the decoder layers of the language model, and the 3-D
    parameters that hold the matrices of a layer's experts. Vision tower, projector, embeddings and
    output head lie outside; weights that are shared with another module, or stored in something
    else than floating point of shape (out, in), are left out, and linears with a forward of their
    own. Routers, which choose or weigh experts, stay whole: most are no linears, and those that are
    hold next to nothing and decide everything. Adapters are no part of the model.

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
    left_out = _in_routers(layers) | adapter_modules(layers)
    found: dict[str, Prunable] = {}
    for name, module in layers.named_modules(prefix=layers_name):
        if not isinstance(module, nn.Linear):
            for stack in expert_stacks(module):
                if stack.weight.is_floating_point() and uses[id(stack.weight)] == 1:
                    found[f"{name}.{stack.key}"] = stack
            continue
        # What is a linear by descent may return anything else: nothing may stand in for it.
        if type(module).forward is not nn.Linear.forward or module in left_out:
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


def _in_routers(layers: nn.Module) -> set[nn.Module]:
    """Return the modules of what chooses experts: a router by name, or a gate beside experts."""
    found: set[nn.Module] = set()
    for module in layers.modules():
        experts = hasattr(module, "experts")
        for name, child in module.named_children():
            if "router" in name or (experts and name.endswith("gate")):
                found.update(child.modules())
    return found


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


def expert_linears(model: nn.Module) -> frozenset[str]:
    """Return the names of linears that belong to one expert (``"...mlp.experts.3.up_proj"``).

    That is: those in one of several modules of the same class that lie together in an
    ``nn.ModuleList`` or ``nn.ModuleDict`` of a decoder layer.
    """
    layers_name, layers = decoder_layers(model)
    found: set[str] = set()
    for name, module in layers.named_modules(prefix=layers_name):
        if module is layers or not isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        classes = Counter(type(child) for child in module.children())
        for key, child in module.named_children():
            if classes[type(child)] > 1:
                inside = child.named_modules(prefix=f"{name}.{key}")
                found |= {inner for inner, leaf in inside if isinstance(leaf, nn.Linear)}
    return frozenset(found)


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


def parameter_name(name: str, weight: object) -> str:
    """Return the name of the parameter of the weight called ``name``.

    Args:
        name: The name.
        weight: A linear, or a stack of experts, plain or compressed in memory.
    """
    return f"{name}.weight" if isinstance(weight, nn.Module) else name


def stack_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names among those of weights that mean stacks of experts.

    Args:
        model: A model, possibly on the meta device.
        names: Of linears, which are modules, and of stacks, which are parameters or were.
    """
    modules = dict(model.named_modules())
    return [name for name in names if name not in modules]


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
    interleaved = getattr(config_of(model), "model_type", None) in _INTERLEAVED_QKV
    if kind == "qkv_proj" and not interleaved:
        keys, values = kv_widths(model)[layer_index(name, decoder_layers(model)[0])]
        if keys and rows - keys - values > 0:
            return rows - keys - values, keys, values
    return (rows,)
