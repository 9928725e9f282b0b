"""What attention reads: packed blocks of keys and values, and the tokens beside them.

``B`` batch, ``H`` KV heads, ``N`` blocks, ``T`` tokens per block, ``D`` channels of a head (keys
and values may differ), ``P(n) = ceil(n * bits / 8)`` bytes, ``G = ceil(D / group)`` groups of
channels. Codes are packed as ``hf_adaptive_sparse.packing.bits`` says. In a short block, what lies
behind its length means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class PackedKeys:
    """Keys: a row of codes per token.

    ``key[t, c] = minimum + step * code[t, c]``, with step and minimum per channel and block, or per
    token and group of channels.

    Attributes:
        bits: 2, 3, 4, 6 or 8.
        codes: uint8 ``(B, H, N, T, P(D))``.
        step: 16- or 32-bit float ``(B, H, N, D)`` by channel, ``(B, H, N, T, G)`` by token.
        minimum: As ``step``.
        group: Channels that share a step, if by token; None: by channel.
    """

    bits: int
    codes: torch.Tensor
    step: torch.Tensor
    minimum: torch.Tensor
    group: int | None = None


@dataclass(frozen=True)
class PackedValues:
    """Values: a row of codes per channel, along the tokens of a block.

    ``value[t, c] = minimum[g, t] + step[g, t] * code[c, t]`` for ``c`` in group ``g``, and of a
    block ``step[g, t] = scales[0] + scales[1] * step_codes[g, t]``, ``minimum[g, t] = scales[2] +
    scales[3] * min_codes[g, t]``.

    Attributes:
        bits: 2, 3, 4, 6 or 8.
        codes: uint8 ``(B, H, N, D, P(T))``.
        step_codes: uint8 ``(B, H, N, G, T)``.
        min_codes: uint8 ``(B, H, N, G, T)``.
        scales: 16- or 32-bit float ``(B, H, N, 4)``.
        group: Channels that share a step.
    """

    bits: int
    codes: torch.Tensor
    step_codes: torch.Tensor
    min_codes: torch.Tensor
    scales: torch.Tensor
    group: int


@dataclass(frozen=True, eq=False)
class PackedBlocks:
    """The packed blocks of one layer. They stay what they are while tokens are decoded.

    Attributes:
        keys: The blocks' keys.
        values: The blocks' values.
        block_length: ``T``.
        lengths: Tokens of each block; None: ``T`` each.
        prepared: What kernels worked out about these blocks for their next calls, by kernel.
    """

    keys: PackedKeys
    values: PackedValues
    block_length: int
    lengths: tuple[int, ...] | None = None
    prepared: dict[object, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def length(self) -> int:
        """Tokens packed."""
        if self.lengths is None:
            return self.keys.codes.shape[2] * self.block_length
        return sum(self.lengths)


@dataclass(slots=True)
class PackedCache:
    """Keys and values of one layer: ``sinks | blocks | recent``, without the first ``skip`` tokens.

    Attributes:
        blocks: The packed blocks.
        raw_keys: ``(B, H, sinks + recent, key D)`` in the model's dtype.
        raw_values: ``(B, H, sinks + recent, value D)``.
        sinks: How many raw tokens lie in front of the blocks.
        skip: Oldest tokens that are not seen; masks do not count them.
    """

    blocks: PackedBlocks
    raw_keys: torch.Tensor
    raw_values: torch.Tensor
    sinks: int = 0
    skip: int = 0

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.blocks.length + self.raw_keys.shape[2] - self.skip

    def check_query(self, query: torch.Tensor) -> None:
        """Refuse queries of another model or batch.

        Args:
            query: ``(batch, heads, queries, head_dim)``.

        Raises:
            ValueError: If batch, heads or head_dim do not fit the cache.
        """
        batch, heads, _, head_dim = query.shape
        keys = self.raw_keys
        if batch != keys.shape[0] or heads % keys.shape[1] or head_dim != keys.shape[-1]:
            raise ValueError(
                "query must be (batch, a multiple of kv_heads, queries, head_dim) of the cache's "
                f"(batch, kv_heads, tokens, head_dim), got {tuple(query.shape)} and "
                f"{tuple(keys.shape)}."
            )
