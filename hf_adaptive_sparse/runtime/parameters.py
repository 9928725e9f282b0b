"""The tensors of a compressed weight as parameters of a module: frozen, and loaded as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_adaptive_sparse.packing.bitmask import BitmaskError
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight, stored_bits
from hf_adaptive_sparse.packing.stored_names import BY_ROW
from hf_adaptive_sparse.runtime.weight_view import FrozenWeightError


class FrozenParameter(nn.Parameter):
    """A parameter that takes no gradient: a part of a compressed weight, of any dtype."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> FrozenParameter:
        """Wrap ``data``; ``requires_grad`` is there for what copies parameters.

        Raises:
            FrozenWeightError: If a gradient is asked for.
        """
        if requires_grad:
            raise FrozenWeightError("requires_grad=True")
        frozen: FrozenParameter = super().__new__(cls, data, requires_grad=False)
        return frozen

    def requires_grad_(self, requires_grad: bool = True) -> FrozenParameter:
        """Refuse a gradient.

        Raises:
            FrozenWeightError: If one is asked for.
        """
        if requires_grad:
            raise FrozenWeightError("requires_grad_()")
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # nn.Parameter's own form comes back as nn.Parameter.
        return FrozenParameter, (self.data,)


def hold_parts_(
    module: nn.Module, names: Mapping[str, str], parts: Mapping[str, torch.Tensor]
) -> None:
    """Make the tensors of a weight the module's parameters; those it has no more become ``None``.

    Args:
        module: The module.
        names: Kind -> name of the parameter, of all kinds.
        parts: Kind -> tensor.
    """
    for kind, name in names.items():
        part = parts.get(kind)
        setattr(module, name, None if part is None else FrozenParameter(part.detach()))


def given_parts(
    names: Mapping[str, str], state_dict: Mapping[str, torch.Tensor], prefix: str
) -> dict[str, torch.Tensor]:
    """Return what a state dict has of a weight, by kind."""
    given = {kind: state_dict.get(prefix + name) for kind, name in names.items()}
    return {kind: part for kind, part in given.items() if part is not None}


def can_load(
    module: nn.Module,
    names: Mapping[str, str],
    columns: int,
    group_size: int | None,
    state_dict: Mapping[str, torch.Tensor],
    prefix: str,
    missing_keys: list[str],
    error_msgs: list[str],
) -> bool:
    """Return whether a weight can be loaded from a state dict, or nothing of it is there.

    Args:
        module: The module that holds the weight.
        names: Kind -> name of the parameter, of all kinds.
        columns: Columns of the weight.
        group_size: Columns per scale, of codes; ``None``: one per row.
        state_dict: What is loaded.
        prefix: Of the module's names in it.
        missing_keys: Takes the name of a codebook that is missing.
        error_msgs: Takes what else is wrong.
    """
    given = given_parts(names, state_dict, prefix)
    if not given:
        return True
    held = {kind: getattr(module, name) for kind, name in names.items()}
    lacks_codebook = held["codebook"] is not None and "codebook" not in given
    if lacks_codebook and "values" in given and given["values"].dtype == held["values"].dtype:
        missing_keys.append(prefix + names["codebook"])
        return False
    try:
        _check(given, held, columns, group_size)
    except BitmaskError as error:
        error_msgs.append(f"{prefix}{names['values']}: {error}")
        return False
    return True


def make_room_(
    module: nn.Module, names: Mapping[str, str], state_dict: Mapping[str, torch.Tensor], prefix: str
) -> None:
    """Resize the parameters of a weight to those that `can_load` found in a state dict."""
    for kind, tensor in given_parts(names, state_dict, prefix).items():
        own = getattr(module, names[kind])
        if own.shape != tensor.shape:
            setattr(module, names[kind], FrozenParameter(own.new_empty(tensor.shape)))


def _check(
    given: Mapping[str, torch.Tensor],
    held: Mapping[str, torch.Tensor | None],
    columns: int,
    group_size: int | None,
) -> None:
    for kind in BY_ROW:
        own, part = held[kind], given.get(kind)
        if own is not None and part is not None and own.shape != part.shape:
            raise BitmaskError(
                f"a {kind} tensor of shape {tuple(own.shape)} is needed, got {tuple(part.shape)}."
            )
    bitmask, values = held["bitmask"], held["values"]
    assert bitmask is not None
    assert values is not None
    parts = {"bitmask": bitmask, "values": values, **given}
    parts = {k: p.detach().flatten(0, -2) if k in BY_ROW else p for k, p in parts.items()}
    weight = SparseWeight.from_tensors(columns, group_size=group_size, **parts)
    bits = stored_bits(values, held["codebook"])
    if weight.bits != bits:
        raise BitmaskError(
            f"values of {bits} bits are needed, got {weight.bits}. Load the checkpoint with "
            "from_pretrained."
        )
