"""How a call of the Triton attention is cut into programs.

Sizes of tiles follow from the sizes of heads and blocks: nothing is tuned at run time. On an H100,
tiles of 128 tokens were faster than of 64 in every width, and eight programs per processor than
four where there are more; the kernel of single warps was fastest with eight warps per processor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hf_adaptive_sparse.kernels.packed import PackedCache, PackedKeys
from hf_adaptive_sparse.kernels.triton_device import processors
from hf_adaptive_sparse.kernels.triton_sizes import pattern_codes, power_of_two

MATRIX_ROWS = 16
"""Rows, and summed elements, that a matrix product has at least."""

_MOST_ROWS = 32
_LEAST_TILE_OF_BYTES = 32
_PROGRAMS_PER_PROCESSOR = 8
_WARPS_PER_PROCESSOR = 8


@dataclass(frozen=True)
class Plan:
    """How one call is cut into programs.

    The kernel of single warps has one program for all queries of a KV head: ``rows``, ``groups``,
    ``row_tiles`` and the words are of the general kernel alone.

    Attributes:
        tile: Tokens of a block that a program takes at once.
        raw_tile: The same of raw tokens.
        rows: Queries of one KV head per program, a power of two.
        groups: Groups of channels, padded to a power of two; ``rows * groups >= 16``.
        row_tiles: Programs per KV head and split.
        tiles_per_split: Tiles of blocks per program.
        block_splits: Splits of the blocks; raw tokens have one of their own.
        key_word: Bits of the words that keys are read in.
        value_word: The same for values.
        warps: Warps per program.
        stages: Tiles that are loaded ahead, and one.
        registers: The most registers per thread, None: the device's own limit.
    """

    tile: int
    raw_tile: int
    rows: int
    groups: int
    row_tiles: int
    tiles_per_split: int
    block_splits: int
    key_word: int
    value_word: int
    warps: int
    stages: int
    registers: int | None


def plan(query: torch.Tensor, cache: PackedCache, processors: int) -> Plan:
    """Return the plan of a call for a device of ``processors`` multiprocessors."""
    batch, heads, queries, key_dim = query.shape
    kv_heads, value_dim = cache.raw_keys.shape[1], cache.raw_values.shape[-1]
    groups = power_of_two(channel_groups(cache))
    row_count = heads // kv_heads * queries
    half = query.dtype != torch.float32
    most_rows = max(1, (_MOST_ROWS if half else MATRIX_ROWS) // groups)
    rows = max(MATRIX_ROWS // groups, min(power_of_two(row_count), most_rows), 1)
    row_tiles = -(-row_count // rows)
    widest = max(key_dim, value_dim)
    # As many codes as registers and shared memory hold as operands of a matrix product.
    wished = (128 if widest <= 128 else 64) if half else max(16, 4096 // power_of_two(widest))
    tile = min(wished, power_of_two(cache.blocks.block_length))
    value_word = _word(cache.blocks.values.bits, tile, cache.blocks.values.codes)
    tile = max(tile, least_tile(cache.blocks.values.bits, value_word))
    key_word = _word(cache.blocks.keys.bits, power_of_two(key_dim), cache.blocks.keys.codes)
    tiles = cache.blocks.keys.codes.shape[2] * -(-cache.blocks.block_length // tile)
    wanted = max(1, processors * _PROGRAMS_PER_PROCESSOR // (batch * kv_heads * row_tiles))
    tiles_per_split = max(1, -(-tiles // wanted))
    return Plan(
        tile=tile,
        raw_tile=32 if half else 16,
        rows=rows,
        groups=groups,
        row_tiles=row_tiles,
        tiles_per_split=tiles_per_split,
        block_splits=-(-tiles // tiles_per_split),
        key_word=key_word,
        value_word=value_word,
        warps=4 if widest <= 128 else 8,
        stages=2 if half and widest <= 128 else 1,
        # Where the common case needs few more anyway, three programs of a processor overlap.
        registers=168 if half and widest <= 128 and rows * groups == MATRIX_ROWS else None,
    )


def plan_of_warps(
    cut: Plan, tile: int, keys: PackedKeys, block_length: int, device: torch.device
) -> Plan:
    """Return the plan of the kernel of single warps: as many as a device holds at once."""
    batch, kv_heads, blocks = keys.codes.shape[:3]
    tiles = blocks * (block_length // tile)
    wanted = max(1, processors(device) * _WARPS_PER_PROCESSOR // (batch * kv_heads))
    tiles_per_split = -(-tiles // wanted)
    return replace(
        cut,
        tile=tile,
        row_tiles=1,
        tiles_per_split=tiles_per_split,
        block_splits=-(-tiles // tiles_per_split),
        warps=1,
        stages=1,
        registers=None,
    )


def channel_groups(cache: PackedCache) -> int:
    """Return the groups of channels of a head, of keys or values, whichever has more."""
    key_dim, value_dim = cache.raw_keys.shape[-1], cache.raw_values.shape[-1]
    key_group = (
        key_dim if cache.blocks.keys.group is None else min(cache.blocks.keys.group, key_dim)
    )
    return max(-(-key_dim // key_group), -(-value_dim // min(cache.blocks.values.group, value_dim)))


def _least_size(bits: int, word: int) -> int:
    """Return the codes that fill the words which repeat the pattern, and a matrix product."""
    return max(MATRIX_ROWS, pattern_codes(bits, word))


def least_tile(bits: int, word: int) -> int:
    """Return the codes in a row of a tile at least."""
    if bits % 3 == 0 and word == 8:
        # 16 of these came out wrong on an H100 (Triton 3.6), right in the interpreter.
        return _LEAST_TILE_OF_BYTES
    return _least_size(bits, word)


def _word(bits: int, size: int, codes: torch.Tensor) -> int:
    """Return the widest word that ``size`` codes per row allow, and the rows' addresses."""
    word = 32
    places = (codes.data_ptr(), codes.shape[-1], *codes.stride()[:-1])
    while word > 8 and (_least_size(bits, word) > size or any(p % (word // 8) for p in places)):
        word //= 2
    return word
