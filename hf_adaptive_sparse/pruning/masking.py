"""Masks applied to a model and removed again: what a search evaluates, without changing a weight.

Besides the rankings, one bit per weight is held: the current mask. It is unpacked where a weight
is used, one linear at a time, and once per forward; of as many linears as a bound allows, the
masked weight is kept until the mask changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from hf_adaptive_sparse.architecture import weight_place
from hf_adaptive_sparse.packing.bitmask import integer_view, pack_mask, unpack_mask
from hf_adaptive_sparse.pruning.parametrizations import (
    check_in_memory,
    remove_parametrizations_after,
)
from hf_adaptive_sparse.pruning.ranking import Ranking


def zeroed(weight: torch.Tensor, removed: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return a weight with the removed entries at +0 and the bits of all others unchanged.

    Each byte of the bitmask is looked up as eight masks as wide as a weight, and those are ANDed
    with the weight's bits: a tenth of the time of unpacking to booleans and `masked_fill`, which
    is what keeps a search trial close to the time of a plain evaluation.

    Args:
        weight: ``(out, in)``, or one more dimension of experts; a floating dtype of 1, 2, 4 or 8
            bytes.
        removed: ``(rows, ceil(columns / 8))``, uint8: bitmask, little-endian bit order; a row for
            each row of the weight, of all experts.
        table: ``mask_table(weight.dtype)``.

    Returns:
        The weight's shape and dtype, without gradient.
    """
    bits = integer_view(weight.dtype)
    masks = table.index_select(0, removed.view(-1).to(torch.int32)).view(bits)
    kept = masks.view(*weight.shape[:-1], -1)[..., : weight.shape[-1]]
    return weight.detach().view(bits).bitwise_and(kept).view(weight.dtype)


def mask_table(dtype: torch.dtype) -> torch.Tensor:
    """Return the eight masks of every byte: ``(256, itemsize)``, int64 holding 8 masks a row.

    A mask is 0 where the byte's bit is set (removed) and all ones where it is not.
    """
    removed = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    return (removed - 1).to(integer_view(dtype)).view(torch.int64)


class _Mask(nn.Module):
    """Parametrization that zeroes the masked weights; lets everything through until it is set."""

    def __init__(self) -> None:
        super().__init__()
        # Plain attributes, not buffers: they must not show in the model's state dict.
        self.removed: torch.Tensor | None = None
        self.keeps = False
        self.kept: torch.Tensor | None = None
        self._table: torch.Tensor | None = None

    def keep_from_here(self, module: nn.Module, inputs: object) -> None:
        """Forward pre-hook of experts: what they read one by one is masked once per forward."""
        self.keeps = True

    def keep_until_here(self, module: nn.Module, inputs: object, output: object) -> None:
        """Forward hook that ends what `keep_from_here` began."""
        self.keeps, self.kept = False, None

    def set_removed(self, removed: torch.Tensor) -> None:
        self.removed, self.kept = removed, None

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.removed is None:
            return weight
        kept = self.kept
        if kept is not None and (kept.device, kept.dtype) == (weight.device, weight.dtype):
            return kept
        if self._table is None or self._table.shape[1] != weight.dtype.itemsize:
            self._table = mask_table(weight.dtype)
        if self._table.device != weight.device:
            self._table = self._table.to(weight.device)
        if self.removed.device != weight.device:
            self.removed = self.removed.to(weight.device)
        masked_weight = zeroed(weight, self.removed, self._table)
        if self.keeps:
            self.kept = masked_weight
        return masked_weight


class MaskedModel:
    """Handle of a model under masks; made by `masked`."""

    def __init__(self, rankings: Mapping[str, Ranking], masks: Mapping[str, _Mask]) -> None:
        self._rankings = rankings
        self._masks = masks
        self._ratios: dict[str, float] = {}

    @property
    def ratios(self) -> dict[str, float]:
        """The ratios of the current masks; linears not named yet are dense."""
        return dict(self._ratios)

    @property
    def nbytes(self) -> int:
        """Bytes held by the rankings and the current masks; without masked weights kept."""
        held = sum(ranking.nbytes for ranking in self._rankings.values())
        return held + sum(m.removed.nbytes for m in self._masks.values() if m.removed is not None)

    @property
    def kept_bytes(self) -> int:
        """Bytes held by masked weights that are kept, within the bound given to `masked`."""
        return sum(mask.kept.nbytes for mask in self._masks.values() if mask.kept is not None)

    def apply(self, ratios: Mapping[str, float]) -> None:
        """Apply the masks of ``ratios``.

        Only what lies between a linear's last ratio and its new one is touched. Linears that
        ``ratios`` does not name keep what they have.

        Args:
            ratios: Module name -> ratio within the range of its ranking.

        Raises:
            ValueError: If a name has no ranking or a ratio lies outside its range; then nothing
                has changed.
        """
        for name, ratio in ratios.items():
            if name not in self._rankings:
                raise ValueError(
                    f"ratios must name linears that were ranked; {name!r} was not. Ranked: "
                    f"{', '.join(list(self._rankings)[:4])}, ..."
                )
            self._rankings[name].position(ratio)
        for name, ratio in ratios.items():
            ranking, mask = self._rankings[name], self._masks[name]
            before = self._ratios.get(name)
            if mask.removed is None or before is None:
                mask.set_removed(pack_mask(ranking.mask(ratio)))
            elif ranking.position(before) != ranking.position(ratio):
                removed = unpack_mask(mask.removed, ranking.shape[1]).contiguous()
                mask.set_removed(pack_mask(ranking.flip_(removed, before, ratio)))
            self._ratios[name] = ratio


@contextmanager
def masked(
    model: nn.Module, rankings: Mapping[str, Ranking], keep_bytes: int = 0
) -> Iterator[MaskedModel]:
    """Mask the weights of a model while the context is open.

    The weights themselves do not change: a parametrization zeroes the masked ones at use, for
    evaluation only (no gradient reaches them once a ratio is set). On exit, also by an exception,
    the model is what it was, down to the parameter objects and their order.

    Args:
        model: The model.
        rankings: Name of a linear or stack of experts -> ranking, as `rank_model` returns them.
        keep_bytes: Masked weights kept at most, in bytes, first weights first: what is kept is not
            masked anew in every forward.

    Yields:
        The handle that sets ratios; until then the model is dense.

    Raises:
        ValueError: If a name is no weight of the model, its shape differs from the ranking's, it is
            masked already (contexts do not nest), or its weight is offloaded.
    """
    places = {
        name: _checked_place(model, name, ranking.shape) for name, ranking in rankings.items()
    }
    masks: dict[str, _Mask] = {}
    handles: list[torch.utils.hooks.RemovableHandle] = []
    with remove_parametrizations_after(places.values()):
        try:
            for name, (module, key) in places.items():
                weight, mask = getattr(module, key), _Mask()
                mask.keeps = weight.nbytes <= keep_bytes
                keep_bytes -= weight.nbytes if mask.keeps else 0
                if weight.ndim == 3 and not mask.keeps:
                    handles.append(module.register_forward_pre_hook(mask.keep_from_here))
                    handles.append(
                        module.register_forward_hook(mask.keep_until_here, always_call=True)
                    )
                masks[name] = mask
                parametrize.register_parametrization(module, key, mask, unsafe=True)
            yield MaskedModel(rankings, masks)
        finally:
            for handle in handles:
                handle.remove()


def _checked_place(model: nn.Module, name: str, shape: tuple[int, int]) -> tuple[nn.Module, str]:
    """Return module and key of a weight that may be masked."""
    place = weight_place(model, name)
    if place is None:
        raise ValueError(f"rankings must name linears of the model; {name!r} is none.")
    module, key = place
    if parametrize.is_parametrized(module, key):
        raise ValueError(
            f"{name!r} is masked or parametrized already; masked() does not nest. Leave the "
            "outer context first, or call apply() on its handle."
        )
    weight = getattr(module, key)
    if (weight.shape[:-1].numel(), weight.shape[-1]) != shape:
        raise ValueError(
            f"The ranking of {name!r} is for shape {shape}; the weight has {tuple(weight.shape)}."
        )
    check_in_memory(weight, name)
    return place
