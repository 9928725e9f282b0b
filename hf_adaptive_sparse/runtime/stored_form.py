"""How a weight is stored, as far as its empty tensors must know before they are loaded into."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_adaptive_sparse.packing.bitmask import row_bytes
from hf_adaptive_sparse.packing.weight_codes import group_count

CODE_DTYPES = {8: torch.int8, 4: torch.uint8}
"""Dtype of the values that are codes, by their bits."""


@dataclass(frozen=True)
class StoredWeight:
    """How one weight is stored, before it is there.

    Attributes:
        nnz: Weights that are kept.
        bits: 16 for values in the weight's dtype; 8 or 4 for codes.
        group_size: Columns per scale, of codes; ``None``: one scale per row.
    """

    nnz: int
    bits: int = 16
    group_size: int | None = None

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
        count = self.nnz if self.bits != 4 else (self.nnz + 1) // 2
        kinds = {
            "values": ((count,), CODE_DTYPES.get(self.bits, dtype)),
            "bitmask": ((*leading, row_bytes(columns)), torch.uint8),
        }
        if self.bits != 16:
            kinds["scales"] = ((*leading, group_count(columns, self.group_size)), dtype)
        return {
            kind: torch.empty(size, dtype=of, device=device) for kind, (size, of) in kinds.items()
        }
