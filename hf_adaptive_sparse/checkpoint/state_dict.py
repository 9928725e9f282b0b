"""The state dict of a compressed model as ``save_pretrained`` writes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from hf_adaptive_sparse.architecture import parameter_name
from hf_adaptive_sparse.checkpoint.changed_weights import (
    holds,
    store_cast_weights_plain_,
    warn_of_changed,
)
from hf_adaptive_sparse.checkpoint.config import our_config
from hf_adaptive_sparse.checkpoint.empty_weights import empty_
from hf_adaptive_sparse.checkpoint.headers import CheckpointError
from hf_adaptive_sparse.checkpoint.resolving import parameter_formats
from hf_adaptive_sparse.packing.stored_names import KINDS, tensor_name, weight_name
from hf_adaptive_sparse.packing.stored_weight import ValueFormat, stored_tensors
from hf_adaptive_sparse.packing.upper_bytes import UPPER_BYTE_BITS, encode
from hf_adaptive_sparse.runtime.conversion import sparse_weights


def stored_state_dict(
    model: PreTrainedModel, rounded_in: Mapping[str, torch.dtype], *, consume: bool = False
) -> dict[str, torch.Tensor] | None:
    """Return the state dict with compressed weights, under runtime names.

    That of a part of a model, whose own config names no compression, has plain weights. A
    ``state_dict`` that ``save_pretrained`` was given is not used: transformers passes none on.
    A weight that its codes or 12 bits no longer hold is stored as it is, and the config says so.

    Args:
        model: The model.
        rounded_in: Parameter name -> dtype that it had when codes last made it. One that is not
            named was not cast since.
        consume: Let go of each weight when it is compressed: the model is of no use after, and
            never in memory twice.

    Returns:
        The state dict; ``None``: the one that transformers makes, which is right as it is.

    Raises:
        CheckpointError: If a weight that the config names is not there.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return None
    config = our_config(model)
    if config is None:
        return _plain_state_dict(model)
    model.config.quantization_config = config  # a dict there would not see what changes below
    store_cast_weights_plain_(model, config)
    if not config.compressed_modules:
        return None
    dense: dict[str, torch.Tensor] = model.state_dict()
    formats = parameter_formats(model, config)
    sparse = {parameter_name(n, weight) for n, weight in sparse_weights(model).items()}
    for key in sorted(formats.keys() - sparse - dense.keys()):
        raise _absent(key, dense)
    if consume:
        _copy_from_files_(model, dense, formats.keys())
    became_plain = {
        tensor_name(key, "bitmask"): key
        for key in sparse & formats.keys()
        if formats[key].bits == UPPER_BYTE_BITS and tensor_name(key, "codebook") not in dense
    }
    # In the model's order, so that equal models make equal shards.
    state, changed = {}, []
    for key in list(dense):
        weight = dense.pop(key)
        if key not in formats:
            state[key] = weight
            if key in became_plain:  # its values came before
                values, book = (
                    tensor_name(became_plain[key], kind) for kind in ("values", "codebook")
                )
                state[values], state[book] = encode(state[values])
            continue
        if weight.device.type == "meta":
            weight = load_offloaded_parameter(model, key)
        form = formats[key]
        if not holds(form, weight, rounded_in.get(key, weight.dtype)):
            changed.append(weight_name(key))
            form = ValueFormat(16)
        if form.bits == 16 and not (config.sparsity or {})[weight_name(key)]:
            state[key] = weight
        else:
            state |= stored_tensors(key, weight, form)
        if consume and key not in sparse:
            empty_(model, [key])
    config.store_plain(changed)
    warn_of_changed(changed)
    return state


def _absent(key: str, state: Collection[str]) -> CheckpointError:
    """Return the error of a model without a weight that its profile names."""
    way_out = "If modules were renamed or replaced, call hf_adaptive_sparse.prune again."
    if any(".base_layer." in name for name in state):
        way_out = (
            "A PEFT adapter wraps it: save the adapter with peft_model.save_pretrained(), or call "
            "merge_and_unload() or unload() of the PEFT model first, and save what that returns."
        )
    return CheckpointError(
        f"The model's sparsity profile names {key!r}, which it does not have. {way_out}"
    )


def _plain_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the state dict with plain weights for those that are compressed in memory."""
    state: dict[str, torch.Tensor] = model.state_dict()
    for name, weight in sparse_weights(model).items():
        key = parameter_name(name, weight)
        for kind in KINDS:
            state.pop(tensor_name(key, kind), None)
        state[key] = weight.to_dense()
    return state


def _copy_from_files_(
    model: PreTrainedModel, state: dict[str, torch.Tensor], letting_go: Collection[str]
) -> None:
    """Copy what stays of a model, in place and in its state dict.

    Weights are mapped from their files, and a norm that stays mapped keeps the pages of a whole
    file, changed ones of weights that were let go among them.

    Args:
        model: The model.
        state: Its state dict.
        letting_go: Names that do not stay.
    """
    copied: set[int] = set()  # tied ones are one tensor by several names
    for key in state.keys() - letting_go:
        if state[key].device.type != "cpu":
            continue
        tensor = model.get_parameter_or_buffer(key)
        if id(tensor) not in copied:
            tensor.data = tensor.data.clone()
            copied.add(id(tensor))
        state[key] = tensor.detach()
