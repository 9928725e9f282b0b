"""Keys per channel: one step and one minimum for each channel over the tokens of a block.

Keys have channels that are large in every token (Qwen2.5's biases, rotary pairs of low frequency).
Per channel such an offset is part of the minimum and costs nothing; per token it would stretch the
scale of the whole group. As in KIVI (Liu et al. 2024, section 3), here asymmetric over a block.

Size of a head of a block of T tokens: ``T * ceil(head_dim * bits / 8) + 4 * head_dim`` bytes, so
that metadata take 32 / T bits per element: 0.25 at T = 128.
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
from hf_adaptive_sparse.kvcache.fitting import KEY_FITS, scale_ends
from hf_adaptive_sparse.packing.bits import pack, packed_size_bytes, unpack


class ChannelParts(NamedTuple):
    """Blocks of keys.

    Attributes:
        codes: uint8 ``(batch, kv_heads, blocks, tokens, ceil(head_dim * bits / 8))``.
        step: 16-bit ``(batch, kv_heads, blocks, head_dim)``.
        minimum: The same, the value of code 0.
    """

    codes: torch.Tensor
    step: torch.Tensor
    minimum: torch.Tensor


@dataclass(frozen=True)
class ChannelCodec(Codec):
    """Asymmetric uniform quantisation per channel over the tokens of a block.

    Attributes:
        bits: Bits per element: 2, 3, 4, 6 or 8.
    """

    bits: int
    parts_type: ClassVar[type[Parts]] = ChannelParts

    @property
    def kernel_format(self) -> Format:
        """See ``Codec.kernel_format``."""
        return Format("channel", self.bits, fits=KEY_FITS.get(self.bits, 0))

    def encode(self, blocks: torch.Tensor, what: str) -> ChannelParts:
        """Quantise and pack ``blocks``; see ``Codec.encode``."""
        exact = blocks.to(compute_dtype(blocks.dtype))
        steps = KEY_FITS.get(self.bits, 0)
        lowest, highest = scale_ends(exact, self.bits, steps, dim=-2)
        step, minimum = stored_scale(lowest, highest, self.bits, blocks, what)
        codes = to_codes(exact, step.unsqueeze(-2), minimum.unsqueeze(-2), self.bits)
        return ChannelParts(pack(codes, self.bits), step, minimum)

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Unpack and dequantise; see ``Codec.decode``."""
        packed, step, minimum = parts
        codes = unpack(packed, self.bits, shape[1])
        return from_codes(codes, step.unsqueeze(-2), minimum.unsqueeze(-2), dtype)

    def packed(self, parts: Parts, width: int) -> PackedKeys:
        """See ``Codec.packed``."""
        codes, step, minimum = parts
        return PackedKeys(self.bits, codes, step, minimum)

    def block_size_bytes(self, tokens: int, head_dim: int) -> int:
        """Return ``tokens * ceil(head_dim * bits / 8) + 4 * head_dim``."""
        return tokens * packed_size_bytes(head_dim, self.bits) + 4 * head_dim
