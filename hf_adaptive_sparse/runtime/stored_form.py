"""How a weight is stored, as far as its empty tensors must know before they are loaded into."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
