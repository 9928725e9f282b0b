"""The plots of a study's report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_adaptive_sparse.report.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILION,
    save_figure,
    tidy,
)
from hf_adaptive_sparse.report.study_analysis import Effect, front
from hf_adaptive_sparse.report.study_facts import StudyFacts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BARS = 15


def plot_history(facts: StudyFacts, path: str | os.PathLike[str]) -> None:
    """Plot the value of every trial, the best so far, and what was stopped early.

    Values far above the others are cut off at the plot's edge and marked there.

    Raises:
        ValueError: If no trial was evaluated in full.
    """
    complete = sorted(facts.complete, key=lambda row: row["number"])
    if not complete:
        raise ValueError("A history needs at least one complete trial; got none.")
    stopped = [row for row in facts.evaluated if row["value"] is None]
    everything = sorted([r["value"] for r in complete] + [r["estimate"] for r in stopped])
    low = everything[0]
    middle = everything[int(0.9 * (len(everything) - 1))]
    # Where nearly all are 0, as questions missed may be, there is no other scale.
    top = max(middle + 0.6 * (middle - low), low * 1.0005) or everything[-1]
    best, running = [], float("inf")
    for row in complete:
        running = min(running, row["value"])
        best.append(running)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()

        def dots(rows: Sequence[tuple[int, float]], marker: str, color: str, label: str) -> None:
            inside = [(n, v) for n, v in rows if v <= top]
            axes.plot(
                [number for number, _ in inside],
                [value for _, value in inside],
                marker,
                color=color,
                ms=5,
                alpha=0.6,
                label=label,
            )
            outside = [n for n, v in rows if v > top]
            if outside:
                axes.plot(outside, [top] * len(outside), "^", color=color, ms=6, alpha=0.6, ls="")

        dots([(r["number"], r["value"]) for r in complete], "o", GREY, "evaluated in full")
        dots(
            [(r["number"], r["estimate"]) for r in stopped], "x", ORANGE, "stopped early (estimate)"
        )
        axes.step([r["number"] for r in complete], best, where="post", color=BLUE, lw=2,
                  label="best so far")  # fmt: skip
        if facts.uniform is not None and facts.uniform["value"] <= top:
            value = facts.uniform["value"]
            axes.axhline(value, color=VERMILION, ls="--", lw=1, label=f"uniform: {value:#.5g}")
        if any(value > top for value in everything):
            axes.plot([], [], "^", color=GREY, ms=6, ls="", label="above the plot")
        axes.set_xlabel("trial")
        axes.set_ylabel(f"{facts.labels[0]} (lower is better)")
        axes.locator_params(axis="x", integer=True)
        tidy(axes)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)

    save_figure(draw, path, (8.4, 3.8))


def plot_sensitivity(
    effects: Sequence[Effect], path: str | os.PathLike[str], *, measure: str
) -> None:
    """Plot what 10 points more sparsity in one group do to the value.

    Args:
        effects: One per group.
        path: Where the PNG goes.
        measure: What changes, for the axis.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        places = range(len(effects))
        axes.bar(
            places,
            [effect.percent for effect in effects],
            yerr=[effect.error for effect in effects],
            color=[VERMILION if effect.percent > 0 else GREEN for effect in effects],
            error_kw={"lw": 1, "ecolor": GREY, "capsize": 3},
        )
        axes.axhline(0, color=GREY, lw=0.8)
        crowded = len(effects) > 8
        axes.set_xticks(list(places), [effect.label for effect in effects],
                        rotation=45 if crowded else 0, ha="right" if crowded else "center",
                        fontsize=9)  # fmt: skip
        axes.set_ylabel(f"change of {measure} (%)")
        tidy(axes)

    save_figure(draw, path, (7.6, 3.4))


def plot_importance(shares: Sequence[tuple[str, float]], path: str | os.PathLike[str]) -> None:
    """Plot how much each choice decides which trials are among the best."""
    shown = list(shares[:MOST_BARS])[::-1]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.barh([name for name, _ in shown], [100 * share for _, share in shown], color=BLUE)
        axes.set_xlabel("importance (%)")
        axes.tick_params(axis="y", labelsize=9)
        tidy(axes, grid="x")

    save_figure(draw, path, (7.6, 0.9 + 0.28 * len(shown)))


def plot_front(
    points: Sequence[tuple[float, float]],
    path: str | os.PathLike[str],
    *,
    cost: str,
    measure: str,
) -> None:
    """Plot quality against a cost, with the points that nothing else beats in both.

    Args:
        points: ``(cost, value)`` per trial.
        path: Where the PNG goes.
        cost: What the cost is, for the axis.
        measure: What the value is.
    """
    best = front(points)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), "o", color=GREY, alpha=0.5, ms=5, mew=0,
                  label="trial")  # fmt: skip
        chosen = [points[index] for index in best]
        axes.step(*zip(*chosen, strict=True), where="post", color=BLUE, lw=1.5)
        axes.plot(*zip(*chosen, strict=True), "o", color=BLUE, ms=7, label="Pareto front")
        axes.set_xlabel(cost)
        axes.set_ylabel(f"{measure} (lower is better)")
        tidy(axes)
        axes.legend(frameon=False, fontsize=9)

    save_figure(draw, path, (7.6, 3.8))
