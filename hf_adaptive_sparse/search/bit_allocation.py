"""Assigns widths to units of unequal size so that their mean is exactly a given one.

A unit is what takes one width: the keys of a layer, a layer's keys and values together, the weights
of a block. The sampler draws a wish for each unit, a place in the palette. The assignment that is
evaluated is the nearest one on the budget, found by dynamic programming over sums of stored bits.
The sums are integers, so that the same wishes give the same widths on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

MOST_STATES = 20_000_000
"""Sums of stored bits that the programme tells apart at most, over all units: 20 MB of choices."""

_RESOLUTION = 1 << 20
_UNREACHED = np.iinfo(np.int64).max // 4


@dataclass(frozen=True)
class BitAllocation:
    """Units that share a palette under an exact mean.

    Attributes:
        sizes: Elements per unit, > 0.
        palette: Distinct widths in bits, ascending.
        mean_bits: Size-weighted mean of every assignment. A value within 1e-9 of a mean that can be
            reached is read as that mean: 13/3 has no finite decimal form.
        what: What the mean is called, for messages.

    Raises:
        ValueError: If no assignment has that mean; the nearest means that some have are named.
    """

    sizes: tuple[int, ...]
    palette: tuple[int, ...]
    mean_bits: Fraction
    what: str = "the mean bits"

    def __post_init__(self) -> None:
        lowest, highest = self.palette[0], self.palette[-1]
        if not lowest <= self.mean_bits <= highest:
            raise ValueError(
                f"{self.what} must lie between the narrowest and the widest of "
                f"{', '.join(map(str, self.palette))} bits, got {float(self.mean_bits):g}."
            )
        if self._states * len(self.sizes) > MOST_STATES:
            raise ValueError(
                f"{self.what} cannot be held exactly over {len(self.sizes)} units of such unequal "
                f"sizes ({', '.join(map(str, sorted(set(self.sizes))[:4]))} elements). Use "
                "fewer blocks, or a budget in bytes, which needs no exact mean."
            )
        if self._goal is None:
            raise ValueError(
                f"No assignment of {', '.join(map(str, self.palette))} bits over this model has "
                f"{self.what} of {float(self.mean_bits):.6g}: the nearest that can be reached are "
                f"{self._nearest_means()}."
            )

    @property
    def _unit(self) -> tuple[int, int]:
        gaps = [bits - self.palette[0] for bits in self.palette[1:]]
        return math.gcd(*self.sizes), math.gcd(*gaps) or 1

    @property
    def _steps(self) -> list[list[int]]:
        """What each width adds to the sum of a unit, above the narrowest, in whole steps."""
        size, gap = self._unit
        return [
            [(count // size) * ((bits - self.palette[0]) // gap) for bits in self.palette]
            for count in self.sizes
        ]

    @property
    def _states(self) -> int:
        return sum(steps[-1] for steps in self._steps) + 1

    @property
    def _wanted(self) -> Fraction:
        size, gap = self._unit
        return (self.mean_bits - self.palette[0]) * sum(self.sizes) / (size * gap)

    @property
    def _goal(self) -> int | None:
        """The sum of steps that has the mean; ``None`` if no assignment has it."""
        size, gap = self._unit
        goal = round(self._wanted)
        error = abs(goal - self._wanted) * size * gap / sum(self.sizes)
        return goal if error < Fraction(1, 10**9) and self._reachable()[goal] else None

    @property
    def exact_mean(self) -> float:
        """The mean that every assignment has."""
        size, gap = self._unit
        steps = (self._goal or 0) * size * gap
        return float(self.palette[0] + Fraction(steps, sum(self.sizes)))

    def _reachable(self) -> np.ndarray:
        reached = np.zeros(self._states, dtype=bool)
        reached[0] = True
        for steps in self._steps:
            before = reached.copy()
            for step in steps[1:]:
                reached[step:] |= before[: len(before) - step]
        return reached

    def _nearest_means(self) -> str:
        size, gap = self._unit
        sums = np.flatnonzero(self._reachable())
        place = int(np.searchsorted(sums, float(self._wanted)))
        near = [int(s) for s in sums[max(0, place - 1) : place + 1]]
        means = [self.palette[0] + Fraction(total * size * gap, sum(self.sizes)) for total in near]
        return " and ".join(f"{float(mean):.12g}" for mean in means)

    def nearest(self, wishes: Sequence[float]) -> tuple[int, ...]:
        """Return the widths on the budget that are nearest to the wishes.

        Args:
            wishes: Per unit a place in the palette: 0 the narrowest width, 1 the next, fractions
                between. Nearness is the sum of squared differences of places; of equals, the one
                with the narrower widths at later units.

        Returns:
            Bits per unit.

        Raises:
            ValueError: If there is not one wish per unit.
        """
        return self.cheapest(
            [[(place - wish) ** 2 for place in range(len(self.palette))] for wish in wishes]
        )

    def cheapest(self, costs: Sequence[Sequence[float]]) -> tuple[int, ...]:
        """Return the widths on the budget whose costs have the lowest sum.

        Args:
            costs: Per unit, the cost of each width of the palette, compared to one part in 2**20 of
                the largest difference.

        Returns:
            Bits per unit; of equals, the one with the narrower widths at later units.

        Raises:
            ValueError: If there are not as many rows as units.
        """
        if len(costs) != len(self.sizes):
            raise ValueError(
                f"One wish per unit is needed: there are {len(self.sizes)} units, got "
                f"{len(costs)} wishes."
            )
        steps = self._steps
        goal = self._goal or 0
        largest = max(max(row) - min(row) for row in costs) or 1.0
        sums = np.full(goal + 1, _UNREACHED, dtype=np.int64)
        sums[0] = 0
        chosen = np.zeros((len(steps), goal + 1), dtype=np.int8)
        for unit, row in enumerate(costs):
            before, sums = sums, np.full(goal + 1, _UNREACHED, dtype=np.int64)
            for place, step in enumerate(steps[unit]):
                if step > goal:
                    break
                extra = round((row[place] - min(row)) / largest * _RESOLUTION)
                total = before[: goal + 1 - step] + extra
                better = total < sums[step:]
                sums[step:][better] = total[better]
                chosen[unit, step:][better] = place
        widths = [0] * len(steps)
        left = goal
        for unit in reversed(range(len(steps))):
            place = int(chosen[unit, left])
            widths[unit] = self.palette[place]
            left -= steps[unit][place]
        return tuple(widths)

    def uniform_wishes(self) -> list[float]:
        """Return wishes for one width everywhere, or for the two next to the mean in turns."""
        mean = float(self.mean_bits)
        for place, bits in enumerate(self.palette):
            if bits == mean:
                return [float(place)] * len(self.sizes)
        above = next(place for place, bits in enumerate(self.palette) if bits > mean)
        low, high = self.palette[above - 1], self.palette[above]
        share = (mean - low) / (high - low)
        # Unit n takes the wider where the running share passes a whole number, as evenly as it can.
        return [
            above - 1 + math.floor((unit + 1) * share + 1e-9) - math.floor(unit * share + 1e-9)
            for unit in range(len(self.sizes))
        ]
