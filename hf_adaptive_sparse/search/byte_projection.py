"""Projection of a trial's wishes onto a budget in bytes.

Every width starts at its wish. All ratios then shift by one common amount until the profile just
fits. If it does not fit at any ratio in range, or room is left at the lowest ratios, widths move
one step at a time, those whose wish lies nearest to the step first, until the ratios can do the
rest; where the ratios are fixed, until nothing more fits. All arithmetic is in integers, so that
the same wishes give the same profile on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SCALE = 10**9
"""Ratios are whole multiples of 1 / SCALE here."""


@dataclass(frozen=True)
class Choice:
    """One width to be chosen.

    Attributes:
        wish: Place in the palette that the trial wishes for, fractions between two widths.
        count: Widths in the palette.
    """

    wish: float
    count: int

    @property
    def nearest(self) -> int:
        """The place nearest to the wish, the upper of two."""
        return min(self.count - 1, max(0, int(self.wish + 0.5)))


@dataclass(frozen=True)
class Ratios:
    """The ratios to be shifted.

    Attributes:
        wishes: One per group, in multiples of 1 / `SCALE`.
        low: Lowest ratio, likewise.
        high: Highest ratio.
    """

    wishes: tuple[int, ...]
    low: int
    high: int

    def shifted(self, shift: int) -> list[int]:
        """Return the wishes moved by ``shift``, clipped to the range."""
        return [min(max(wish + shift, self.low), self.high) for wish in self.wishes]

    @property
    def reach(self) -> int:
        """A shift that takes every ratio to the end of the range."""
        return self.high - self.low + SCALE


Holds = Callable[[Sequence[int], Sequence[int]], bool]
"""Takes ratios (multiples of 1 / `SCALE`) and places in the palettes; says whether they fit."""


def project_bytes(
    ratios: Ratios, choices: Sequence[Choice], holds: Holds
) -> tuple[list[int], list[int]] | None:
    """Return the ratios and places that fit, near to the wishes and to the limit.

    Args:
        ratios: The ratios wished for.
        choices: The widths wished for.
        holds: Whether a profile fits; higher ratios and narrower widths fit if it does.

    Returns:
        Ratios and places, or ``None`` where the highest ratios and narrowest widths do not fit.
    """
    sparsest, densest = ratios.shifted(ratios.reach), ratios.shifted(-ratios.reach)
    places = [choice.nearest for choice in choices]
    for unit in _least_attached(choices, places):
        if holds(sparsest, places):
            break
        places[unit] -= 1
    if not holds(sparsest, places):
        return None
    for unit in _most_attached(choices, places):
        if not holds(densest, places) and sparsest != densest:
            break
        places[unit] += 1
        if not holds(sparsest, places):
            places[unit] -= 1
    # The smallest shift at which the profile fits.
    below, fits = -ratios.reach - 1, ratios.reach
    while fits - below > 1:
        middle = (below + fits) // 2
        if holds(ratios.shifted(middle), places):
            fits = middle
        else:
            below = middle
    return ratios.shifted(fits), places


def _least_attached(choices: Sequence[Choice], places: Sequence[int]) -> list[int]:
    """Return units in the order in which they give up one width each, as often as they have."""
    steps = [
        (choices[unit].wish - (place - 0.5), -unit, unit)
        for unit, start in enumerate(places)
        for place in range(start, 0, -1)
    ]
    return [unit for *_, unit in sorted(steps)]


def _most_attached(choices: Sequence[Choice], places: Sequence[int]) -> list[int]:
    """Return units in the order in which they gain one width each, as often as there are."""
    steps = [
        (place + 0.5 - choices[unit].wish, unit)
        for unit, start in enumerate(places)
        for place in range(start, choices[unit].count - 1)
    ]
    return [unit for _, unit in sorted(steps)]
