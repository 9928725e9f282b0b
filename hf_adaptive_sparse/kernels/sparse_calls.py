"""What the native library is asked for: a call's fields, and what a weight's calls share."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch

from hf_adaptive_sparse.kernels.library import DTYPES, PATHS, active_path, library
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.packing.upper_bytes import BOOK_WORDS

Int = ctypes.c_int64
Address = ctypes.c_void_p

_TOKENS, _REGISTER_TOKENS, _AMX_TOKENS = 8, 32, 128
_BEFORE_MANY, _CODES_BEFORE_MANY = 32, 64
_AMX_GROUPS = 64  # columns: groups are to be a multiple


class Call(ctypes.Structure):
    """``has_sparse_call`` of ``csrc/sparse.h``, field by field."""

    _fields_ = (
        *((name, Int) for name in ("rows", "columns", "bits", "dtype", "group_size")),
        ("bitmask", Address),
        ("values", Address),
        ("value_bytes", Int),
        ("row_offsets", Address),
        ("offset_bytes", Int),
        ("scales", Address),
        ("codebook", Address),
        ("exceptions", Int),
        ("tokens", Int),
        ("x", Address),
        ("x_stride", Int),
        ("bias", Address),
        ("output", Address),
        *((name, Int) for name in ("output_stride", "first_row", "last_row", "widens", "threads")),
    )


class Prepared(NamedTuple):
    """What calls with one weight share, worked out once.

    Attributes:
        call: To be copied for each call; its fields about the weight are filled in, but for the
            addresses: where a parameter's data lies may change.
        dtype: Dtype of the weight, of x and of the bias.
        most_tokens: See ``sparse_native.tokens_that_pay``.
        number: Number of the path in the library.
        multiply: The library's ``has_sparse_linear``.
        decompress: Its ``has_sparse_dense``.
        takes_many: Whether the library multiplies many tokens: see ``sparse_many``.
    """

    call: Call
    dtype: torch.dtype
    most_tokens: int
    number: int
    multiply: Callable[..., int]
    decompress: Callable[..., int]
    takes_many: bool


def prepared_for(weight: SparseWeight) -> Prepared | None:
    """Return what calls with this weight share; None: no kernel takes it.

    A weight keeps its path: in a model, with its weights between two calls, one look at the
    environment costs as much as a small product. Its tensors may get data of another dtype.
    """
    dtype = (weight.values if weight.scales is None else weight.scales).dtype
    try:
        prepared: Prepared | None = weight.prepared[dtype]  # a tuple to look up costs, too
    except KeyError:
        prepared = weight.prepared[dtype] = _prepare(weight)
    return prepared


def _prepare(weight: SparseWeight) -> Prepared | None:
    loaded, dtype = library(), weight.dtype
    if loaded is None or weight.device.type != "cpu" or dtype not in DTYPES:
        return None
    path = active_path()
    if path is None:
        return None
    call = Call(
        rows=weight.shape[0],
        columns=weight.shape[1],
        bits=weight.value_bits,
        dtype=DTYPES[dtype],
        group_size=weight.group_size or 0,
        offset_bytes=weight.row_offsets.element_size(),
    )
    takes_many = path == "amx" and dtype is torch.bfloat16
    return Prepared(
        call,
        dtype,
        _tokens_that_pay(weight, path, loaded, takes_many),
        PATHS[path],
        loaded.has_sparse_linear,
        loaded.has_sparse_dense,
        takes_many,
    )


def needed_for(weight: SparseWeight) -> Prepared:
    """Return what calls with this weight share.

    Raises:
        ValueError: If no kernel takes it.
    """
    prepared = prepared_for(weight)
    if prepared is None:
        raise ValueError("There is no native library here; `is_supported` says so beforehand.")
    return prepared


def _tokens_that_pay(weight: SparseWeight, path: str, loaded: ctypes.CDLL, takes_many: bool) -> int:
    if loaded.has_sparse_in_registers(PATHS[path]):
        return _REGISTER_TOKENS
    if path != "amx":
        return _TOKENS
    if weight.scales is None:
        return _BEFORE_MANY if takes_many else _TOKENS
    if (weight.group_size or _AMX_GROUPS) % _AMX_GROUPS:
        return _TOKENS
    return _CODES_BEFORE_MANY if takes_many else _AMX_TOKENS


def call_for(prepared: Prepared, weight: SparseWeight) -> Call:
    """Return a call of one's own with the weight's fields filled in."""
    values, scales, codebook = weight.values, weight.scales, weight.codebook
    call = Call.from_buffer_copy(prepared.call)
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
