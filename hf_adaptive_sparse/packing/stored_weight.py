"""The tensors that a checkpoint stores for one compressed weight, and the weight they make."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hf_adaptive_sparse.packing.bitmask import compress, decompress
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight


def stored_tensors(
    key: str, weight: torch.Tensor, bits: int, group_size: int | None
) -> dict[str, torch.Tensor]:
    """Return what a checkpoint stores for the weight called ``key``, by tensor name.

    Args:
        key: Name of the weight in the checkpoint.
        weight: ``(out, in)``; of any floating-point dtype with 16 bits.
        bits: Bits of the values: 16 (the weight's own dtype), 8 or 4.
        group_size: Columns per scale, of codes; ``None``: one scale per row.
    """
    if bits == 16:  # of any dtype, float64 included
        values, bitmask = compress(weight)
        return {f"{key}_values": values, f"{key}_bitmask": bitmask}
    tensors = SparseWeight.from_dense(weight.detach(), bits, group_size).tensors()
    return {f"{key}_{kind}": tensor for kind, tensor in tensors.items()}


def stored_kinds(bits: int) -> tuple[str, ...]:
    """Return the kinds of tensors that a checkpoint stores for a weight."""
    return ("values", "bitmask") if bits == 16 else ("values", "bitmask", "scales")


def restored_weight(
    tensors: Mapping[str, torch.Tensor], columns: int, bits: int, group_size: int | None
) -> torch.Tensor:
    """Return the weight ``(out, columns)`` that stored tensors make.

    Args:
        tensors: The tensors, by their `stored_kinds`.
        columns: Columns of the weight.
        bits: As for `stored_tensors`.
        group_size: As for `stored_tensors`.

    Raises:
        BitmaskError: If they do not make one.
    """
    if bits == 16:
        return decompress(tensors["values"], tensors["bitmask"], columns)
    return SparseWeight.from_tensors(columns, group_size=group_size, **tensors).to_dense()
