"""Whether codes of 8 or 4 bits still hold a weight: training or a merged adapter may change it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import torch

from hf_adaptive_sparse.packing.stored_names import tensor_name
from hf_adaptive_sparse.packing.stored_weight import ValueFormat, restored_weight, stored_kinds
from hf_adaptive_sparse.packing.weight_codes import CODE_BITS

logger = logging.getLogger(__name__)

_TOLERANCE = 2
"""Units in the last place by which a cast moves a weight, against its codes with the cast scale."""


def holds(
    stored: Mapping[str, torch.Tensor],
    key: str,
    weight: torch.Tensor,
    form: ValueFormat,
) -> bool:
    """Return whether stored tensors make a weight, up to what casting it may have changed.

    Args:
        stored: What `stored_tensors` returned for the other arguments.
        key: Name of the weight.
        weight: ``(out, in)``, or ``(experts, out, in)``.
        form: How its values are stored.
    """
    if form.bits not in CODE_BITS:
        return True
    parts = {kind: stored[tensor_name(key, kind)] for kind in stored_kinds(form.bits)}
    found = restored_weight(parts, weight.shape[-1], *form)
    if torch.equal(found, weight):
        return True
    narrowest = _narrowest(weight)
    unit, tiny = torch.finfo(narrowest).eps, torch.finfo(narrowest).tiny
    return torch.allclose(found, weight, rtol=_TOLERANCE * unit, atol=tiny * unit)


def warn_of_changed(names: Collection[str]) -> None:
    """Say which weights are stored as they are, though the config had fewer bits for them."""
    if names:
        logger.warning(
            "%d weights, such as that of %r, are no longer what 8 or 4 bits hold: they were "
            "trained, or an adapter was merged into them. They are stored as they are, without "
            "loss, and the config says weight_bits=16 of them. To quantise them again, prune the "
            "model again: hf_adaptive_sparse.prune(model, config).",
            len(names),
            next(iter(names)),
        )


def _narrowest(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype of fewest digits that holds a weight, which may have been cast since."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(weight.to(dtype).to(weight.dtype), weight):
            return dtype
    return weight.dtype
