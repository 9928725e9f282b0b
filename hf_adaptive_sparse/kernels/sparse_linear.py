"""Products with a sparse weight: chooses the kernel. Other packages call nothing but this.

A few tokens go through a kernel that reads the sparse weight itself (``sparse_native`` on the CPU,
``triton_sparse`` on a GPU), and so do many on a CPU that has a matrix unit (``sparse_many``).
Otherwise many go by tiles through torch's matrix product (``sparse_tiles``), as do a few where
there is no kernel or it fails, which is said once. Nothing here records a gradient; the layer that
calls this does, with ``input_gradient``.
"""

from __future__ import annotations

import functools
import logging

import torch

from hf_adaptive_sparse.kernels import sparse_many, sparse_native, sparse_tiles, triton_sparse
from hf_adaptive_sparse.kernels.library import describe
from hf_adaptive_sparse.packing import offsets
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight

logger = logging.getLogger(__name__)


def linear(x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x @ W.T + bias``.

    Args:
        x: ``(..., columns)`` in the weight's dtype, on its device, with any strides.
        weight: ``(rows, columns)``.
        bias: ``(rows,)`` in the same dtype and on the same device, or None.

    Returns:
        ``(..., rows)`` in that dtype, contiguous.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
    """
    if sparse_native.takes(x, weight, bias):
        return sparse_native.linear(x, weight, bias)
    rows, columns = weight.shape
    _check(x, "x", columns, weight)
    if bias is not None:
        _check(bias, "bias", rows, weight)
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _product(x, weight, bias)
    return _product(x, weight, bias)


def input_gradient(gradient: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
    """Return ``gradient @ W``, the gradient of ``linear`` for ``x``.

    Args:
        gradient: ``(..., rows)``, that of the output, in the weight's dtype and on its device.
        weight: ``(rows, columns)``.

    Returns:
        ``(..., columns)`` in that dtype.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
    """
    rows, columns = weight.shape
    _check(gradient, "gradient", rows, weight)
    with torch.no_grad():
        flat = gradient.reshape(gradient.shape[:-1].numel(), rows)
        return sparse_tiles.input_gradient(flat, weight).view(*gradient.shape[:-1], columns)


def _product(x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None) -> torch.Tensor:
    rows, columns = weight.shape
    tokens = x.reshape(-1, columns) if columns else x.reshape(x.shape[:-1].numel(), 0)
    output = _few_tokens(tokens, weight, bias)
    if output is None and sparse_many.takes(weight):
        output = sparse_many.linear(tokens, weight, bias)
    if output is None:
        output = sparse_tiles.linear(tokens, weight, bias)
    # No view, of which autograd would let nothing be changed in place.
    product: torch.Tensor = torch.ops.aten._unsafe_view(output, (*x.shape[:-1], rows))
    return product


def _few_tokens(
    x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the product by a GPU's kernel for few tokens; None: by tiles, rather."""
    if x.shape[0] > triton_sparse.MAX_TOKENS:
        return None
    if triton_sparse.is_supported(weight):
        try:
            return triton_sparse.linear(x, weight, bias)
        except triton_sparse.LaunchError as error:
            triton_sparse.say_what_failed(error)
    elif not sparse_native.is_supported(weight):
        _say_why_not(weight.device.type)
    return None


def count_row_offsets(bitmask: torch.Tensor) -> torch.Tensor:
    """Return the number of values before each row, and of all: ``(rows + 1,)``, int32 or int64.

    Args:
        bitmask: uint8 ``(rows, bytes)``.
    """
    counted = None
    if bitmask.device.type == "cpu" and bitmask.dtype == torch.uint8 and bitmask.dim() == 2:
        counted = sparse_native.count_row_offsets(bitmask)
    return offsets.count_row_offsets(bitmask) if counted is None else counted


def block_offsets_for(weight: SparseWeight) -> torch.Tensor | None:
    """Return the block offsets of a weight where its device's kernels read them, else None.

    See ``packing.offsets.count_block_offsets``; those that it has are taken.
    """
    if weight.device.type != "cuda" or not triton_sparse.is_supported(weight):
        return None
    if weight.block_offsets is not None:
        return weight.block_offsets
    # A buffer made in inference mode could not be saved for a gradient outside of it.
    with torch.inference_mode(False), torch.no_grad():
        return offsets.count_block_offsets(weight.bitmask, weight.shape[1])


@functools.cache
def _say_why_not(device: str) -> None:
    logger.warning(
        "No kernel for sparse weights on %s here; they are decompressed for every product, which "
        "saves memory but is slow. Kernels: %s.",
        device,
        describe(),
    )


def _check(tensor: torch.Tensor, name: str, size: int, weight: SparseWeight) -> None:
    if tensor.dim() < 1 or tensor.shape[-1] != size:
        raise ValueError(
            f"{name} must end in a dimension of {size} for a weight of shape {weight.shape}, got "
            f"shape {tuple(tensor.shape)}."
        )
    if tensor.dtype != weight.dtype or tensor.device != weight.device:
        raise ValueError(
            f"{name} must be {weight.dtype} on {weight.device} as the sparse weight is, got "
            f"{tensor.dtype} on {tensor.device}."
        )
