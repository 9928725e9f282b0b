"""What the kernels of sparse weights compute, in torch, to read and to test against."""

from __future__ import annotations

import torch

from hf_adaptive_sparse.packing.sparse_weight import SparseWeight


def linear(x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply with the decompressed weight, ``x @ W.T + bias``, all in float32.

    Codes times scales are not rounded to the weight's dtype on the way.

    Args:
        x: ``(..., columns)``.
        weight: ``(rows, columns)``.
        bias: ``(rows,)`` or None.

    Returns:
        float32 ``(..., rows)``.
    """
    product = x.float() @ weight.to_dense(torch.float32).T
    return product if bias is None else product + bias.float()
