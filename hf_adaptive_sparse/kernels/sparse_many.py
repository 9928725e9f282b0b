"""Products of many tokens with a sparse weight in native code, where a CPU has a matrix unit (AMX).

Rows are decompressed into the cache of the thread that multiplies them; see
``csrc/sparse_amx_many.h``. Through tiles (``sparse_tiles``) dense weights are written to memory,
and torch reads them to write them once more, in its matrix product's order.
"""

from __future__ import annotations

import ctypes

import torch

from hf_adaptive_sparse.kernels.library import check_status, library
from hf_adaptive_sparse.kernels.scratch import scratch
from hf_adaptive_sparse.kernels.sparse_calls import (
    Address,
    Call,
    Prepared,
    call_for,
    needed_for,
    prepared_for,
)
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight

MOST_BYTES = 32 << 20
"""Memory of a product. Tokens that need more are split, but not ``LEAST_TOKENS`` or fewer.

Every thread's decompressed rows are part of it, so that many threads take more all the same.
"""

LEAST_TOKENS = 512


def takes(weight: SparseWeight) -> bool:
    """Return whether ``linear`` takes this weight, and is meant to beat torch's product."""
    prepared = prepared_for(weight)
    return prepared is not None and prepared.takes_many and weight.values.is_cpu


def linear(x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x @ W.T + bias`` for many tokens.

    Codes times scales are rounded to bfloat16, as in the dense runtime; sums are float32.

    Args:
        x: ``(tokens, columns)`` in the weight's dtype, on the CPU.
        weight: See ``takes``.
        bias: ``(rows,)`` in that dtype, or None.

    Returns:
        ``(tokens, rows)`` in that dtype, contiguous.

    Raises:
        ValueError: If there is no library.
        RuntimeError: If it does not take the weight.
    """
    prepared, loaded = needed_for(weight), library()
    assert loaded is not None
    (tokens, columns), rows = x.shape, weight.shape[0]
    output = x.new_empty((tokens, rows))
    if output.numel() == 0 or columns == 0:
        return output.zero_() if bias is None else output.copy_(bias)
    x = x if x.stride(1) == 1 else x.contiguous()
    call = call_for(prepared, weight)
    if bias is not None:
        bias = bias.contiguous()
        call.bias = bias.data_ptr()
    call.x_stride, call.output_stride = x.stride(0), rows
    together = call.tokens = tokens
    while (size := _size_bytes(loaded, prepared, call)) > MOST_BYTES and together > LEAST_TOKENS:
        together = call.tokens = -(-together // 32) * 16  # half of them, in tiles of 16
    memory = scratch(size)
    for start in range(0, tokens, together):
        call.x = x.data_ptr() + start * call.x_stride * x.element_size()
        call.output = output.data_ptr() + start * rows * x.element_size()
        call.tokens = min(tokens - start, together)
        status = loaded.has_sparse_many_linear(
            prepared.number, ctypes.byref(call), Address(memory.data_ptr())
        )
        check_status(status, "sparse")
    return output


def _size_bytes(loaded: ctypes.CDLL, prepared: Prepared, call: Call) -> int:
    return int(loaded.has_sparse_many_bytes(prepared.number, ctypes.byref(call)))
