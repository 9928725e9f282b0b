"""The stored form of a weight: what it takes to allocate its tensors before they are loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_adaptive_sparse.packing.bitmask import row_bytes
from hf_adaptive_sparse.packing.sparse_weight import stored_count
from hf_adaptive_sparse.packing.upper_bytes import BOOK_WORDS, UPPER_BYTE_BITS
from hf_adaptive_sparse.packing.weight_codes import group_count

CODE_DTYPES = {8: torch.int8, 4: torch.uint8}
"""Dtype of the values that are codes, by their bits."""

_VALUE_DTYPES = {**CODE_DTYPES, UPPER_BYTE_BITS: torch.uint8}


def stored_bits(values: torch.Tensor, codebook: torch.Tensor | None) -> int:
    """Return the bits that values are stored in: 12 with a codebook, 8 or 4 for codes, else 16."""
    if codebook is not None:
        return UPPER_BYTE_BITS
    return next((bits for bits, dtype in CODE_DTYPES.items() if dtype == values.dtype), 16)


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
