"""Adapters in a model: what PEFT puts beside a layer that it wraps, and calls ``base_layer``."""

from __future__ import annotations

from torch import nn


def adapter_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules of adapters: wrappers, and all in them but the layers that they wrap."""
    found: set[nn.Module] = set()
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):
            found.update(module.modules())
            found.difference_update(base.modules())
    return found


def check_no_adapters(model: nn.Module) -> None:
    """Refuse to prune a model with adapters: they change what its weights compute, and their names.

    Raises:
        ValueError: If it has any.
    """
    if adapter_modules(model):
        raise ValueError(
            f"A model must have no adapters when it is pruned; {type(model).__name__} has (PEFT). "
            "Call merge_and_unload() or unload() of the PEFT model, and prune what that returns; "
            "an adapter can be trained on top of the pruned model."
        )
