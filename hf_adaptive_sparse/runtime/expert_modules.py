"""Modules of experts whose parameters are compressed: made, moved, loaded, and made plain again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_adaptive_sparse.experts import ExpertStack
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.packing.stored_names import KINDS, leaf_names
from hf_adaptive_sparse.packing.stored_weight import StoredWeight
from hf_adaptive_sparse.runtime.parameters import FrozenParameter
from hf_adaptive_sparse.runtime.sparse_experts import (
    EAGER,
    HELD,
    SparseStack,
    by_expert,
    offsets_name,
    stacks_of,
)
from hf_adaptive_sparse.runtime.sparse_linear import dtype_after, keeping_integers
from hf_adaptive_sparse.runtime.weight_view import FrozenWeightError


def hold_empty_(stack: ExpertStack, stored: StoredWeight) -> None:
    """Put a `SparseStack` without values in a parameter's place, to be loaded into.

    Args:
        stack: A stack of a model on the meta device.
        stored: How it is stored.
    """
    weight = stack.weight
    parts = stored.empty(*weight.shape, dtype=weight.dtype, device="meta")
    _hold_(stack, parts, stored.group_size)


def hold_(stack: ExpertStack, bits: int, group_size: int | None) -> None:
    """Compress a stack in memory, in its parameter's place.

    Args:
        stack: A stack of a model with weights.
        bits: Bits of the values: 16, 12, 8 or 4.
        group_size: Columns per scale; ``None``: one per row.
    """
    count = stack.count
    weight = SparseWeight.from_dense(stack.weight.detach().flatten(0, 1), bits, group_size)
    held = _hold_(stack, by_expert(weight, count), group_size)
    held.settle(weight.row_offsets)


def _hold_(
    stack: ExpertStack, parts: Mapping[str, torch.Tensor], group_size: int | None
) -> SparseStack:
    module, key = stack.place
    count, rows, columns = stack.weight.shape
    dtype = stack.weight.dtype
    delattr(module, key)
    for kind, name in zip(KINDS, leaf_names(key), strict=True):
        part = parts.get(kind)
        module.register_parameter(name, None if part is None else FrozenParameter(part))
    module.register_buffer(offsets_name(key), None, persistent=False)
    held = SparseStack(module, key, (count, rows, columns), group_size, dtype)
    setattr(module, key, held)
    module.__dict__.setdefault(HELD, {})[key] = held
    for name, override in _OVERRIDES.items():
        setattr(module, name, partial(override, module))
    # What a model's initialisation would do to the parameter has no meaning here.
    module._is_hf_initialized = True  # type: ignore[assignment]
    config: Any = module.config
    if config._experts_implementation != EAGER:
        held.implementation, config._experts_implementation = config._experts_implementation, EAGER
    return held


def release_(held: SparseStack, rest: Iterable[SparseStack]) -> None:
    """Put the decompressed parameter back.

    The model's experts implementation comes back with its last compressed stack.

    Args:
        held: The stack that stood for it.
        rest: Stacks of the model that stay compressed, for now or for good.
    """
    module, key, dense = held.owner, held.key, held.to_dense()
    for name in (*leaf_names(key), offsets_name(key), key):
        delattr(module, name)
    del module.__dict__[HELD][key]
    setattr(module, key, nn.Parameter(dense))
    if not stacks_of(module):
        for name in (*_OVERRIDES, HELD):
            delattr(module, name)
    if held.implementation is None:
        return
    config: Any = module.config
    for other in rest:
        if other.owner.config is config:
            other.implementation = held.implementation
            return
    config._experts_implementation = held.implementation


def _apply(
    module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    """Move or cast the module, as `SparseLinear` does itself."""
    stacks = stacks_of(module)
    before = [(dtype_after(fn, stack.dtype), stack.is_counted) for stack in stacks]
    type(module)._apply(module, keeping_integers(fn), recurse)
    for stack, (dtype, were_counted) in zip(stacks, before, strict=True):
        stack.follow(dtype, were_counted)
    return module


def _register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """Add a parameter, but none in a compressed stack's place, as `SparseLinear` does itself."""
    held: dict[str, SparseStack] = getattr(module, HELD)
    if name in held:
        module.__dict__[name] = held[name]  # which `nn.Module.__setattr__` took out before
        raise FrozenWeightError(f"{name} = ...")
    type(module).register_parameter(module, name, param)


def _load_from_state_dict(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load the module, as `SparseLinear` does itself; what does not fit changes nothing."""
    given = [stack for stack in stacks_of(module) if stack.is_in(state_dict, prefix)]
    checked = [stack.can_load(state_dict, prefix, missing_keys, error_msgs) for stack in given]
    if not all(checked):
        return
    for stack in given:
        stack.make_room(state_dict, prefix)
    rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
    type(module)._load_from_state_dict(module, state_dict, prefix, *rest)
    for stack in given:
        stack.settle()


_OVERRIDES: dict[str, Callable[..., Any]] = {
    "_apply": _apply,
    "_load_from_state_dict": _load_from_state_dict,
    "register_parameter": _register_parameter,
}
"""Methods of `nn.Module` that a module of compressed experts has of its own."""
