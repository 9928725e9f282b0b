"""How sensitive the loss is to fewer KV bits, per layer, and the split that this suggests.

One unit at a time is stored at a low width while all others stay unquantised, and the change of the
loss is measured. The changes of different units nearly add up, so that the best split with a given
mean is a knapsack problem, which is solved exactly. The search only starts from that split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_adaptive_sparse.profiles import KVCacheConfig
from hf_adaptive_sparse.search.kv_plan import FreeSplit
from hf_adaptive_sparse.search.kv_split import LayerBits
from hf_adaptive_sparse.search.space import OWN_DTYPE, SearchSpace

WIDEST_MEASURED = 4
"""Above this width the change of the loss is too small to measure. It is extrapolated: a quarter
for each further bit, as the squared error falls."""


@dataclass(frozen=True)
class KVSensitivity:
    """The change of the loss when one unit alone is quantised.

    Attributes:
        plan: The units and the palette.
        changes: Per unit, the change at each width of the palette, in the loss's unit. No width
            has a smaller change than a wider one; what was measured below 0 is 0.
    """

    plan: FreeSplit
    changes: tuple[tuple[float, ...], ...]

    def best_bits(self) -> tuple[LayerBits, ...]:
        """Return the split on the plan's mean whose changes have the lowest sum.

        Returns:
            ``(key bits, value bits)`` per decoder layer.

        Raises:
            ValueError: If the plan has no mean to hold.
        """
        if self.plan.allocation is None:
            raise ValueError("The best split is that of a mean; the space must set kv_mean_bits.")
        return self.plan.layer_bits(self.plan.allocation.cheapest(self.changes))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types: label of a unit -> width -> change."""
        widths = list(map(str, self.plan.palette))
        return {
            unit.label: dict(zip(widths, row, strict=True))
            for unit, row in zip(self.plan.units, self.changes, strict=True)
        }


def measure_kv_sensitivity(
    loss: Callable[[KVCacheConfig], float], plan: FreeSplit, space: SearchSpace
) -> KVSensitivity:
    """Measure every unit at the palette's widths of `WIDEST_MEASURED` bits and fewer.

    Args:
        loss: Loss of the model through a KV profile, on a few batches.
        plan: The units and the palette.
        space: The space, for the cache's other settings.
    """

    def through(unit: int, bits: int) -> float:
        alone = [OWN_DTYPE] * len(plan.units)
        alone[unit] = bits
        return loss(_profile(plan, space, alone))

    unquantised = loss(_profile(plan, space, [OWN_DTYPE] * len(plan.units)))
    measured = [bits for bits in plan.palette if bits <= WIDEST_MEASURED]
    if not measured and plan.palette[0] < OWN_DTYPE:
        measured = [plan.palette[0]]
    rows = []
    for unit in range(len(plan.units)):
        found = {bits: through(unit, bits) - unquantised for bits in measured}
        rows.append(_spread(found, plan.palette))
    return KVSensitivity(plan, tuple(rows))


def _spread(found: dict[int, float], palette: Sequence[int]) -> tuple[float, ...]:
    """Return the change at each width, from those that were measured."""
    changes: dict[int, float] = {}
    above = 0.0
    for bits in sorted(found, reverse=True):
        above = changes[bits] = max(above, found[bits])
    for bits in palette:
        if bits not in changes:
            widest = max(found, default=bits)
            wide = 0.0 if bits == OWN_DTYPE else changes[widest] / 4.0 ** (bits - widest)
            changes[bits] = wide
    return tuple(changes[bits] for bits in palette)


def _profile(plan: FreeSplit, space: SearchSpace, unit_bits: Sequence[int]) -> KVCacheConfig:
    keys, values = zip(*plan.layer_bits(unit_bits), strict=True)
    return space.kv_config(keys, values)
