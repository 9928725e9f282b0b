"""Compressed tensors through ``load_state_dict`` into plain weights: how a Trainer goes on.

``from_pretrained`` decompresses what it reads. A Trainer that resumes, or brings its best model
back, reads the same files without it, as `safetensors.torch.load_model` does. That works where the
files and the model use the same names, as in Llama and most text models. transformers renames the
tensors of others on save (llava, qwen2_vl, mixtral), and its Trainer restores none of those, be
they compressed or dense.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.checkpoint.config import our_config
from hf_adaptive_sparse.checkpoint.headers import CheckpointError
from hf_adaptive_sparse.packing.bitmask import BitmaskError
from hf_adaptive_sparse.packing.sparse_weight import stored_bits
from hf_adaptive_sparse.packing.stored_names import parse_tensor_name
from hf_adaptive_sparse.packing.stored_weight import restored_weight, stored_kinds

_WAITING = "_parts_that_wait"


class _Waiting(dict[str, dict[str, torch.Tensor]]):
    """Parts of weights whose other parts lie in a file that is loaded later, by parameter name.

    Copies and pickles of a model take none of them along.
    """

    def __reduce__(self) -> tuple[type[_Waiting], tuple[()]]:
        return type(self), ()


def take_compressed_(model: PreTrainedModel) -> None:
    """Let ``load_state_dict`` of a model take compressed tensors for its plain weights.

    Args:
        model: A model whose config carries a `SparsityConfig`.
    """
    if not hasattr(model, _WAITING):
        setattr(model, _WAITING, _Waiting())
        model.register_load_state_dict_pre_hook(_restore_)


def _restore_(
    model: PreTrainedModel,
    state_dict: dict[str, Any],
    prefix: str,
    *args: Any,  # torch's signature
) -> None:
    """Replace the compressed tensors of plain weights, in a state dict, by those weights.

    The bits of a weight are read from its tensors: a checkpoint of an earlier step may have
    quantised what the config now stores as it is. The group size of codes is that of the config,
    since no tensor tells it: a file with another one must not be loaded.

    Raises:
        CheckpointError: If the tensors of a weight do not make one.
    """
    config = our_config(model)
    if config is None:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    waiting: _Waiting = getattr(model, _WAITING)
    for key in parameters:
        if prefix + key in state_dict:
            waiting.pop(key, None)
    for key, names in _compressed(parameters, state_dict, prefix).items():
        parts = {kind: state_dict[name] for kind, name in names.items()}
        earlier = waiting.pop(key, {})
        if earlier.keys().isdisjoint(parts):
            parts |= earlier
        bits = stored_bits(parts["values"], parts.get("codebook")) if "values" in parts else 16
        kinds = stored_kinds(bits)
        if "values" not in parts or parts.keys() < set(kinds):
            waiting[key] = parts
            continue
        if parts.keys() != set(kinds):
            raise CheckpointError(
                f"{key}: a weight with values of {bits} bits is stored as {', '.join(kinds)}; got "
                f"{', '.join(sorted(parts))}."
            )
        dtype = parameters[key].dtype
        if "scales" in parts:  # cast as from_pretrained casts them
            parts["scales"] = parts["scales"].to(dtype)
            model.hf_quantizer.rounded_in[key] = dtype
        try:
            weight = restored_weight(parts, parameters[key].shape, config.format_at(bits))
        except BitmaskError as error:
            raise CheckpointError(f"{key}: {error}") from error
        for name in names.values():
            del state_dict[name]
        state_dict[prefix + key] = weight


def _compressed(
    parameters: Collection[str], state_dict: Collection[str], prefix: str
) -> dict[str, dict[str, str]]:
    """Return parameter -> kind -> name in a state dict, of those it has only compressed."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in state_dict:
        own = name.removeprefix(prefix)
        parsed = parse_tensor_name(own) if name.startswith(prefix) else None
        if parsed is None or own in parameters:
            continue
        key, kind = parsed
        if key in parameters and prefix + key not in state_dict:
            found[key][kind] = name
    return found
