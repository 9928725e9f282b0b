"""The codec for one entry of a KV profile."""

from __future__ import annotations

from hf_adaptive_sparse.kvcache.channel import ChannelCodec
from hf_adaptive_sparse.kvcache.codec import Codec
from hf_adaptive_sparse.kvcache.grouped import GroupCodec
from hf_adaptive_sparse.kvcache.transposed import TransposedCodec
from hf_adaptive_sparse.profiles import KV_KEY_MODES


def key_codec(bits: int, key_mode: str, group_size: int) -> Codec | None:
    """Return the codec for keys, None for the model's dtype.

    Args:
        bits: 2, 3, 4, 6, 8, or 16 for the model's dtype.
        key_mode: "channel" or "token".
        group_size: Channels that share a step and a minimum; of no meaning per channel.

    Raises:
        ValueError: If ``key_mode`` is unknown.
    """
    if key_mode not in KV_KEY_MODES:
        raise ValueError(f"key_mode must be one of {', '.join(KV_KEY_MODES)}, got {key_mode!r}.")
    if bits == 16:
        return None
    return ChannelCodec(bits) if key_mode == "channel" else GroupCodec(bits, group_size)


def value_codec(bits: int, group_size: int) -> Codec | None:
    """Return the codec for values, None for the model's dtype.

    Args:
        bits: 2, 3, 4, 6, 8, or 16 for the model's dtype.
        group_size: Channels of a token that share a step and a minimum.
    """
    return None if bits == 16 else TransposedCodec(bits, group_size)
