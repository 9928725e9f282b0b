"""Products of a few tokens with a sparse weight in native code, and its decompression.

Only shapes, dtypes and addresses pass to the library (see ``csrc/sparse.h``). The weight is read
once, whatever the number of tokens; ``csrc/sparse_body.h`` says how.
"""

from __future__ import annotations

import ctypes

import torch

from hf_adaptive_sparse.kernels.library import check_status, library
from hf_adaptive_sparse.kernels.sparse_calls import (
    Address,
    Int,
    call_for,
    needed_for,
    prepared_for,
)
from hf_adaptive_sparse.packing.offsets import offset_dtype
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight

MAX_TOKENS = 32
"""Tokens that the library takes at once; more are split."""


def is_supported(weight: SparseWeight) -> bool:
    """Return whether the library is there and takes this weight."""
    return prepared_for(weight) is not None


def tokens_that_pay(weight: SparseWeight) -> int:
    """Return the tokens up to which ``linear`` is meant to be the fastest way.

    That is settled by the processor, not measured. Row by row, a kernel takes as long again for
    every token, and is overtaken by torch's matrix product at about eight; at about 32 where rows
    are expanded in registers, on processors whose matrix products are slower, too. The matrix unit
    (AMX) takes 32 tokens in hardly more time than two, for values in bfloat16 and for codes in
    whole groups of 64 columns. With up to 128 it reads the weight four times and is still ahead of
    torch's product, but where ``sparse_many`` takes the weight, that overtakes it at 32, or at 64
    with codes.
    """
    prepared = prepared_for(weight)
    return 0 if prepared is None else prepared.most_tokens


def takes(x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None) -> bool:
    """Return whether ``linear`` takes these, and is meant to be the fastest way.

    Whatever is wrong with them: then the answer is no.
    """
    prepared = prepared_for(weight)
    if prepared is None or x.dtype is not prepared.dtype or x.dim() == 0:
        return False
    if not (x.is_cpu and weight.values.is_cpu):
        return False
    rows, columns = weight.shape
    return (
        x.shape[-1] == columns
        and 0 < x.numel() <= prepared.most_tokens * columns
        and (
            bias is None or (bias.dtype is prepared.dtype and bias.is_cpu and bias.shape == (rows,))
        )
    )


def linear(x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x @ W.T + bias`` for a few tokens.

    Sums are float32. With values as they are, so are the products: in bfloat16 the result is as
    close to the float32 reference as its own rounding allows. With codes, x is rounded to 15 bits
    and a sign on a step of its own for at most 256 columns, in a float32 model, too. That adds an
    error of at most ``max |x| / 65278 * sum |w|`` per such segment: about a hundredth of what 8
    bits have rounded off the weights. Two paths leave x as it is: ``avx512f``, and ``avx512`` on
    processors that do not multiply bfloat16.

    Every linear of a model comes here for every token, right after another one's weights went
    through the processor's caches: each thing touched costs a hundred times what it costs in a
    loop, torch's functions most of all.

    Args:
        x: ``(..., columns)`` in the weight's dtype, on the CPU.
        weight: ``(rows, columns)``, contiguous tensors; see ``is_supported``.
        bias: ``(rows,)`` in that dtype, or None.

    Returns:
        ``(..., rows)`` in that dtype, contiguous.

    Raises:
        ValueError: If there is no library, or it does not take the weight.
    """
    prepared = needed_for(weight)
    rows, columns = weight.shape
    shape = x.shape
    output = x.new_empty((*shape[:-1], rows))
    tokens = shape[:-1].numel()
    if tokens == 0 or rows == 0 or columns == 0:
        return output.zero_() if bias is None else output.copy_(bias)
    if not x.is_contiguous():
        x = x.contiguous()
    call = call_for(prepared, weight)
    if bias is not None:
        bias = bias.contiguous()
        call.bias = bias.data_ptr()
    call.x_stride, call.output_stride = columns, rows
    for start in range(0, tokens, MAX_TOKENS):
        call.x = x.data_ptr() + start * columns * x.element_size()
        call.output = output.data_ptr() + start * rows * x.element_size()
        call.tokens = min(tokens - start, MAX_TOKENS)
        check_status(prepared.multiply(prepared.number, ctypes.byref(call)), "sparse")
    return output


def decompress(weight: SparseWeight, start: int, stop: int, output: torch.Tensor) -> None:
    """Write rows ``start`` to ``stop - 1`` of the weight to ``output``.

    Args:
        weight: See ``is_supported``.
        start: First row.
        stop: Last row plus one.
        output: ``(stop - start, columns)`` in the weight's dtype or float32, contiguous rows; codes
            times scales are rounded to the weight's dtype.

    Raises:
        ValueError: If there is no library, or it does not take the weight.
    """
    if output.numel() == 0:
        return
    prepared = needed_for(weight)
    call = call_for(prepared, weight)
    call.first_row, call.last_row = start, stop
    call.widens = output.dtype == torch.float32
    call.output, call.output_stride = output.data_ptr(), output.stride(0)
    check_status(prepared.decompress(prepared.number, ctypes.byref(call)), "sparse")


def count_row_offsets(bitmask: torch.Tensor) -> torch.Tensor | None:
    """Return the offsets of a contiguous bitmask in memory; None where there is no library."""
    loaded = library()
    if loaded is None or not bitmask.is_contiguous():
        return None
    rows, row_bytes = bitmask.shape
    offsets = torch.empty(rows + 1, dtype=torch.int64, device="cpu")
    status = loaded.has_row_offsets(
        Address(bitmask.data_ptr()),
        Int(rows),
        Int(row_bytes),
        Address(offsets.data_ptr()),
        Int(torch.get_num_threads()),
    )
    check_status(status, "sparse")
    return offsets.to(offset_dtype(int(offsets[-1])))
