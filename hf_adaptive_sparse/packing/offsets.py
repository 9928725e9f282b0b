"""The offsets that let kernels start at any row, or block of columns, of a sparse weight."""

from __future__ import annotations

import torch

from hf_adaptive_sparse.packing.bitmask import row_chunks, row_popcounts

BLOCK_COLUMNS = 64
"""Columns per block offset: as many as the bits of the widest word of a mask."""


def offset_dtype(nnz: int) -> torch.dtype:
    """Return the narrowest dtype for offsets into ``nnz`` values: int32, from 2**31 on int64."""
    return torch.int32 if nnz <= torch.iinfo(torch.int32).max else torch.int64


def block_offset_dtype(columns: int) -> torch.dtype:
    """Return the narrowest dtype for offsets in a row: int16, read without sign, or int32."""
    return torch.int16 if columns < 1 << 16 else torch.int32


def block_count(columns: int) -> int:
    """Return the blocks of columns in a row."""
    return -(-columns // BLOCK_COLUMNS)


def count_row_offsets(bitmask: torch.Tensor) -> torch.Tensor:
    """Return the number of values before each row, and of all: ``(rows + 1,)``, int32 or int64.

    ``kernels.sparse_linear.count_row_offsets`` does the same faster, where it can.

    Args:
        bitmask: uint8 ``(rows, bytes)``.
    """
    ends = row_popcounts(bitmask).cumsum(0)
    total = int(ends[-1]) if ends.numel() else 0
    offsets = torch.zeros(len(ends) + 1, dtype=offset_dtype(total), device=bitmask.device)
    offsets[1:] = ends
    return offsets


def count_block_offsets(bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the number of a row's values before each of its blocks of 64 columns.

    Args:
        bitmask: uint8 ``(rows, ceil(columns / 8))``.
        columns: Columns of the weight.

    Returns:
        ``(rows, ceil(columns / 64))`` in ``block_offset_dtype(columns)``, whose int16 is to be read
        without its sign.
    """
    dtype, blocks = block_offset_dtype(columns), block_count(columns)
    offsets = torch.empty(bitmask.shape[0], blocks, dtype=dtype, device=bitmask.device)
    for start, stop in row_chunks(bitmask.shape[0], columns):
        padding = blocks * (BLOCK_COLUMNS // 8) - bitmask.shape[1]
        padded = torch.nn.functional.pad(bitmask[start:stop], (0, padding))
        counts = row_popcounts(padded.reshape(-1, BLOCK_COLUMNS // 8)).view(stop - start, blocks)
        offsets[start:stop] = (counts.cumsum(1) - counts).to(dtype)
    return offsets
