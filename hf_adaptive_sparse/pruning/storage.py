"""Where the weight of a linear really lies, and whether it is sound."""

from __future__ import annotations

import torch
from torch import nn

_CHUNK_ELEMENTS = 1 << 20


def stored_weight(module: nn.Linear, name: str) -> torch.Tensor:
    """Return the tensor that holds a linear's weight, to be read or modified in place.

    That is the parameter's data, or, where `accelerate` keeps it in CPU memory and leaves a
    stand-in on the meta device, the copy there.

    Args:
        module: The linear.
        name: Its name, for the message.

    Returns:
        ``(out, in)``, without gradient; writing to it changes the model.

    Raises:
        ValueError: If the weight lies on disk, where it cannot be modified in place.
    """
    weight = module.weight.detach()
    if not weight.is_meta:
        return weight
    weights_map = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if weights_map is not None:
        first: torch.Tensor = weights_map["weight"]
        second: torch.Tensor = weights_map["weight"]
        if first.data_ptr() == second.data_ptr() and not first.is_meta:
            return first.detach()
    raise ValueError(
        f"The weight of {name!r} is not in memory (offloaded to disk, or the model was made on the "
        "meta device), so it cannot be pruned in place. Load the model without disk offload."
    )


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Refuse a weight ``(out, in)`` that holds NaN or infinity.

    Raises:
        ValueError: If it does; the tensor is named.
    """
    for part in weight.reshape(-1).split(_CHUNK_ELEMENTS):
        if not bool(part.isfinite().all()):
            raise ValueError(
                f"Weights must be finite; '{name}.weight' holds NaN or infinite values. The "
                "checkpoint may be damaged, or was cast to a dtype that cannot hold it."
            )
