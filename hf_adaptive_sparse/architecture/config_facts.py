"""What a model's config says of its language model, in the words of every family.

Where a family uses words of its own, they are added to the tuples here and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import nn
from transformers import PretrainedConfig

UNLIMITED_CONTEXT = 2**31 - 1
"""What `context_length` returns for a model whose config names no limit."""

_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index", "media_placeholder_token_id")
_OTHER_TOKEN_FIELDS = ("video_token_id", "video_token_index", "audio_token_id", "audio_token_index")
_KV_HEAD_FIELDS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_WITHOUT_KV = ("linear_attention", "mamba", "conv", "recurrent")


def config_of(model_or_config: nn.Module | PretrainedConfig) -> PretrainedConfig:
    """Return the config of a model, or the config itself.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(model_or_config, PretrainedConfig):
        return model_or_config
    config = getattr(model_or_config, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise ValueError(
            "A `transformers` model or its config is needed, got "
            f"{type(model_or_config).__name__}, which has no config."
        )
    return config


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that says what the language model's decoder is."""
    text = config.get_text_config(decoder=True)
    return text if isinstance(text, PretrainedConfig) else config


def num_decoder_layers(model_or_config: nn.Module | PretrainedConfig) -> int:
    """Return the number of decoder layers of the language model.

    Raises:
        ValueError: If the config does not say.
    """
    config = config_of(model_or_config)
    layers = getattr(text_config(config), "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ValueError(f"{type(config).__name__} names no num_hidden_layers.")
    return layers


def kv_widths(model_or_config: nn.Module | PretrainedConfig) -> list[tuple[int, int]]:
    """Return how many elements one token adds to the cache, per decoder layer.

    Returns:
        ``(elements of the keys, elements of the values)`` per layer: ``kv_heads * head_dim``
        each; ``(0, 0)`` for a layer that keeps no keys and values.

    Raises:
        ValueError: If the config does not say.
    """
    config = config_of(model_or_config)
    text = text_config(config)
    layers = num_decoder_layers(config)
    kinds = getattr(text, "layer_types", None)
    own = getattr(text, "per_layer_config", None)  # Gemma 4: heads differ between layers
    return [
        _layer_kv_width(own[index] if own else text, index, kinds[index] if kinds else "")
        for index in range(layers)
    ]


def _layer_kv_width(text: PretrainedConfig, index: int, kind: str) -> tuple[int, int]:
    if kind in _WITHOUT_KV or index in cross_attention_layers(text):
        return 0, 0
    heads = _per_layer(getattr(text, "num_attention_heads", None), index)
    kv_heads = next(
        (_per_layer(v, index) for v in (getattr(text, f, None) for f in _KV_HEAD_FIELDS) if v),
        heads,
    )
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1  # Falcon-7B and GPT-BigCode: one key-value head, whatever num_kv_heads says
    head_dim = _per_layer(getattr(text, "head_dim", None), index)
    if head_dim is None and heads:
        head_dim = int(text.hidden_size) // heads
    if not kv_heads or not head_dim:
        raise ValueError(f"{type(text).__name__} names no attention heads, so no cache width.")
    if getattr(text, "qk_nope_head_dim", None) and getattr(text, "v_head_dim", None):
        # Multi-head latent attention is cached expanded, with keys wider than values.
        key_dim = int(text.qk_nope_head_dim) + int(text.qk_rope_head_dim)
        return kv_heads * key_dim, kv_heads * int(text.v_head_dim)
    return kv_heads * head_dim, kv_heads * head_dim


def _per_layer(value: object, index: int) -> int | None:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[index]
    return value if isinstance(value, int) else None


def kv_heads(model_or_config: nn.Module | PretrainedConfig, width: int) -> int:
    """Return the heads that a layer's keys, or values, of ``width`` elements per token have.

    1 where the config's head size does not divide the width.
    """
    text = text_config(config_of(model_or_config))
    head_dim = getattr(text, "head_dim", None)
    if not isinstance(head_dim, int):
        head_dim = int(text.hidden_size) // int(text.num_attention_heads)
    return width // head_dim if width % head_dim == 0 else 1


def cross_attention_layers(model_or_config: nn.Module | PretrainedConfig) -> frozenset[int]:
    """Return the decoder layers that attend to images instead of tokens (Mllama).

    Their keys and values are made once per image and read from the cache without an update.
    """
    listed = getattr(text_config(config_of(model_or_config)), "cross_attention_layers", None)
    return frozenset(listed if isinstance(listed, Sequence) else ())


def context_length(model_or_config: nn.Module | PretrainedConfig) -> int:
    """Return the most tokens the language model takes; `UNLIMITED_CONTEXT` if it names no limit."""
    text = text_config(config_of(model_or_config))
    for field in _CONTEXT_FIELDS:
        value = getattr(text, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return UNLIMITED_CONTEXT


def image_token_id(model_or_config: nn.Module | PretrainedConfig) -> int | None:
    """Return the id that stands for image features in ``input_ids``, if there is one."""
    config = config_of(model_or_config)
    for field in _IMAGE_TOKEN_FIELDS:
        value = getattr(config, field, None)
        if isinstance(value, int):
            return value
    return None


def media_token_ids(model_or_config: nn.Module | PretrainedConfig) -> tuple[int, ...]:
    """Return the ids that stand for features of images, videos and sounds in ``input_ids``."""
    config = config_of(model_or_config)
    parts = (config, *(getattr(config, f"{part}_config", None) for part in ("vision", "audio")))
    fields = (*_IMAGE_TOKEN_FIELDS, *_OTHER_TOKEN_FIELDS)
    found = (getattr(part, field, None) for part in parts for field in fields)
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int)))


def accepts_images(model_or_config: nn.Module | PretrainedConfig) -> bool:
    """Return whether the model's forward takes images beside text."""
    config = config_of(model_or_config)
    vision = getattr(config, "vision_config", None)
    return vision is not None or image_token_id(config) is not None


def accepts_audio(model_or_config: nn.Module | PretrainedConfig) -> bool:
    """Return whether the model's forward takes sounds beside text."""
    config = config_of(model_or_config)
    fields = ("audio_config", "audio_token_id", "audio_token_index")
    return any(getattr(config, field, None) is not None for field in fields)


def rewrites_weights(model_or_config: nn.Module | PretrainedConfig) -> bool:
    """Return whether the model's forward changes its own weights (RWKV divides some, in place)."""
    every = getattr(text_config(config_of(model_or_config)), "rescale_every", None)
    return isinstance(every, int) and every > 0


def cache_argument(model: nn.Module) -> str:
    """Return the name under which the model's forward takes its cache.

    That is ``"past_key_values"``, and from transformers 5.24 on ``"cache"``.
    """
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"
