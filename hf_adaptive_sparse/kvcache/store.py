"""All tokens of one layer's keys, or of its values: encoded blocks and unencoded tokens.

In the order of the sequence a store holds

    sink tokens (unencoded) | blocks of ``block_length`` tokens (encoded) | tail (unencoded)

Sinks and tail lie side by side in one tensor, ``raw``. Without a codec (16 bits) all are raw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from hf_adaptive_sparse.kvcache.buffer import RowBuffer
from hf_adaptive_sparse.kvcache.codec import Codec, Parts
from hf_adaptive_sparse.kvcache.coding import empty_parts, encode_into
from hf_adaptive_sparse.kvcache.pinned import Blocks, Pinned
from hf_adaptive_sparse.kvcache.refusals import Refusals


class Addition(NamedTuple):
    """What ``TokenStore.prepare`` worked out and ``TokenStore.commit`` stores.

    Attributes:
        lengths: Tokens in each of the newly encoded blocks, which lie behind those stored.
        raw: States that join ``raw``; after an encoding they are all of it but the sinks.
        sinks: How many of these are sinks.
    """

    lengths: tuple[int, ...]
    raw: torch.Tensor
    sinks: int


class TokenStore:
    """Keys or values of one layer, each token encoded at most once.

    A block is encoded when its last token arrives: behind a ``commit`` the tail is shorter than a
    block (than ``hold_back`` and a block). Where ``remove_newest`` cuts into a block, the tokens
    that remain keep their codes: the block stays a shorter one, and new tokens begin the next.

    Args:
        codec: How blocks are encoded; None keeps every token in the model's dtype.
        block_length: Tokens that are encoded together.
        template: States ``(batch, kv_heads, any, head_dim)`` whose shape, dtype and device all
            later ones must have.
        sink_length: First tokens of the sequence that are never encoded.
    """

    def __init__(
        self,
        codec: Codec | None,
        block_length: int,
        template: torch.Tensor,
        sink_length: int = 0,
    ) -> None:
        self.codec = codec
        self.block_length = block_length
        self.sink_length = 0 if codec is None else sink_length
        self.sinks = 0
        self.lengths: tuple[int, ...] = ()
        self.head_dim = template.shape[-1]
        self.dtype = template.dtype
        self._blocks: Blocks | None = None
        # Raw tokens are allocated in eighths of a block, so that a nearly empty tail takes little.
        self._raw = RowBuffer(template, step=max(1, block_length // 8))
        self._parts: list[RowBuffer] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies what is worked out about the original's blocks: its addresses."""
        return self.__dict__ | {"_blocks": None}

    @property
    def blocks(self) -> Blocks:
        """The encoded blocks as they are now: the same object until they change."""
        if self._blocks is None:
            self._blocks = Blocks(self.codec, self.parts, self.lengths, self.block_length)
        return self._blocks

    @property
    def parts(self) -> Parts:
        """The encoded blocks, the codec's named tuple of views ``(batch, kv_heads, blocks, ...)``.

        Empty as long as no block has filled up.
        """
        if self.codec is None or not self.lengths:
            return ()
        return self.codec.parts_type(*(part.rows for part in self._parts))

    @property
    def raw(self) -> torch.Tensor:
        """The unencoded states, a view ``(batch, kv_heads, sinks + tail, head_dim)``."""
        return self._raw.rows

    @property
    def length(self) -> int:
        """Tokens held, encoded or not."""
        return self.blocks.length + self._raw.length

    @property
    def batch_size(self) -> int:
        """Sequences stored."""
        return self._raw.leading_shape[0]

    @property
    def kv_heads(self) -> int:
        """Heads stored."""
        return self._raw.leading_shape[1]

    @property
    def device(self) -> torch.device:
        """Where the states are."""
        return self._raw.device

    @property
    def nbytes(self) -> int:
        """Bytes allocated, slack included."""
        return self._raw.nbytes + sum(part.nbytes for part in self._parts)

    def pin(self, newest: int | None = None) -> Pinned:
        """Return the newest tokens, or all of them, as they are now."""
        skip = 0 if newest is None else max(0, self.length - newest)
        return Pinned(self.blocks, self._raw.rows, self.sinks, skip)

    def fits(self, states: torch.Tensor) -> bool:
        """Return whether states have the shape, tokens aside, dtype and device of the stored."""
        return self._raw.fits(states)

    def has_room(self, tokens: int, hold_back: int = 0) -> bool:
        """Return whether so many more tokens fill no block and are no sinks."""
        if self.codec is None:
            return True
        if self.sinks < self.sink_length and not self.lengths:
            return False
        return self._raw.length - self.sinks + tokens - hold_back < self.block_length

    def append(self, states: torch.Tensor) -> None:
        """Store states ``(batch, kv_heads, n, head_dim)``, for which there is room, as they are."""
        self._raw.append(states.detach() if states.requires_grad else states)

    def prepare(
        self,
        states: torch.Tensor,
        what: str,
        hold_back: int = 0,
        refusals: Refusals | None = None,
        *,
        whole: bool = False,
    ) -> Addition:
        """Encode the blocks that ``states`` fill up, behind those stored; nothing counts yet.

        Args:
            states: ``(batch, kv_heads, n, head_dim)`` to be added.
            what: What the states are, for error messages.
            hold_back: Newest tokens that are not to be encoded yet.
            refusals: See ``coding.encode_into``.
            whole: Encode all tokens, the last ones as a shorter block.

        Raises:
            NonFiniteError: If the codec cannot represent the states.
        """
        states, tokens = states.detach() if states.requires_grad else states, states.shape[2]
        sinks = 0 if self.lengths else min(self.sink_length - self.sinks, tokens)
        tail = self._raw.length - self.sinks
        pending = tail + tokens - sinks
        count = max(0, pending - hold_back) // self.block_length
        end = count * self.block_length
        lengths = (self.block_length,) * count
        if whole and pending > end:
            lengths, end = (*lengths, pending - end), pending
        if self.codec is None or not lengths:
            return Addition((), states, sinks)
        # Every operation on a view costs a GPU's host as much as a launch: none without need.
        fresh = states.narrow(2, sinks, tokens - sinks) if sinks else states
        if tail:
            fresh = torch.cat([self.raw.narrow(2, self.sinks, tail), fresh], dim=2)
        raw = fresh.narrow(2, end, fresh.shape[2] - end)
        if sinks:
            raw = torch.cat([states.narrow(2, 0, sinks), raw], dim=2)
        self._encode(self.codec, fresh.narrow(2, 0, end), what, refusals)
        return Addition(lengths, raw, sinks)

    def commit(self, addition: Addition) -> None:
        """Store what ``prepare`` returned; nothing may have changed in between."""
        if addition.lengths:
            for part in self._parts:
                part.extend(len(addition.lengths))
            self.lengths += addition.lengths
            self._blocks = None
            kept = self.raw.narrow(2, 0, self.sinks) if self.sinks else None
            self._raw.clear()
            if kept is not None:
                self._raw.append(kept)
        self.sinks += addition.sinks
        if addition.raw.shape[2]:
            self._raw.append(addition.raw)

    def restore(
        self, parts: Sequence[torch.Tensor], lengths: tuple[int, ...], raw: torch.Tensor, sinks: int
    ) -> None:
        """Hold what another store of this kind held; this one is empty.

        Args:
            parts: Its ``parts``.
            lengths: Its ``lengths``.
            raw: Its ``raw``.
            sinks: Its ``sinks``.
        """
        held = parts if lengths else ()  # of none it is not known that they are the codec's
        self._parts = [RowBuffer(part, step=1) for part in held]
        for buffer, part in zip(self._parts, held, strict=True):
            buffer.append(part)
        self._raw.append(raw)
        self.lengths, self.sinks, self._blocks = lengths, sinks, None

    def remove_newest(self, count: int) -> None:
        """Remove the newest tokens, encoded or not."""
        from_tail = min(count, self._raw.length - self.sinks)
        self._raw.truncate(self._raw.length - from_tail)
        count -= from_tail
        lengths = list(self.lengths)
        while count and lengths:
            removed = min(count, lengths[-1])
            lengths[-1] -= removed
            count -= removed
            if not lengths[-1]:
                lengths.pop()
        self.lengths, self._blocks = tuple(lengths), None
        for part in self._parts:
            part.truncate(len(lengths))
        if count:
            self.sinks = max(0, self.sinks - count)
            self._raw.truncate(self.sinks)

    def drop_oldest(self, keep: int) -> None:
        """Drop blocks that hold none of the newest ``keep`` tokens; the rest of one may stay."""
        surplus = self.length - keep
        if self.codec is None:
            if surplus >= self.block_length:
                self._raw.drop_front(surplus)
            return
        blocks = 0
        while blocks < len(self.lengths) and self.lengths[blocks] <= surplus:
            surplus -= self.lengths[blocks]
            blocks += 1
        if blocks:
            self.lengths, self._blocks = self.lengths[blocks:], None
            for part in self._parts:
                part.drop_front(blocks)

    def transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a selection along the batch (dimension 0), or a move, to all that is stored."""
        for buffer in (*self._parts, self._raw):
            buffer.transform(function)
        self._blocks = None

    def _encode(
        self, codec: Codec, states: torch.Tensor, what: str, refusals: Refusals | None
    ) -> None:
        """Write blocks of ``states`` to the rows behind those stored."""
        missing = -states.shape[-2] % self.block_length
        if missing:  # copies of the last token change no step and no minimum
            filler = states[:, :, -1:].expand(-1, -1, missing, -1)
            states = torch.cat([states, filler], dim=-2)
        blocks = states.unflatten(-2, (-1, self.block_length))
        count = blocks.shape[2]
        if not self._parts:
            empty = empty_parts(codec, blocks)
            self._parts = [RowBuffer(part, step=1, capacity=count) for part in empty]
        room = [part.room(count) for part in self._parts]
        encode_into(codec, blocks, room, what, refusals)
