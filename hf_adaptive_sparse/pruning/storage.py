"""The tensor that stores a prunable weight, and the check that it is finite."""

from __future__ import annotations

import torch
from torch import nn

from hf_adaptive_sparse.architecture import Prunable, parameter_name

_CHUNK_ELEMENTS = 1 << 20


def stored_weight(weight: Prunable, name: str) -> torch.Tensor:
    """Return the tensor that holds a prunable weight, to be read or modified in place.

    That is the parameter's data, or, where `accelerate` keeps it in CPU memory and leaves a
    stand-in on the meta device, the copy there.

    Args:
        weight: The linear, or the stack of experts.
        name: Its name, for the message.

    Returns:
        ``(out, in)``, of experts one more dimension; without gradient. Writing to it changes the
        model.

    Raises:
        ValueError: If the weight lies on disk, where it cannot be modified in place.
    """
    stored = weight.weight.detach()
    if not stored.is_meta:
        return stored
    module, key = (weight, "weight") if isinstance(weight, nn.Linear) else weight.place
    weights_map = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if weights_map is not None:
        first: torch.Tensor = weights_map[key]
        second: torch.Tensor = weights_map[key]
        if first.data_ptr() == second.data_ptr() and not first.is_meta:
            return first.detach()
    raise ValueError(
        f"The weight of {name!r} is not in memory (offloaded to disk, or the model was made on the "
        "meta device), so it cannot be pruned in place. Load the model without disk offload."
    )


def check_sound(weight: Prunable, name: str) -> None:
    """Refuse a prunable weight that is not in memory, or holds NaN or infinity."""
    check_finite(stored_weight(weight, name), parameter_name(name, weight))


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Refuse a tensor of weights that holds NaN or infinity.

    Raises:
        ValueError: If it does; the tensor is named.
    """
    for part in weight.reshape(-1).split(_CHUNK_ELEMENTS):
        if not bool(part.isfinite().all()):
            raise ValueError(
                f"Weights must be finite; {name!r} holds NaN or infinite values. The "
                "checkpoint may be damaged, or was cast to a dtype that cannot hold it."
            )
