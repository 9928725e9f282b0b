"""Sizes as people write them: ``6GiB``, ``4.5 GB``, ``800MB`` or plain bytes."""

from __future__ import annotations

import re
from fractions import Fraction
from numbers import Integral

UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
"""Bytes per unit: KB, MB, GB and TB are powers of 1000, KiB, MiB, GiB and TiB powers of 1024."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(size: object, what: str) -> int:
    """Return a size in whole bytes, rounded down.

    Args:
        size: A whole number of bytes, or text such as ``"6GiB"``, ``"4.5 GB"`` or ``"800000000"``.
        what: Name of the argument, for the message.

    Raises:
        ValueError: If it is not such a size, or below one byte.
    """
    count: int | None = None
    if isinstance(size, Integral) and not isinstance(size, bool):
        count = int(size)
    elif isinstance(size, str) and (match := _SIZE.fullmatch(size)):
        number, unit = match[1], match[2].lower()
        # A fraction without a unit is a mistake, not a number of bytes.
        if unit in UNITS or (not unit and "." not in number):
            count = int(Fraction(number) * UNITS[unit or "b"])
    if count is None or count < 1:
        raise ValueError(
            f"{what} must be a size of at least one byte: a whole number of bytes, or a number "
            "with KB, MB, GB or TB (powers of 1000) or KiB, MiB, GiB or TiB (powers of 1024), "
            f"such as 6GiB; got {size!r}."
        )
    return count


def exact_bytes(count: int) -> str:
    """Return a number of bytes for a message, exact and readable: ``6,442,450,944 bytes (6 GiB)``.

    Below one MiB, only the exact number is given.
    """
    exact = f"{count:,} bytes"
    for unit in ("tib", "gib", "mib"):
        if count >= UNITS[unit]:
            return f"{exact} ({count / UNITS[unit]:.4g} {unit[0].upper()}iB)"
    return exact
