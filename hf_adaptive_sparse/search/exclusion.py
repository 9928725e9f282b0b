"""One search at a time per model, since a search masks the model that it evaluates."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_lock = threading.Lock()
_searched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def alone_with(model: nn.Module) -> Iterator[None]:
    """Refuse a second search of ``model`` in this process for as long as the body runs.

    Raises:
        ValueError: If another thread searches it.
    """
    with _lock:
        if model in _searched:
            raise ValueError(
                "A model is searched by one thread at a time, as it is masked meanwhile; another "
                "thread searches this one. Search a copy of it, or wait for the other search."
            )
        _searched.add(model)
    try:
        yield
    finally:
        with _lock:
            _searched.discard(model)
