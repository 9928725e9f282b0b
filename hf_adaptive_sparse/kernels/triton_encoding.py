"""Blocks of keys and values into bytes on a GPU, by Triton: one launch for all blocks of a prompt.

What is stored is what ``kernels/encoding.py`` stores, to the last bit; ``triton_decoding`` is the
way back. With ``TRITON_INTERPRET=1`` the kernels run on CPU tensors, for tests.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch

from hf_adaptive_sparse.kernels.encoding import Format, blocks_of_a_head, empty_parts
from hf_adaptive_sparse.kernels.library import DTYPES
from hf_adaptive_sparse.kernels.triton_device import (
    Launch,
    LaunchError,
    launch,
    launch_call,
    on_device,
    serves,
)
from hf_adaptive_sparse.kernels.triton_encode_plan import prepare, takes

__all__ = ["LaunchError", "encode", "is_supported"]


def is_supported(blocks: torch.Tensor, how: Format) -> bool:
    """Return whether ``encode`` can take these; see there."""
    return (
        blocks.dtype in DTYPES
        and blocks.numel() > 0
        and not blocks.requires_grad
        and takes(how, blocks.shape[3], blocks.shape[4])
        and serves(blocks.device)
    )


def encode(
    blocks: torch.Tensor,
    how: Format,
    room: Sequence[torch.Tensor] | None = None,
    refused: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...] | None:
    """Return the parts of ``blocks``, or None where they are known not to be storable.

    They are not where there is NaN or Inf, or spans overflow.

    Args:
        blocks: ``(batch, kv_heads, blocks, tokens, head_dim)``, see ``is_supported``; copied where
            the channels of a head are not side by side.
        how: The codec's format.
        room: Tensors to fill, as ``encoding.encode`` has them; None: new ones.
        refused: int32 ``(1,)`` on the device, which becomes 1 where blocks cannot be stored and is
            for the caller to read. None: the host waits for the device to know.

    Returns:
        ``(batch, kv_heads, blocks, ...)`` each, as the codec has them: ``room``, or new tensors
        where heads do not lie there as the kernels have them.

    Raises:
        LaunchError: If Triton fails to compile or launch the kernel for this call, now or before:
            what failed once is not tried again.
    """
    if blocks.stride(4) != 1:
        blocks = blocks.contiguous()
    head_blocks = None if room is None else blocks_of_a_head(room)
    if room is None or head_blocks is None:
        parts, head_blocks = empty_parts(blocks, how), blocks.shape[2]
    else:
        parts = tuple(room)
    flag = blocks.new_zeros(1, dtype=torch.int32) if refused is None else refused
    with on_device(blocks.device):
        call = prepare(blocks, how, parts, flag, head_blocks)
        kernel = (call.kernel, blocks.device, blocks.dtype, *call.constants.values())
        launch(_failures, kernel, lambda: launch_call(call, _compiled, _kernels))
        return None if refused is None and bool(flag) else parts


_failures: dict[object, str] = {}
"""Kernels that failed to compile or launch on a device, and the error."""

_compiled: dict[object, Launch] = {}
"""What launches a kernel again, by what it is compiled for."""


def _kernels() -> ModuleType:
    # Not at the head of this module: Triton is optional and slow to import.
    return importlib.import_module("hf_adaptive_sparse.kernels.triton_encode_kernels")
