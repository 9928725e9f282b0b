"""The product with a sparse weight as operators of torch: traced, compiled and differentiated.

``torch.compile`` and ``torch.export`` see two opaque operators, ``hf_adaptive_sparse::linear`` and
the gradient for its input. They take the tensors of a `SparseWeight` one by one, as operators of
torch must. The weight itself has no gradient. A call at which nothing but autograd looks skips the
operators, which take as long as a small product. Operators of torch have neither forward-mode
derivatives nor those of ``torch.func``: these multiply with the decompressed weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn import functional

from hf_adaptive_sparse.kernels import sparse_linear
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight

_NO_GROUPS = 0
"""What stands for ``group_size=None``: an operator's argument is a plain int."""


def linear(x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``x @ W.T + bias``, differentiable in ``x`` and ``bias``.

    Args:
        x: ``(..., columns)`` in the weight's dtype (under autocast any) and on its device.
        weight: ``(rows, columns)``.
        bias: ``(rows,)`` in the same dtype, or ``None``.

    Returns:
        ``(..., rows)`` in that dtype.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
    """
    if x.dtype is not weight.dtype and torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    product: torch.Tensor
    if not _is_watched(x):
        if not _needs_gradient(x, bias):
            return sparse_linear.linear(x, weight, bias)
        product = _Product.apply(x, bias, weight)
        return product
    if _is_transformed():
        return functional.linear(x, weight.to_dense(), bias)
    product = _linear(x, bias, *_tensors(weight), weight.shape[1], weight.group_size or _NO_GROUPS)
    return product


def _is_watched(x: torch.Tensor) -> bool:
    """Return whether there are tracers, transforms or tensors that are not just their numbers."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not torch.Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or x.is_meta
    )


def _is_transformed() -> bool:
    """Return whether derivatives are taken of which the operators know nothing."""
    if torch.compiler.is_compiling():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    known = torch._C._functorch.TransformType.Vmap
    return forward_ad._current_level >= 0 or any(entry.key() != known for entry in stack)


def _needs_gradient(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )


class _Product(torch.autograd.Function):
    """The product with what autograd has to know, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, weight: SparseWeight
    ) -> torch.Tensor:
        _save(ctx, weight.shape[1], weight.group_size or _NO_GROUPS, _tensors(weight))
        return sparse_linear.linear(x, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        for_x, for_bias = _gradients(ctx, gradient, *ctx.needs_input_grad[:2])
        return for_x, for_bias, None


def _tensors(weight: SparseWeight) -> tuple[torch.Tensor | None, ...]:
    """Return the tensors of a weight in the order in which the operators take them."""
    return (
        weight.values,
        weight.bitmask,
        weight.row_offsets,
        weight.scales,
        weight.block_offsets,
        weight.codebook,
    )


def _save(
    ctx: Any, columns: int, group_size: int, tensors: tuple[torch.Tensor | None, ...]
) -> None:
    ctx.columns, ctx.group_size = columns, group_size
    ctx.save_for_backward(*tensors)  # torch refuses a gradient if they are overwritten meanwhile


def _gradients(
    ctx: Any, gradient: torch.Tensor, for_x: bool, for_bias: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients for x and the bias of what ``_save`` has saved, where wanted."""
    x = bias = None
    if for_x:
        x = _input_gradient(gradient, *ctx.saved_tensors, ctx.columns, ctx.group_size)
    if for_bias:
        bias = gradient.sum(tuple(range(gradient.dim() - 1))) if gradient.dim() > 1 else gradient
    return x, bias


@torch.library.custom_op("hf_adaptive_sparse::linear", mutates_args=())
def _linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    row_offsets: torch.Tensor,
    scales: torch.Tensor | None,
    block_offsets: torch.Tensor | None,
    codebook: torch.Tensor | None,
    columns: int,
    group_size: int,
) -> torch.Tensor:
    parts = (values, bitmask, row_offsets, scales, block_offsets, codebook)
    return sparse_linear.linear(x, _weight(*parts, columns, group_size), bias)


@_linear.register_fake
def _fake_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    *_: Any,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], bitmask.shape[0]))


@torch.library.custom_op("hf_adaptive_sparse::linear_input_gradient", mutates_args=())
def _input_gradient(
    gradient: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    row_offsets: torch.Tensor,
    scales: torch.Tensor | None,
    block_offsets: torch.Tensor | None,
    codebook: torch.Tensor | None,
    columns: int,
    group_size: int,
) -> torch.Tensor:
    parts = (values, bitmask, row_offsets, scales, block_offsets, codebook)
    return sparse_linear.input_gradient(gradient, _weight(*parts, columns, group_size))


@_input_gradient.register_fake
def _fake_input_gradient(
    gradient: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    row_offsets: torch.Tensor,
    scales: torch.Tensor | None,
    block_offsets: torch.Tensor | None,
    codebook: torch.Tensor | None,
    columns: int,
    group_size: int,
) -> torch.Tensor:
    return gradient.new_empty((*gradient.shape[:-1], columns))


def _weight(
    values: torch.Tensor,
    bitmask: torch.Tensor,
    row_offsets: torch.Tensor,
    scales: torch.Tensor | None,
    block_offsets: torch.Tensor | None,
    codebook: torch.Tensor | None,
    columns: int,
    group_size: int,
) -> SparseWeight:
    shape, group = (bitmask.shape[0], columns), group_size or None
    # Kernels take tensors as they lie; under vmap these are parts of others, with any strides.
    own = (bitmask.contiguous(), values.contiguous(), row_offsets.contiguous())
    coded = (None if t is None else t.contiguous() for t in (scales, block_offsets, codebook))
    scales, block_offsets, codebook = coded
    return SparseWeight(shape, *own, scales, group, block_offsets, codebook)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, _, *tensors, columns, group_size = inputs
    _save(ctx, columns, group_size, tuple(tensors))


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    for_x, for_bias = _gradients(ctx, gradient, *ctx.needs_input_grad[:2])
    return for_x, for_bias, None, None, None, None, None, None, None, None


def _remember_gradient(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, *tensors, columns, group_size = inputs
    _save(ctx, columns, group_size, tuple(tensors))


def _backward_of_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    product = _linear(gradient, None, *ctx.saved_tensors, ctx.columns, ctx.group_size)
    return product, None, None, None, None, None, None, None, None


_linear.register_autograd(_backward, setup_context=_remember)
_input_gradient.register_autograd(_backward_of_gradient, setup_context=_remember_gradient)
