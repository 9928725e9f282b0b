"""What a store holds at one moment: its encoded blocks, and all of its tokens.

Attention reads these while the store goes on. A store's blocks change once in ``block_length``
tokens; what changes with every token is kept small, for it is made anew per layer and token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from hf_adaptive_sparse.kernels.packed import PackedBlocks
from hf_adaptive_sparse.kvcache.codec import Codec, Parts
from hf_adaptive_sparse.kvcache.coding import decode_blocks


@dataclass(eq=False)
class Blocks:
    """The encoded blocks of a store as they were at one moment.

    One object for as long as they do not change, so that what is worked out about them serves all
    the tokens that are decoded meanwhile.

    Attributes:
        codec: How ``parts`` are encoded, None if no token is.
        parts: The encoded blocks, a named tuple of views ``(batch, kv_heads, blocks, ...)``.
        lengths: Tokens of each block; the rows behind them, in shorter blocks, mean nothing.
        block_length: Tokens that a whole block has.
        packed_with: Of keys: the values beside them, and what kernels read of both.
    """

    codec: Codec | None
    parts: Parts
    lengths: tuple[int, ...]
    block_length: int
    packed_with: tuple[Blocks, PackedBlocks | None] | None = None

    @functools.cached_property
    def length(self) -> int:
        """Tokens encoded."""
        return sum(self.lengths)

    @functools.cached_property
    def has_short_ones(self) -> bool:
        """Whether a block has fewer than ``block_length`` tokens."""
        return any(length != self.block_length for length in self.lengths)


@dataclass(slots=True)
class Pinned:
    """The newest tokens of a store as they were at one moment.

    Later appends, batch operations and dropped blocks leave it as it is; ``crop`` may not.

    Attributes:
        blocks: The encoded tokens.
        raw: Unencoded states ``(batch, kv_heads, sinks + tail, head_dim)``.
        sinks: How many of them lie in front of the blocks.
        skip: Oldest tokens that are held but not part of this (outside a sliding window).
    """

    blocks: Blocks
    raw: torch.Tensor
    sinks: int
    skip: int

    @property
    def length(self) -> int:
        """Tokens pinned."""
        return self.blocks.length + self.raw.shape[2] - self.skip

    def decode(self) -> torch.Tensor:
        """Return the tokens ``(batch, kv_heads, length, head_dim)`` in the model's dtype.

        A view where nothing is encoded.
        """
        raw, codec, lengths = self.raw, self.blocks.codec, self.blocks.lengths
        if codec is None or not lengths:
            return raw[:, :, self.skip :]
        batch, kv_heads, raw_tokens, head_dim = raw.shape
        sinks, end = self.sinks, self.sinks + self.blocks.length
        whole = raw.new_empty((batch, kv_heads, self.blocks.length + raw_tokens, head_dim))
        if sinks:
            whole.narrow(2, 0, sinks).copy_(raw.narrow(2, 0, sinks))
        if sinks < raw_tokens:
            tail = raw_tokens - sinks
            whole.narrow(2, end, tail).copy_(raw.narrow(2, sinks, tail))
        decode_blocks(
            codec,
            self.blocks.parts,
            self.blocks.block_length,
            whole.narrow(2, sinks, end - sinks),
            lengths if self.blocks.has_short_ones else None,
        )
        return whole[:, :, self.skip :] if self.skip else whole
