"""Sparsity patterns: unstructured, or n kept of every m neighbours in a row."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_adaptive_sparse.profiles import check_ratio


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern.

    Attributes:
        kept: n of n:m, or ``None`` for unstructured.
        group: m of n:m, or ``None`` for unstructured.
    """

    kept: int | None = None
    group: int | None = None

    def __str__(self) -> str:
        return "unstructured" if self.group is None else f"{self.kept}:{self.group}"

    @property
    def ratio(self) -> float | None:
        """The ratio that the pattern fixes, ``1 - n/m``; ``None`` for unstructured."""
        if self.group is None or self.kept is None:
            return None
        return 1 - self.kept / self.group

    def removed_per_group(self, width: int) -> int:
        """Return how many of ``width`` neighbouring weights go.

        A full group loses ``m - n``. The last group of a row may be narrower: it keeps
        ``ceil(width * n / m)``.
        """
        if self.group is None or self.kept is None:
            raise ValueError("An unstructured pattern has no groups.")
        return width - -(-width * self.kept // self.group)

    def removal_count(self, rows: int, columns: int) -> int:
        """Return how many weights of a ``(rows, columns)`` linear go."""
        if self.group is None:
            raise ValueError("An unstructured pattern fixes no count.")
        full, tail = divmod(columns, self.group)
        return rows * (full * self.removed_per_group(self.group) + self.removed_per_group(tail))

    def check(self, ratio: float, what: str) -> float:
        """Return ``ratio``, refusing one that the pattern cannot give.

        Raises:
            ValueError: If ``ratio`` lies outside [0, 1), or is neither 0 (left dense) nor, for
                n:m, the ratio ``1 - n/m`` that the pattern fixes.
        """
        ratio = check_ratio(ratio, what)
        if self.ratio is not None and ratio != 0.0 and abs(ratio - self.ratio) > 1e-6:
            raise ValueError(
                f"Pattern {self} keeps {self.kept} of every {self.group} weights and so fixes the "
                f"ratio at {self.ratio:.6g} (or 0 for a module left dense); {what} is {ratio!r}. "
                f"Set it to {self.ratio:.6g} or use pattern='unstructured'."
            )
        return ratio


UNSTRUCTURED = Pattern()


def parse_pattern(pattern: str | Pattern) -> Pattern:
    """Read ``"unstructured"`` or ``"n:m"``.

    Raises:
        ValueError: If it is neither, or not ``0 < n < m``.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if pattern == "unstructured":
        return UNSTRUCTURED
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", pattern) if isinstance(pattern, str) else None
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(
            "pattern must be 'unstructured' or 'n:m' with 0 < n < m (n weights kept of every m, "
            f"such as '2:4' or '4:8'); got {pattern!r}."
        )
    return Pattern(int(match[1]), int(match[2]))
