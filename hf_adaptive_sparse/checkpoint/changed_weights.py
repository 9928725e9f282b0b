"""Which weights their format no longer holds: by codes once trained, in 12 bits once cast.

They are stored as they are, and the config says so.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import parameter_name
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.resolving import parameter_formats
from hf_adaptive_sparse.packing.bitmask import row_chunks
from hf_adaptive_sparse.packing.stored_names import weight_name
from hf_adaptive_sparse.packing.stored_weight import ValueFormat
from hf_adaptive_sparse.packing.upper_bytes import UPPER_BYTE_BITS
from hf_adaptive_sparse.packing.weight_codes import CODE_BITS, decode, encode
from hf_adaptive_sparse.runtime.conversion import decompress_, sparse_weights

logger = logging.getLogger(__name__)

_TOLERANCE = 2
"""Units in the last place by which a cast moves a weight, against its codes with the cast scale."""


def holds(form: ValueFormat, weight: torch.Tensor, rounded_in: torch.dtype) -> bool:
    """Return whether a format holds a weight without loss, but for what a cast changed.

    In the dtype that it was rounded in, a weight is exactly what its codes make.

    Args:
        form: How the values of the weight are stored.
        weight: ``(out, in)``, or ``(experts, out, in)``.
        rounded_in: Dtype that the weight had when codes last made it.

    Raises:
        ValueError: If codes cannot hold the weight, because it is not finite, or its dtype.
    """
    if form.bits not in CODE_BITS:
        return True
    rows = weight.detach().flatten(0, -2)
    blocks = (rows[start:stop] for start, stop in row_chunks(*rows.shape))
    return all(_holds_rows(form, block, rounded_in) for block in blocks)


def _holds_rows(form: ValueFormat, rows: torch.Tensor, rounded_in: torch.dtype) -> bool:
    found = decode(*encode(rows, *form), *form).to(rows.dtype)
    if rows.dtype == rounded_in:
        return torch.equal(found, rows)
    if not torch.equal(rows.to(rounded_in).to(rows.dtype), rows):  # changed after the cast
        return False
    limits = [torch.finfo(dtype) for dtype in (rows.dtype, rounded_in)]
    unit = max(limit.eps for limit in limits)
    step = max(limit.smallest_normal * limit.eps for limit in limits)
    return torch.allclose(found, rows, rtol=_TOLERANCE * unit, atol=step)


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


def store_cast_weights_plain_(model: PreTrainedModel, config: SparsityConfig) -> None:
    """Change 12 bits to 16 in a config, for weights that are not bfloat16: loaded so, or cast.

    A weight of which nothing is removed is stored dense then, and so made plain in the model, too.

    Args:
        model: The model.
        config: The config that it carries.
    """
    if UPPER_BYTE_BITS not in config.widths:
        return
    cast = []
    sparse = sparse_weights(model)
    held = {parameter_name(name, weight): weight for name, weight in sparse.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, form in parameter_formats(model, config).items():
        weight = held.get(key, parameters.get(key))
        if form.bits != UPPER_BYTE_BITS or weight is None:
            continue
        if weight.dtype != torch.bfloat16 and getattr(weight, "bits", 16) != UPPER_BYTE_BITS:
            cast.append(weight_name(key))
    ratios = config.sparsity or {}
    decompress_(model, [name for name in cast if name in sparse and not ratios.get(name)])
    config.store_plain(cast)
