"""The bit widths of weights and of the KV cache."""

from __future__ import annotations

from numbers import Integral

WEIGHT_BITS = (4, 8, 12, 16)
"""Bit widths the kept values of a weight may be stored in; 16 keeps the model's own dtype, 12 is
bfloat16 without loss."""

LOSSLESS_BITS = (12, 16)
"""Those that change no weight."""

SEARCHED_WEIGHT_BITS = (4, 8, 16)
"""Those that a search chooses from, by bytes that are known beforehand."""

KV_BITS = (2, 3, 4, 6, 8, 16)
"""Bit widths a key or value may be stored in; 16 keeps the model's own dtype."""

KV_KEY_MODES = ("channel", "token")
"""How keys may share scales: per channel over the tokens of a block, or per token in groups."""


def check_weight_bits(bits: object, what: str) -> int:
    """Return ``bits`` as one of ``WEIGHT_BITS``.

    Raises:
        ValueError: If it is none of them.
    """
    if not isinstance(bits, Integral) or isinstance(bits, bool) or int(bits) not in WEIGHT_BITS:
        raise ValueError(
            f"{what} must be one of {', '.join(map(str, WEIGHT_BITS))} (bits per kept weight), "
            f"got {bits!r}."
        )
    return int(bits)
