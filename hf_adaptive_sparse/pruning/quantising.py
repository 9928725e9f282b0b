"""Weights seen through their codes of 8 or 4 bits, without changing them: what a search evaluates.

What a linear computes with is ``decode(encode(weight))`` of the very codes that a checkpoint
stores, worked out where the weight is used, under the masks that lie over it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from hf_adaptive_sparse.packing.weight_codes import CODE_BITS, decode, encode


def through_codes(weight: torch.Tensor, bits: int, group_size: int | None) -> torch.Tensor:
    """Return the weight that a checkpoint gives back, ``(out, in)`` in its dtype.

    Args:
        weight: ``(out, in)``, finite; 0 stays 0.
        bits: 8 or 4.
        group_size: Columns that share a scale; ``None``: one scale per row.
    """
    codes, scales = encode(weight, bits, group_size)
    return decode(codes, scales, bits, group_size).to(weight.dtype)


class _Codes(nn.Module):
    """Parametrization that lets a weight through unchanged until bits are set."""

    def __init__(self) -> None:
        super().__init__()
        self.bits: int | None = None
        self.group_size: int | None = None

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.bits is None:
            return weight
        return through_codes(weight, self.bits, self.group_size)


class QuantisedModel:
    """Handle of a model seen through codes; made by `quantised`."""

    def __init__(self, codes: Mapping[str, _Codes]) -> None:
        self._codes = codes

    def apply(self, weight_bits: Mapping[str, int], group_sizes: Mapping[int, int | None]) -> None:
        """Put widths in force.

        Args:
            weight_bits: Module name -> bits; 16, or not named: the weight as it is.
            group_sizes: Bits -> columns that share a scale, ``None``: one scale per row.

        Raises:
            ValueError: If a name is not one of the linears; then nothing has changed.
        """
        for name in weight_bits:
            if name not in self._codes:
                raise ValueError(
                    f"weight_bits must name linears that were laid open; {name!r} was not. Known: "
                    f"{', '.join(list(self._codes)[:4])}, ..."
                )
        for name, codes in self._codes.items():
            bits = weight_bits.get(name)
            codes.bits = bits if bits in CODE_BITS else None
            codes.group_size = None if codes.bits is None else group_sizes.get(codes.bits)


@contextmanager
def quantised(model: nn.Module, names: Iterable[str]) -> Iterator[QuantisedModel]:
    """See the weights of linears through codes while the context is open.

    May be opened inside `masked`, not around it. On exit the linears have no parametrization left,
    masks included; the parameters are the objects that they were.

    Args:
        model: The model.
        names: Its linears.

    Yields:
        The handle that sets the bits; until then nothing is quantised.

    Raises:
        ValueError: If a name is no linear of the model.
    """
    modules = dict(model.named_modules())
    linears: dict[str, nn.Linear] = {}
    for name in names:
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"names must be those of linears of the model; {name!r} is none.")
        linears[name] = module
    codes = {name: _Codes() for name in linears}
    order = {name: list(module._parameters) for name, module in linears.items()}
    try:
        for name, module in linears.items():
            parametrize.register_parametrization(module, "weight", codes[name], unsafe=True)
        yield QuantisedModel(codes)
    finally:
        for name, module in linears.items():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            parameters = dict(module._parameters)
            module._parameters.clear()
            # The weight came back last; a mask around this context restores its own order.
            for key in (*order[name], *(key for key in parameters if key not in order[name])):
                module._parameters[key] = parameters[key]
