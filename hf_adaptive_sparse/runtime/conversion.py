"""From plain weights to sparse ones and back, in place, one at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from hf_adaptive_sparse.architecture import stack_names
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.packing.stored_weight import StoredWeight, ValueFormat
from hf_adaptive_sparse.runtime.expert_modules import hold_, hold_empty_, release_
from hf_adaptive_sparse.runtime.sparse_experts import (
    SparseStack,
    compressible_stacks,
    sparse_stacks,
)
from hf_adaptive_sparse.runtime.sparse_linear import SparseLinear


def sparse_linears(model: nn.Module) -> dict[str, SparseLinear]:
    """Return the linears whose weight is compressed in memory, by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}


def sparse_weights(model: nn.Module) -> dict[str, SparseLinear | SparseStack]:
    """Return all weights that are compressed in memory: of linears, and stacks of experts."""
    return {**sparse_linears(model), **sparse_stacks(model)}


def replace_by_empty_(model: nn.Module, weights: Mapping[str, StoredWeight]) -> None:
    """Replace plain weights by sparse ones without values, to be loaded into.

    Args:
        model: A model on the meta device.
        weights: Name of a linear, or of a stack of experts that can be kept compressed -> how its
            weight is stored.
    """
    stacks = compressible_stacks(model, stack_names(model, weights))
    for name, stored in weights.items():
        if name in stacks:
            hold_empty_(stacks[name], stored)
            continue
        linear = _linear(model, name)
        made = SparseLinear(
            linear.in_features,
            linear.out_features,
            stored.nnz,
            bias=linear.bias is not None,
            bits=stored.bits,
            group_size=stored.group_size,
            exceptions=stored.exceptions,
            dtype=linear.weight.dtype,
            device="meta",
        )
        made.train(linear.training)
        model.set_submodule(name, made)


@torch.no_grad()
def compress_(model: nn.Module, weights: Mapping[str, ValueFormat]) -> None:
    """Compress weights in memory, one after the other.

    Args:
        model: A model with weights.
        weights: Name of a linear, or of a stack of experts that can be kept compressed -> how its
            values are stored.

    Raises:
        ValueError: If a weight is not in memory, or cannot be quantised.
    """
    stacks = compressible_stacks(model, stack_names(model, weights))
    for name, (bits, group_size) in weights.items():
        if name in stacks:
            _check_here(name, stacks[name].weight, stacks[name].experts.module)
            hold_(stacks[name], bits, group_size)
            continue
        linear = _linear(model, name)
        _check_here(name, linear.weight, linear)
        weight = SparseWeight.from_dense(linear.weight.detach(), bits, group_size)
        made = SparseLinear.from_weight(weight, linear.bias)
        made.train(linear.training)
        model.set_submodule(name, made)


@torch.no_grad()
def quantise_(weight: torch.Tensor, form: ValueFormat) -> None:
    """Replace a weight by what it is in values of 8 or 4 bits; doing so again changes nothing.

    Args:
        weight: ``(out, in)``, float32, bfloat16 or float16, finite.
        form: How its values are stored: in 8 or 4 bits.

    Raises:
        ValueError: If the weight cannot be quantised.
    """
    weight.copy_(SparseWeight.from_dense(weight, *form).to_dense())


@torch.no_grad()
def decompress_(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Replace sparse weights by plain ones with the same values.

    Args:
        model: A model.
        names: Of linears, and of stacks of experts; ``None``: all.

    Raises:
        ValueError: If a weight is not in memory; then nothing is changed.
    """
    chosen = {n: w for n, w in sparse_weights(model).items() if names is None or n in names}
    for name, weight in chosen.items():
        if any(part.is_meta for part in weight.parts.values()):
            raise ValueError(
                f"The weight of {name!r} is offloaded, where it cannot be decompressed. Load the "
                "model with sparsity_config=SparsityConfig(runtime='dense')."
            )
    stacks = sparse_stacks(model)
    for name, weight in chosen.items():
        if isinstance(weight, SparseLinear):
            model.set_submodule(name, weight.to_linear())
        else:
            release_(stacks.pop(name), stacks.values())


def _check_here(name: str, weight: torch.Tensor, owner: nn.Module) -> None:
    if weight.is_meta or hasattr(owner, "_hf_hook"):
        raise ValueError(
            f"The weight of {name!r} is offloaded or waits on another device, where it cannot be "
            "compressed. Save the pruned model, and load it with runtime='sparse'."
        )


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear) or isinstance(module, SparseLinear):
        raise ValueError(f"{name!r} must be a plain nn.Linear, it is {type(module).__name__}.")
    return module
