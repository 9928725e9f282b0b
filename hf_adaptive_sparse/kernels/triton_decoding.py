"""Blocks of keys and values from bytes on a GPU, by Triton: one launch for all blocks of a prompt.

For attention that reads states: over a prompt, or by another implementation. That of a few queries
reads the blocks as they are (``triton_attention``). What is written is what ``kernels/encoding.py``
writes, to the last bit. With ``TRITON_INTERPRET=1`` the kernels run on CPU tensors, for tests.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch

from hf_adaptive_sparse.kernels.encoding import Format, are_parts_of
from hf_adaptive_sparse.kernels.triton_decode_plan import prepare
from hf_adaptive_sparse.kernels.triton_device import (
    Launch,
    LaunchError,
    launch,
    launch_call,
    on_device,
    serves,
)

__all__ = ["LaunchError", "decode", "is_supported"]


def is_supported(
    parts: Sequence[torch.Tensor], how: Format, block_length: int, output: torch.Tensor
) -> bool:
    """Return whether ``decode`` can take these; see there."""
    return are_parts_of(parts, how, block_length, output) and serves(output.device)


def decode(
    parts: Sequence[torch.Tensor],
    how: Format,
    block_length: int,
    output: torch.Tensor,
    lengths: Sequence[int] | None = None,
) -> None:
    """Write what ``parts`` stand for to ``output``.

    Args:
        parts: Tensors ``(batch, kv_heads, blocks, ...)`` as the codec has them, see
            ``is_supported``; what belongs to one head of one block is contiguous.
        how: The codec's format.
        block_length: Tokens of a block as it was encoded.
        output: ``(batch, kv_heads, tokens, head_dim)`` of the states' dtype, channels side by side.
        lengths: Tokens to write of each block, from its start; None: all. Blocks follow each other.

    Raises:
        LaunchError: If Triton fails to compile or launch the kernel for this call, now or before:
            what failed once is not tried again.
    """
    with on_device(output.device):
        call = prepare(parts, how, block_length, output, lengths)
        kernel = (call.kernel, output.device, output.dtype, *call.constants.values())
        launch(_failures, kernel, lambda: launch_call(call, _compiled, _kernels))


_failures: dict[object, str] = {}
"""Kernels that failed to compile or launch on a device, and the error."""

_compiled: dict[object, Launch] = {}
"""What launches a kernel again, by what it is compiled for."""


def _kernels() -> ModuleType:
    # Not at the head of this module: Triton is optional and slow to import.
    return importlib.import_module("hf_adaptive_sparse.kernels.triton_decode_kernels")
