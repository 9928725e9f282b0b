"""Projection of sampled ratios onto the exact sparsity budget.

All arithmetic is in rational numbers, so the same sample gives the same profile on every machine,
and projecting a projected profile changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def project_ratios(
    ratios: Sequence[float | Fraction],
    weights: Sequence[int],
    target: float | Fraction,
    low: float | Fraction,
    high: float | Fraction,
) -> list[Fraction]:
    """Shift ratios by one common amount, clipped to a range, until their mean is the target.

    This is the Euclidean projection (in the norm weighted by ``weights``) of the ratios onto
    ``{r : sum(w r) = target sum(w), low <= r <= high}``.

    Args:
        ratios: Sampled ratio of each block.
        weights: Number of weights of each block, > 0.
        target: Weighted mean the result has, exactly.
        low: Lowest ratio allowed.
        high: Highest ratio allowed.

    Returns:
        One exact ratio per block.

    Raises:
        ValueError: If the target lies outside the range, or the lengths differ.
    """
    sampled = [_exact(ratio) for ratio in ratios]
    goal, floor, ceiling = _exact(target), _exact(low), _exact(high)
    if not floor <= goal <= ceiling:
        raise ValueError(
            f"The target must lie in the range of ratios: {float(goal)} is outside "
            f"[{float(floor)}, {float(ceiling)}]."
        )
    if len(sampled) != len(weights) or not sampled:
        raise ValueError(f"{len(sampled)} ratios were given for {len(weights)} blocks.")
    budget = goal * sum(weights)

    def clipped(shift: Fraction) -> list[Fraction]:
        return [min(max(ratio + shift, floor), ceiling) for ratio in sampled]

    def removed(shift: Fraction) -> Fraction:
        return sum(
            (ratio * weight for ratio, weight in zip(clipped(shift), weights, strict=True)),
            Fraction(0),
        )

    # The removed weight grows piecewise linearly with the shift; it bends where a block meets a
    # bound. Search the bends for the piece that holds the budget, then solve that piece.
    bends = sorted({bound - ratio for ratio in sampled for bound in (floor, ceiling)})
    first, last = 0, len(bends) - 1
    while last - first > 1:
        middle = (first + last) // 2
        if removed(bends[middle]) <= budget:
            first = middle
        else:
            last = middle
    start, end = bends[first], bends[last]
    below, above = removed(start), removed(end)
    if above == below:
        return clipped(start)
    return clipped(start + (end - start) * (budget - below) / (above - below))


def removal_counts(ratios: Sequence[float | Fraction], numels: Sequence[int]) -> list[int]:
    """Round ``ratio * numel`` to whole weights so that the total is exact.

    Each linear removes its share rounded down or up; the total is the rounded sum of the shares.
    The linears whose shares lost most by rounding down are rounded up, earlier ones first; none
    that would lose its last weight by that, as long as another can take it on.

    Args:
        ratios: Exact ratio of each linear.
        numels: Number of weights of each linear.

    Returns:
        Number of weights that each linear removes.
    """
    shares = [_exact(ratio) * numel for ratio, numel in zip(ratios, numels, strict=True)]
    counts = [share.numerator // share.denominator for share in shares]
    total = sum(shares, Fraction(0))
    missing = round(total) - sum(counts)
    order = sorted(range(len(shares)), key=lambda index: (counts[index] - shares[index], index))
    while missing > 0:
        # A ratio is below 1: what a tiny linear cannot lose, others do.
        able = [index for index in order if counts[index] + 1 < numels[index]] or order
        raised = able[:missing]
        for index in raised:
            counts[index] += 1
        missing -= len(raised)
    return counts


def _exact(ratio: float | Fraction) -> Fraction:
    # 0.525 stands for 525/1000, not for the nearest binary fraction.
    return ratio if isinstance(ratio, Fraction) else Fraction(repr(float(ratio)))
