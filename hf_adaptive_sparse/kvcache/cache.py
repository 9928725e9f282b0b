"""The adaptive KV cache as transformers sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    QuantizedCache,
)

from hf_adaptive_sparse.architecture import cross_attention_layers
from hf_adaptive_sparse.kvcache.attending import Attending
from hf_adaptive_sparse.kvcache.carrying import carried_profile, check_profile
from hf_adaptive_sparse.kvcache.hybrid import AdaptiveHybridLayer, AdaptiveSlidingHybridLayer
from hf_adaptive_sparse.kvcache.indexed import AdaptiveIndexedLayer
from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer
from hf_adaptive_sparse.kvcache.refusals import Refusals
from hf_adaptive_sparse.kvcache.saving import layer_state, restored_layer, saved_layers
from hf_adaptive_sparse.kvcache.sliding import AdaptiveSlidingWindowLayer
from hf_adaptive_sparse.profiles import FORMAT_VERSION, KVCacheConfig, check_format_version


class AdaptiveQuantizedCache(QuantizedCache, DynamicCache):
    """KV cache with its own number of bits for the keys and the values of every layer.

    Works wherever a ``DynamicCache`` does: greedy, sampling, beam search, assisted and
    prompt-lookup decoding, left-padded batches, continued conversations, chunked prefill, ``crop``,
    ``reorder_cache`` and the ``batch_*`` operations. Only ``torch.compile(fullgraph=True)`` refuses
    it: graphs break where it is updated. What is stored, and when, is described at
    ``AdaptiveQuantizedLayer``; the number format in ``hf_adaptive_sparse.kvcache.codec``.

    Full-attention, sliding-window and chunked layers are quantised, and the keys and values of
    those that keep something else besides: states of a linear attention, keys of an indexer.
    Linear-attention, state-space, shared and cross-attention layers are those a ``DynamicCache``
    has, not quantised, and ignore their entry of the KV profile, which has one per decoder layer
    all the same.

    Args:
        config: ``model.config`` of the model that the cache will be used with, the object itself
            and no copy. The cache looks there for the attention in use: flex attention, which is
            compiled, gets plain tensors.
        kv_cache: Bits per layer, group size and residual length. None: the profile that ``config``
            carries, else 8 bits throughout.
        offloading: Keep every layer's contents in CPU memory but while it computes (CUDA only),
            as ``DynamicCache`` does.

    Raises:
        ValueError: If the profile lists another number of layers than the model has.
        TypeError: If ``kv_cache`` is not a ``KVCacheConfig``.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        kv_cache: KVCacheConfig | None = None,
        *,
        offloading: bool = False,
    ) -> None:
        if kv_cache is None:
            kv_cache = carried_profile(config) or KVCacheConfig()
        check_profile(kv_cache)
        # transformers decides which kind of layer goes where.
        read_directly = cross_attention_layers(config)
        layers = [
            layer if index in read_directly else _quantized(layer, kv_cache, bits, index)
            for index, (layer, bits) in enumerate(_with_bits(config, kv_cache))
        ]
        # QuantizedCache's own constructor would give every layer the same arguments. That this is
        # a DynamicCache, too, is what models and EncoderDecoderCache ask for.
        Cache.__init__(self, layers=layers, offloading=offloading, offload_only_non_sliding=False)
        self.kv_cache = kv_cache
        attending = Attending.of(config)
        for layer in self._quantized_layers():
            layer.attending = attending
        self._share_refusals()

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to copy what means nothing, and leave out how that becomes known."""
        self._refusals.check()
        return {name: value for name, value in self.__dict__.items() if name != "_refusals"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Let the layers of a copy share refusals of their own."""
        self.__dict__.update(state)
        self._share_refusals()

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self._share_refusals()

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values.

        Packed blocks with their slack, steps, minima and unquantised tails; of layers that are not
        quantised, their keys and values.
        """
        return sum(_layer_nbytes(layer) for layer in self.layers)

    @property
    def quantizes(self) -> bool:
        """Whether there is a layer that is quantised."""
        return bool(self._quantized_layers())

    @property
    def is_compileable(self) -> bool:
        """False: ``generate()`` compiles models only around caches of fixed size."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what the cache holds as tensors and plain types, for ``torch.save``.

        ``torch.load(..., weights_only=True)`` reads it back, for ``load_state_dict``. A cache may
        also be pickled whole.
        """
        self._refusals.check()
        return {
            "format_version": FORMAT_VERSION,
            "kv_cache": self.kv_cache.to_dict(),
            "layers": [layer_state(layer) for layer in self.layers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the contents by those of another cache's ``state_dict``.

        The tensors decide on the device: move them first (``map_location`` of ``torch.load``). A
        state that is refused leaves the cache as it was.

        Raises:
            ValueError: If it was written by a later version, by a cache with another profile or
                number of layers, or is damaged.
            KeyError: If a part of it is missing.
        """
        layers = saved_layers(state)
        check_format_version(state["format_version"], "the saved cache")
        profile = KVCacheConfig.from_dict(state["kv_cache"])
        if profile.to_dict() != self.kv_cache.to_dict() or len(layers) != len(self):
            raise ValueError(
                "A cache is loaded into one of the same profile and number of layers; the saved "
                f"one has {len(layers)} layers and {profile.to_dict()}, this one "
                f"{len(self)} layers and {self.kv_cache.to_dict()}."
            )
        pairs = zip(self.layers, layers, strict=True)
        self.layers[:] = [restored_layer(layer, stored) for layer, stored in pairs]
        self._share_refusals()

    def _quantized_layers(self) -> list[AdaptiveQuantizedLayer]:
        return [layer for layer in self.layers if isinstance(layer, AdaptiveQuantizedLayer)]

    def _share_refusals(self) -> None:
        """Begin anew with what is refused."""
        quantized = self._quantized_layers()
        self._refusals = Refusals(quantized[-1].layer_idx if quantized else -1)
        for layer in quantized:
            layer.refusals = self._refusals

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, ...]]:
        """Yield keys, values and sliding window of each layer, as ``DynamicCache`` does.

        Keys and values are ``(batch, kv_heads, seq, head_dim)``, dequantised; None before the
        first update.
        """
        for layer in self.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if isinstance(layer, AdaptiveQuantizedLayer) and layer.is_initialized:
                keys, values = layer.decode()
            yield keys, values, getattr(layer, "_sliding_window_tensor", None)

    def __repr__(self) -> str:
        quantized = self._quantized_layers()
        tokens = quantized[0].get_seq_length() if quantized else 0
        fields = {
            "layers": f"{len(self.layers)} ({len(quantized)} quantised)",
            "key_bits": _summary([layer.key_bits for layer in quantized]),
            "value_bits": _summary([layer.value_bits for layer in quantized]),
            "group_size": self.kv_cache.group_size,
            "residual_length": self.kv_cache.residual_length,
            "key_mode": self.kv_cache.key_mode,
            "tokens": tokens,
            "nbytes": f"{self.nbytes:,}",
        }
        described = ", ".join(f"{name}={value}" for name, value in fields.items())
        return f"{type(self).__name__}({described})"


_REPLACED: dict[type, type[AdaptiveQuantizedLayer]] = {
    DynamicLayer: AdaptiveQuantizedLayer,
    DynamicSlidingWindowLayer: AdaptiveSlidingWindowLayer,
    DynamicIndexedLayer: AdaptiveIndexedLayer,
    LinearAttentionAndFullAttentionLayer: AdaptiveHybridLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: AdaptiveSlidingHybridLayer,
}
"""transformers' kinds of layers -> ours in their places."""


def _with_bits(
    config: PretrainedConfig, kv_cache: KVCacheConfig
) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Yield transformers' layers, each with its key bits and value bits."""
    layers = DynamicCache(config=config).layers
    yield from zip(layers, kv_cache.layer_bits(len(layers)), strict=True)


def _quantized(layer: Any, kv_cache: KVCacheConfig, bits: tuple[int, int], index: int) -> Any:
    """Return the quantised layer in the place of transformers' ``layer``, or ``layer`` itself."""
    made = _REPLACED.get(type(layer))
    if made is None:
        return layer
    settings: dict[str, Any] = {
        "group_size": kv_cache.group_size,
        "residual_length": kv_cache.residual_length,
        "layer_idx": index,
        "key_mode": kv_cache.key_mode,
    }
    if issubclass(made, AdaptiveSlidingWindowLayer):
        if layer.sliding_window == 1:  # of which transformers' layer keeps everything
            return layer
        settings["sliding_window"] = layer.sliding_window
    else:
        settings["sink_length"] = kv_cache.sink_length
    if issubclass(made, AdaptiveHybridLayer):
        settings["number_of_states"] = layer.number_of_states
    return made(*bits, **settings)


def _layer_nbytes(layer: Any) -> int:
    if isinstance(layer, AdaptiveQuantizedLayer):
        return layer.nbytes
    states = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(s.untyped_storage().nbytes() for s in states if isinstance(s, torch.Tensor))


def _summary(bits: list[int]) -> int | list[int]:
    return bits[0] if len(set(bits)) == 1 else bits
