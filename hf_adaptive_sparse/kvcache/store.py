"""All tokens of one layer's keys, or of its values: an encoded prefix and an unencoded tail."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from hf_adaptive_sparse.kvcache.buffer import TokenBuffer
from hf_adaptive_sparse.kvcache.codec import Codec, Parts


class Addition(NamedTuple):
    """What ``TokenStore.prepare`` worked out and ``TokenStore.commit`` stores.

    Attributes:
        parts: Newly encoded tokens, or None where no block has filled up.
        tail: States that join the tail; after an encoding, they are all of it.
    """

    parts: Parts | None
    tail: torch.Tensor


class TokenStore:
    """Keys or values of one layer, each token encoded at most once.

    Blocks start at multiples of ``block_length``, and a block is encoded when its last token
    arrives: behind an ``append`` the tail is shorter than a block. Where ``truncate`` cut into
    encoded tokens, those that remain stay encoded and the rest of their block follows when it is
    full again.

    Args:
        codec: How tokens are encoded.
        block_length: Tokens that are encoded together. A lossless codec has no use for a tail and
            encodes every token at once.
        template: States ``(batch, kv_heads, any, head_dim)`` whose shape, dtype and device all
            later ones must have.
    """

    def __init__(self, codec: Codec, block_length: int, template: torch.Tensor) -> None:
        self.codec = codec
        self.block_length = 1 if codec.is_lossless else block_length
        self.head_dim = template.shape[-1]
        self.dtype = template.dtype
        # The codec itself says how many parts there are and how wide: encode no tokens at all.
        step = max(1, block_length // 8) if codec.is_lossless else block_length
        empty = template.detach()[:, :, :0]
        self._parts = [TokenBuffer(part, step) for part in self._encode(empty, "no states")]
        # The tail is allocated in eighths of a block, so that a nearly empty one takes little.
        self._tail = TokenBuffer(empty, step=max(1, block_length // 8))

    @property
    def encoded_length(self) -> int:
        """Tokens encoded."""
        return self._parts[0].length

    @property
    def length(self) -> int:
        """Tokens stored, encoded or not."""
        return self.encoded_length + self._tail.length

    @property
    def batch_size(self) -> int:
        """Sequences stored."""
        return self._tail.rows.shape[0]

    @property
    def kv_heads(self) -> int:
        """Heads stored."""
        return self._tail.rows.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, slack included."""
        return self._tail.nbytes + sum(part.nbytes for part in self._parts)

    @property
    def parts(self) -> Parts:
        """The encoded tokens as the codec's parts, views ``(batch, kv_heads, seq, width)``."""
        return tuple(part.rows for part in self._parts)

    @property
    def unencoded(self) -> torch.Tensor:
        """The states that lie in the model's dtype, a view ``(batch, kv_heads, n, head_dim)``.

        These are the newest tokens or, of a lossless codec, all tokens.
        """
        return self.decode() if self.codec.is_lossless else self._tail.rows

    def prepare(self, states: torch.Tensor, what: str, whole: bool = False) -> Addition:
        """Encode the blocks that ``states`` fill up, changing nothing yet.

        Args:
            states: ``(batch, kv_heads, n, head_dim)`` to be added.
            what: What the states are, for error messages.
            whole: Encode all tokens, not only full blocks.

        Raises:
            ValueError: If the codec cannot represent the states.
        """
        length = self.length + states.shape[-2]
        end = length if whole else length - length % self.block_length
        count = end - self.encoded_length
        if count <= 0:
            return Addition(None, states)
        pending = torch.cat([self._tail.rows, states], dim=-2) if self._tail.length else states
        return Addition(self._encode(pending[:, :, :count], what), pending[:, :, count:])

    def commit(self, addition: Addition) -> None:
        """Store what ``prepare`` returned; nothing may have changed in between."""
        if addition.parts is not None:
            for buffer, part in zip(self._parts, addition.parts, strict=True):
                buffer.append(part)
            self._tail.clear()
        if addition.tail.shape[-2]:
            self._tail.append(addition.tail)

    def decode(self) -> torch.Tensor:
        """Return all tokens ``(batch, kv_heads, length, head_dim)`` in the model's dtype.

        May be a view of the storage, which holds until ``truncate`` is called.
        """
        if not self.encoded_length and not self.codec.is_lossless:
            return self._tail.rows
        encoded = self.codec.decode(self.parts, self.head_dim)
        return torch.cat([encoded, self._tail.rows], dim=-2) if self._tail.length else encoded

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self._tail.truncate(max(0, length - self.encoded_length))
        for part in self._parts:
            part.truncate(length)

    def transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a selection along the batch (dimension 0), or a move, to all that is stored."""
        for buffer in (*self._parts, self._tail):
            buffer.transform(function)

    @torch.no_grad()
    def _encode(self, states: torch.Tensor, what: str) -> Parts:
        return self.codec.encode(states.detach(), what)
