"""Weights of which the shape alone is in memory, on the meta device, until they are filled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation


def keep_in_float32_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give an empty model in float32 what transformers keeps in it when it loads in ``dtype``."""
    kept = list(model._get_dtype_plan(dtype))
    if not kept:
        return
    pattern, *_ = build_glob_alternation(kept)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if pattern.search(name):
            tensor.data = cast_floating(tensor.data, torch.float32)


def fill_(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors in the place of parameters and buffers, in the dtype those have.

    Args:
        model: The model, possibly on the meta device.
        tensors: Runtime name -> tensor.
    """
    for name, tensor in tensors.items():
        owner_name, _, key = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if key in owner._parameters:
            held = cast_floating(tensor, owner.get_parameter(key).dtype)
            owner._parameters[key] = nn.Parameter(held, requires_grad=False)
        else:
            owner._buffers[key] = cast_floating(tensor, owner.get_buffer(key).dtype)


def empty_(model: nn.Module, names: Iterable[str]) -> None:
    """Leave only the shapes of parameters in memory."""
    for name in names:
        owner_name, _, key = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if key in owner._parameters:
            meta = owner.get_parameter(key).to("meta")
            owner._parameters[key] = nn.Parameter(meta, requires_grad=False)


def cast_floating(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in a dtype, if it is one of floating-point numbers; else as it is."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
