"""Reserved address space for tensors that grow in place: only the part in use takes memory."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress

import torch

FACTOR = 8
"""Address space is taken for so many times the rows that are wanted first."""

HUGE_PAGE_BYTES = 1 << 21


class Reserve:
    """Zeroed memory in which rows ``(rows, *shape)`` are made one by one, without moving.

    The system gives pages to what is written only: rows which no tensor covers cost nothing.
    Memory goes back when the last tensor in it does.

    Args:
        rows: Rows wanted first.
        shape: Of a row.
        dtype: Of its elements.

    Raises:
        OSError: If the system has no such memory, or gives no more of it.
    """

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if sys.platform != "linux":
            raise OSError("Memory is reserved on Linux only.")
        self._shape, self._dtype = shape, dtype
        self._row_elements = torch.Size(shape).numel()
        self.rows = FACTOR * rows
        size_bytes = self.rows * self._row_elements * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        self._memory = mmap.mmap(-1, max(1, size_bytes), flags=flags)
        # A huge page would be given as a whole to the first of its bytes that is written.
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            with suppress(OSError):  # a system without them
                self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._huge_bytes = 0

    def take(self, rows: int) -> torch.Tensor:
        """Return the first 1 to ``self.rows`` rows, ``(rows, *shape)``: the memory, no copy."""
        count = rows * self._row_elements
        self._allow_huge_pages(count * self._dtype.itemsize)
        return torch.frombuffer(self._memory, dtype=self._dtype, count=count).view(
            rows, *self._shape
        )

    def _allow_huge_pages(self, taken: int) -> None:
        """Let whole huge pages of what is taken be such; reading them takes less looking up."""
        whole = taken // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if whole > self._huge_bytes and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a system without them
                self._memory.madvise(mmap.MADV_HUGEPAGE, self._huge_bytes, whole - self._huge_bytes)
            self._huge_bytes = whole
