"""Simulated quantisation of weights to 8 or 4 bits, without changing them: what a search evaluates.

What a weight is used as is ``decode(encode(weight))`` of the very codes that a checkpoint stores,
computed where the weight is used, after the masks are applied to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from hf_adaptive_sparse.architecture import weight_place
from hf_adaptive_sparse.packing.weight_codes import (
    CODE_BITS,
    decode,
    default_group_size,
    encode,
)
from hf_adaptive_sparse.pruning.parametrizations import remove_parametrizations_after


def through_codes(weight: torch.Tensor, bits: int, group_size: int | None) -> torch.Tensor:
    """Return the weight that a checkpoint gives back, in its shape and dtype.

    Args:
        weight: ``(out, in)``, or one more dimension of experts; finite. 0 stays 0.
        bits: 8 or 4.
        group_size: Columns that share a scale; ``None``: one scale per row.
    """
    codes, scales = encode(weight.flatten(0, -2), bits, group_size)
    return decode(codes, scales, bits, group_size).to(weight.dtype).view(weight.shape)


class _Codes(nn.Module):
    """Parametrization that lets a weight through unchanged until bits are set."""

    def __init__(self) -> None:
        super().__init__()
        self.bits: int | None = None

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.bits is None:
            return weight
        return through_codes(weight, self.bits, default_group_size(self.bits))


class QuantisedModel:
    """Handle of a model with simulated quantisation; made by `quantised`."""

    def __init__(self, codes: Mapping[str, _Codes]) -> None:
        self._codes = codes

    def apply(self, weight_bits: Mapping[str, int]) -> None:
        """Set the bits of every weight; their groups have the default size.

        Args:
            weight_bits: Module name -> bits; 16, or not named: the weight as it is.

        Raises:
            ValueError: If a name is not one of the linears; then nothing has changed.
        """
        for name in weight_bits:
            if name not in self._codes:
                raise ValueError(
                    f"weight_bits must name weights given to quantised(); {name!r} was not. "
                    f"Known: {', '.join(list(self._codes)[:4])}, ..."
                )
        for name, codes in self._codes.items():
            bits = weight_bits.get(name)
            codes.bits = bits if bits in CODE_BITS else None


@contextmanager
def quantised(model: nn.Module, names: Iterable[str]) -> Iterator[QuantisedModel]:
    """Simulate the quantisation of weights while the context is open.

    May be opened inside `masked`, not around it. On exit the weights have no parametrization left,
    not even masks; the parameters are the same objects as before.

    Args:
        model: The model.
        names: Names of linears and of stacks of experts.

    Yields:
        The handle that sets the bits; until then nothing is quantised.

    Raises:
        ValueError: If a name is no weight of the model.
    """
    places: dict[str, tuple[nn.Module, str]] = {}
    for name in names:
        place = weight_place(model, name)
        if place is None:
            raise ValueError(f"names must be those of linears of the model; {name!r} is none.")
        places[name] = place
    codes = {name: _Codes() for name in places}
    with remove_parametrizations_after(places.values()):
        for name, (module, key) in places.items():
            parametrize.register_parametrization(module, key, codes[name], unsafe=True)
        yield QuantisedModel(codes)
