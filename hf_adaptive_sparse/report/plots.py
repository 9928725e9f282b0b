"""The plot of a profile over the layers, and what all plots share.

Drawn with matplotlib's object interface on the Agg canvas: no display, no global figure state, and
nothing of matplotlib is imported before the first plot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from hf_adaptive_sparse.files import replacing
from hf_adaptive_sparse.profiles import CompressionProfile
from hf_adaptive_sparse.report.layers import largest_stack, mean_by_layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any common colour blindness, and in grey.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
ORANGE = "#E69F00"

_DPI = 120


def plot_profile(
    profile: CompressionProfile,
    path: str | os.PathLike[str],
    *,
    numel: Mapping[str, int] | None = None,
    target_sparsity: float | None = None,
    num_layers: int | None = None,
) -> None:
    """Plot what each decoder layer gets: the ratio removed and the bits of keys and values.

    Args:
        profile: What to plot; a part that is absent is left out.
        path: Where the PNG goes; written under a temporary name, then renamed.
        numel: Module name -> weights, for a layer's mean ratio; None: its modules weigh alike.
        target_sparsity: Drawn as a line.
        num_layers: Decoder layers, needed only where the KV profile is one number for all layers
            and there is no sparsity profile.

    Raises:
        ValueError: If the profile is empty, or the number of layers cannot be known.
    """
    layers: dict[int, float] = {}
    if profile.sparsity is not None and profile.sparsity.ratios:
        ratios = profile.sparsity.ratios
        by_stack = mean_by_layer(ratios, numel)
        if by_stack:
            layers = by_stack[largest_stack(by_stack, ratios)]
    kv: tuple[tuple[int, int], ...] = ()
    if profile.kv_cache is not None:
        kv = profile.kv_cache.layer_bits(layer_count(profile, num_layers, layers))
    panels: list[Callable[[Axes], None]] = []
    if layers:
        panels.append(lambda axes: _draw_ratios(axes, layers, target_sparsity))
    if profile.weight_bits:
        stacks = mean_by_layer(profile.weight_bits, numel)
        bits = stacks[largest_stack(stacks, profile.weight_bits)]
        panels.append(lambda axes: _draw_weight_bits(axes, bits))
    if kv:
        panels.append(lambda axes: _draw_bits(axes, kv))
    if not panels:
        raise ValueError("A profile to plot must have ratios of layers or a KV cache; it is empty.")

    def draw(figure: Figure) -> None:
        stacked = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for panel, axes in zip(panels, stacked, strict=True):
            panel(axes)
            tidy(axes)
        stacked[-1].set_xlabel("decoder layer")
        stacked[-1].locator_params(axis="x", integer=True)
        figure.suptitle("Compression profile")

    save_figure(draw, path, (6.4, 1.2 + 2.4 * len(panels)))


def layer_count(
    profile: CompressionProfile, num_layers: int | None, layers: Collection[int]
) -> int:
    """Return the decoder layers of a profile with a KV cache.

    Args:
        profile: The profile.
        num_layers: Decoder layers where they are known.
        layers: Positions of the layers that are known to be there.

    Raises:
        ValueError: If nothing tells how many there are.
    """
    if num_layers is not None:
        return num_layers
    cache = profile.kv_cache
    assert cache is not None  # callers plot a KV profile
    lists = [bits for bits in (cache.key_bits, cache.value_bits, cache.bits) if bits is not None]
    lengths = [len(bits) for bits in lists if not isinstance(bits, int)]
    if lengths:
        return lengths[0]
    if layers:
        return max(layers) + 1
    raise ValueError(
        "A KV profile of one number for all layers needs num_layers= to be plotted by layer."
    )


def _draw_ratios(axes: Axes, layers: Mapping[int, float], target: float | None) -> None:
    percent = [100 * ratio for ratio in layers.values()]
    axes.bar(list(layers), percent, width=0.8, color=BLUE)
    if target is not None:
        label = f"target {100 * target:.4g} %"
        axes.axhline(100 * target, color=VERMILION, ls="--", lw=1.5, label=label)
        axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=1)
    axes.set_ylabel("weights removed (%)")
    axes.set_title("Sparsity", loc="left", fontsize=10)
    # From zero, as bars are read by their length, with room above the longest.
    axes.set_ylim(0, min(100, max([*percent, 100 * (target or 0)]) * 1.15 + 1))


def _draw_weight_bits(axes: Axes, layers: Mapping[int, float]) -> None:
    axes.bar(list(layers), list(layers.values()), width=0.8, color=GREEN)
    axes.set_yticks(sorted({0, 16, *(round(bits) for bits in layers.values())}))
    axes.set_ylim(0, 17)
    axes.set_ylabel("bits per weight")
    axes.set_title("Kept weights", loc="left", fontsize=10)


def _draw_bits(axes: Axes, bits: Sequence[tuple[int, int]]) -> None:
    layers = range(len(bits))
    for place, (name, color) in enumerate((("keys", BLUE), ("values", ORANGE))):
        axes.bar(
            [layer + (place - 0.5) * 0.4 for layer in layers],
            [pair[place] for pair in bits],
            width=0.38,
            color=color,
            label=name,
        )
    top = max(max(pair) for pair in bits)
    axes.set_yticks(sorted({0, *(width for pair in bits for width in pair)}))
    axes.set_ylim(0, top * 1.1)
    axes.set_ylabel("bits per element")
    axes.set_title("KV cache", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def tidy(axes: Axes, *, grid: Literal["x", "y"] = "y") -> None:
    """Take away what a plot does not need."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)


def save_figure(
    draw: Callable[[Figure], None], path: str | os.PathLike[str], inches: tuple[float, float]
) -> None:
    """Draw on a new figure and write it as a PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    with replacing(path) as partial:
        # Without the version of matplotlib in it, the same input gives the same bytes.
        figure.savefig(partial, format="png", metadata={"Software": None})
