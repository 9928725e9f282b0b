"""The most bytes that a KV cache takes at a given length, computed without filling one.

The bytes of a block are the codecs' own figures. The number of blocks and unpacked tokens of a
layer, and the spare room of its buffers, follow `kvcache.store` and `kvcache.buffer`. The bound
holds however the cache was filled: by a prompt, token by token, or both. It does not cover assisted
decoding, which keeps a further block of every layer unpacked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from hf_adaptive_sparse.architecture import kv_heads, kv_widths
from hf_adaptive_sparse.kvcache.buffer import GROWTH
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.codec import Codec
from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer
from hf_adaptive_sparse.kvcache.selection import key_codec, value_codec
from hf_adaptive_sparse.kvcache.sliding import AdaptiveSlidingWindowLayer
from hf_adaptive_sparse.profiles import KV_BITS
from hf_adaptive_sparse.search.kv_split import LayerBits
from hf_adaptive_sparse.search.space import SearchSpace


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of every layer's keys and values at each width, at one length and batch size.

    Attributes:
        layers: Per layer and part (keys, values): bits -> bytes at most. Empty for what the cache
            does not quantise.
        fixed: Bytes of layers that are not quantised, whatever the bits.
        plain: Bytes of a ``DynamicCache``.
    """

    layers: tuple[tuple[Mapping[int, int], Mapping[int, int]], ...]
    fixed: int
    plain: int

    @classmethod
    def of(cls, model: PreTrainedModel, space: SearchSpace) -> CacheBytes:
        """Compute the bytes for a model and a space with ``fit_bytes``."""
        length, batch = space.context_length or 1, space.batch_size
        itemsize = model.dtype.itemsize
        widths = kv_widths(model)
        cache = AdaptiveQuantizedCache(model.config, space.kv_config(8, 8))
        stock = DynamicCache(config=model.config)
        layers: list[tuple[dict[int, int], dict[int, int]]] = []
        fixed, plain = 0, 0
        # Layers that share the keys and values of others have no place in the cache.
        for layer, dense, width in zip(cache.layers, stock.layers, widths, strict=False):
            window = getattr(dense, "sliding_window", None)
            sliding = isinstance(dense, DynamicSlidingWindowLayer) and window is not None
            tokens = min(length, int(window)) if sliding and window is not None else length
            states = tokens * sum(width) * itemsize * batch
            plain += states
            if not isinstance(layer, AdaptiveQuantizedLayer):
                fixed += states
                layers.append(({}, {}))
                continue
            tables = []
            for part, size in enumerate(width):
                heads = kv_heads(model.config, size) if size else 1
                head_dim = size // heads
                tables.append(
                    {
                        bits: batch
                        * heads
                        * _store_bytes(layer, _codec(bits, part, space), length, head_dim, itemsize)
                        for bits in KV_BITS
                    }
                )
            layers.append((tables[0], tables[1]))
        return cls(tuple(layers), fixed, plain)

    def at_most(self, bits: Sequence[LayerBits] | None) -> int:
        """Return the most bytes that a cache takes.

        Args:
            bits: ``(key bits, value bits)`` per decoder layer; ``None``: a plain ``DynamicCache``.
        """
        if bits is None:
            return self.plain
        return self.fixed + sum(
            table.get(width, 0)
            for tables, pair in zip(self.layers, bits, strict=False)
            for table, width in zip(tables, pair, strict=True)
        )


def _codec(bits: int, part: int, space: SearchSpace) -> Codec | None:
    if part == 0:
        return key_codec(bits, space.kv_key_mode, space.kv_group_size)
    return value_codec(bits, space.kv_group_size)


def _store_bytes(layer: Any, codec: Codec | None, length: int, head_dim: int, itemsize: int) -> int:
    """Return the bytes of one head of one sequence's keys, or values, as an upper bound."""
    block = layer.residual_length
    raw_step = max(1, block // 8)
    token = head_dim * itemsize
    window = layer.sliding_window if isinstance(layer, AdaptiveSlidingWindowLayer) else None
    slides = window is not None and length >= window
    # Behind a window, less than one block is held beyond it, and the rows in front of it are given
    # back once they are more than a step.
    held = window - 1 + block - 1 if slides and window is not None else length
    if codec is None:
        return token * (_capacity(held, raw_step) + (raw_step if slides else 0))
    packed = codec.block_size_bytes(block, head_dim)
    if slides:
        return packed * (_capacity(held // block + 1, 1) + 1) + token * _capacity(
            block - 1, raw_step
        )
    # The most is reached at the length itself or one token before its last whole block.
    fullest = {length, (length + 1) // block * block - 1} - {-1}
    return max(
        packed * _capacity(tokens // block, 1) + token * _capacity(tokens % block, raw_step)
        for tokens in fullest
    )


def _capacity(rows: int, step: int) -> int:
    """Return the rows that a buffer holding ``rows`` may have allocated, see `RowBuffer`."""
    if rows <= 1:
        return rows
    return max(rows, rows - 1 + max(step, (rows - 1) // GROWTH))
