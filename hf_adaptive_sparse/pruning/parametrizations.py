"""Parametrizations of weights: which weights can have them, and removing them without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize


def check_in_memory(weight: torch.Tensor, name: str) -> None:
    """Refuse an offloaded weight, which cannot have a parametrization.

    Raises:
        ValueError: If it is.
    """
    if weight.is_meta:
        raise ValueError(
            f"The weight of {name!r} is offloaded; searching ratios or weight bits needs it in "
            "memory. Load the model without offloading."
        )


@contextmanager
def remove_parametrizations_after(places: Iterable[tuple[nn.Module, str]]) -> Iterator[None]:
    """Remove all parametrizations of some weights when the context ends, also by an exception.

    The parameters are the objects that they were, in the order that they had: optimizers and state
    dicts go by it.

    Args:
        places: Module and name of each parameter.
    """
    by_module: dict[nn.Module, tuple[list[str], list[str]]] = {}
    for module, key in places:
        by_module.setdefault(module, (list(module._parameters), []))[1].append(key)
    try:
        yield
    finally:
        for module, (order, keys) in by_module.items():
            for key in keys:
                if parametrize.is_parametrized(module, key):
                    parametrize.remove_parametrizations(module, key, leave_parametrized=False)
            parameters = dict(module._parameters)
            module._parameters.clear()
            # What came back came last. A context around this one restores an order of its own.
            for key in (*order, *(key for key in parameters if key not in order)):
                module._parameters[key] = parameters[key]
