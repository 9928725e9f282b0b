"""Projects what a trial wishes for onto the budget: the nearest profile that meets it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeVar

from hf_adaptive_sparse.search.byte_budget import ByteBudget, Spent
from hf_adaptive_sparse.search.byte_projection import SCALE, Choice, Ratios, project_bytes
from hf_adaptive_sparse.search.candidate import Candidate
from hf_adaptive_sparse.search.kv_split import LayerBits
from hf_adaptive_sparse.search.ratio_projection import project_ratios, removal_counts
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace

_Ratio = TypeVar("_Ratio", int, Fraction)


@dataclass(frozen=True)
class Draw:
    """What a trial wishes for, before it is projected onto the budget.

    Attributes:
        ratios: One per group of linears.
        kv: The parameters of the KV plan.
        weights: Per group of linears that share a weight width, a place in the palette: 0 the
            narrowest, fractions between two. Empty where there is nothing to choose.
    """

    ratios: tuple[float, ...]
    kv: Mapping[str, float]
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Parts:
    """What a candidate is made of; empty where it is still open or left alone.

    Attributes:
        ratios: One per group of linears.
        removed: Linear -> weights that it loses.
        group_bits: Weight bits per group of linears that share a width.
        kv_bits: ``(key bits, value bits)`` per decoder layer; ``None``: the cache is left alone.
    """

    ratios: Sequence[float]
    removed: Mapping[str, int]
    group_bits: Sequence[int]
    kv_bits: Sequence[LayerBits] | None


def project(draw: Draw, space: SearchSpace, shape: ModelShape) -> Candidate:
    """Return the profile on the budget that is near to what a trial wishes for.

    Raises:
        ValueError: If no profile of the space meets a budget in bytes.
    """
    held = hold_means(draw, space, shape)
    if shape.budget is not None:
        return project_onto_bytes(draw, held, space, shape, shape.budget)
    return build(held, space, shape)


def hold_means(draw: Draw, space: SearchSpace, shape: ModelShape) -> Parts:
    """Project a draw onto the exact means of the space; what a budget decides stays open."""
    ratios: Sequence[Fraction] = []
    counts: Sequence[int] = []
    if shape.groups and not space.is_free:
        weights = [sum(shape.numel[name] for name in group.names) for group in shape.groups]
        ratios = project_ratios(draw.ratios, weights, space.target, space.low, space.high)
        counts = removal_counts(per_linear(ratios, shape), list(shape.numel.values()))
    group_bits: Sequence[int] = []
    if shape.weight_allocation is not None:
        group_bits = shape.weight_allocation.nearest(
            draw.weights or [0.0] * len(shape.weight_groups)
        )
    return Parts(
        ratios=[float(ratio) for ratio in ratios],
        removed=dict(zip(shape.numel, counts, strict=True)) if counts else {},
        group_bits=group_bits,
        kv_bits=None if shape.kv is None else shape.kv.assign(draw.kv),
    )


def per_linear(ratios: Sequence[_Ratio], shape: ModelShape) -> list[_Ratio]:
    """Return the ratio of each linear from those of the groups."""
    return [ratio for ratio, group in zip(ratios, shape.groups, strict=True) for _ in group.names]


def build(parts: Parts, space: SearchSpace, shape: ModelShape) -> Candidate:
    """Put a candidate together.

    Args:
        parts: What it is made of.
        space: The search space.
        shape: The space applied to the model.
    """
    kv_cache, mean_kv_bits = None, None
    if parts.kv_bits is not None and shape.kv is not None:
        keys, values = zip(*parts.kv_bits, strict=True)
        kv_cache = space.kv_config(keys, values)
        mean_kv_bits = shape.kv.mean_bits
        if mean_kv_bits is None:
            mean_kv_bits = kv_cache.mean_bits(shape.kv_widths)
    weight_bits = {
        name: bits
        for group, bits in zip(shape.weight_groups, parts.group_bits, strict=True)
        for name in group.names
    }
    spent = None
    if shape.budget is not None:
        spent = shape.budget.spent(parts.removed, weight_bits, parts.kv_bits)
    return Candidate(
        block_ratios=tuple(parts.ratios),
        removed=dict(parts.removed),
        numel=shape.numel,
        kv_cache=kv_cache,
        mean_kv_bits=mean_kv_bits,
        weight_bits=weight_bits,
        spent=spent,
    )


def project_onto_bytes(
    draw: Draw, held: Parts, space: SearchSpace, shape: ModelShape, budget: ByteBudget
) -> Candidate:
    """Return the profile within the limits in bytes that is near to the wishes.

    Args:
        draw: The wishes.
        held: The parts of the draw that the exact means already fix.
        space: The search space.
        shape: The space applied to the model.
        budget: The limits.

    Raises:
        ValueError: If no profile of the space meets them; the smallest reachable bytes are named.
    """
    moves = Moves(draw, held, space, shape)

    def spent(ratios: Sequence[int], places: Sequence[int]) -> Spent:
        found = moves.candidate(ratios, places).spent
        if found is None:
            raise TypeError("A candidate under a budget in bytes must have its bytes counted.")
        return found

    ratios, choices = moves.ratios, moves.choices
    found = project_bytes(ratios, choices, lambda r, p: budget.holds(spent(r, p)))
    if found is None:
        raise budget.refuse(spent(ratios.shifted(ratios.reach), [0] * len(choices)))
    return moves.candidate(*found)


class Moves:
    """The part of a draw that a budget in bytes may change, and the candidate after a change.

    Args:
        draw: The wishes.
        held: The parts of the draw that the exact means already fix.
        space: The search space.
        shape: The space applied to the model.
    """

    def __init__(self, draw: Draw, held: Parts, space: SearchSpace, shape: ModelShape) -> None:
        self._held, self._space, self._shape = held, space, shape
        self.ratios = Ratios((), 0, 0)
        if space.is_free:
            wishes = tuple(round(ratio * SCALE) for ratio in draw.ratios)
            self.ratios = Ratios(wishes, round(space.low * SCALE), round(space.high * SCALE))
        self._palette = space.weight_bits or ()
        self._weights: list[Choice] = []
        if not held.group_bits:
            self._weights = [Choice(wish, len(self._palette)) for wish in draw.weights]
        self._kv: dict[str, Choice] = {}
        if shape.kv is not None and space.kv_bits is not None:
            self._kv = {
                name: Choice(draw.kv.get(name, 0.0), len(space.kv_bits))
                for name in shape.kv.movable
            }

    @property
    def choices(self) -> list[Choice]:
        """The widths of the weights, then those of the KV cache."""
        return [*self._weights, *self._kv.values()]

    def candidate(self, ratios: Sequence[int], places: Sequence[int]) -> Candidate:
        """Return the candidate of ratios, in multiples of 1 / `SCALE`, and places in the palettes.

        Args:
            ratios: One per group whose ratio moves.
            places: One for each of `choices`.
        """
        after = self._held
        shape = self._shape
        if ratios:
            linears = zip(shape.numel.items(), per_linear(ratios, shape), strict=True)
            removed = {name: ratio * numel // SCALE for (name, numel), ratio in linears}
            after = replace(after, ratios=[ratio / SCALE for ratio in ratios], removed=removed)
        if self._weights:
            bits = [self._palette[place] for place in places[: len(self._weights)]]
            after = replace(after, group_bits=bits)
        if self._kv and shape.kv is not None:
            wishes = map(float, places[len(self._weights) :])
            kv_bits = shape.kv.assign(dict(zip(self._kv, wishes, strict=True)))
            after = replace(after, kv_bits=kv_bits)
        return build(after, self._space, shape)
