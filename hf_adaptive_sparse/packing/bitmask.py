"""One sparse weight: a bit per position that says whether it is kept, and the kept values in order.

The layout of a weight of shape ``(out, in)`` is

* ``values`` ``(nnz,)`` in the weight's dtype: the kept entries, row by row;
* ``bitmask`` uint8 ``(out, ceil(in / 8))``: column ``j`` is bit ``j % 8`` of byte ``j // 8``, the
  least significant bit first, and the bits after the last column are 0::

      column    7 6 5 4 3 2 1 0 | 15 14 13 12 11 10 9 8 | ...
      byte            0         |           1           | ...

An entry is kept when its bit pattern is not all zero, so ``-0.0`` and every NaN survive and
``decompress(*compress(w), columns)`` equals ``w`` bit for bit. Its size is
``nnz * value_bytes + out * ceil(in / 8)``: at 16 bits and half the weights, 0.5625 of the dense
weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hf_adaptive_sparse.errors import AdaptiveSparseError

_CHUNK_ELEMENTS = 1 << 22  # of a weight that is taken apart or put together at a time
_INTEGER_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class BitmaskError(AdaptiveSparseError, ValueError):
    """A bitmask and its values do not describe one weight."""


def row_bytes(columns: int) -> int:
    """Return the bytes one row of a bitmask takes: ``ceil(columns / 8)``."""
    return (columns + 7) // 8


def compressed_size_bytes(rows: int, columns: int, nnz: int, value_bytes: int) -> int:
    """Return the bytes of values and bitmask: ``nnz * value_bytes + rows * ceil(columns / 8)``."""
    return nnz * value_bytes + rows * row_bytes(columns)


def row_chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield first and last row, plus one, of consecutive parts of a weight; one part at least."""
    step = max(1, _CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step) if rows else (0,):
        yield start, min(rows, start + step)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Pack a boolean mask, eight columns to a byte.

    Args:
        mask: bool ``(rows, columns)``.

    Returns:
        uint8 ``(rows, ceil(columns / 8))``, little-endian bit order, on the mask's device.

    Raises:
        BitmaskError: If ``mask`` is not a two-dimensional boolean tensor.
    """
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise BitmaskError(f"A mask must be bool of shape (rows, columns), got {_describe(mask)}.")
    rows, columns = mask.shape
    nbytes = row_bytes(columns)
    padded = mask.new_zeros((rows, nbytes * 8))
    padded[:, :columns] = mask
    bits = padded.view(torch.uint8).view(rows, nbytes, 8)
    packed = bits[:, :, 0].clone()
    for place in range(1, 8):
        packed |= bits[:, :, place] << place
    return packed


def unpack_mask(bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpack a bitmask.

    Args:
        bitmask: uint8 ``(rows, ceil(columns / 8))``.
        columns: Columns of the mask.

    Returns:
        bool ``(rows, columns)`` on the bitmask's device.

    Raises:
        BitmaskError: If the bitmask is not of that shape and dtype, or has a bit set after the
            last column.
    """
    check_bitmask(bitmask, columns)
    rows, nbytes = bitmask.shape
    places = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    bits = (bitmask.unsqueeze(-1) >> places).bitwise_and_(1)
    return bits.view(torch.bool).view(rows, nbytes * 8)[:, :columns]


def row_popcounts(bitmask: torch.Tensor) -> torch.Tensor:
    """Return the set bits of each row: int64 ``(rows,)`` from uint8 ``(rows, bytes)``."""
    if bitmask.dtype != torch.uint8 or bitmask.dim() != 2:
        raise BitmaskError(f"A bitmask must be uint8 (rows, bytes), got {_describe(bitmask)}.")
    # Neighbouring bits, then pairs, then nibbles are added up inside each byte.
    pairs = bitmask - ((bitmask >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    counts = (nibbles + (nibbles >> 4)) & 0x0F
    return counts.sum(dim=1, dtype=torch.int64)


def popcount(bitmask: torch.Tensor) -> int:
    """Return the number of set bits of a uint8 ``(rows, bytes)`` bitmask."""
    return int(row_popcounts(bitmask).sum())


def kept_mask(weight: torch.Tensor) -> torch.Tensor:
    """Return which entries of a weight are kept.

    Args:
        weight: ``(out, in)``, any real dtype of 1, 2, 4 or 8 bytes.

    Returns:
        bool ``(out, in)``: where the bit pattern is not all zero.

    Raises:
        BitmaskError: If its dtype has another size.
    """
    return _pattern(weight) != 0


def compress(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a weight into its kept values and their bitmask.

    Beside these, some rows at a time are in memory.

    Args:
        weight: ``(out, in)``, any real dtype of 1, 2, 4 or 8 bytes.

    Returns:
        ``values`` ``(nnz,)`` in the weight's dtype, row by row, and ``bitmask`` uint8
        ``(out, ceil(in / 8))``, both on the weight's device.

    Raises:
        BitmaskError: If the weight is not two-dimensional or its dtype has another size.
    """
    if weight.dim() != 2:
        raise BitmaskError(f"A weight must be of shape (out, in), got {_describe(weight)}.")
    pattern = _pattern(weight)
    parts = [pattern[start:stop] for start, stop in row_chunks(*pattern.shape)]
    bitmask = torch.cat([pack_mask(part != 0) for part in parts])
    values = pattern.new_empty(popcount(bitmask))
    filled = 0
    for part in parts:
        found = part[part != 0]
        values[filled : filled + found.numel()] = found
        filled += found.numel()
    return values.view(weight.dtype), bitmask


def decompress(values: torch.Tensor, bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    """Put the kept values back in their places.

    Args:
        values: ``(nnz,)``, row by row.
        bitmask: uint8 ``(out, ceil(columns / 8))``, on the same device.
        columns: Columns of the weight.

    Returns:
        ``(out, columns)`` in the dtype of ``values``; ``+0`` wherever the bitmask is 0.

    Raises:
        BitmaskError: If the shapes do not fit or ``popcount(bitmask) != len(values)``.
    """
    check_bitmask(bitmask, columns)
    if values.dim() != 1:
        raise BitmaskError(f"values must be of shape (nnz,), got {_describe(values)}.")
    kept = popcount(bitmask)
    if kept != values.numel():
        raise BitmaskError(
            f"the bitmask keeps {kept} weights but {values.numel()} values are stored; "
            "the two must agree."
        )
    dtype = integer_view(values.dtype)
    weight = torch.zeros((bitmask.shape[0], columns), dtype=dtype, device=values.device)
    weight.masked_scatter_(unpack_mask(bitmask, columns), values.contiguous().view(dtype))
    return weight.view(values.dtype)


def check_bitmask(bitmask: torch.Tensor, columns: int) -> None:
    """Check that a tensor can be the bitmask of a weight with ``columns`` columns.

    Raises:
        BitmaskError: If it is not uint8 ``(rows, ceil(columns / 8))``, or sets a bit after the
            last column.
    """
    if columns < 0:
        raise BitmaskError(f"columns must be >= 0, got {columns}.")
    expected = row_bytes(columns)
    if bitmask.dtype != torch.uint8 or bitmask.dim() != 2 or bitmask.shape[1] != expected:
        raise BitmaskError(
            f"the bitmask of a weight with {columns} columns must be uint8 (out, {expected}), "
            f"got {_describe(bitmask)}."
        )
    used = columns % 8
    if used and bool((bitmask[:, -1] >> used).any()):
        raise BitmaskError(
            f"the bitmask sets bits after the last of its {columns} columns; those must be 0."
        )


def _pattern(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as integers, in which -0.0 differs from 0.0 and NaN equals itself."""
    return weight.detach().contiguous().view(integer_view(weight.dtype))


def integer_view(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a weight's elements are seen as their bits.

    Raises:
        BitmaskError: If elements are complex, or have not 1, 2, 4 or 8 bytes.
    """
    if dtype.is_complex or dtype.itemsize not in _INTEGER_VIEWS:
        raise BitmaskError(f"A weight must have a real dtype of 1, 2, 4 or 8 bytes, got {dtype}.")
    return _INTEGER_VIEWS[dtype.itemsize]


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
