"""How keys or values become bytes and back: pure functions of tensors, one codec per class.

A codec turns states ``(batch, kv_heads, seq, head_dim)`` into a tuple of *parts*, tensors
``(batch, kv_heads, seq, part width)`` with one row per token, and back. What a row holds depends on
its own token alone, so parts may be cut, joined and indexed along batch and sequence like the
states themselves. A further codec is one more class here and one more case in ``codec_for``.

The quantising codec is asymmetric and uniform, group-wise per token along ``head_dim``::

    step = (max - min) / (2**bits - 1)    q = round((x - min) / step)    x' = min + q * step

with ``step`` and ``min`` stored in the model's own dtype (16 bits each for bfloat16 and float16):
``min`` is one of the group's elements, so that it is stored exactly and a group of equal elements
comes back exactly; ``step`` is rounded *up* to the dtype before ``q`` is computed, so that no
element falls off the end of the scale. Therefore, for every element,

    |x - x'| <= step / 2 + half a unit in the last place of x' (its rounding to the model's dtype).

Measured on trained keys and values (1,024 tokens, 8 layers, head size 64), the bfloat16 step costs
1.1 % of the root-mean-square error at 8 bits, 0.7 % at 6, 0.3 % at 4; float16 would cost 0.1 %,
but overflows at 65,504 and rounds the minimum, so that constant groups would not be exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hf_adaptive_sparse.packing.bits import pack, packed_size_bytes, unpack

Parts = tuple[torch.Tensor, ...]


class Codec(ABC):
    """One way of storing keys or values."""

    @property
    @abstractmethod
    def is_lossless(self) -> bool:
        """Whether states come back bit for bit, so that none need to wait unencoded."""

    @abstractmethod
    def encode(self, states: torch.Tensor, what: str) -> Parts:
        """Return the parts of ``states``.

        Args:
            states: ``(batch, kv_heads, seq, head_dim)``, a floating dtype.
            what: What the states are, for error messages: ``"keys of layer 3"``.

        Returns:
            Tensors ``(batch, kv_heads, seq, part width)``.

        Raises:
            ValueError: If the codec cannot represent the states (NaN or Inf).
        """

    @abstractmethod
    def decode(self, parts: Parts, head_dim: int) -> torch.Tensor:
        """Return the states ``(batch, kv_heads, seq, head_dim)`` in the dtype they had."""

    @abstractmethod
    def token_size_bytes(self, head_dim: int, item_size_bytes: int) -> int:
        """Return the bytes of one head of one token.

        Args:
            head_dim: Elements per head.
            item_size_bytes: Bytes of an element in the model's dtype.
        """


@dataclass(frozen=True)
class RawCodec(Codec):
    """16 "bits": the states themselves, in the model's dtype, bit for bit.

    Size per head and token: ``head_dim * item_size_bytes``. NaN and Inf come back as they were.
    """

    @property
    def is_lossless(self) -> bool:
        """True."""
        return True

    def encode(self, states: torch.Tensor, what: str) -> Parts:
        """Return the states as the only part."""
        return (states,)

    def decode(self, parts: Parts, head_dim: int) -> torch.Tensor:
        """Return the only part, without a copy."""
        return parts[0]

    def token_size_bytes(self, head_dim: int, item_size_bytes: int) -> int:
        """Return ``head_dim * item_size_bytes``."""
        return head_dim * item_size_bytes


@dataclass(frozen=True)
class GroupCodec(Codec):
    """Asymmetric uniform quantisation, group-wise per token along ``head_dim``.

    The effective group is ``min(group_size, head_dim)``; the last group of a head may be shorter.
    Parts: packed codes uint8 ``(..., ceil(head_dim * bits / 8))``, steps and minima in the model's
    dtype ``(..., groups)``. Size per head and token, with ``groups = ceil(head_dim / group)``:

        ceil(head_dim * bits / 8) + 2 * groups * item_size_bytes

    Attributes:
        bits: Bits per element: 2, 3, 4, 6 or 8.
        group_size: Neighbouring elements of a head that share a step and a minimum.
    """

    bits: int
    group_size: int

    @property
    def is_lossless(self) -> bool:
        """False."""
        return False

    def encode(self, states: torch.Tensor, what: str) -> Parts:
        """Quantise and pack ``states``; see ``Codec.encode``."""
        pieces = [quantize(chunk, self.bits, what) for chunk in _in_groups(states, self.group_size)]
        codes = torch.cat([piece.codes.flatten(-2) for piece in pieces], dim=-1)
        return (
            pack(codes, self.bits),
            torch.cat([piece.step for piece in pieces], dim=-1),
            torch.cat([piece.minimum for piece in pieces], dim=-1),
        )

    def decode(self, parts: Parts, head_dim: int) -> torch.Tensor:
        """Unpack and dequantise; see ``Codec.decode``."""
        packed, steps, minima = parts
        codes = unpack(packed, self.bits, head_dim)
        pieces, start = [], 0
        for chunk in _in_groups(codes, self.group_size):
            groups = slice(start, start + chunk.shape[-2])
            quantized = Quantized(chunk, steps[..., groups], minima[..., groups])
            pieces.append(dequantize(quantized).flatten(-2))
            start = groups.stop
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def token_size_bytes(self, head_dim: int, item_size_bytes: int) -> int:
        """Return the bytes of one head of one token, by the formula of the class."""
        groups = -(-head_dim // min(self.group_size, head_dim))
        return packed_size_bytes(head_dim, self.bits) + 2 * groups * item_size_bytes


class Quantized(NamedTuple):
    """Groups of elements as integers.

    Attributes:
        codes: uint8 ``(..., groups, group)``.
        step: Distance of neighbouring codes, ``(..., groups)``, the dtype of the elements.
        minimum: Value of code 0, ``(..., groups)``, the dtype of the elements.
    """

    codes: torch.Tensor
    step: torch.Tensor
    minimum: torch.Tensor


def quantize(elements: torch.Tensor, bits: int, what: str = "elements") -> Quantized:
    """Quantise groups of elements; formula and error bound are those of the module.

    Args:
        elements: ``(..., groups, group)``, a floating dtype.
        bits: Bits per code, 1 to 8.
        what: What the elements are, for the error message.

    Raises:
        ValueError: If an element is NaN or Inf, or a group's range overflows.
    """
    exact = elements.to(_compute_dtype(elements.dtype))
    minimum, maximum = exact.amin(dim=-1), exact.amax(dim=-1)
    highest = 2**bits - 1
    wanted = (maximum - minimum) / highest
    # NaN or Inf anywhere in a group makes its step NaN or Inf: no pass over the elements is needed.
    if not bool(torch.isfinite(wanted).all()):
        raise ValueError(
            f"The {what} must be finite to be quantised, got NaN or Inf. The model produced them "
            f"(float16 overflow is a common cause: try bfloat16); at 16 bits they are kept as is."
        )
    step = _round_up(wanted, elements.dtype)
    divisor = step.to(exact.dtype)
    divisor = torch.where(divisor > 0, divisor, torch.ones_like(divisor))
    codes = (exact - minimum[..., None]).div_(divisor[..., None]).round_().clamp_(0, highest)
    return Quantized(codes.to(torch.uint8), step, minimum.to(elements.dtype))


def dequantize(quantized: Quantized) -> torch.Tensor:
    """Return the elements ``(..., groups, group)`` in the dtype of the steps."""
    codes, step, minimum = quantized
    compute_dtype = _compute_dtype(step.dtype)
    elements = codes.to(compute_dtype)
    elements.mul_(step[..., None].to(compute_dtype)).add_(minimum[..., None].to(compute_dtype))
    # A step that was rounded up may carry the highest code past the dtype's largest value.
    return elements.clamp_(max=torch.finfo(step.dtype).max).to(step.dtype)


def codec_for(bits: int, group_size: int) -> Codec:
    """Return the codec for one entry of a KV profile.

    Args:
        bits: 2, 3, 4, 6 or 8; 16 keeps the model's dtype.
        group_size: Elements that share a step and a minimum.
    """
    return RawCodec() if bits == 16 else GroupCodec(bits, group_size)


def _in_groups(states: torch.Tensor, group_size: int) -> list[torch.Tensor]:
    """Cut ``(..., head_dim)`` into ``(..., groups, group)``: whole groups, then a shorter one."""
    head_dim = states.shape[-1]
    group = min(group_size, head_dim)
    whole = head_dim // group * group
    chunks = [states[..., :whole].unflatten(-1, (whole // group, group))]
    if whole < head_dim:
        chunks.append(states[..., None, whole:])
    return chunks


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float32, or the elements' own where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def _round_up(step: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the smallest values of ``dtype`` that are not below ``step`` (finite, >= 0)."""
    rounded = step.to(dtype)
    if dtype == step.dtype:
        return rounded
    # Non-negative floats of one format are ordered like their bit patterns.
    below = (rounded.to(step.dtype) < step).to(torch.int16)
    return (rounded.view(torch.int16) + below).view(dtype)
