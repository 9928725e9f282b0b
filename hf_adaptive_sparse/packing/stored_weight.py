"""The tensors that a checkpoint stores for one compressed weight, and the weight they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hf_adaptive_sparse.packing.bitmask import (
    BitmaskError,
    compress,
    compressed_size_bytes,
    decompress,
    row_bytes,
)
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight, stored_count
from hf_adaptive_sparse.packing.stored_names import BY_ROW, tensor_name
from hf_adaptive_sparse.packing.upper_bytes import BOOK_WORDS, UPPER_BYTE_BITS
from hf_adaptive_sparse.packing.weight_codes import CODE_DTYPES, group_count

_VALUE_DTYPES = {**CODE_DTYPES, UPPER_BYTE_BITS: torch.uint8}


class ValueFormat(NamedTuple):
    """How the values of a weight are stored.

    Attributes:
        bits: 16 (the weight's own dtype), 12 (bfloat16 without loss, see upper_bytes.py), 8 or 4
            (codes).
        group_size: Columns that share a scale, of codes; ``None``: one scale per row, or no scale.
    """

    bits: int
    group_size: int | None = None


def stored_tensors(key: str, weight: torch.Tensor, form: ValueFormat) -> dict[str, torch.Tensor]:
    """Return what a checkpoint stores for the weight called ``key``, by tensor name.

    Args:
        key: Name of the weight in the checkpoint.
        weight: ``(out, in)``, or ``(experts, out, in)``, of which bitmask and scales keep the first
            dimension; of any floating-point dtype with 16 bits, bfloat16 with 12.
        form: How its values are stored.
    """
    rows = weight.detach().flatten(0, -2)
    if form.bits == 16:  # of any dtype, float64 included
        tensors = dict(zip(stored_kinds(form.bits), compress(rows), strict=True))
    else:
        tensors = SparseWeight.from_dense(rows, *form).tensors()
    return {
        tensor_name(key, kind): t.unflatten(0, weight.shape[:-1]) if kind in BY_ROW else t
        for kind, t in tensors.items()
    }


def stored_kinds(bits: int) -> tuple[str, ...]:
    """Return the kinds of tensors that a checkpoint stores for a weight."""
    of_their_own = {16: (), UPPER_BYTE_BITS: ("codebook",)}.get(bits, ("scales",))
    return ("values", "bitmask", *of_their_own)


@dataclass(frozen=True)
class StoredWeight:
    """How one weight is stored, before it is there.

    Attributes:
        nnz: Weights that are kept.
        bits: 16 for values in the weight's dtype; 12 for bfloat16 by a codebook; 8 or 4 for codes.
        group_size: Columns per scale, of codes; ``None``: one scale per row.
        exceptions: With 12 bits: values that the codebook holds.
    """

    nnz: int
    bits: int = 16
    group_size: int | None = None
    exceptions: int = 0

    def empty(
        self, *shape: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> dict[str, torch.Tensor]:
        """Return its tensors, uninitialised, by their kind.

        Args:
            shape: ``out, in``, or ``experts, out, in``.
            dtype: Dtype of the weight, whichever bits its values take.
            device: Where they lie.

        Raises:
            ValueError: If ``group_size`` is invalid.
        """
        *leading, columns = shape
        kinds = {
            "values": ((stored_count(self.nnz, self.bits),), _VALUE_DTYPES.get(self.bits, dtype)),
            "bitmask": ((*leading, row_bytes(columns)), torch.uint8),
        }
        if self.bits == UPPER_BYTE_BITS:
            kinds["codebook"] = ((BOOK_WORDS + self.exceptions,), torch.int64)
        elif self.bits != 16:
            kinds["scales"] = ((*leading, group_count(columns, self.group_size)), dtype)
        return {
            kind: torch.empty(size, dtype=of, device=device) for kind, (size, of) in kinds.items()
        }


def checkpoint_bytes(
    rows: int, columns: int, kept: int, form: ValueFormat, value_bytes: int
) -> int:
    """Return the bytes of a weight's `stored_tensors`: values, bitmask and scales.

    ``ceil(kept * value bits / 8) + rows * ceil(columns / 8) + rows * groups * value_bytes``

    Args:
        rows: Rows of the weight; of experts, those of all together.
        columns: Columns of the weight.
        kept: Values that are stored.
        form: How the values are stored, not in 12 bits, whose bytes depend on the values.
        value_bytes: Bytes of an element of the weight's own dtype, which the scales have, too.
    """
    if form.bits == 16:
        return compressed_size_bytes(rows, columns, kept, value_bytes)
    scales = rows * group_count(columns, form.group_size) * value_bytes
    return (kept * form.bits + 7) // 8 + rows * row_bytes(columns) + scales


def restored_weight(
    tensors: Mapping[str, torch.Tensor], shape: Sequence[int], form: ValueFormat
) -> torch.Tensor:
    """Return the weight that stored tensors make.

    Args:
        tensors: The tensors, by their `stored_kinds`.
        shape: Shape of the weight: ``(out, in)``, or ``(experts, out, in)``.
        form: How its values are stored.

    Raises:
        BitmaskError: If they do not make one.
    """
    *leading, columns = shape
    # The shapes first: they bound what is allocated.
    widths = {"bitmask": row_bytes(columns), "scales": group_count(columns, form.group_size)}
    for kind in BY_ROW:
        expected = [*leading, widths[kind]]
        if kind in tensors and list(tensors[kind].shape) != expected:
            raise BitmaskError(
                f"the {kind} of a weight {[*leading, columns]} must be {expected}, got "
                f"{list(tensors[kind].shape)}."
            )
    rows = {k: t.flatten(0, -2) if k in BY_ROW else t for k, t in tensors.items()}
    if form.bits == 16:
        return decompress(rows["values"], rows["bitmask"], columns).view(*shape)
    weight = SparseWeight.from_tensors(columns, group_size=form.group_size, **rows)
    return weight.to_dense().view(*shape)
