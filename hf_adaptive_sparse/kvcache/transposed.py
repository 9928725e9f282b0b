"""Values per token, their codes stored channel by channel within a block.

Attention's second pass is ``out_c = sum_t p_t * value_tc``. With the codes of one channel side by
side it becomes, like the first pass, packed rows times a vector, here ``p_t * step_t``.

Each token and group of channels has a step and a minimum of 8 bits under a 16-bit second level per
head and block::

    step_tg = step_base + step_code_tg * step_unit      min_tg = min_base + min_code_tg * min_unit

The minimum's code is rounded down and the step's up, the step for the minimum as stored, and the
bases down and units up before that: every element lies on its scale. Size of a head of a block of T
tokens, with ``groups = ceil(head_dim / min(group_size, head_dim))``, in bytes:

    head_dim * ceil(T * bits / 8) + 2 * groups * T + 8

At head size 64 and T = 128 metadata take 0.258 bits per element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from hf_adaptive_sparse.kernels.encoding import Format
from hf_adaptive_sparse.kernels.packed import PackedValues
from hf_adaptive_sparse.kvcache.affine import (
    check_finite,
    compute_dtype,
    divide,
    from_codes,
    metadata_dtype,
    round_down,
    round_up,
    to_codes,
)
from hf_adaptive_sparse.kvcache.codec import Codec, Parts
from hf_adaptive_sparse.kvcache.fitting import VALUE_FITS
from hf_adaptive_sparse.kvcache.grouped import group_count, group_ends, spread_groups
from hf_adaptive_sparse.packing.bits import pack, packed_size_bytes, unpack

_HIGHEST = 255


class TransposedParts(NamedTuple):
    """Blocks of values.

    Attributes:
        codes: uint8 ``(batch, kv_heads, blocks, head_dim, ceil(tokens * bits / 8))``: a row holds
            one channel's codes of all tokens.
        step_codes: uint8 ``(batch, kv_heads, blocks, groups, tokens)``.
        min_codes: The same.
        scales: 16-bit ``(batch, kv_heads, blocks, 4)``: step base and unit, minimum base and unit.
    """

    codes: torch.Tensor
    step_codes: torch.Tensor
    min_codes: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class TransposedCodec(Codec):
    """Asymmetric uniform quantisation per token and group, codes channel by channel.

    Attributes:
        bits: Bits per element: 2, 3, 4, 6 or 8.
        group_size: Neighbouring elements of a head that share a step and a minimum; the last group
            of a head may be shorter.
    """

    bits: int
    group_size: int
    parts_type: ClassVar[type[Parts]] = TransposedParts

    @property
    def kernel_format(self) -> Format:
        """See ``Codec.kernel_format``."""
        return Format("transposed", self.bits, self.group_size, VALUE_FITS.get(self.bits, 0))

    def encode(self, blocks: torch.Tensor, what: str) -> TransposedParts:
        """Quantise and pack ``blocks``; see ``Codec.encode``."""
        exact = blocks.to(compute_dtype(blocks.dtype))
        steps = VALUE_FITS.get(self.bits, 0)
        # (..., tokens, groups)
        lowest, highest = group_ends(exact, self.group_size, self.bits, steps)
        dtype = metadata_dtype(blocks.dtype)
        min_codes, min_base, min_unit = _second_level(lowest, dtype, torch.floor)
        minimum = _first_level(min_codes, min_base, min_unit)
        wanted = divide(highest - minimum, 2**self.bits - 1)
        step_codes, step_base, step_unit = _second_level(wanted, dtype, torch.ceil)
        check_finite(torch.stack([step_base, step_unit]), blocks, what)
        step = _first_level(step_codes, step_base, step_unit)
        width = blocks.shape[-1]
        codes = to_codes(
            exact,
            spread_groups(step, self.group_size, width),
            spread_groups(minimum, self.group_size, width),
            self.bits,
        )
        return TransposedParts(
            pack(codes.transpose(-1, -2), self.bits),
            step_codes.transpose(-1, -2).contiguous(),
            min_codes.transpose(-1, -2).contiguous(),
            torch.stack([step_base, step_unit, min_base, min_unit], dim=-1),
        )

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Unpack and dequantise; see ``Codec.decode``."""
        packed, step_codes, min_codes, scales = parts
        tokens, width = shape
        codes = unpack(packed, self.bits, tokens).transpose(-1, -2)
        step_base, step_unit, min_base, min_unit = scales.unbind(-1)
        step = _first_level(step_codes.transpose(-1, -2), step_base, step_unit)
        minimum = _first_level(min_codes.transpose(-1, -2), min_base, min_unit)
        return from_codes(
            codes.contiguous(),
            spread_groups(step, self.group_size, width),
            spread_groups(minimum, self.group_size, width),
            dtype,
        )

    def packed(self, parts: Parts, width: int) -> PackedValues:
        """See ``Codec.packed``."""
        codes, step_codes, min_codes, scales = parts
        group = min(self.group_size, width)
        return PackedValues(self.bits, codes, step_codes, min_codes, scales, group)

    def block_size_bytes(self, tokens: int, head_dim: int) -> int:
        """Return the bytes of one head of one block, by the formula of the module."""
        groups = group_count(head_dim, self.group_size)
        return head_dim * packed_size_bytes(tokens, self.bits) + 2 * groups * tokens + 8


def _second_level(
    metadata: torch.Tensor,
    dtype: torch.dtype,
    rounding: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return 8-bit codes of ``metadata`` ``(..., tokens, groups)``, and their base and unit."""
    base = round_down(metadata.amin(dim=(-1, -2)), dtype)
    spread = metadata.amax(dim=(-1, -2)) - base.to(metadata.dtype)
    unit = round_up(divide(spread, _HIGHEST), dtype)
    divisor = torch.where(unit > 0, unit, torch.ones_like(unit)).to(metadata.dtype)
    above = metadata - base.to(metadata.dtype)[..., None, None]
    codes = rounding(above / divisor[..., None, None]).clamp_(0, _HIGHEST)
    return codes.to(torch.uint8), base, unit


def _first_level(codes: torch.Tensor, base: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Return ``base + codes * unit`` in float32, ``codes`` ``(..., tokens, groups)``."""
    compute = compute_dtype(unit.dtype)
    return codes.to(compute) * unit.to(compute)[..., None, None] + base.to(compute)[..., None, None]
