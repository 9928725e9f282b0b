"""Lets ``generate()`` make the adaptive cache on its own where the model's config has a KV profile.

``generate()`` accepts a cache from its caller but knows a fixed list of kinds to make itself, so
the one method that makes them is wrapped, once and for all models. No instance is touched: copies
and pickles of a model behave as the model does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from hf_adaptive_sparse.architecture import decoder_layers
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.carrying import profile_to_generate_with
from hf_adaptive_sparse.profiles import KVCacheConfig

_MARK = "_hf_adaptive_sparse_wrapper"
_CACHE_NAMES = ("cache", "past_key_values")
"""Under which of them ``generate()`` keeps its cache depends on the version of transformers."""


class AdaptiveEncoderDecoderCache(EncoderDecoderCache):
    """``EncoderDecoderCache`` whose self-attention is quantised; cross-attention is not."""


def install() -> None:
    """Make ``generate()`` use the adaptive cache for models whose config has a KV profile.

    Calling it again changes nothing. Everything a caller says has precedence:
    ``cache=`` or ``past_key_values=``, any ``cache_implementation`` (argument or generation
    config), and ``use_cache=False`` are honoured, and a plain ``model(...)`` is not affected.
    Assistants of assisted decoding get the cache that their own config asks for.
    """
    stock = GenerationMixin._prepare_cache_for_generation
    if not hasattr(stock, _MARK):
        GenerationMixin._prepare_cache_for_generation = _with_adaptive_cache(stock)


def check_takes_profile(model: nn.Module) -> None:
    """Refuse a KV profile for a model whose ``generate()`` would never look at it.

    Raises:
        ValueError: If it does not make the `DynamicCache` that the adaptive cache stands for.
    """
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        raise ValueError(
            "A KV profile needs a model that generates with a DynamicCache; "
            f"{type(model).__name__} makes one of its own kind, of which nothing would be "
            "quantised. Leave kv_cache out (of a search, kv_bits); a checkpoint that has it loads "
            "with sparsity_config=SparsityConfig(kv_cache=False)."
        )


def _with_adaptive_cache(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def prepare(
        self: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        callers_own = any(model_kwargs.get(name) is not None for name in _CACHE_NAMES)
        stock(self, generation_config, model_kwargs, *args, **kwargs)
        name = next((n for n in _CACHE_NAMES if model_kwargs.get(n) is not None), None)
        if name is None or callers_own or generation_config.cache_implementation is not None:
            return
        made: Any = model_kwargs[name]
        profile = profile_to_generate_with(self)
        if profile is None:
            return
        if generation_config.is_assistant:
            profile = _of_first_layers(profile, len(made), of=len(decoder_layers(self)[1]))
        if type(made) is EncoderDecoderCache:
            cache = AdaptiveQuantizedCache(self.config, profile)
            model_kwargs[name] = AdaptiveEncoderDecoderCache(cache, made.cross_attention_cache)
        elif type(made) is DynamicCache:
            model_kwargs[name] = AdaptiveQuantizedCache(self.config, profile)
        else:
            return
        if generation_config.is_assistant:  # its rejected tokens will be taken back
            model_kwargs[name].activate_past_recording()

    setattr(prepare, _MARK, True)
    return prepare


def _of_first_layers(profile: KVCacheConfig, count: int, *, of: int) -> KVCacheConfig:
    """Return the profile of the first layers: an early exit drafts with no more of its model.

    Args:
        profile: A profile. Lists that do not fit the whole model are left for the cache to refuse.
        count: Layers that draft.
        of: Layers of the whole model.
    """
    lists: dict[str, Any] = {
        name: bits[:count]
        for name in ("bits", "key_bits", "value_bits")
        if isinstance(bits := getattr(profile, name), tuple) and len(bits) == of
    }
    return replace(profile, **lists)
