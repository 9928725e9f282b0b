"""A tensor that grows along one dimension without copying itself for every row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hf_adaptive_sparse.kvcache.reserve import Reserve

GROWTH = 64
"""A full buffer grows by 1/64 of itself at least: slack stays below 2 %, appending is O(1)."""

_NO_CONTEXT = contextlib.nullcontext()

LONG_ROW_BYTES = 1024
"""Rows of a head that are longer need not be neighbours: who reads one reads several pages."""


class RowBuffer:
    """Rows ``(batch, kv_heads, rows, ...)`` in preallocated storage; a row is a token or a block.

    The first append allocates exactly what it needs; a full buffer grows by at least
    ``max(step, capacity / 64)`` rows, so that n appends copy O(n) rows in all. Rows dropped from
    the front are reclaimed when the buffer fills up: for a window of constant size it is a ring
    whose turn is one copy of the window. Growing and reclaiming move the rows to new storage, and
    what was handed out before keeps the old one, unchanged. Long rows on the CPU lie with all heads
    of a row side by side, in reserved address space, and move only when they have grown eightfold:
    with steps of 1/64, each row would otherwise be copied 64 times.

    The contents carry no autograd graph, and are ordinary tensors even when filled under
    ``torch.inference_mode``, so that a cache filled there can be continued outside.

    Args:
        template: Any tensor ``(batch, kv_heads, any, ...)`` with the dtype and device to store.
        step: Rows to grow by at least.
        capacity: Rows to make room for at once.
    """

    def __init__(self, template: torch.Tensor, step: int, capacity: int = 0) -> None:
        self.step = step
        self._first, self._end = 0, 0
        self._reserve: Reserve | None = None
        with _ordinary():
            self._storage = self._allocate(template, capacity)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies reserved address space and what was never written."""
        storage = self._storage if self.length == self.capacity else self.rows.clone()
        return self.__dict__ | {
            "_reserve": None,
            "_storage": storage,
            "_first": 0,
            "_end": self.length,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Hold ordinary tensors in copies, too, whichever mode they are made in."""
        self.__dict__.update(state)
        if self._storage.is_inference():
            self.transform(torch.clone)

    @property
    def length(self) -> int:
        """Rows stored."""
        return self._end - self._first

    @property
    def capacity(self) -> int:
        """Rows that fit into what is allocated."""
        return self._storage.shape[2]

    @property
    def leading_shape(self) -> tuple[int, int]:
        """Sequences and heads stored."""
        return self._storage.shape[0], self._storage.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._storage.device

    def fits(self, rows: torch.Tensor) -> bool:
        """Return whether ``rows`` differ from what is stored in their number only."""
        held = self._storage
        return (
            rows.dtype is held.dtype
            and rows.device == held.device
            and rows.ndim == held.ndim
            and rows.shape[:2] == held.shape[:2]
            and rows.shape[3:] == held.shape[3:]
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._storage.untyped_storage().nbytes()

    @property
    def rows(self) -> torch.Tensor:
        """The rows stored, ``(batch, kv_heads, length, ...)``: a view, not a copy.

        Later appends leave it as it is; rows that ``truncate`` removes may be overwritten.
        """
        return self._storage.narrow(2, self._first, self._end - self._first)

    def append(self, rows: torch.Tensor) -> None:
        """Add ``rows`` ``(batch, kv_heads, n, ...)``, which need no gradient, at the end."""
        # Every layer does this for every token: few calls, and no context managers.
        count = rows.shape[2]
        self.room(count).copy_(rows)
        self._end += count

    def room(self, count: int) -> torch.Tensor:
        """Return the next ``count`` rows to be written, which ``extend`` makes part of the rest."""
        if self._end + count > self.capacity:
            self._make_room(count)
        return self._storage.narrow(2, self._end, count)

    def extend(self, count: int) -> None:
        """Add the ``count`` rows that were written to ``room``."""
        self._end += count

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` rows; what is allocated stays."""
        self._end = min(self._end, self._first + length)

    def drop_front(self, count: int) -> None:
        """Drop the first ``count`` rows; more than ``step`` unused rows there are given back."""
        self._first += min(count, self.length)
        if self._first > self.step:
            self._move_to(self.length)

    def clear(self) -> None:
        """Drop all rows and what is allocated for them."""
        self._first = self._end = 0
        self._move_to(0)

    def transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the storage by ``function`` of it: a selection along the batch, or a move."""
        with _ordinary():
            self._storage, self._reserve = function(self._storage), None

    def _make_room(self, count: int) -> None:
        needed = self.length + count
        if self.capacity and needed > self.capacity:
            needed = max(needed, self.capacity + max(self.step, self.capacity // GROWTH))
        self._move_to(max(needed, self.capacity if self._first else 0))

    def _move_to(self, capacity: int) -> None:
        count = self.length
        with _ordinary():
            if self._reserve is not None and not self._first and 0 < capacity <= self._reserve.rows:
                self._storage = _by_head(self._reserve.take(capacity))
                return
            storage = self._allocate(self._storage, capacity)
            if count:
                storage.narrow(2, 0, count).copy_(self.rows)
            self._storage = storage
        self._first, self._end = 0, count

    def _allocate(self, template: torch.Tensor, capacity: int) -> torch.Tensor:
        """Return room for as many rows; reserved memory takes pages once it is written."""
        batch, kv_heads, _, *row = template.shape
        self._reserve = None
        head_bytes = torch.Size(row).numel() * template.itemsize
        if capacity and batch and kv_heads and head_bytes > LONG_ROW_BYTES and template.is_cpu:
            try:
                self._reserve = Reserve(capacity, (batch, kv_heads, *row), template.dtype)
            except OSError:  # ordinary memory does as well, with more copies
                pass
            else:
                return _by_head(self._reserve.take(capacity))
        shape = (batch, kv_heads, capacity, *row)
        return torch.empty(shape, dtype=template.dtype, device=template.device)


def _ordinary() -> contextlib.AbstractContextManager[object]:
    """Return what makes new tensors ordinary ones, without a graph; nothing if they are anyway."""
    if torch.is_inference_mode_enabled():
        return _outside_inference()
    return torch.no_grad() if torch.is_grad_enabled() else _NO_CONTEXT


@contextlib.contextmanager
def _outside_inference() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():  # the first of which enables gradients
        yield


def _by_head(rows: torch.Tensor) -> torch.Tensor:
    """Return rows ``(rows, batch, kv_heads, ...)`` as ``(batch, kv_heads, rows, ...)``."""
    return rows.movedim(0, 2)
