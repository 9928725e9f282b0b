"""How products with sparse weights are cut into programs of a GPU.

Tiles were chosen for the loads that are under way at a time. A processor of an H100 has to have
about 18 KB of them to reach its share of the bandwidth, a thread has 4 per four columns, half of
them real, of 2 bytes each: with 1,024 threads, four columns of about 5 places at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_adaptive_sparse.kernels.triton_device import processors
from hf_adaptive_sparse.packing.bitmask import row_bytes
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.packing.weight_codes import CODE_BITS, code_limit

_MATRIX_ROWS = 16  # rows, tokens and columns that a matrix product has at least
_TOKENS_COLUMNS = 256
_PROGRAMS_PER_PROCESSOR = 6
_ROWS_PER_PROCESSOR = 16
"""Rows from which a warp to each fills a processor."""


@dataclass(frozen=True)
class Tile:
    """What a program takes at a time.

    Attributes:
        rows: Rows of the weight, a power of two.
        columns: Columns, a power of two, 32 at least.
        warps: Warps of a program.
    """

    rows: int
    columns: int
    warps: int


@dataclass(frozen=True)
class TokensPlan:
    """How a product of a few tokens is cut.

    Attributes:
        tile: Tile of a program.
        tokens: Tokens, padded to a power of two that the matrix units take.
        splits: Parts of the columns, each of other programs.
        words_per_split: Words of the mask in each, whole tiles.
    """

    tile: Tile
    tokens: int
    splits: int
    words_per_split: int


def fixed_arguments(weight: SparseWeight) -> dict[str, int]:
    """Return what all kernels are compiled for: bits, words of the mask, groups and codes."""
    return {
        "BITS": weight.bits,
        "WORD": _word(weight),
        "GROUP": weight.group_size or 0,
        "LIMIT": code_limit(weight.bits) if weight.bits in CODE_BITS else 0,
    }


def vector_tiles(weight: SparseWeight) -> list[Tile]:
    """Return tiles for one token, the first of them where none can be measured."""
    wide = [Tile(4, 1024, 4), Tile(4, 512, 2), Tile(1, 1024, 1), Tile(1, 4096, 4)]
    if weight.shape[0] < _ROWS_PER_PROCESSOR * processors(weight.device):
        wide.reverse()  # few rows: more warps to each
    most = max(32, _power_of_two(weight.shape[1]))
    return list(dict.fromkeys(Tile(t.rows, min(t.columns, most), t.warps) for t in wide))


def tokens_plan(weight: SparseWeight, tokens: int) -> TokensPlan:
    """Return the plan for 2 tokens and more."""
    rows, columns = weight.shape
    width = min(_TOKENS_COLUMNS, max(32, _power_of_two(columns)))
    if weight.group_size is not None:
        # A tile has one scale per row: the largest power of two that divides the group.
        width = min(width, weight.group_size & -weight.group_size)
    tiles = -(-columns // width)
    row_tiles = -(-rows // _MATRIX_ROWS)
    wanted = max(1, processors(weight.device) * _PROGRAMS_PER_PROCESSOR // row_tiles)
    tiles_per_split = -(-tiles // min(wanted, tiles))
    return TokensPlan(
        tile=Tile(_MATRIX_ROWS, width, 4),
        tokens=max(_MATRIX_ROWS, _power_of_two(tokens)),
        splits=-(-tiles // tiles_per_split),
        words_per_split=tiles_per_split * (width // _word(weight)),
    )


def decompress_tile(weight: SparseWeight) -> Tile:
    """Return the tile of decompression."""
    return Tile(4, min(1024, max(32, _power_of_two(weight.shape[1]))), 4)


def _word(weight: SparseWeight) -> int:
    """Return the bits of the words that the mask is read in: 32 where rows begin at such words."""
    places = (row_bytes(weight.shape[1]), weight.bitmask.data_ptr())
    return 8 if any(place % 4 for place in places) else 32


def _power_of_two(number: int) -> int:
    """Return the lowest power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()
