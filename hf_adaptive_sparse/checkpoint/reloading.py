"""Compressed tensors through ``load_state_dict`` into plain weights: how a Trainer goes on.

``from_pretrained`` decompresses what it reads. A Trainer that resumes, or brings its best model
back, reads the same files without it, as `safetensors.torch.load_model` does.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.checkpoint.headers import CheckpointError
from hf_adaptive_sparse.packing.bitmask import BitmaskError
from hf_adaptive_sparse.packing.stored_names import parse_tensor_name
from hf_adaptive_sparse.packing.stored_weight import restored_weight, stored_kinds
from hf_adaptive_sparse.runtime.stored_form import stored_bits

_WAITING = "_parts_that_wait"
"""Attribute of a model: parts of weights whose other parts lie in a file that is loaded later."""


def take_compressed_(model: PreTrainedModel) -> None:
    """Let ``load_state_dict`` of a model take compressed tensors for its plain weights.

    Args:
        model: A model whose config carries a `SparsityConfig`.
    """
    if not hasattr(model, _WAITING):
        setattr(model, _WAITING, {})
        model.register_load_state_dict_pre_hook(_restore_)


def _restore_(
    model: PreTrainedModel,
    state_dict: dict[str, Any],
    prefix: str,
    *args: Any,  # torch's signature
) -> None:
    """Replace the compressed tensors of plain weights, in a state dict, by those weights.

    How a weight is stored is read from its tensors: a checkpoint of an earlier step may have
    quantised what the config now stores as it is.

    Raises:
        CheckpointError: If the tensors of a weight do not make one.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in state_dict:
        own = name.removeprefix(prefix)
        parsed = parse_tensor_name(own) if name.startswith(prefix) else None
        if parsed is not None and parsed[0] in parameters and own not in parameters:
            found[parsed[0]][parsed[1]] = name
    waiting: dict[str, dict[str, torch.Tensor]] = getattr(model, _WAITING)
    for key, names in found.items():
        parts = waiting.pop(key, {}) | {kind: state_dict[name] for kind, name in names.items()}
        bits = stored_bits(parts["values"], parts.get("codebook")) if "values" in parts else 16
        if not parts.keys() >= set(stored_kinds(bits)):
            waiting[key] = parts
            continue
        for name in names.values():
            del state_dict[name]
        form = model.config.quantization_config.format_at(bits)
        columns = parameters[key].shape[-1]
        try:
            state_dict[prefix + key] = restored_weight(parts, columns, *form)
        except BitmaskError as error:
            raise CheckpointError(f"{key}: {error}") from error
