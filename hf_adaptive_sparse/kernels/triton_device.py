"""Which devices run Triton's kernels, and what is done where a kernel cannot be compiled."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch

from hf_adaptive_sparse.kernels.library import ENVIRONMENT_VARIABLE

logger = logging.getLogger(__name__)

_LEAST_TRITON = (3, 4)  # 3.3 compiles no attention, and 3.2 encodes otherwise than torch
_LEAST_CAPABILITY = (8, 0)  # bfloat16 and TF32 in the matrix units, asynchronous copies
_INTERPRETED_PROCESSORS = 2
_NO_CONTEXT = contextlib.nullcontext()
_Result = TypeVar("_Result")


class LaunchError(RuntimeError):
    """Triton could not compile or launch a kernel; nothing that was stored has changed."""


def is_available() -> bool:
    """Return whether a recent Triton is installed, wanted, and has a device, or interprets.

    ``HF_ADAPTIVE_SPARSE_KERNEL=none`` switches it off like the native kernels.
    """
    if torch.cuda.is_available():
        return serves(torch.device("cuda", torch.cuda.current_device()))
    return serves(torch.device("cpu"))


def serves(device: torch.device) -> bool:
    """Return whether kernels can run on tensors of a device."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == "none":
        return False
    if device.type == "cuda":
        return _has_recent_triton() and _is_recent(device)
    return device.type == "cpu" and interprets() and _has_recent_triton()


def interprets() -> bool:
    """Return whether Triton is asked to interpret, on CPU tensors, instead of to compile."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def processors(device: torch.device) -> int:
    """Return the multiprocessors of a device; a few where kernels are interpreted."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return what makes a device the current one, where kernels are launched; nothing if it is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device(device)


def launch(failures: dict[object, str], kernel: object, run: Callable[[], _Result]) -> _Result:
    """Run what compiles and launches a kernel, unless it failed before, and return what it does.

    Args:
        failures: Kernels that failed to compile or launch, and the error: to compile one again
            would take seconds.
        kernel: What the kernel is compiled for.
        run: Launches it.

    Raises:
        LaunchError: If it fails, now or before. What is out of memory is raised as it is: that is
            no fault of the kernel.
    """
    if not failures or kernel not in failures:  # what kernels are known by takes time to hash
        try:
            return run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever compilers, assemblers and drivers raise
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise  # what cannot be done while a graph is recorded can be had elsewhere
            failures[kernel] = f"{type(error).__name__}: {error}"
            raise LaunchError(failures[kernel]) from error
    raise LaunchError(failures[kernel])


@functools.cache
def say_what_failed(logger: logging.Logger, what: str, instead: str, error: str) -> None:
    """Log, once per error, that a kernel failed and what computes in its place.

    Args:
        logger: Of the module that goes on with torch.
        what: What the kernel is for.
        instead: What stays as it is, and what is done instead.
        error: Why the kernel failed.
    """
    logger.warning(
        "A Triton kernel %s failed. %s, which is slower. %s=none switches the kernels off. The "
        "failure was: %s",
        *(what, instead, ENVIRONMENT_VARIABLE, error),
    )


Launch = Callable[[tuple[int, int, int], Sequence[Any]], None]
"""Launches what was compiled: on a grid, with the arguments that are no constants."""


def compile_and_launch(
    kernel: Any, grid: tuple[int, int, int], arguments: Sequence[Any], constants: Mapping[str, int]
) -> Launch:
    """Launch a kernel as Triton does, and return what launches it again in a fraction of the time.

    Triton looks at every argument of every call to find what it compiled for such ones, which takes
    half of the 40 microseconds of a launch, in which a GPU computes a layer. The caller knows that
    better, and must: what is returned is for arguments of the same types, pointers as aligned to 16
    bytes or not, and the same integers where the kernel is specialised on them. For AMD's GPUs it
    compiles for more than that, and all is left to it.

    Args:
        kernel: What ``triton.jit`` made.
        grid: Programs.
        arguments: The kernel's first arguments.
        constants: The others, by name, and Triton's own options.
    """
    compiled = kernel[grid](*arguments, **constants)

    def launch_slowly(grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        kernel[grid](*arguments, **constants)

    if compiled is None or torch.version.hip is not None:  # interpreted, or AMD
        return launch_slowly
    names = kernel.arg_names[len(arguments) :]
    fixed = tuple(constants[name] for name in names)

    def launch_again(grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        compiled[grid](*arguments, *fixed)

    return launch_again


class Call(NamedTuple):
    """What is to be launched, and what it is compiled for.

    Attributes:
        kernel: The kernel's name, without ``_kernel``.
        grid: Programs.
        arguments: Tensors, strides and counts, in the kernel's order.
        constants: By name, Triton's own options among them.
        kind: What a kernel is compiled for, but for the constants.
    """

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[torch.Tensor | int, ...]
    constants: dict[str, int | bool]
    kind: tuple[object, ...]


def launch_call(
    call: Call, compiled: dict[object, Launch], kernels: Callable[[], ModuleType]
) -> Launch:
    """Launch a kernel by ``compile_and_launch`` once, and by what that returned from then on.

    Args:
        call: What to launch.
        compiled: What launches a kernel again, by what it is compiled for.
        kernels: Imports the module that has the kernel.

    Returns:
        What launches it again.
    """
    asked = (call.kernel, *call.kind, *call.constants.values())
    again = compiled.get(asked)
    if again is not None:
        again(call.grid, call.arguments)
        return again
    kernel = getattr(kernels(), f"{call.kernel}_kernel")
    again = compile_and_launch(kernel, call.grid, call.arguments, call.constants)
    compiled[asked] = again
    return again


@functools.cache
def _has_recent_triton() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        version = _triton_version()
    except Exception as error:  # whatever a broken installation raises
        logger.warning(
            "Triton cannot be imported (%s: %s); torch computes instead, which is slower.",
            *(type(error).__name__, error),
        )
        return False
    if version < _LEAST_TRITON:
        logger.warning(
            "Triton %d.%d is too old for the kernels, which need %d.%d or newer (torch 2.8 brings "
            "it); torch computes instead, which is slower.",
            *(*version, *_LEAST_TRITON),
        )
    return version >= _LEAST_TRITON


def _triton_version() -> tuple[int, int]:
    # Not the distribution's version: it has other names with other builds of torch.
    major, minor = importlib.import_module("triton").__version__.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
