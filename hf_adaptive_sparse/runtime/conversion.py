"""From plain linears to sparse ones and back, in place, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.runtime.sparse_linear import SparseLinear


@dataclass(frozen=True)
class StoredWeight:
    """How one weight is stored, before it is there.

    Attributes:
        nnz: Weights that are kept.
        bits: 16 for values in the weight's dtype; 8 or 4 for codes.
        group_size: Columns per scale, of codes; ``None``: one scale per row.
    """

    nnz: int
    bits: int = 16
    group_size: int | None = None


def sparse_linears(model: nn.Module) -> dict[str, SparseLinear]:
    """Return the linears whose weight is compressed in memory, by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}


def replace_by_empty_(model: nn.Module, weights: Mapping[str, StoredWeight]) -> None:
    """Replace plain linears by sparse ones without values, to be loaded into.

    Args:
        model: A model on the meta device.
        weights: Module name -> how its weight is stored.
    """
    for name, stored in weights.items():
        linear = _linear(model, name)
        made = SparseLinear(
            linear.in_features,
            linear.out_features,
            stored.nnz,
            bias=linear.bias is not None,
            bits=stored.bits,
            group_size=stored.group_size,
            dtype=linear.weight.dtype,
            device="meta",
        )
        made.train(linear.training)
        model.set_submodule(name, made)


@torch.no_grad()
def compress_(model: nn.Module, weights: Mapping[str, tuple[int, int | None]]) -> None:
    """Compress the weights of plain linears in memory, one after the other.

    Args:
        model: A model with weights.
        weights: Module name -> bits of its values (16, 8 or 4), and columns per scale.

    Raises:
        ValueError: If a weight is not in memory, or cannot be quantised.
    """
    for name, (bits, group_size) in weights.items():
        linear = _linear(model, name)
        if linear.weight.is_meta or hasattr(linear, "_hf_hook"):
            raise ValueError(
                f"The weight of {name!r} is offloaded or waits on another device, where it cannot "
                "be compressed. Save the pruned model, and load it with runtime='sparse'."
            )
        weight = SparseWeight.from_dense(
            linear.weight.detach(), None if bits == 16 else bits, group_size
        )
        made = SparseLinear.from_weight(weight, linear.bias)
        made.train(linear.training)
        model.set_submodule(name, made)


@torch.no_grad()
def quantise_(weight: torch.Tensor, bits: int, group_size: int | None) -> None:
    """Replace a weight by what it is in values of 8 or 4 bits; doing so again changes nothing.

    Args:
        weight: ``(out, in)``, float32, bfloat16 or float16, finite.
        bits: 8 or 4.
        group_size: Columns per scale; ``None``: one scale per row.

    Raises:
        ValueError: If the weight cannot be quantised.
    """
    weight.copy_(SparseWeight.from_dense(weight, bits, group_size).to_dense())


@torch.no_grad()
def decompress_(model: nn.Module) -> None:
    """Replace every sparse linear by a plain one with the same values."""
    for name, module in sparse_linears(model).items():
        model.set_submodule(name, module.to_linear())


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear) or isinstance(module, SparseLinear):
        raise ValueError(f"{name!r} must be a plain nn.Linear, it is {type(module).__name__}.")
    return module
