"""Keys per token: one step and one minimum for each group of neighbouring channels of a token.

Size of a head of a block of T tokens, with ``groups = ceil(head_dim / min(group_size, head_dim))``:
``T * (ceil(head_dim * bits / 8) + 4 * groups)`` bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from hf_adaptive_sparse.kernels.encoding import Format
from hf_adaptive_sparse.kernels.packed import PackedKeys
from hf_adaptive_sparse.kvcache.affine import (
    compute_dtype,
    from_codes,
    stored_scale,
    to_codes,
)
from hf_adaptive_sparse.kvcache.codec import Codec, Parts
from hf_adaptive_sparse.kvcache.fitting import scale_ends
from hf_adaptive_sparse.packing.bits import pack, packed_size_bytes, unpack


class GroupParts(NamedTuple):
    """Blocks of keys.

    Attributes:
        codes: uint8 ``(batch, kv_heads, blocks, tokens, ceil(head_dim * bits / 8))``.
        step: 16-bit ``(batch, kv_heads, blocks, tokens, groups)``.
        minimum: The same, the value of code 0.
    """

    codes: torch.Tensor
    step: torch.Tensor
    minimum: torch.Tensor


@dataclass(frozen=True)
class GroupCodec(Codec):
    """Asymmetric uniform quantisation, group-wise per token along ``head_dim``.

    The effective group is ``min(group_size, head_dim)``; the last group of a head may be shorter.

    Attributes:
        bits: Bits per element: 2, 3, 4, 6 or 8.
        group_size: Neighbouring elements of a head that share a step and a minimum.
    """

    bits: int
    group_size: int
    parts_type: ClassVar[type[Parts]] = GroupParts

    @property
    def kernel_format(self) -> Format:
        """See ``Codec.kernel_format``."""
        return Format("group", self.bits, self.group_size)

    def encode(self, blocks: torch.Tensor, what: str) -> GroupParts:
        """Quantise and pack ``blocks``; see ``Codec.encode``."""
        exact = blocks.to(compute_dtype(blocks.dtype))
        lowest, highest = group_ends(exact, self.group_size, self.bits, 0)
        step, minimum = stored_scale(lowest, highest, self.bits, blocks, what)
        width = blocks.shape[-1]
        codes = to_codes(exact, self._spread(step, width), self._spread(minimum, width), self.bits)
        return GroupParts(pack(codes, self.bits), step, minimum)

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Unpack and dequantise; see ``Codec.decode``."""
        packed, step, minimum = parts
        codes = unpack(packed, self.bits, shape[1])
        return from_codes(
            codes, self._spread(step, shape[1]), self._spread(minimum, shape[1]), dtype
        )

    def packed(self, parts: Parts, width: int) -> PackedKeys:
        """See ``Codec.packed``."""
        codes, step, minimum = parts
        return PackedKeys(self.bits, codes, step, minimum, min(self.group_size, width))

    def block_size_bytes(self, tokens: int, head_dim: int) -> int:
        """Return the bytes of one head of one block, by the formula of the module."""
        groups = group_count(head_dim, self.group_size)
        return tokens * (packed_size_bytes(head_dim, self.bits) + 4 * groups)

    def _spread(self, metadata: torch.Tensor, width: int) -> torch.Tensor:
        return spread_groups(metadata, self.group_size, width)


def group_count(width: int, group_size: int) -> int:
    """Return the groups that ``width`` elements make: ``ceil(width / min(group_size, width))``."""
    return -(-width // min(group_size, width))


def group_ends(
    elements: torch.Tensor, group_size: int, bits: int, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``fitting.scale_ends`` of each group along the last dimension, ``(..., groups)``."""
    width = elements.shape[-1]
    group = min(group_size, width)
    whole = width // group * group
    pieces = [elements[..., :whole].unflatten(-1, (whole // group, group))]
    if whole < width:
        pieces.append(elements[..., None, whole:])
    lowest, highest = zip(*(scale_ends(piece, bits, steps) for piece in pieces), strict=True)
    return torch.cat(lowest, dim=-1), torch.cat(highest, dim=-1)


def spread_groups(metadata: torch.Tensor, group_size: int, width: int) -> torch.Tensor:
    """Return ``(..., groups)`` such that it broadcasts against ``(..., width)``."""
    if metadata.shape[-1] == 1:
        return metadata
    return metadata.repeat_interleave(min(group_size, width), dim=-1)[..., :width]
