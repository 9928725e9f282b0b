"""A tensor that grows along the sequence without copying itself for every token."""

from __future__ import annotations

from collections.abc import Callable

import torch

GROWTH = 32
"""A full buffer grows by 1/32 of itself at least: slack stays near 3 %, appending is O(1)."""


class TokenBuffer:
    """Rows of tokens ``(batch, kv_heads, seq, width)`` in preallocated storage.

    The first append allocates exactly what it needs; a full buffer grows by at least
    ``max(step, capacity / 32)`` tokens. The contents carry no autograd graph, and are ordinary
    tensors even when filled under ``torch.inference_mode``, so that a cache filled there can be
    continued outside.

    Args:
        template: Any tensor ``(batch, kv_heads, any, width)`` with the dtype and device to store.
        step: Tokens to grow by at least.
    """

    def __init__(self, template: torch.Tensor, step: int) -> None:
        self.step = step
        self.length = 0
        with torch.inference_mode(False):
            batch, kv_heads, _, width = template.shape
            self._storage = torch.zeros(
                (batch, kv_heads, 0, width), dtype=template.dtype, device=template.device
            )

    @property
    def capacity(self) -> int:
        """Tokens that fit into what is allocated."""
        return self._storage.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._storage.untyped_storage().nbytes()

    @property
    def rows(self) -> torch.Tensor:
        """The tokens stored, ``(batch, kv_heads, length, width)``: a view, not a copy.

        Later appends leave it as it is; tokens that ``truncate`` removes may be overwritten.
        """
        return self._storage[:, :, : self.length]

    def append(self, rows: torch.Tensor) -> None:
        """Add ``rows`` ``(batch, kv_heads, n, width)`` at the end."""
        end = self.length + rows.shape[-2]
        with torch.inference_mode(False), torch.no_grad():
            if end > self.capacity:
                self._grow(end)
            self._storage[:, :, self.length : end] = rows
        self.length = end

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens; what is allocated stays."""
        self.length = min(self.length, length)

    def clear(self) -> None:
        """Drop all tokens and what is allocated for them."""
        self.length = 0
        with torch.inference_mode(False):
            self._storage = self._storage.new_zeros(
                (*self._storage.shape[:2], 0, self._storage.shape[-1])
            )

    def transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the storage by ``function`` of it: a selection along the batch, or a move."""
        with torch.inference_mode(False), torch.no_grad():
            self._storage = function(self._storage)

    def _grow(self, needed: int) -> None:
        if self.capacity:
            needed = max(needed, self.capacity + max(self.step, self.capacity // GROWTH))
        batch, kv_heads, _, width = self._storage.shape
        larger = self._storage.new_zeros((batch, kv_heads, needed, width))
        larger[:, :, : self.length] = self.rows
        self._storage = larger
