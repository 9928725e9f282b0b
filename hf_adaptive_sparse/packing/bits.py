"""Packed storage of small unsigned integers: codes of 2, 3, 4, 6 or 8 bits in a byte stream.

The stream is little-endian throughout: code ``i`` takes the stream's bits ``i * bits`` to
``(i + 1) * bits - 1``, and bit ``k`` of the stream is bit ``k % 8`` of byte ``k // 8``. The last
dimension of a tensor is one stream, padded with zero bits to a whole byte, so that

    size_bytes = ceil(count * bits / 8)

per stream. The pattern repeats after ``lcm(bits, 8)`` bits:

    8 bits   byte 0 = aaaaaaaa                                             1 code   in 1 byte
    6 bits   byte 0 = bbaaaaaa   byte 1 = ccccbbbb   byte 2 = ddddddcc     4 codes  in 3 bytes
    4 bits   byte 0 = bbbbaaaa                                             2 codes  in 1 byte
    3 bits   byte 0 = ccbbbaaa   byte 1 = feeedddc   byte 2 = hhhgggff     8 codes  in 3 bytes
    2 bits   byte 0 = ddccbbaa                                             4 codes  in 1 byte

(most significant bit on the left, first code ``a``).

Eight codes take exactly ``bits`` bytes. Packing therefore works on 64-bit words that start with one
code per byte: neighbours are pushed together in pairs, the pairs in fours, the fours in eights, and
unpacking does the reverse. Words are viewed as bytes, so this needs a little-endian machine, which
every platform of PyTorch's wheels is.
"""

from __future__ import annotations

import torch
from torch.nn import functional

PACKED_BITS = (2, 3, 4, 6, 8)
"""Widths that can be packed."""


def packed_size_bytes(count: int, bits: int) -> int:
    """Return the bytes that ``count`` codes of ``bits`` bits take: ``ceil(count * bits / 8)``.

    Raises:
        ValueError: If ``bits`` is not one of ``PACKED_BITS`` or ``count`` is negative.
    """
    _check_bits(bits)
    if count < 0:
        raise ValueError(f"The number of codes must be >= 0, got {count}.")
    return (count * bits + 7) // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the last dimension of ``codes``.

    Args:
        codes: uint8 ``(..., n)``, each below ``2 ** bits``; larger ones would spill into their
            neighbours, and for the sake of speed this is not checked.
        bits: Bits per code, one of ``PACKED_BITS``.

    Returns:
        uint8 ``(..., packed_size_bytes(n, bits))`` on the device of ``codes``. At 8 bits this is
        ``codes`` itself.

    Raises:
        ValueError: If ``bits`` is not one of ``PACKED_BITS``, or ``codes`` has no dimension.
        TypeError: If ``codes`` is not uint8.
    """
    _check_bits(bits)
    _check_stream(codes, "codes")
    if bits == 8:
        return codes
    count = codes.shape[-1]
    size_bytes = packed_size_bytes(count, bits)
    eights = _split(codes, 8)
    if not eights.is_contiguous():
        eights = eights.contiguous()
    word = eights.view(torch.int64)  # one code per byte
    for lane_bits in (8, 16, 32):  # two codes, then four, then eight move together
        used = bits * lane_bits // 8
        low = _every(2 * lane_bits, 2**used - 1)
        word = (word & low) | ((word >> (lane_bits - used)) & (low << used))
    stream = word.view(torch.uint8)[..., :bits].flatten(-2)
    return stream[..., :size_bytes].contiguous()


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Undo ``pack``.

    Args:
        packed: uint8 ``(..., packed_size_bytes(count, bits))``.
        bits: Bits per code, one of ``PACKED_BITS``.
        count: Codes per stream.

    Returns:
        uint8 ``(..., count)`` on the device of ``packed``. At 8 bits this is ``packed`` itself.

    Raises:
        ValueError: If ``bits`` is not one of ``PACKED_BITS``, or the last dimension has another
            size than ``count`` codes take.
        TypeError: If ``packed`` is not uint8.
    """
    _check_stream(packed, "packed")
    size_bytes = packed_size_bytes(count, bits)
    if packed.shape[-1] != size_bytes:
        raise ValueError(
            f"{count} codes of {bits} bits take {size_bytes} bytes, got {packed.shape[-1]}."
        )
    if bits == 8:
        return packed
    rows = _split(packed, bits)
    eights = rows.new_zeros((*rows.shape[:-1], 8))
    eights[..., :bits] = rows
    word = eights.view(torch.int64)
    for lane_bits in (32, 16, 8):  # four codes move apart from four, then two from two, ...
        used = bits * lane_bits // 8
        low = _every(2 * lane_bits, 2**used - 1)
        word = (word & low) | ((word & (low << used)) << (lane_bits - used))
    return word.view(torch.uint8).flatten(-2)[..., :count]


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise ValueError(
            f"Codes are packed in {', '.join(map(str, PACKED_BITS))} bits, got {bits!r}."
        )


def _check_stream(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{name} must be a uint8 tensor, got {tensor.dtype}.")
    if tensor.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar.")


def _every(lane_bits: int, pattern: int) -> int:
    """Return the 64-bit word with ``pattern`` in each lane of ``lane_bits`` bits."""
    return sum(pattern << start for start in range(0, 64, lane_bits))


def _split(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Return ``tensor`` zero-padded to whole rows of ``size``, as ``(..., rows, size)``."""
    missing = -tensor.shape[-1] % size
    padded = functional.pad(tensor, (0, missing)) if missing else tensor
    return padded.reshape((*padded.shape[:-1], padded.shape[-1] // size, size))
