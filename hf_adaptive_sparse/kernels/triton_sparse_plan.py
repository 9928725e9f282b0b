"""How products with sparse weights are cut into programs of a GPU, and what these are compiled for.

A program of a product has two rows, which share what is read of x; one of decompression has one. A
thread has the columns of four words, and reads their values a tile ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_adaptive_sparse.kernels.triton_device import interprets
from hf_adaptive_sparse.kernels.triton_sizes import power_of_two
from hf_adaptive_sparse.packing.offsets import BLOCK_COLUMNS, block_count
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.packing.weight_codes import CODE_BITS, code_limit

ROWS = 2
"""Rows of a program of ``vector_kernel``."""

_THREADS = 32  # of a warp
_WORD_BYTES = 4  # of values that are read at once
_LONG_ROW = 64  # in a warp's tiles: shorter ones keep no eight warps busy
_PACKED_BYTES = 16  # of x, or of the output, that are read or written at once


@dataclass(frozen=True)
class Tile:
    """What a program takes at a time.

    Attributes:
        blocks: Blocks of 64 columns, a power of two.
        warps: Warps of a program.
    """

    blocks: int
    warps: int


def vector_tiles(weight: SparseWeight) -> list[Tile]:
    """Return tiles for a few tokens, the first of them where none can be measured."""
    least = _THREADS * _columns(weight) // BLOCK_COLUMNS
    tiles = [Tile(warps * least, warps) for warps in (4, 2, 1)]
    if block_count(weight.shape[1]) >= _LONG_ROW * least:
        tiles.append(Tile(8 * least, 8))
    return tiles


def vector_constants(weight: SparseWeight, x: torch.Tensor, tile: Tile) -> dict[str, int]:
    """Return what ``vector_kernel`` is compiled for, but for the bias."""
    packed = (
        x.dtype.itemsize == 2
        and is_packed(x)
        and (weight.group_size or BLOCK_COLUMNS) % BLOCK_COLUMNS == 0
    )
    columns = _columns(weight)
    if packed:  # by all threads of whole warps, each with columns of its own
        tile = Tile(max(tile.blocks, tile.warps * _THREADS * columns // BLOCK_COLUMNS), tile.warps)
    else:
        tile = _fitted(weight, tile, columns)
    # Numbers of tokens in between would each take the compiler seconds.
    tokens = power_of_two(x.shape[0])
    return {**_constants(weight, tile, columns), "TOKENS": tokens, "PACKED": packed}


def decompress_constants(weight: SparseWeight, output: torch.Tensor) -> dict[str, int]:
    """Return what ``decompress_kernel`` is compiled for."""
    columns = min(8, _columns(weight))  # a warp writes what lies side by side
    tile = _fitted(weight, decompress_tile(weight), columns)
    return {**_constants(weight, tile, columns), "PACKED": is_packed(output)}


def decompress_tile(weight: SparseWeight) -> Tile:
    """Return the tile of decompression."""
    return Tile(32, 4)


def is_packed(tensor: torch.Tensor) -> bool:
    """Return whether rows of a tensor can be read or written by 16 bytes."""
    size = tensor.dtype.itemsize
    return (
        tensor.data_ptr() % _PACKED_BYTES == 0
        and tensor.shape[-1] * size % _PACKED_BYTES == 0
        and (tensor.shape[0] == 1 or tensor.stride(0) * size % _PACKED_BYTES == 0)
    )


def _constants(weight: SparseWeight, tile: Tile, columns: int) -> dict[str, int]:
    row_columns = weight.shape[1]
    return {
        "BITS": weight.value_bits,
        "GROUP": weight.group_size or 0,
        "LIMIT": code_limit(weight.bits) if weight.bits in CODE_BITS else 0,
        "ALIGNED": row_columns % BLOCK_COLUMNS == 0 and weight.bitmask.data_ptr() % 8 == 0,
        "WHOLE": weight.value_bits == 32 or weight.values.data_ptr() % _WORD_BYTES == 0,
        "NATIVE": _is_native(),
        "FULL": row_columns % (BLOCK_COLUMNS * tile.blocks) == 0,
        "BLOCKS": tile.blocks,
        "COLUMNS": columns,
        "num_warps": tile.warps,
    }


def _is_native() -> bool:
    return torch.version.hip is None and not interprets()


def _columns(weight: SparseWeight) -> int:
    """Return the columns of four words of values, codes as bytes."""
    return 4 * 32 // max(8, weight.value_bits)


def _fitted(weight: SparseWeight, tile: Tile, columns: int) -> Tile:
    blocks = min(tile.blocks, power_of_two(block_count(weight.shape[1])))
    threads = blocks * BLOCK_COLUMNS // columns
    return Tile(blocks, max(1, min(tile.warps, threads // _THREADS)))
