"""The equal split of KV bits: every width goes to as many layers.

The paper draws every layer's bits on its own and rejects the draws that miss the mean. Here the
sampler draws a priority for each layer, and the widest bits go to the layers of highest priority.
Every draw then meets the budget, an ordering needs one number per layer however many widths there
are, and the sampler sees everything that decides a layer's bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations_with_replacement

LayerBits = tuple[int, int]
"""Bits of one layer's keys and of its values."""

UNCACHED_BITS = 16
"""What a layer that caches no keys and values is listed with; nothing is stored in it."""


@dataclass(frozen=True)
class KVSplit:
    """The bits that a model's layers share out; made once, since it depends on no trial.

    Attributes:
        groups: Per group of layers with caches of one size: the layers, and as many bits, from the
            widest to the narrowest.
        num_layers: Decoder layers of the model.
        mean_bits: The width-weighted mean bits that every assignment has.
    """

    groups: tuple[tuple[tuple[int, ...], tuple[LayerBits, ...]], ...]
    num_layers: int
    mean_bits: float

    def assign(self, priorities: Sequence[float]) -> tuple[LayerBits, ...]:
        """Give the widest bits to the layers of highest priority, earlier layers first in a tie.

        Args:
            priorities: One number per decoder layer. Only their order within a group counts.

        Returns:
            ``(key bits, value bits)`` per decoder layer.

        Raises:
            ValueError: If there is not one priority per layer.
        """
        if len(priorities) != self.num_layers:
            raise ValueError(
                f"One priority per decoder layer is needed: the model has {self.num_layers} "
                f"layers, got {len(priorities)} priorities."
            )
        assigned = [(UNCACHED_BITS, UNCACHED_BITS)] * self.num_layers
        for layers, bits in self.groups:
            ranked = sorted(layers, key=lambda layer: (-priorities[layer], layer))
            for layer, pair in zip(ranked, bits, strict=True):
                assigned[layer] = pair
        return tuple(assigned)

    def interleaved_priorities(self, palette_size: int) -> list[float]:
        """Return priorities in [0, 1] that spread every width evenly over the depth.

        This is the baseline of a search: widths take turns from layer to layer.
        """
        priorities = [0.0] * self.num_layers
        for layers, _ in self.groups:
            count = len(layers)
            chunk = -(-count // palette_size)
            # Layer 0 takes the widest of the first chunk of ranks, layer 1 that of the second, ...
            places = [i % palette_size * chunk + i // palette_size for i in range(count)]
            turn = sorted(range(count), key=places.__getitem__)
            for rank, position in enumerate(turn):
                priorities[layers[position]] = 1.0 - rank / max(1, count - 1)
        return priorities


def split_equally(
    widths: Sequence[tuple[int, int]], palette: Sequence[int], tolerance_bits: float = 0.0
) -> KVSplit:
    """Share a palette of bit widths out equally so that the mean is the palette's mean.

    Layers with caches of one size form a group, and every width goes to an equal number of its
    layers. The layers that remain where the number does not divide take the bits, keys and values
    apart if need be, that bring the mean over all layers to the palette's mean: with 8 and 6 bits
    and an odd number of layers, one layer takes keys at 8 and values at 6.

    Args:
        widths: Elements that one token adds to the keys and to the values, per decoder layer;
            ``(0, 0)`` for a layer without a cache.
        palette: Distinct bit widths.
        tolerance_bits: How far the mean may be off where no choice reaches it.

    Raises:
        ValueError: If no layer caches anything, or the mean cannot be reached within
            ``tolerance_bits``.
    """
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for layer, width in enumerate(widths):
        if sum(width):
            members[width].append(layer)
    if not members:
        raise ValueError(
            "kv_bits needs a model that caches keys and values; no decoder layer of this one does. "
            "Search its sparsity alone: kv_bits=None."
        )
    palette = sorted(palette, reverse=True)
    goal = Fraction(sum(palette), len(palette))
    remainders = {width: len(layers) % len(palette) for width, layers in members.items()}
    rest = _settle_remainders(remainders, palette, goal)
    groups = []
    for width, layers in members.items():
        bits = [(b, b) for b in palette for _ in range(len(layers) // len(palette))]
        bits += rest[width]
        bits.sort(key=lambda pair: (-_stored_bits(pair, width), -pair[0]))
        groups.append((tuple(layers), tuple(bits)))
    split = KVSplit(tuple(groups), len(widths), _mean_bits(groups, widths))
    if abs(split.mean_bits - float(goal)) > tolerance_bits + 1e-12:
        raise ValueError(
            f"No equal split of {', '.join(map(str, palette))} bits over this model's layers has "
            f"the mean {float(goal):g}: the nearest has {split.mean_bits:.6g}, because the widths "
            "of the keys and values differ. Accept it with "
            f"kv_tolerance_bits={abs(split.mean_bits - float(goal)) * 1.01:.2g}, or choose other "
            "kv_bits."
        )
    return split


def _settle_remainders(
    remainders: dict[tuple[int, int], int], palette: Sequence[int], goal: Fraction
) -> dict[tuple[int, int], list[LayerBits]]:
    """Choose the bits of the layers that an equal split leaves over.

    A dynamic programme over the groups: for every sum of stored bits that can be reached, keep the
    choice with the fewest split layers, then the fewest repeated widths.
    """
    choices: dict[int, tuple[tuple[int, int], dict[tuple[int, int], list[LayerBits]]]]
    choices = {0: ((0, 0), {})}
    for width, count in remainders.items():
        options = _group_options(width, count, palette)
        extended: dict[int, tuple[tuple[int, int], dict[tuple[int, int], list[LayerBits]]]] = {}
        for stored, (cost, chosen) in choices.items():
            for more, (extra, pairs) in options.items():
                total = (cost[0] + extra[0], cost[1] + extra[1])
                known = extended.get(stored + more)
                if known is None or total < known[0]:
                    extended[stored + more] = (total, chosen | {width: pairs})
        choices = extended
    wanted = goal * sum(sum(width) * count for width, count in remainders.items())
    best = min(choices, key=lambda stored: (abs(stored - wanted), choices[stored][0]))
    return choices[best][1]


def _group_options(
    width: tuple[int, int], count: int, palette: Sequence[int]
) -> dict[int, tuple[tuple[int, int], list[LayerBits]]]:
    pairs = [(k, v) for k in palette for v in palette if k >= v]
    options: dict[int, tuple[tuple[int, int], list[LayerBits]]] = {}
    for combination in combinations_with_replacement(pairs, count):
        stored = sum(_stored_bits(pair, width) for pair in combination)
        halves = [bits for pair in combination for bits in pair]
        repeats = sum(halves.count(bits) ** 2 for bits in set(halves))
        cost = (sum(k != v for k, v in combination), repeats)
        if stored not in options or cost < options[stored][0]:
            options[stored] = (cost, list(combination))
    return options


def _stored_bits(pair: LayerBits, width: tuple[int, int]) -> int:
    return pair[0] * width[0] + pair[1] * width[1]


def _mean_bits(
    groups: Iterable[tuple[tuple[int, ...], tuple[LayerBits, ...]]],
    widths: Sequence[tuple[int, int]],
) -> float:
    stored = sum(_stored_bits(p, widths[layers[0]]) for layers, bits in groups for p in bits)
    return stored / sum(map(sum, widths))
