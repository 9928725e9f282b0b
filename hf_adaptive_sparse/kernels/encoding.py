"""Encoding and decoding blocks of keys and values in native code, bit for bit as in torch.

The formats and their readable references are ``kvcache/channel.py``, ``grouped.py`` and
``transposed.py``. Only shapes, dtypes and addresses pass to the library (see ``csrc/encode.h``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hf_adaptive_sparse.kernels.library import (
    DTYPES,
    MAX_CODES,
    PATHS,
    active_path,
    check_status,
    library,
)
from hf_adaptive_sparse.packing.bits import packed_size_bytes

_LAYOUTS = {"channel": 0, "group": 1, "transposed": 2}
_METADATA_DTYPES = {
    torch.float32: torch.float16,
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float16,
}
_REFUSED = 4

_Int = ctypes.c_int64
_Address = ctypes.c_void_p


class Format(NamedTuple):
    """How a codec stores blocks.

    Attributes:
        layout: "channel", "group" or "transposed": whose parts they are.
        bits: 2, 3, 4, 6 or 8.
        group: Channels that share a step; None where tokens do.
        fits: Steps of least squares that place the scale, see ``kvcache/fitting.py``.
    """

    layout: str
    bits: int
    group: int | None = None
    fits: int = 0


class _Call(ctypes.Structure):
    """``has_encode_call`` of ``csrc/encode.h``, field by field."""

    _fields_ = (
        *((name, _Int) for name in ("batch", "heads", "blocks", "tokens", "width")),
        *((name, _Int) for name in ("format", "bits", "group", "fits", "dtype")),
        ("states", _Address),
        ("state_strides", _Int * 4),
        ("lengths", _Address),
        ("codes", _Address),
        ("code_strides", _Int * 3),
        ("metadata", _Address * 3),
        ("metadata_strides", _Int * 3 * 3),
        ("threads", _Int),
    )


def encode(
    blocks: torch.Tensor, how: Format, parts: Sequence[torch.Tensor] | None = None
) -> tuple[torch.Tensor, ...] | None:
    """Return the parts of ``blocks``, or None where that is for torch.

    It is for torch where no kernel serves these blocks, and where they cannot be stored (NaN, Inf,
    spans that overflow): torch says what is wrong.

    Args:
        blocks: ``(batch, kv_heads, blocks, tokens, head_dim)``: float32, bfloat16 or float16 on the
            CPU, up to ``MAX_CODES`` tokens and channels.
        how: The codec's format.
        parts: Tensors to fill, of the shapes and dtypes of ``empty_parts`` and what belongs to a
            block of a head contiguous; None: new ones.

    Returns:
        ``(batch, kv_heads, blocks, ...)`` each, as the codec has them.

    Raises:
        ValueError: If ``parts`` are not such tensors.
    """
    if not _serves(blocks.device) or not _takes(blocks.dtype, blocks.shape[3], blocks.shape[4]):
        return None
    if blocks.numel() == 0 or blocks.requires_grad:
        return None
    if blocks.stride(4) != 1:
        blocks = blocks.contiguous()
    if parts is None:
        filled = empty_parts(blocks, how)
    else:
        filled = tuple(parts)
        _check_room(filled, how, blocks)
    call = _describe(how, filled, blocks.shape[3], blocks.shape[4], blocks.dtype)
    call.states = blocks.data_ptr()
    call.state_strides = blocks.stride()[:4]
    return filled if _run("has_encode", call) else None


def decode(
    parts: Sequence[torch.Tensor],
    how: Format,
    block_length: int,
    output: torch.Tensor,
    lengths: Sequence[int] | None = None,
) -> bool:
    """Write what ``parts`` stand for to ``output``; False, and nothing done, where torch has to.

    Args:
        parts: Tensors ``(batch, kv_heads, blocks, ...)``, as the codec has them.
        how: The codec's format.
        block_length: Tokens of a block as it was encoded.
        output: ``(batch, kv_heads, tokens, head_dim)`` of the states' dtype.
        lengths: Tokens to write of each block, from its start; None: all. Blocks follow each other.
    """
    width = output.shape[3]
    if not _serves(output.device) or not are_parts_of(parts, how, block_length, output):
        return False
    call = _describe(how, parts, block_length, width, output.dtype)
    call.states = output.data_ptr()
    strides = output.stride()
    call.state_strides = (strides[0], strides[1], 0, strides[2])
    array = None if lengths is None else (_Int * len(lengths))(*lengths)
    call.lengths = None if array is None else ctypes.addressof(array)
    return _run("has_decode", call)


def are_parts_of(
    parts: Sequence[torch.Tensor], how: Format, block_length: int, output: torch.Tensor
) -> bool:
    """Return whether kernels can decode ``parts`` to ``output``, on a device that they serve.

    That is, whether they are what encoding states like these makes, blocks of heads contiguous, and
    the channels to write are side by side; see ``decode``.
    """
    width = output.shape[3]
    if not _takes(output.dtype, block_length, width):
        return False
    if output.numel() == 0 or output.stride(3) != 1:
        return False
    forms = zip(_shapes(how, block_length, width), _dtypes(how, output.dtype), strict=True)
    return all(
        _is_part(part, *form, output.device) for part, form in zip(parts, forms, strict=True)
    )


def _is_part(
    part: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> bool:
    """Return whether kernels find a block of a head in a part, which has at least one."""
    return (
        part.shape[3:] == shape
        and part.dtype == dtype
        and part.device == device
        and _is_dense(part.shape[3:], part.stride()[3:])
    )


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether elements lie side by side; a view to ask costs as much as all of this."""
    elements = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != elements:
            return False
        elements *= size
    return True


def blocks_of_a_head(parts: Sequence[torch.Tensor]) -> int | None:
    """Return how many blocks lie from one head's first to the next one's, the same in all parts.

    None if that is not the same, or if there is anything between blocks. Rows that a buffer has
    room for behind a head's own count, too.

    Args:
        parts: ``(batch, kv_heads, blocks, ...)``, what belongs to a block of a head contiguous.
    """
    apart = {_blocks_apart(part) for part in parts}
    return apart.pop() if len(apart) == 1 else None


def _blocks_apart(part: torch.Tensor) -> int | None:
    of_batch, of_head, of_block = part.stride()[:3]
    size = part.shape[3:].numel()
    is_regular = of_block == size and of_head % size == 0 and of_batch == part.shape[1] * of_head
    return of_head // size if is_regular else None


def _check_room(parts: Sequence[torch.Tensor], how: Format, blocks: torch.Tensor) -> None:
    """Refuse tensors of other shapes and dtypes than ``empty_parts`` would have."""
    *leading, tokens, width = blocks.shape
    forms = zip(_shapes(how, tokens, width), _dtypes(how, blocks.dtype), strict=True)
    for part, (shape, dtype) in zip(parts, forms, strict=True):
        if list(part.shape[:3]) != leading or not _is_part(part, shape, dtype, blocks.device):
            raise ValueError(
                f"Blocks {tuple(blocks.shape)} are encoded to contiguous {dtype} "
                f"{(*leading, *shape)}, got {part.dtype} {tuple(part.shape)}."
            )


def _takes(dtype: torch.dtype, tokens: int, width: int) -> bool:
    return dtype in DTYPES and 1 <= tokens <= MAX_CODES and 1 <= width <= MAX_CODES


def _serves(device: torch.device) -> bool:
    return device.type == "cpu" and active_path() is not None


def _shapes(how: Format, tokens: int, width: int) -> tuple[tuple[int, ...], ...]:
    """Return the parts' shapes behind batch, heads and blocks."""
    if how.layout == "channel":
        return (tokens, packed_size_bytes(width, how.bits)), (width,), (width,)
    groups = -(-width // min(how.group or width, width))
    if how.layout == "group":
        return (tokens, packed_size_bytes(width, how.bits)), (tokens, groups), (tokens, groups)
    codes = (width, packed_size_bytes(tokens, how.bits))
    return codes, (groups, tokens), (groups, tokens), (4,)


def _dtypes(how: Format, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Return the parts' dtypes, of states of a dtype."""
    kept, eight = _METADATA_DTYPES[dtype], torch.uint8
    return (eight, eight, eight, kept) if how.layout == "transposed" else (eight, kept, kept)


def empty_parts(blocks: torch.Tensor, how: Format) -> tuple[torch.Tensor, ...]:
    """Allocate what is filled by encoding ``blocks``: contiguous, uninitialised."""
    forms = zip(
        _shapes(how, blocks.shape[3], blocks.shape[4]), _dtypes(how, blocks.dtype), strict=True
    )
    return tuple(
        blocks.new_empty((*blocks.shape[:3], *shape), dtype=dtype) for shape, dtype in forms
    )


def _describe(
    how: Format, parts: Sequence[torch.Tensor], tokens: int, width: int, dtype: torch.dtype
) -> _Call:
    """Fill in all but the states."""
    codes, *metadata = parts
    call = _Call()
    call.batch, call.heads, call.blocks = codes.shape[:3]
    call.tokens, call.width = tokens, width
    call.format = _LAYOUTS[how.layout]
    call.bits = how.bits
    call.group = min(how.group or width, width)
    call.fits = how.fits
    call.dtype = DTYPES[dtype]
    call.codes = codes.data_ptr()
    call.code_strides = codes.stride()[:3]
    for i, part in enumerate(metadata):
        call.metadata[i] = part.data_ptr()
        call.metadata_strides[i] = part.stride()[:3]
    call.threads = torch.get_num_threads()
    return call


def _run(function: str, call: _Call) -> bool:
    """Return whether the library did it; False if it refused the states."""
    loaded, path = library(), active_path()
    if loaded is None or path is None:
        return False
    status: int = getattr(loaded, function)(PATHS[path], ctypes.byref(call))
    if status not in (0, _REFUSED):
        check_status(status, "encoding")
    return status == 0
