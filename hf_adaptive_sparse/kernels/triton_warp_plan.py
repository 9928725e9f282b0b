"""Which calls of the Triton attention go to its kernel of single warps, and how it reads rows."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_adaptive_sparse.kernels.packed import PackedKeys, PackedValues
from hf_adaptive_sparse.kernels.triton_sizes import power_of_two

MAX_ROWS = 8
"""Queries of one KV head: half of the matrix units' rows, of which each thread has one."""

_CHANNELS = 32  # of values that are multiplied at once
_PARTS = 4  # threads of a row
_SHORT_UNIT, _LONG_UNIT = 16, 32
_MOST_BYTES = 16  # that a thread reads at once
_METADATA = (torch.float16, torch.bfloat16)


class Units(NamedTuple):
    """How rows are read.

    Attributes:
        key: Codes of a row of keys that one thread reads before the next does.
        value: The same of a row of values.
        tile: Tokens of a block at once.
    """

    key: int
    value: int
    tile: int


def units(
    query: torch.Tensor, keys: PackedKeys, values: PackedValues, block_length: int, rows: int
) -> Units | None:
    """Return how the kernel reads these blocks; None: it does not.

    Args:
        query: ``(batch, heads, queries, key head_dim)``.
        keys: With rows that are contiguous.
        values: Likewise.
        block_length: Tokens of a block.
        rows: Queries of one KV head.
    """
    key_dim, value_dim = query.shape[3], values.codes.shape[3]
    group = min(values.group, value_dim)
    if (
        query.dtype not in _METADATA
        or rows > MAX_ROWS
        or keys.group is not None
        or keys.step.dtype not in _METADATA
        or values.scales.dtype not in _METADATA
        or value_dim % 2
        or (group != value_dim and group % _CHANNELS)
        or not keys.codes.shape[2]
    ):
        return None
    key = _unit(keys.bits, key_dim)
    value = _unit(values.bits, block_length)
    if key is None or value is None:
        return None
    tile = _PARTS * (_LONG_UNIT if block_length % (_PARTS * _LONG_UNIT) == 0 else value)
    if block_length % tile or not (
        _begin_with_units(keys.codes, keys.bits, key)
        and _begin_with_units(values.codes, values.bits, value)
        and _begin_with_units(values.step_codes, 8, _SHORT_UNIT)
        and _begin_with_units(values.min_codes, 8, _SHORT_UNIT)
    ):
        return None
    return Units(key, value, tile)


def key_pad(key_dim: int, unit: int) -> int:
    """Return the channels that the threads of a row have together: a power of two of units each."""
    return power_of_two(-(-key_dim // (_PARTS * unit))) * _PARTS * unit


def _unit(bits: int, size: int) -> int | None:
    """Return the codes that a thread reads at once, as many as fill words; None: there are none."""
    # Of 8 bits, sixteen bytes at once lie side by side.
    units = (_SHORT_UNIT,) if bits == 8 else (_LONG_UNIT, _SHORT_UNIT)
    for unit in units:
        fills_words = unit * bits % 32 == 0
        if fills_words and size % unit == 0 and (size % (_PARTS * unit) == 0 or unit == units[-1]):
            return unit
    return None


def _begin_with_units(codes: torch.Tensor, bits: int, unit: int) -> bool:
    """Return whether rows begin where as many bytes may be read as are read at once."""
    size = unit * bits // 8
    size = min(_MOST_BYTES, size & -size)
    strides = [s for n, s in zip(codes.shape, codes.stride(), strict=True) if n > 1]
    return all(place % size == 0 for place in (codes.data_ptr(), *strides[:-1]))
