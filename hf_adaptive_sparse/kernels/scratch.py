"""Memory that a thread's products use for a moment, kept for its next one."""

from __future__ import annotations

import threading

import torch

KEPT_BYTES = 16 << 20
"""Bytes that are taken at once, and kept, where fewer are asked for."""

_of_thread = threading.local()


def scratch(size_bytes: int) -> torch.Tensor:
    """Return uint8 memory on the CPU, ``(size_bytes,)``, with what was last written to it.

    It is this thread's until it asks again; pages that nothing is written to take no memory.
    """
    kept: torch.Tensor | None = getattr(_of_thread, "kept", None)
    if kept is None or kept.numel() < size_bytes:
        _of_thread.kept = None  # never in memory twice
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            kept = torch.empty(max(size_bytes, KEPT_BYTES), dtype=torch.uint8, device="cpu")
        _of_thread.kept = kept
    return kept[:size_bytes]
