"""Weights as small signed integers: symmetric codes with a scale per row or per group of columns.

A group is ``group_size`` consecutive columns of one row (the last may be shorter), or a whole row.
With ``limit = 2 ** (bits - 1) - 1`` (127 or 7)

    scale = max |w| of the group          exact: it is one of the weights
    code  = round(limit * w / scale)      -limit <= code <= limit
    w'    = code * scale / limit          |w - w'| <= scale / limit / 2

The largest weight of a group keeps its value, and so the group its scale. That is why quantising
``w'`` again, rounded to the weight's dtype, gives ``w'`` again: a model whose weights were replaced
by ``w'`` can be stored and loaded any number of times without a change.

0 is always code 0, so that a pruned weight stays what it is, and a group of zeros has scale 0. The
bound holds for ``w'`` in float32; rounding ``w'`` to a 16-bit dtype, as a dense copy has to, adds
half a unit in its last place.

Codes of 8 bits are int8. Codes of 4 bits are two's complement nibbles in one stream, the first in
the lower half of a byte, as in ``packing/bits.py``.
"""

from __future__ import annotations

import torch

from hf_adaptive_sparse.packing.bitmask import integer_view
from hf_adaptive_sparse.packing.bits import pack, unpack

CODE_DTYPES = {8: torch.int8, 4: torch.uint8}
"""Dtype of the tensor that stores codes, by their bits; of 4 bits, two are in a byte."""

CODE_BITS = tuple(CODE_DTYPES)

GROUP_MULTIPLE = 32
"""Groups are whole multiples of this many columns, so that no step of a kernel straddles two."""

MAX_GROUP_SIZE = 2**31 - GROUP_MULTIPLE
"""Most columns of a group: any weight's, and what kernels take as a number."""

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtype of the scales is that of the weight they belong to."""


def are_scales(scales: torch.Tensor) -> bool:
    """Return whether all are finite and not negative, as scales are.

    Args:
        scales: Of ``SCALE_DTYPES``.
    """
    if not scales.numel():
        return True
    # Numbers above zero are in the order of their bits: one pass at the rate of memory.
    bits = integer_view(scales.dtype)
    least, most = scales.view(bits).aminmax()
    largest = torch.tensor(torch.finfo(scales.dtype).max, dtype=scales.dtype, device="cpu")
    if int(least) >= 0 and int(most) <= int(largest.view(bits)):
        return True
    return bool((torch.isfinite(scales) & (scales >= 0)).all())  # a zero may have a sign


def code_limit(bits: int) -> int:
    """Return the largest code: 127 at 8 bits, 7 at 4.

    Raises:
        ValueError: If ``bits`` is neither.
    """
    if bits not in CODE_BITS:
        raise ValueError(f"Weights are quantised to 8 or 4 bits, got {bits!r}.")
    return (1 << (bits - 1)) - 1


def default_group_size(bits: int) -> int | None:
    """Return the columns that share a scale unless told otherwise; ``None``: one scale per row."""
    return 64 if bits == 4 else None


def group_count(columns: int, group_size: int | None) -> int:
    """Return the scales of a row: ``ceil(columns / group_size)``, 1 without groups.

    Raises:
        ValueError: If ``group_size`` is not None and not a positive multiple of 32, or more
            than ``MAX_GROUP_SIZE``.
    """
    if group_size is None:
        return 1
    if not 0 < group_size <= MAX_GROUP_SIZE or group_size % GROUP_MULTIPLE:
        raise ValueError(
            f"group_size must be a positive multiple of {GROUP_MULTIPLE}, at most "
            f"{MAX_GROUP_SIZE}, or None for one scale per row, got {group_size!r}."
        )
    return max(1, -(-columns // group_size))


def encode(
    weight: torch.Tensor, bits: int, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight.

    Args:
        weight: ``(rows, columns)``, float32, bfloat16 or float16, finite.
        bits: 8 or 4.
        group_size: Columns per scale, a multiple of 32; None: one scale per row.

    Returns:
        ``codes`` int8 ``(rows, columns)`` and ``scales`` ``(rows, groups)`` in the weight's dtype,
        finite and >= 0.

    Raises:
        ValueError: If the weight is not finite or of another dtype, or ``bits`` or ``group_size``
            are not as above.
    """
    limit = code_limit(bits)
    if weight.dtype not in SCALE_DTYPES:
        raise ValueError(
            f"Weights of float32, bfloat16 and float16 can be quantised, got {weight.dtype}."
        )
    rows, columns = weight.shape
    groups = group_count(columns, group_size)
    width = columns if group_size is None else min(group_size, columns)
    exact = weight.detach().float()
    if not torch.isfinite(exact).all():
        raise ValueError("Only finite weights can be quantised; this one has NaN or infinity.")
    padded = torch.nn.functional.pad(exact, (0, groups * width - columns))
    grouped = padded.view(rows, groups, width)
    scales = grouped.abs().amax(dim=2) if width else exact.new_zeros((rows, groups))
    divisors = scales.masked_fill(scales == 0, 1.0).unsqueeze(2)
    # Divided first: limit * w may be more than float32 holds.
    codes = (grouped / divisors).mul_(limit).round_().to(torch.int8)
    return codes.view(rows, groups * width)[:, :columns], scales.to(weight.dtype)


def decode(
    codes: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int | None
) -> torch.Tensor:
    """Return ``codes * scales / limit`` in float32.

    Args:
        codes: int8 ``(rows, columns)``.
        scales: ``(rows, groups)``.
        bits: 8 or 4.
        group_size: Columns per scale; None: one scale per row.
    """
    # In float32 a scale would not come back from its own code.
    wide = torch.float64 if scales.dtype == torch.float32 else torch.float32
    factors = scales.to(wide) / code_limit(bits)
    if group_size is not None:
        columns = codes.shape[1]
        factors = factors.repeat_interleave(min(group_size, columns), dim=1)[:, :columns]
    return (codes.to(wide) * factors).float()


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int8 codes ``(n,)`` as they are stored: themselves, or uint8 ``(ceil(n / 2),)``."""
    if bits == 8:
        return codes
    return pack(codes.view(torch.uint8) & 0x0F, bits)


def unpack_codes(stored: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Undo ``pack_codes``: int8 ``(count,)``."""
    if bits == 8:
        return stored
    # A nibble's upper bit is its sign: flipped, the nibble is its value plus 8.
    return ((unpack(stored, bits, count) ^ 8).view(torch.int8) - 8).contiguous()
