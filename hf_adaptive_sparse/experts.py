"""Experts of one layer whose matrices lie in 3-D parameters: which modules hold them, and how.

transformers keeps the experts of a layer in one module with the parameters ``gate_up_proj`` (or
``up_proj``, where nothing is gated) and ``down_proj``, the expert first. What differs between
models is written on the module or shows in the shapes, so that most families need no entry here:
whether a matrix is ``(out, in)`` or ``(in, out)``, whether gate and up are halves or alternate,
biases, the gate itself, and how tokens come to the experts.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

PARAMETERS = _GATED, _PLAIN, _DOWN = "gate_up_proj", "up_proj", "down_proj"
"""Names of parameters that hold experts, in the order in which they multiply."""

_ROUTED_ARGUMENTS = 3  # hidden states, experts chosen, their weights


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of one layer.

    Attributes:
        module: The module that owns the parameters.
        up: Name of its first parameter: ``"gate_up_proj"`` or ``"up_proj"``.
        transposed: Matrices are ``(in, out)`` instead of ``(out, in)``.
        interleaved: Gate and up alternate along the outputs, instead of one after the other.
        routed: The module is called with all tokens and the experts that were chosen for each;
            False: with one block of tokens per expert, zero where a token was not sent (Llama 4).
    """

    module: nn.Module
    up: str
    transposed: bool
    interleaved: bool
    routed: bool

    @property
    def gated(self) -> bool:
        """Whether the first product is split into gate and up."""
        return self.up == _GATED

    @property
    def count(self) -> int:
        """Number of experts."""
        return int(getattr(self.module, self.up).shape[0])

    def hidden(self, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        """Return what an expert hands from its first matrix to its second.

        Args:
            expert: The expert.
            inputs: ``(tokens, in)``: its inputs.

        Returns:
            ``(tokens, intermediate)``: the inputs of ``down_proj``.
        """
        product = self._product(self.up, expert, inputs)
        module: Any = self.module
        if not self.gated:
            return module.act_fn(product)  # type: ignore[no-any-return]
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(product)  # type: ignore[no-any-return]
        gate, up = product.chunk(2, dim=-1)
        return module.act_fn(gate) * up  # type: ignore[no-any-return]

    def output(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return an expert's output ``(tokens, out)`` from `hidden`, before it is weighted."""
        product = self._product(_DOWN, expert, hidden)
        if getattr(self.module, "has_post_expert_norm", False):
            module: Any = self.module
            return module.post_expert_norm(product)  # type: ignore[no-any-return]
        return product

    def _product(self, key: str, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        matrix = getattr(self.module, key)[expert]
        bias = getattr(self.module, f"{key}_bias", None)
        return functional.linear(
            inputs.to(matrix.dtype),
            matrix.mT if self.transposed else matrix,
            None if bias is None else bias[expert],
        )


@dataclass(frozen=True, eq=False)
class ExpertStack:
    """The matrices of one kind of all experts of a layer: one 3-D parameter.

    A matrix is read and written as ``(out, in)``, with the rows of the gate before those of up, in
    whatever order the parameter stores them.

    Attributes:
        experts: The experts.
        key: Name of the parameter in their module.
    """

    experts: Experts
    key: str

    @property
    def weight(self) -> nn.Parameter:
        """The parameter: ``(experts, out, in)``, or ``(experts, in, out)`` where transposed."""
        return getattr(self.experts.module, self.key)  # type: ignore[no-any-return]

    @property
    def place(self) -> tuple[nn.Module, str]:
        """The module that owns the parameter, and its name there."""
        return self.experts.module, self.key

    @property
    def count(self) -> int:
        """Number of experts."""
        return self.experts.count

    @property
    def out_features(self) -> int:
        """Outputs of one expert's matrix."""
        return int(self.weight.shape[2 if self.experts.transposed else 1])

    @property
    def in_features(self) -> int:
        """Inputs of one expert's matrix."""
        return int(self.weight.shape[1 if self.experts.transposed else 2])

    @property
    def fused_rows(self) -> tuple[int, ...]:
        """Rows of the matrices that one expert's matrix consists of: gate and up, or one."""
        rows = self.out_features
        return (rows // 2, rows // 2) if self.key == _GATED else (rows,)

    def read(self, stored: torch.Tensor, expert: int) -> torch.Tensor:
        """Return one expert's matrix.

        Args:
            stored: The parameter's data, or a tensor of its shape.
            expert: The expert.

        Returns:
            ``(out, in)``, contiguous; a view of ``stored`` where its layout is the same.
        """
        matrix = self._place(stored, expert)
        if self._alternates:
            matrix = matrix.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
        return matrix.contiguous()

    def write_(self, stored: torch.Tensor, expert: int, matrix: torch.Tensor) -> None:
        """Put a matrix ``(out, in)`` in one expert's place; `read` returns it again."""
        place = self._place(stored, expert)
        if self._alternates:
            place.unflatten(0, (-1, 2)).transpose(0, 1).copy_(matrix.unflatten(0, (2, -1)))
        elif place.data_ptr() != matrix.data_ptr() or place.stride() != matrix.stride():
            place.copy_(matrix)

    @property
    def _alternates(self) -> bool:
        return self.experts.interleaved and self.key == _GATED

    def _place(self, stored: torch.Tensor, expert: int) -> torch.Tensor:
        return stored[expert].mT if self.experts.transposed else stored[expert]


def expert_stacks(module: nn.Module) -> list[ExpertStack]:
    """Return the stacks of matrices that a module holds; none if it holds no experts.

    That is: two 3-D parameters, ``down_proj`` and ``gate_up_proj`` or ``up_proj``, with the expert
    first and shapes that fit each other, an activation, and a forward that takes tokens, chosen
    experts and their weights, or one block of tokens per expert.

    Args:
        module: Any module.
    """
    found = _experts(module)
    return [] if found is None else [ExpertStack(found, found.up), ExpertStack(found, _DOWN)]


def _experts(module: nn.Module) -> Experts | None:
    tensors = {key: getattr(module, key, None) for key in (_GATED, _PLAIN, _DOWN)}
    # More than two, or one of another kind, is a layout that is not known.
    held = [key for key, value in tensors.items() if isinstance(value, torch.Tensor)]
    if len(held) != 2 or held[1] != _DOWN or getattr(module, "gate_proj", None) is not None:
        return None
    up, down = tensors[held[0]], tensors[_DOWN]
    if up is None or down is None or up.ndim != 3 or down.ndim != 3 or up.shape[0] < 2:
        return None
    transposed = _transposed(module, up, down, gated=held[0] == _GATED)
    arguments = len(inspect.signature(module.forward).parameters)
    acts = hasattr(module, "act_fn") or (held[0] == _GATED and hasattr(module, "_apply_gate"))
    if transposed is None or not acts or arguments not in (1, _ROUTED_ARGUMENTS):
        return None
    interleaved = not getattr(module, "is_concatenated", True)
    return Experts(module, held[0], transposed, interleaved, arguments == _ROUTED_ARGUMENTS)


def _transposed(
    module: nn.Module, up: torch.Tensor, down: torch.Tensor, *, gated: bool
) -> bool | None:
    """Return whether matrices are ``(in, out)``; ``None`` if the two parameters do not fit."""
    factor = 2 if gated else 1
    experts, *of_up = up.shape
    fits = {
        False: tuple(down.shape) == (experts, of_up[1], of_up[0] / factor),
        True: tuple(down.shape) == (experts, of_up[1] / factor, of_up[0]),
    }
    # The shapes of gated experts fit one way only; others have to say.
    marked = getattr(module, "is_transposed", None)
    ways = [way for way, fit in fits.items() if fit and (marked is None or way == marked)]
    return ways[0] if len(ways) == 1 else None
