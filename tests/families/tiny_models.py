"""Tiny random models of any family: one table of small sizes for whatever a config holds."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

VOCABULARY = 160
FIRST_TEXT_TOKEN = 100
"""Ids from here on are text; those below stand for images, sounds, ends, padding."""

SIZES: Mapping[str, int] = {
    **dict.fromkeys(["hidden_size", "d_model", "embed_dim", "dim", "n_embd", "hidden_dim"], 32),
    **dict.fromkeys(["word_embed_proj_dim", "out_hidden_size", "projection_dim"], 32),
    **dict.fromkeys(["mm_hidden_size", "encoder_hidden_size"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"], 48),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "depth", "n_layer"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_head"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "image_size": 32,
    "patch_size": 8,
}
_PER_LAYER = ("layer_types", "mlp_layer_types")
_FIXED_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield a config and all configs inside it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from parts(value)


def tiny_config(model_type: str, changes: Mapping[str, Any] = {}) -> PretrainedConfig:
    """Return the smallest useful config of a model type.

    Args:
        model_type: As in ``AutoConfig``.
        changes: Dotted path -> value, for what the table of sizes does not know.
    """
    # A sub-config that is None unless it is asked for.
    wanted = {key: value for key, value in changes.items() if value == {}}
    config = AutoConfig.for_model(model_type, **wanted)
    ids = dict(_FIXED_IDS)
    for part in parts(config):
        values = vars(part)
        for key, size in SIZES.items():
            if type(values.get(key)) is int:
                setattr(part, key, size)
        for key in _PER_LAYER:
            if isinstance(values.get(key), list):
                setattr(part, key, values[key][: SIZES["num_layers"]])
        for key in [k for k in values if k.endswith(("_token_id", "_token_index"))]:
            if isinstance(values[key], int | list) or key in _FIXED_IDS:
                setattr(part, key, ids.setdefault(key, 3 + len(ids)))
    for path, value in changes.items():
        if path in wanted:
            continue
        owner, _, key = path.rpartition(".")
        part = attrgetter(owner)(config) if owner else config
        setattr(part, key, value)
    return config


def model_class(model_type: str) -> type[PreTrainedModel]:
    """Return the class that generates text for a model type."""
    names = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    found: type[PreTrainedModel] = getattr(transformers, names[model_type])
    return found


def tiny_model(model_type: str, changes: Mapping[str, Any] = {}) -> PreTrainedModel:
    """Return a random model of `tiny_config`, in evaluation mode."""
    torch.manual_seed(0)
    return model_class(model_type)(tiny_config(model_type, changes)).eval()


def feature_tokens(model: PreTrainedModel, kind: str, inputs: Mapping[str, Any]) -> int:
    """Return how many tokens a model makes of one image, clip or sound: by asking the model."""
    method = f"get_{kind}_features"
    owner = next(m for m in (getattr(model, "model", None), model) if hasattr(m, method))
    accepted = inspect.signature(getattr(owner, method)).parameters
    with torch.no_grad():
        found = getattr(owner, method)(**{k: v for k, v in inputs.items() if k in accepted})
    found = getattr(found, "pooler_output", found)
    tensors = found if isinstance(found, list | tuple) else [found]
    return sum(tensor.numel() // tensor.shape[-1] for tensor in tensors)
