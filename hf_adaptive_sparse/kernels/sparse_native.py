"""Products with a sparse weight in native code, and its decompression.

Only shapes, dtypes and addresses pass to the library (see ``csrc/sparse.h``). The weight is read
once, whatever the number of tokens; ``csrc/sparse_body.h`` says how.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch

from hf_adaptive_sparse.kernels.library import (
    DTYPES,
    PATHS,
    active_path,
    check_status,
    library,
)
from hf_adaptive_sparse.packing.offsets import offset_dtype
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.packing.upper_bytes import BOOK_WORDS

MAX_TOKENS = 32
"""Tokens that the library takes at once; more are split."""

_TOKENS, _REGISTER_TOKENS, _AMX_TOKENS = 8, 32, 128
_AMX_GROUPS = 64  # columns: groups are to be a multiple

_Int = ctypes.c_int64
_Address = ctypes.c_void_p


class _Call(ctypes.Structure):
    """``has_sparse_call`` of ``csrc/sparse.h``, field by field."""

    _fields_ = (
        *((name, _Int) for name in ("rows", "columns", "bits", "dtype", "group_size")),
        ("bitmask", _Address),
        ("values", _Address),
        ("value_bytes", _Int),
        ("row_offsets", _Address),
        ("offset_bytes", _Int),
        ("scales", _Address),
        ("codebook", _Address),
        ("exceptions", _Int),
        ("tokens", _Int),
        ("x", _Address),
        ("x_stride", _Int),
        ("bias", _Address),
        ("output", _Address),
        *((name, _Int) for name in ("output_stride", "first_row", "last_row", "widens", "threads")),
    )


class _Prepared(NamedTuple):
    """What calls with one weight share, worked out once.

    Attributes:
        call: To be copied for each call; its fields about the weight are filled in, but for the
            addresses: where a parameter's data lies may change.
        dtype: Dtype of the weight, of x and of the bias.
        most_tokens: See ``tokens_that_pay``.
        number: Number of the path in the library.
        multiply: The library's ``has_sparse_linear``.
        decompress: Its ``has_sparse_dense``.
    """

    call: _Call
    dtype: torch.dtype
    most_tokens: int
    number: int
    multiply: Callable[..., int]
    decompress: Callable[..., int]


def _prepared(weight: SparseWeight) -> _Prepared | None:
    """Return what calls with this weight share; None: no kernel takes it.

    A weight keeps its path: in a model, with its weights between two calls, one look at the
    environment costs as much as a small product. Its tensors may get data of another dtype.
    """
    dtype = (weight.values if weight.scales is None else weight.scales).dtype
    try:
        prepared: _Prepared | None = weight.prepared[dtype]  # a tuple to look up costs, too
    except KeyError:
        prepared = weight.prepared[dtype] = _prepare(weight)
    return prepared


def _prepare(weight: SparseWeight) -> _Prepared | None:
    loaded, dtype = library(), weight.dtype
    if loaded is None or weight.device.type != "cpu" or dtype not in DTYPES:
        return None
    path = active_path()
    if path is None:
        return None
    call = _Call(
        rows=weight.shape[0],
        columns=weight.shape[1],
        bits=weight.value_bits,
        dtype=DTYPES[dtype],
        group_size=weight.group_size or 0,
        offset_bytes=weight.row_offsets.element_size(),
    )
    return _Prepared(
        call,
        dtype,
        _tokens_that_pay(weight, path, loaded),
        PATHS[path],
        loaded.has_sparse_linear,
        loaded.has_sparse_dense,
    )


def is_supported(weight: SparseWeight) -> bool:
    """Return whether the library is there and takes this weight."""
    return _prepared(weight) is not None


def tokens_that_pay(weight: SparseWeight) -> int:
    """Return the tokens up to which ``linear`` is meant to beat tiles and torch's matrix product.

    That is settled by the processor, not measured. Row by row, a kernel takes as long again for
    every token, and is overtaken at about eight; at about 32 where rows are expanded in registers,
    on processors whose matrix products are slower, too. The matrix unit (AMX) takes 32 tokens in
    hardly more time than two, and up to 128 reads the weight four times and is still ahead of
    tiles; it does so for values in bfloat16, and for codes in whole groups of 64 columns.
    """
    prepared = _prepared(weight)
    return 0 if prepared is None else prepared.most_tokens


def _tokens_that_pay(weight: SparseWeight, path: str, loaded: ctypes.CDLL) -> int:
    if loaded.has_sparse_in_registers(PATHS[path]):
        return _REGISTER_TOKENS
    if path != "amx":
        return _TOKENS
    if weight.scales is None:
        return _AMX_TOKENS if weight.dtype == torch.bfloat16 else _TOKENS
    return _AMX_TOKENS if (weight.group_size or _AMX_GROUPS) % _AMX_GROUPS == 0 else _TOKENS


def takes(x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None) -> bool:
    """Return whether ``linear`` takes these, and is meant to be the fastest way.

    Whatever is wrong with them: then the answer is no.
    """
    prepared = _prepared(weight)
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
    prepared = _needed(weight)
    rows, columns = weight.shape
    shape = x.shape
    output = x.new_empty((*shape[:-1], rows))
    tokens = shape[:-1].numel()
    if tokens == 0 or rows == 0 or columns == 0:
        return output.zero_() if bias is None else output.copy_(bias)
    if not x.is_contiguous():
        x = x.contiguous()
    call = _call(prepared, weight)
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
    prepared = _needed(weight)
    call = _call(prepared, weight)
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
        _Address(bitmask.data_ptr()),
        _Int(rows),
        _Int(row_bytes),
        _Address(offsets.data_ptr()),
        _Int(torch.get_num_threads()),
    )
    check_status(status, "sparse")
    return offsets.to(offset_dtype(int(offsets[-1])))


def _needed(weight: SparseWeight) -> _Prepared:
    prepared = _prepared(weight)
    if prepared is None:
        raise ValueError("There is no native library here; `is_supported` says so beforehand.")
    return prepared


def _call(prepared: _Prepared, weight: SparseWeight) -> _Call:
    """Return a call of one's own with the weight's fields filled in."""
    values, scales, codebook = weight.values, weight.scales, weight.codebook
    call = _Call.from_buffer_copy(prepared.call)
    call.bitmask = weight.bitmask.data_ptr()
    call.values = values.data_ptr()
    call.value_bytes = values.nbytes
    call.row_offsets = weight.row_offsets.data_ptr()
    if scales is not None:
        call.scales = scales.data_ptr()
    elif codebook is not None:
        call.codebook = codebook.data_ptr()
        call.exceptions = codebook.numel() - BOOK_WORDS
    call.threads = torch.get_num_threads()
    return call
