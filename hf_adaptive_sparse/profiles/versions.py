"""Names and versions of what is stored: profiles, and configs of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

from hf_adaptive_sparse.profiles.widths import LOSSLESS_BITS

QUANT_METHOD = "adaptive_sparse"
"""``quant_method`` of the ``quantization_config`` of a model that carries our config."""

FORMAT_VERSION = 1
"""Version of the profiles' JSON forms and of the checkpoint's config, where none is named."""

WEIGHT_BITS_VERSION = 2
"""Version of a compression profile, and of a checkpoint, that quantises values of weights.

What does not quantise them keeps version 1, so that earlier releases go on reading it.
"""

LOSSLESS_BITS_VERSION = 3
"""Version of the same with values of 12 bits."""


def weight_bits_version(widths: Iterable[int]) -> int:
    """Return the version of a checkpoint, or profile, with values of these bits."""
    narrowest = set(widths) - {16}
    if narrowest & set(LOSSLESS_BITS):
        return LOSSLESS_BITS_VERSION
    return WEIGHT_BITS_VERSION if narrowest else FORMAT_VERSION


def check_format_version(found: object, what: str, newest: int = FORMAT_VERSION) -> None:
    """Refuse a serialised form that this version cannot read.

    Args:
        found: The version read from the file.
        what: Name of the thing that was read, for the message.
        newest: The newest version of that thing.

    Raises:
        ValueError: If ``found`` is not a version between 1 and ``newest``.
    """
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"format_version of {what} must be a whole number >= 1, got {found!r}.")
    if found > newest:
        raise ValueError(
            f"{what} has format_version {found}; this version of hf_adaptive_sparse reads up to "
            f"{newest}. Upgrade it: pip install --upgrade hf-adaptive-sparse."
        )
