"""How blocks of keys or values become bytes and back: the interface, and the choice of a codec.

A codec encodes blocks ``(batch, kv_heads, blocks, tokens, head_dim)``, each by itself and once,
into *parts*: a named tuple of tensors ``(batch, kv_heads, blocks, ...)``, which may be cut, joined
and indexed along batch and blocks like the states themselves. The number of tokens per block is
fixed per store. A further codec is one more module and one more case in ``selection``:

- ``channel.ChannelCodec``: keys, a step and a minimum per channel over the tokens of the block;
- ``grouped.GroupCodec``: keys, a step and a minimum per token and group of channels;
- ``transposed.TransposedCodec``: values, per token and group, codes stored channel by channel.

All are asymmetric and uniform::

    q = round((x - min) / step)    x' = min + q * step    step >= (max - min) / (2**bits - 1)

and compute ``q`` from the step and the minimum *as they are stored*, the minimum rounded down and
the step up, so that the scale covers every element. Therefore, at 4 bits and more, for every one,

    |x - x'| <= step / 2 + half a unit in the last place of x' (its rounding to the model's dtype).

At 2 and 3 bits the scale may end a little inside the extremes, see ``fitting``.

16 "bits" have no codec: such states stay in the model's dtype (see ``store``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from hf_adaptive_sparse.kernels.encoding import Format
from hf_adaptive_sparse.kernels.packed import PackedKeys, PackedValues

Parts = tuple[torch.Tensor, ...]
"""Named tuples in truth; each codec has its own."""


class Codec(ABC):
    """One way of storing keys or values.

    Attributes:
        bits: Bits per element: 2, 3, 4, 6 or 8.
        parts_type: The named tuple that ``encode`` returns.
    """

    bits: int
    parts_type: ClassVar[type[Parts]]

    @property
    def kernel_format(self) -> Format | None:
        """What native kernels call this codec; None where they do not know it."""
        return None

    @abstractmethod
    def encode(self, blocks: torch.Tensor, what: str) -> Parts:
        """Return the parts of ``blocks``.

        Args:
            blocks: ``(batch, kv_heads, blocks, tokens, head_dim)``, a floating dtype.
            what: What the states are, for error messages: ``"keys of layer 3"``.

        Returns:
            A named tuple of tensors ``(batch, kv_heads, blocks, ...)``.

        Raises:
            ValueError: If the codec cannot represent the states (NaN or Inf).
        """

    @abstractmethod
    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return the states ``(batch, kv_heads, blocks, tokens, head_dim)``.

        Args:
            parts: What ``encode`` returned, or a selection of it along batch or blocks.
            shape: Tokens per block and elements per head.
            dtype: The model's dtype.
        """

    @abstractmethod
    def packed(self, parts: Parts, width: int) -> PackedKeys | PackedValues | None:
        """Return ``parts`` as attention kernels read them.

        ``None`` where they cannot: then all of the cache is decoded at every step, which is slow.

        Args:
            parts: What ``encode`` returned.
            width: Elements per head.
        """

    @abstractmethod
    def block_size_bytes(self, tokens: int, head_dim: int) -> int:
        """Return the bytes of one head of one block.

        Args:
            tokens: Tokens per block.
            head_dim: Elements per head.
        """
