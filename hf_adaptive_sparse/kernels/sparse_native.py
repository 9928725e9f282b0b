"""Products with a sparse weight in native code, and its decompression.

Only shapes, dtypes and addresses pass to the library (see ``csrc/sparse.h``). The weight is read
once, whatever the number of tokens; ``csrc/sparse_body.h`` says how.
"""

from __future__ import annotations

import ctypes

import torch

from hf_adaptive_sparse.kernels.library import PATHS, active_path, library
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight, offset_dtype

MAX_TOKENS = 32
"""Tokens that the library takes at once; more are split."""

_TOKENS, _AMX_TOKENS = 8, 128
_AMX_GROUPS = 64  # columns: groups are to be a multiple

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STATUS = {1: "no such path on this processor", 2: "no memory", 3: "sizes out of range"}

_PATH = "native path"

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
        ("tokens", _Int),
        ("x", _Address),
        ("x_stride", _Int),
        ("bias", _Address),
        ("output", _Address),
        *((name, _Int) for name in ("output_stride", "first_row", "last_row", "threads")),
    )


def path_of(weight: SparseWeight) -> str | None:
    """Return the path that takes this weight; None: there is no library, or it does not.

    A weight keeps its path: in a model, with its weights between two calls, one look at the
    environment costs as much as a small product.
    """
    try:
        path: str | None = weight.prepared[_PATH]
    except KeyError:
        taken = weight.device.type == "cpu" and weight.dtype in _DTYPES
        path = weight.prepared[_PATH] = active_path() if taken else None
    return path


def is_supported(weight: SparseWeight) -> bool:
    """Return whether the library is there and takes this weight."""
    return path_of(weight) is not None


def tokens_that_pay(weight: SparseWeight) -> int:
    """Return the tokens up to which ``linear`` is meant to beat tiles and torch's matrix product.

    That is settled by the processor, not measured. Row by row, a kernel takes as long again for
    every token, and is overtaken at about eight. The matrix unit (AMX) takes 32 tokens in hardly
    more time than one, and up to 128 reads the weight four times and is still ahead of tiles; it
    does so for values in bfloat16, and for codes in whole groups of 64 columns.
    """
    if path_of(weight) != "amx":
        return _TOKENS
    if weight.scales is None:
        return _AMX_TOKENS if weight.dtype == torch.bfloat16 else _TOKENS
    return _AMX_TOKENS if (weight.group_size or _AMX_GROUPS) % _AMX_GROUPS == 0 else _TOKENS


def linear(x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x @ W.T + bias`` for a few tokens.

    Sums are float32. With values as they are, so are the products: in bfloat16 the result is as
    close to the float32 reference as its own rounding allows. With codes, x is rounded to 15 bits
    and a sign on a step of its own for at most 256 columns, which adds an error of at most
    ``max |x| / 65534 * sum |w|`` per such segment.

    Args:
        x: ``(tokens, columns)`` in the weight's dtype, on the CPU.
        weight: ``(rows, columns)``, contiguous tensors; see ``is_supported``.
        bias: ``(rows,)`` in that dtype, or None.

    Returns:
        ``(tokens, rows)`` in that dtype, contiguous.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    output = x.new_empty((x.shape[0], weight.shape[0]))
    if output.numel() == 0 or x.shape[1] == 0:
        return output.zero_() if bias is None else output.copy_(bias)
    if bias is not None:
        bias = bias.contiguous()
    call = _describe(weight)
    call.x_stride = x.stride(0)
    call.bias = None if bias is None else bias.data_ptr()
    call.output_stride = weight.shape[0]
    for start in range(0, x.shape[0], MAX_TOKENS):
        call.tokens = min(MAX_TOKENS, x.shape[0] - start)
        call.x = x.data_ptr() + start * x.stride(0) * x.element_size()
        call.output = output.data_ptr() + start * weight.shape[0] * x.element_size()
        _run("has_sparse_linear", call, path_of(weight))
    return output


def decompress(weight: SparseWeight, start: int, stop: int, output: torch.Tensor) -> None:
    """Write rows ``start`` to ``stop - 1`` of the weight to ``output``.

    Args:
        weight: See ``is_supported``.
        start: First row.
        stop: Last row plus one.
        output: ``(stop - start, columns)`` in the weight's dtype, contiguous rows; codes times
            scales are rounded to it.
    """
    if output.numel() == 0:
        return
    call = _describe(weight)
    call.first_row, call.last_row = start, stop
    call.output, call.output_stride = output.data_ptr(), output.stride(0)
    _run("has_sparse_dense", call, path_of(weight))


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
    _check(status)
    return offsets.to(offset_dtype(int(offsets[-1])))


def _describe(weight: SparseWeight) -> _Call:
    """Fill in the fields of the weight."""
    call = _Call()
    call.rows, call.columns = weight.shape
    call.bits = weight.bits
    call.dtype = _DTYPES[weight.dtype]
    call.group_size = weight.group_size or 0
    call.bitmask = weight.bitmask.data_ptr()
    call.values = weight.values.data_ptr()
    call.value_bytes = weight.values.nbytes
    call.row_offsets = weight.row_offsets.data_ptr()
    call.offset_bytes = weight.row_offsets.element_size()
    call.scales = None if weight.scales is None else weight.scales.data_ptr()
    call.threads = torch.get_num_threads()
    return call


def _run(function: str, call: _Call, path: str | None) -> None:
    loaded = library()
    if loaded is None or path is None:
        raise ValueError("There is no native library here; `is_supported` says so beforehand.")
    _check(getattr(loaded, function)(PATHS[path], ctypes.byref(call)))


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"The sparse kernel failed: {_STATUS.get(status, status)}.")
