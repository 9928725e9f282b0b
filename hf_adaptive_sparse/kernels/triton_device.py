"""Where Triton's kernels can run, and what becomes of those that cannot be had."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch

from hf_adaptive_sparse.kernels.library import ENVIRONMENT_VARIABLE

_LEAST_CAPABILITY = (8, 0)  # bfloat16 and TF32 in the matrix units, asynchronous copies
_INTERPRETED_PROCESSORS = 2


class LaunchError(RuntimeError):
    """Triton could not compile or launch a kernel; nothing that was stored has changed."""


def is_available() -> bool:
    """Return whether Triton is installed, wanted, and has a device, or interprets.

    ``HF_ADAPTIVE_SPARSE_KERNEL=none`` switches it off like the native kernels.
    """
    if torch.cuda.is_available():
        return serves(torch.device("cuda", torch.cuda.current_device()))
    return serves(torch.device("cpu"))


def serves(device: torch.device) -> bool:
    """Return whether kernels can run on tensors of a device."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == "none" or not _is_installed():
        return False
    if device.type == "cuda":
        return _is_recent(device)
    return device.type == "cpu" and interprets()


def interprets() -> bool:
    """Return whether Triton is asked to interpret, on CPU tensors, instead of to compile."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def processors(device: torch.device) -> int:
    """Return the multiprocessors of a device; a few where kernels are interpreted."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch(failures: dict[object, str], kernel: object, run: Callable[[], None]) -> None:
    """Run what compiles and launches a kernel, unless it failed before.

    Args:
        failures: Kernels that cannot be had, and why; compiling one takes seconds.
        kernel: What the kernel is compiled for.
        run: Launches it.

    Raises:
        LaunchError: If it fails, now or before. What is out of memory is raised as it is: that is
            no fault of the kernel.
    """
    if kernel not in failures:
        try:
            run()
            return
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever compilers, assemblers and drivers raise
            failures[kernel] = f"{type(error).__name__}: {error}"
            raise LaunchError(failures[kernel]) from error
    raise LaunchError(failures[kernel])


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
