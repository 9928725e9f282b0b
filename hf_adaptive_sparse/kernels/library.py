"""The compiled library, which is optional: loading it once, and choosing the path that it takes.

The library is an optional part of the package: without it, or with a processor it does not know,
everything works in torch. ``HF_ADAPTIVE_SPARSE_KERNEL`` chooses a path: ``portable``, ``avx2``,
``avx512f`` (Skylake-X, Cascade Lake), ``avx512`` (Ice Lake, Zen 4), ``amx``, ``neon``, ``none``
(torch only), or ``auto``, the fastest that this processor has.
A cache that is in use asks again whenever a block of tokens has filled up.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from pathlib import Path

import torch

from hf_adaptive_sparse.errors import AdaptiveSparseError

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "HF_ADAPTIVE_SPARSE_KERNEL"
LIBRARY = "_kernels.so"
ABI_VERSION = 8

PATHS = {"amx": 4, "avx512": 2, "avx512f": 5, "avx2": 1, "neon": 3, "portable": 0}
"""Names of the paths, fastest first, and their numbers in the library."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes that it knows and their numbers in it."""

MAX_CODES = 1024
"""Codes in a packed row, tokens of a block or channels of a head, that kernels take at most."""

_FAILURES = {
    1: "no such path on this processor",
    2: "no memory",
    3: "sizes are out of range, or tensors not of one weight (load others with load_state_dict)",
}

_IMPORTED_BY = os.getpid()


class KernelError(AdaptiveSparseError, OSError):
    """The path that was asked for cannot be had."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the library, or None where it was not built or does not fit this version."""
    path = Path(__file__).parent / LIBRARY
    if not path.is_file():
        return None
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("The kernels at %s cannot be loaded and are not used: %s", path, error)
        return None
    if loaded.has_abi_version() != ABI_VERSION:
        logger.warning(
            "The kernels at %s are of another version and are not used; build them anew: "
            "python -m hf_adaptive_sparse.kernels.build",
            path,
        )
        return None
    loaded.has_use_threads_of.argtypes = [ctypes.c_void_p]
    loaded.has_use_threads_of.restype = None
    loaded.has_sparse_many_bytes.restype = ctypes.c_int64
    # A forked child has no threads of its parent's pool, whose kernels may wait for them for ever.
    loaded.has_use_threads_of(_torch_parallel() if os.getpid() == _IMPORTED_BY else None)
    return loaded


def available_paths() -> tuple[str, ...]:
    """Return the paths that this processor and this installation have, fastest first."""
    loaded = library()
    if loaded is None:
        return ()
    return tuple(name for name in PATHS if loaded.has_supports(PATHS[name]))


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Return whether this processor multiplies numbers of a dtype itself.

    Where it does not, torch's matrix product of them takes several times that of float32. True also
    where that is not known.
    """
    loaded = library()
    return loaded is None or dtype not in DTYPES or bool(loaded.has_multiplies(DTYPES[dtype]))


def active_path() -> str | None:
    """Return the path in use, None for torch.

    Raises:
        KernelError: If ``HF_ADAPTIVE_SPARSE_KERNEL`` names a path that is unknown or not to be had
            here.
    """
    return _chosen(os.environ.get(ENVIRONMENT_VARIABLE, "auto"))


def check_status(status: int, kernel: str) -> None:
    """Check what a kernel of the library returned.

    Args:
        status: Its status; 0: it did what it was asked for.
        kernel: What it is called in the message.

    Raises:
        RuntimeError: If it failed.
    """
    if status:
        raise RuntimeError(f"The {kernel} kernel failed: {_FAILURES.get(status, status)}.")


def describe() -> str:
    """Return, for people, which path is in use and why."""
    path = active_path()
    if path is not None:
        return f"native, {path} (this machine has: {', '.join(available_paths())})"
    if library() is not None:
        return f"torch (chosen by {ENVIRONMENT_VARIABLE})"
    return (
        "torch (the native kernels are not built; where there is a C compiler: "
        "python -m hf_adaptive_sparse.kernels.build)"
    )


@functools.cache
def _chosen(wish: str) -> str | None:
    available = available_paths()
    if wish == "none":
        return None
    if wish in ("auto", ""):
        return available[0] if available else None
    if wish not in available:
        known = ", ".join(("auto", "none", *PATHS))
        here = ", ".join(("none", *available))
        raise KernelError(
            f"{ENVIRONMENT_VARIABLE} must be one of {known}, of which this machine has {here}; got "
            f"{wish!r}."
        )
    return wish


def _torch_parallel() -> int | None:
    """Return the address of ``GOMP_parallel`` in the OpenMP runtime that torch computes with.

    Looked up through torch's own library, so that it is that runtime and no other. Runtimes of LLVM
    and Intel have this entry as well. None where torch does not use OpenMP.
    """
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            function = ctypes.CDLL(str(folder / name)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None
