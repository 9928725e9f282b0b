"""bfloat16 in 12 bits, without loss: the upper bytes of a weight's values are few.

The upper byte of a bfloat16 is its sign and all but one of its bits of exponent. Fifteen of them
cover both signs of 14 powers of two, and so nearly all values of a trained weight: of normally
distributed ones all but 1 or 2 in 10,000. A value is stored as its lower byte and a code of 4 bits
for the upper one; what has another upper byte is an exception and stored aside, so that every bit
pattern comes back, NaN and -0 included.

    values    uint8 (n + ceil(n / 2),)   n lower bytes, then n codes, the first in the lower half of
                                         a byte (as in bits.py)
    codebook  int64 (2 + exceptions,)    two words: 16 bytes, the upper byte that each code stands
                                         for; then a word per exception, ascending:
                                         number of the value << 16 | its 16 bits

Code 0 always stands for the upper byte 0, which tiny values have, and is given to exceptions. The
other 15 go to the upper bytes that are found most often, in ascending order, 0 where there are
fewer: one weight has one form.

    size_bytes = n + ceil(n / 2) + 16 + 8 * exceptions

That is less than the 2 * n of plain values while fewer than one in 16 is an exception. Kernels read
any number of them, but look for the column of each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hf_adaptive_sparse.packing.bitmask import BitmaskError
from hf_adaptive_sparse.packing.bits import pack

UPPER_BYTE_BITS = 12
"""Bits of a value in this form: as ``weight_bits`` and as kernels know it."""

CODES = 16
BOOK_WORDS = 2
"""Words of a codebook before its exceptions."""

_CHUNK = 1 << 22  # values that are encoded or decoded at a time


def stored_bytes(count: int) -> int:
    """Return the bytes of ``count`` values, without the codebook."""
    return count + (count + 1) // 2


def value_count(size_bytes: int) -> int | None:
    """Return how many values so many bytes hold; None: no number of values takes them."""
    count = 2 * size_bytes // 3
    return count if stored_bytes(count) == size_bytes else None


def encode(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Store bfloat16 values in 12 bits.

    Args:
        values: bfloat16 ``(n,)``, any bit patterns.

    Returns:
        ``values`` and ``codebook`` as at the head of this module.

    Raises:
        ValueError: If the values are of another dtype.
    """
    if values.dtype != torch.bfloat16:
        raise ValueError(
            f"Values of {UPPER_BYTE_BITS} bits are bfloat16 ones, got {values.dtype}. Cast "
            "the weight to bfloat16, or store it in 16 bits."
        )
    count = values.numel()
    halves = values.contiguous().view(torch.int16)
    book = _choose_book(halves)
    code_of = book.new_zeros(256)
    code_of[book.int()] = torch.arange(CODES, dtype=torch.uint8, device=book.device)
    code_of[0] = 0  # where codes are left over, they stand for it, too
    stored = torch.empty(stored_bytes(count), dtype=torch.uint8, device=values.device)
    exceptions = [book.view(torch.int64)]
    for start, part in _chunks(halves):
        stop = start + part.numel()
        upper = _upper(part)
        codes = code_of[upper.int()]
        stored[start:stop] = part.to(torch.uint8)
        stored[count + start // 2 : count + (stop + 1) // 2] = pack(codes, 4)
        missed = ((codes == 0) & (upper != 0)).nonzero().flatten()
        exceptions.append((missed + start) << 16 | (part[missed].long() & 0xFFFF))
    return stored, torch.cat(exceptions)


def decode(
    stored: torch.Tensor, codebook: torch.Tensor, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Return values ``start`` to ``stop - 1``, by default all, as bfloat16.

    Args:
        stored: What ``encode`` returned, and
        codebook: its codebook, on the same device.
        start: First value.
        stop: Last value plus one.
    """
    count = value_count(stored.numel())
    assert count is not None  # `check` has looked
    stop = count if stop is None else stop
    uppers = codebook[:BOOK_WORDS].view(torch.uint8).to(torch.int16) << 8
    pairs = torch.stack([uppers.repeat(CODES), uppers.repeat_interleave(CODES)], dim=1)
    pairs = pairs.view(torch.int32).flatten()  # of each byte of two codes
    halves = torch.empty(stop - start, dtype=torch.int16, device=stored.device)
    for begin, part in _chunks(halves):
        first, last = start + begin, start + begin + part.numel()
        packed = stored[count + first // 2 : count + (last + 1) // 2]
        part.copy_(pairs[packed.int()].view(torch.int16)[first % 2 :][: part.numel()])
        part |= stored[first:last]
    exceptions = codebook[BOOK_WORDS:]
    bounds = torch.tensor([start << 16, stop << 16], device=codebook.device)
    low, high = torch.searchsorted(exceptions, bounds).tolist()
    found = exceptions[low:high]
    halves[(found >> 16) - start] = found.to(torch.int16)
    return halves.view(torch.bfloat16)


def check(stored: torch.Tensor, codebook: torch.Tensor) -> None:
    """Check that two tensors can be the values and the codebook of a weight.

    Raises:
        BitmaskError: If dtypes or sizes are others, or as `check_book`.
    """
    count = value_count(stored.numel())
    if stored.dtype != torch.uint8 or count is None:
        raise BitmaskError(
            f"values with a codebook must be uint8 (n + ceil(n / 2),), got {stored.dtype} "
            f"{tuple(stored.shape)}."
        )
    check_book(codebook, count)


def check_book(codebook: torch.Tensor, count: int) -> None:
    """Check that a tensor can be the codebook of ``count`` values.

    Raises:
        BitmaskError: If its dtype or shape is another, code 0 stands for another byte than 0, or
            the exceptions are not in ascending order or none of the values.
    """
    if codebook.dtype != torch.int64 or codebook.dim() != 1 or codebook.numel() < BOOK_WORDS:
        raise BitmaskError(
            f"a codebook must be int64 (n,) with n >= {BOOK_WORDS}, got {codebook.dtype} "
            f"{tuple(codebook.shape)}."
        )
    words = codebook.numpy(force=True)  # few words, of each weight: torch would take longer
    if words[0] & 0xFF:
        raise BitmaskError("code 0 of a codebook must stand for the byte 0; the file is damaged.")
    numbers = words[BOOK_WORDS:] >> 16
    are_values = not numbers.size or 0 <= numbers[0] <= numbers[-1] < count
    if not are_values or (numbers[1:] <= numbers[:-1]).any():
        raise BitmaskError(
            f"the exceptions of a codebook must be in ascending order, each one of {count} values; "
            "the file is damaged."
        )


def _choose_book(halves: torch.Tensor) -> torch.Tensor:
    """Return the upper byte of each code: uint8 ``(16,)``."""
    counts = torch.zeros(256, dtype=torch.int64, device=halves.device)
    for _, part in _chunks(halves):
        counts += torch.bincount(_upper(part), minlength=256)
    counts[0] = 0  # has code 0
    often = counts.argsort(descending=True, stable=True)[: CODES - 1]
    found = often[counts[often] > 0].sort().values
    book = torch.zeros(CODES, dtype=torch.uint8, device=halves.device)
    book[1 : 1 + found.numel()] = found.to(torch.uint8)
    return book


def _upper(halves: torch.Tensor) -> torch.Tensor:
    return (halves >> 8).to(torch.uint8)


def _chunks(halves: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield consecutive parts, each from an even number on, with the number of its first."""
    for start in range(0, halves.numel(), _CHUNK):
        yield start, halves[start : start + _CHUNK]
