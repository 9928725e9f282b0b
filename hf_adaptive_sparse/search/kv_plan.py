"""Turns a space's KV bits into parameters of a trial, and parameters into bits per layer.

A *unit* is what takes one width: a layer, or its keys and its values apart. Two plans share one
interface: the equal split (a priority per unit) and the free split (a wish per unit).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from hf_adaptive_sparse.search.bit_allocation import BitAllocation
from hf_adaptive_sparse.search.kv_split import UNCACHED_BITS, KVSplit, LayerBits, split_equally
from hf_adaptive_sparse.search.space import SearchSpace

WIDEST_BASELINE = 8
"""Bits beyond which a cache gains nothing that can be measured."""

Widths = Sequence[tuple[int, int]]
"""Elements that one token adds to the keys and to the values, per decoder layer."""


@dataclass(frozen=True)
class KVUnit:
    """What takes one width.

    Attributes:
        layer: Decoder layer.
        parts: 0 for its keys, 1 for its values; both where they go together.
        size: Elements that one token adds to them.
    """

    layer: int
    parts: tuple[int, ...]
    size: int

    @property
    def label(self) -> str:
        """Its name in a trial's parameters: ``layer_3``, or ``layer_3_keys``."""
        part = "" if len(self.parts) == 2 else ("_keys", "_values")[self.parts[0]]
        return f"layer_{self.layer}{part}"


def kv_units(widths: Widths, *, apart: bool) -> tuple[KVUnit, ...]:
    """Return the units of a model, in layer order; what caches nothing is none.

    Args:
        widths: The model's cache.
        apart: Whether keys and values are units of their own.
    """
    units = []
    for layer, width in enumerate(widths):
        for parts in ((0,), (1,)) if apart else ((0, 1),):
            size = sum(width[part] for part in parts)
            if size:
                units.append(KVUnit(layer, parts, size))
    return tuple(units)


class KVPlan(ABC):
    """From a trial's parameters to KV bits, and back."""

    @property
    @abstractmethod
    def mean_bits(self) -> float | None:
        """The size-weighted mean bits of every assignment; ``None`` if they differ."""

    @property
    @abstractmethod
    def parameters(self) -> dict[str, tuple[float, float]]:
        """Parameters of a trial: name -> lowest and highest value."""

    @property
    def movable(self) -> tuple[str, ...]:
        """Parameters that a budget in bytes may move, each a place in the palette."""
        return ()

    @property
    def measurable(self) -> FreeSplit | None:
        """This plan, where the units' sensitivities tell the best split; else ``None``."""
        return None

    @abstractmethod
    def assign(self, values: Mapping[str, float]) -> tuple[LayerBits, ...]:
        """Return ``(key bits, value bits)`` per decoder layer.

        Args:
            values: The trial's parameters. Those of other choices are ignored.
        """

    @abstractmethod
    def uniform_parameters(self) -> dict[str, float]:
        """Return the parameters of the baseline: one width everywhere, or widths in turns."""

    @abstractmethod
    def parameters_for(self, bits: Sequence[LayerBits]) -> dict[str, float]:
        """Return parameters that `assign` turns into these bits, if they are on the budget.

        Args:
            bits: ``(key bits, value bits)`` per decoder layer.
        """


@dataclass(frozen=True)
class EqualSplit(KVPlan):
    """Every width goes to as many units: the paper's split, see `kv_split`.

    Attributes:
        split: The bits shared out over all ``labels``. With keys and values apart it takes each of
            them for a layer of its own, of which only the first width counts.
        labels: Per layer of the split, the end of its parameter's name.
        palette_size: Number of widths.
        apart: Whether keys and values are apart.
    """

    split: KVSplit
    labels: tuple[str, ...]
    palette_size: int
    apart: bool

    @classmethod
    def of(cls, widths: Widths, space: SearchSpace) -> EqualSplit:
        """Lay the split over a model's cache; errors as for `split_equally`."""
        palette = space.kv_bits or ()
        labels = tuple(f"layer_{layer}" for layer in range(len(widths)))
        if space.kv_apart:
            labels = tuple(f"{label}_{part}" for label in labels for part in ("keys", "values"))
            widths = [(size, 0) for width in widths for size in width]
        split = split_equally(widths, palette, space.kv_tolerance_bits)
        return cls(split, labels, len(palette), space.kv_apart)

    @property
    def mean_bits(self) -> float:
        """The palette's mean, or what the tolerance admits near it."""
        return self.split.mean_bits

    @property
    def parameters(self) -> dict[str, tuple[float, float]]:
        """A priority in [0, 1] wherever the layers of a group differ in bits."""
        return {self._name(index): (0.0, 1.0) for index in self._free}

    def assign(self, values: Mapping[str, float]) -> tuple[LayerBits, ...]:
        """Give the widest bits to the highest priorities; see `KVSplit.assign`."""
        priorities = [values.get(self._name(index), 0.0) for index in range(len(self.labels))]
        bits = self.split.assign(priorities)
        if not self.apart:
            return bits
        return tuple(
            (keys[0], values[0]) for keys, values in zip(bits[::2], bits[1::2], strict=True)
        )

    def uniform_parameters(self) -> dict[str, float]:
        """Return the priorities by which the widths take turns over the depth."""
        priorities = self.split.interleaved_priorities(self.palette_size)
        return {self._name(index): priorities[index] for index in self._free}

    def parameters_for(self, bits: Sequence[LayerBits]) -> dict[str, float]:
        """Return priorities in the order of the bits."""
        flat = [(b, b) for pair in bits for b in pair] if self.apart else list(bits)
        parameters = {}
        for index in self._free:
            keys, values = flat[index]
            # Keys break the tie between (8, 6) and (6, 8), as they do in the split.
            parameters[self._name(index)] = (keys + values + keys / 64) / 64
        return parameters

    @property
    def _free(self) -> list[int]:
        return sorted(i for group, bits in self.split.groups if len(set(bits)) > 1 for i in group)

    def _name(self, index: int) -> str:
        return f"kv_priority_{self.labels[index]}"


@dataclass(frozen=True)
class FreeSplit(KVPlan):
    """Any width at any unit, under an exact mean or under whatever else bounds the bytes.

    Attributes:
        units: What takes a width each.
        palette: The widths, ascending.
        num_layers: Decoder layers.
        allocation: Holds the mean; ``None``: wishes are rounded to the nearest width, and a budget
            in bytes moves them.
    """

    units: tuple[KVUnit, ...]
    palette: tuple[int, ...]
    num_layers: int
    allocation: BitAllocation | None

    @classmethod
    def of(cls, widths: Widths, space: SearchSpace) -> FreeSplit:
        """Lay the split over a model's cache.

        Raises:
            ValueError: If no layer caches anything, or the mean cannot be reached exactly.
        """
        palette = space.kv_bits or ()
        units = kv_units(widths, apart=space.kv_apart)
        if not units:
            raise ValueError(
                "kv_bits needs a model that caches keys and values; no decoder layer of this one "
                "does. Leave the cache alone: kv_bits=None."
            )
        allocation = None
        if space.held_kv_mean is not None:
            mean = Fraction(repr(space.held_kv_mean))
            sizes = tuple(unit.size for unit in units)
            allocation = BitAllocation(sizes, palette, mean, "kv_mean_bits")
        return cls(units, palette, len(widths), allocation)

    @property
    def mean_bits(self) -> float | None:
        """The exact mean; ``None`` where a budget in bytes decides."""
        return None if self.allocation is None else self.allocation.exact_mean

    @property
    def parameters(self) -> dict[str, tuple[float, float]]:
        """A wish per unit: 0 the narrowest width, 1 the next, and fractions between."""
        if len(self.palette) == 1:
            return {}
        return {self._name(unit): (0.0, float(len(self.palette) - 1)) for unit in self.units}

    @property
    def movable(self) -> tuple[str, ...]:
        """The wishes, where no mean holds them."""
        return () if self.allocation is not None else tuple(map(self._name, self.units))

    @property
    def measurable(self) -> FreeSplit | None:
        """This plan, where there are several widths and a mean to hold."""
        return None if self.allocation is None or len(self.palette) < 2 else self

    def assign(self, values: Mapping[str, float]) -> tuple[LayerBits, ...]:
        """Give every unit what it wishes for, as far as the mean allows."""
        wishes = [values.get(self._name(unit), 0.0) for unit in self.units]
        if self.allocation is not None:
            return self.layer_bits(self.allocation.nearest(wishes))
        top = len(self.palette) - 1
        return self.layer_bits([self.palette[min(top, int(wish + 0.5))] for wish in wishes])

    def layer_bits(self, unit_bits: Sequence[int]) -> tuple[LayerBits, ...]:
        """Return ``(key bits, value bits)`` per decoder layer from bits per unit."""
        layers = [[UNCACHED_BITS, UNCACHED_BITS] for _ in range(self.num_layers)]
        for unit, bits in zip(self.units, unit_bits, strict=True):
            for part in unit.parts:
                layers[unit.layer][part] = bits
        return tuple((keys, values) for keys, values in layers)

    def uniform_parameters(self) -> dict[str, float]:
        """Return equal wishes, or those for two widths in turns.

        Under a budget in bytes alone: the widest up to `WIDEST_BASELINE` bits everywhere.
        """
        if len(self.palette) == 1:
            return {}
        place = sum(bits <= WIDEST_BASELINE for bits in self.palette[1:])
        wishes = [float(place)] * len(self.units)
        if self.allocation is not None:
            wishes = [float(wish) for wish in self.allocation.uniform_wishes()]
        return {self._name(unit): wish for unit, wish in zip(self.units, wishes, strict=True)}

    def parameters_for(self, bits: Sequence[LayerBits]) -> dict[str, float]:
        """Return the places of these bits in the palette."""
        if len(self.palette) == 1:
            return {}
        return {
            self._name(unit): float(self.palette.index(bits[unit.layer][unit.parts[0]]))
            for unit in self.units
        }

    def _name(self, unit: KVUnit) -> str:
        return f"kv_wish_{unit.label}"


def kv_plan(widths: Widths, space: SearchSpace) -> KVPlan:
    """Return the plan that a space asks for on a model.

    Args:
        widths: The model's cache.
        space: A space whose ``kv_bits`` are not ``None``.

    Raises:
        ValueError: If no layer caches anything, or the mean cannot be reached.
    """
    if space.kv_split == "equal":
        return EqualSplit.of(widths, space)
    return FreeSplit.of(widths, space)
