"""Taking parametrizations off weights again, so that a module is exactly what it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.utils import parametrize


@contextmanager
def uncovered_after(places: Iterable[tuple[nn.Module, str]]) -> Iterator[None]:
    """Leave no parametrization on some weights when the context ends, also by an exception.

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
