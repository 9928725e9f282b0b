"""From what a trial wishes for to the profile on the budget that is near to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from hf_adaptive_sparse.search.byte_budget import ByteBudget, Spent
from hf_adaptive_sparse.search.byte_projection import SCALE, Choice, Ratios, project_bytes
from hf_adaptive_sparse.search.kv_plan import FreeSplit
from hf_adaptive_sparse.search.kv_split import LayerBits
from hf_adaptive_sparse.search.on_budget import Candidate
from hf_adaptive_sparse.search.projection import project_ratios, removal_counts
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace


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


def project(draw: Draw, space: SearchSpace, shape: ModelShape) -> Candidate:
    """Return the profile on the budget that is near to what a trial wishes for.

    Raises:
        ValueError: If no profile of the space meets a budget in bytes.
    """
    ratios: Sequence[Fraction] = []
    if shape.groups and not space.is_free:
        weights = [sum(shape.numel[name] for name in group.names) for group in shape.groups]
        ratios = project_ratios(draw.ratios, weights, space.target, space.low, space.high)
    if shape.budget is not None:
        return project_onto_bytes(draw, ratios, space, shape, shape.budget)
    per_linear = [
        ratio for ratio, group in zip(ratios, shape.groups, strict=True) for _ in group.names
    ]
    counts = removal_counts(per_linear, list(shape.numel.values())) if ratios else []
    kv_bits = None if shape.kv is None else shape.kv.assign(draw.kv)
    return build(
        [float(ratio) for ratio in ratios],
        dict(zip(shape.numel, counts, strict=False)),
        exact_widths(draw, space, shape),
        kv_bits,
        space,
        shape,
    )


def build(
    ratios: Sequence[float],
    removed: Mapping[str, int],
    group_bits: Sequence[int],
    kv_bits: Sequence[LayerBits] | None,
    space: SearchSpace,
    shape: ModelShape,
) -> Candidate:
    """Put a candidate together.

    Args:
        ratios: One per group of linears.
        removed: Linear -> weights that it loses.
        group_bits: One per group that shares a weight width.
        kv_bits: ``(key bits, value bits)`` per decoder layer; ``None``: the cache is left alone.
        space: The search space.
        shape: The space laid over the model.
    """
    kv_cache, mean_kv_bits = None, None
    if kv_bits is not None and shape.kv is not None:
        keys, values = zip(*kv_bits, strict=True)
        kv_cache = space.kv_config(keys, values)
        mean_kv_bits = shape.kv.mean_bits
        if mean_kv_bits is None:
            mean_kv_bits = kv_cache.mean_bits(shape.kv_widths)
    weight_bits = {
        name: bits
        for group, bits in zip(shape.weight_groups, group_bits, strict=True)
        for name in group.names
    }
    spent = None
    if shape.budget is not None:
        spent = shape.budget.spent(removed, weight_bits, kv_bits)
    return Candidate(
        block_ratios=tuple(ratios),
        removed=dict(removed),
        numel=shape.numel,
        kv_cache=kv_cache,
        mean_kv_bits=mean_kv_bits,
        weight_bits=weight_bits,
        spent=spent,
    )


def exact_widths(draw: Draw, space: SearchSpace, shape: ModelShape) -> list[int]:
    """Return the weight bits of each group where an exact mean or a single width gives them."""
    if shape.weight_allocation is None or space.weight_bits is None:
        return []
    return list(shape.weight_allocation.nearest(draw.weights or [0.0] * len(shape.weight_groups)))


def project_onto_bytes(
    draw: Draw,
    exact: Sequence[Fraction],
    space: SearchSpace,
    shape: ModelShape,
    budget: ByteBudget,
) -> Candidate:
    """Return the profile within the limits in bytes that is near to the wishes.

    Args:
        draw: The wishes.
        exact: The ratios of an exact mean; empty where the mean is free or nothing is pruned.
        space: The search space.
        shape: The space laid over the model.
        budget: The limits.

    Raises:
        ValueError: If no profile of the space meets them; the smallest reachable bytes are named.
    """
    numels = list(shape.numel.values())
    fixed_counts: list[int] | None = None
    if exact:
        per_linear = [
            ratio for ratio, group in zip(exact, shape.groups, strict=True) for _ in group.names
        ]
        fixed_counts = removal_counts(per_linear, numels)
    fixed_bits = exact_widths(draw, space, shape)
    palette = space.weight_bits or ()
    choices = []
    if shape.weight_allocation is None:
        choices = [Choice(wish, len(palette)) for wish in draw.weights]
    split = shape.kv if isinstance(shape.kv, FreeSplit) and shape.kv.mean_bits is None else None
    if split is not None:
        choices += [Choice(wish, len(split.palette)) for wish in split.wishes(draw.kv)]
    fixed_kv = None if shape.kv is None or split is not None else shape.kv.assign(draw.kv)

    def candidate(ratios: Sequence[int], places: Sequence[int]) -> Candidate:
        counts = fixed_counts
        values = [float(ratio) for ratio in exact]
        if counts is None:
            spread = [r for r, g in zip(ratios, shape.groups, strict=True) for _ in g.names]
            counts = [ratio * numel // SCALE for ratio, numel in zip(spread, numels, strict=False)]
            values = [ratio / SCALE for ratio in ratios]
        groups = len(choices) - (0 if split is None else len(split.units))
        bits = fixed_bits or [palette[place] for place in places[:groups]]
        kv_bits = fixed_kv
        if split is not None:
            kv_bits = split.layer_bits([split.palette[place] for place in places[groups:]])
        removed = dict(zip(shape.numel, counts, strict=True)) if shape.groups else {}
        return build(values, removed, bits, kv_bits, space, shape)

    def spent(ratios: Sequence[int], places: Sequence[int]) -> Spent:
        found = candidate(ratios, places).spent
        if found is None:
            raise TypeError("A candidate under a budget in bytes must be weighed.")
        return found

    wishes = Ratios((), 0, 0)
    if fixed_counts is None:
        wishes = Ratios(
            tuple(round(ratio * SCALE) for ratio in draw.ratios),
            round(space.low * SCALE),
            round(space.high * SCALE),
        )
    found = project_bytes(wishes, choices, lambda r, p: budget.holds(spent(r, p)))
    if found is None:
        raise budget.refuse(spent(wishes.shifted(wishes.reach), [0] * len(choices)))
    return candidate(*found)
