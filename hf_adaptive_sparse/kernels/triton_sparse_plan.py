"""How products with sparse weights are cut into programs of a GPU, and what these are compiled for.

A program has one row. Tiles were chosen for the loads that are under way at a time, of four or
eight fours of columns to a thread, and for a warp or two to a program, so that many programs share
a processor and one waits while others compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_adaptive_sparse.kernels.triton_device import interprets
from hf_adaptive_sparse.kernels.triton_sizes import power_of_two
from hf_adaptive_sparse.packing.sparse_weight import BLOCK_COLUMNS, SparseWeight, block_count
from hf_adaptive_sparse.packing.weight_codes import CODE_BITS, code_limit

_WORD_BYTES = 4  # of codes that are read at once
_X_BYTES = 8  # of four columns of x, or of the output, that are read or written at once


@dataclass(frozen=True)
class Tile:
    """What a program takes at a time.

    Attributes:
        blocks: Blocks of 64 columns, a power of two.
        warps: Warps of a program.
        columns: Columns per thread: 4, 8 or 16.
    """

    blocks: int
    warps: int
    columns: int


def vector_tiles(weight: SparseWeight) -> list[Tile]:
    """Return tiles for a few tokens, the first of them where none can be measured."""
    if weight.bits > 8:
        wide = [Tile(16, 2, 8), Tile(8, 1, 8), Tile(32, 2, 8), Tile(32, 4, 8)]
    else:
        wide = [Tile(32, 1, 16), Tile(16, 1, 16), Tile(8, 1, 16), Tile(32, 2, 16)]
    return list(dict.fromkeys(_fitted(weight, tile) for tile in wide))


def decompress_tile(weight: SparseWeight) -> Tile:
    """Return the tile of decompression."""
    return _fitted(weight, Tile(32, 4, 4))


def constants_of(weight: SparseWeight, tile: Tile) -> dict[str, int]:
    """Return what all kernels are compiled for."""
    columns = weight.shape[1]
    return {
        "BITS": weight.bits,
        "GROUP": weight.group_size or 0,
        "LIMIT": code_limit(weight.bits) if weight.bits in CODE_BITS else 0,
        "ALIGNED": columns % BLOCK_COLUMNS == 0 and weight.bitmask.data_ptr() % 8 == 0,
        "WHOLE": weight.bits > 8 or weight.values.data_ptr() % _WORD_BYTES == 0,
        "NATIVE": torch.version.hip is None and not interprets(),
        "FULL": columns % (BLOCK_COLUMNS * tile.blocks) == 0,
        "BLOCKS": tile.blocks,
        "COLUMNS": tile.columns,
        "num_warps": tile.warps,
    }


def is_packed(tensor: torch.Tensor) -> bool:
    """Return whether rows of a tensor can be read or written by four numbers of 16 bits."""
    return (
        tensor.dtype.itemsize == 2
        and tensor.shape[-1] % 4 == 0
        and tensor.data_ptr() % _X_BYTES == 0
        and (tensor.shape[0] == 1 or tensor.stride(0) % 4 == 0)
    )


def _fitted(weight: SparseWeight, tile: Tile) -> Tile:
    blocks = min(tile.blocks, power_of_two(block_count(weight.shape[1])))
    threads = blocks * BLOCK_COLUMNS // tile.columns
    return Tile(blocks, max(1, min(tile.warps, threads // 32)), tile.columns)
