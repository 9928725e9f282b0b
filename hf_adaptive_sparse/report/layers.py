"""Averages over the modules of each layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hf_adaptive_sparse.architecture import layer_of


def mean_by_layer(
    ratios: Mapping[str, float], numel: Mapping[str, int] | None = None
) -> dict[str, dict[int, float]]:
    """Return the mean ratio of each layer: stack -> position -> ratio, positions ascending.

    Args:
        ratios: Module name -> fraction removed.
        numel: Module name -> weights, to weight the mean; None: modules weigh alike.
    """
    sums: dict[str, dict[int, tuple[float, float]]] = {}
    for name, ratio in ratios.items():
        place = layer_of(name)
        if place is None:
            continue
        weight = 1.0 if numel is None else float(numel[name])
        stack = sums.setdefault(place[0], {})
        total, weights = stack.get(place[1], (0.0, 0.0))
        stack[place[1]] = (total + ratio * weight, weights + weight)
    return {
        stack: {position: total / weights for position, (total, weights) in sorted(layers.items())}
        for stack, layers in sums.items()
    }


def largest_stack(stacks: Iterable[str], ratios: Mapping[str, float]) -> str:
    """Return the stack with the most modules: the language model's, in practice."""
    return max(stacks, key=lambda stack: sum(name.startswith(f"{stack}.") for name in ratios))
