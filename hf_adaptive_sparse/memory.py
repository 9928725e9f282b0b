"""Giving memory that was freed back to the operating system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def release_freed() -> None:
    """Give memory that was freed back to the system, where the C library keeps it.

    glibc keeps what lies between pieces that are in use: beside a thousand small results of large
    computations it can hold as much again as they take.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # not glibc: Windows, macOS, musl
        return None
    trim.argtypes = [ctypes.c_size_t]
    return trim
