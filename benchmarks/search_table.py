"""The figures and the table of `search.py`, from its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

KINDS = ("paper", "equal_trials", "equal_time", "equal_time_both", "equal_time_best")


def summary(runs: Sequence[Mapping[str, Any]], dense: float, uniform: float) -> dict[str, Any]:
    """Return the figures asked for."""
    paper_trial = median(s for run in runs for s in run["paper"]["trial_seconds"])
    timed = [run["equal_time"] for run in runs]  # the same blocks and windows, our defaults
    full = median(s for run in timed for s in run["full_trial_seconds"])
    typical = median(s for run in timed for s in run["trial_seconds"])
    gains = {kind: [uniform - run[kind]["held_out"] for run in runs] for kind in KINDS}
    return {
        "held_out_dense": dense,
        "held_out_uniform": uniform,
        "paper_trial_seconds": paper_trial,
        "full_trial_seconds": full,
        "median_trial_seconds": typical,
        "full_trial_speedup": paper_trial / full,
        "median_trial_speedup": paper_trial / typical,
        "held_out": {kind: mean(r[kind]["held_out"] for r in runs) for kind in gains},
        "gain_over_uniform": {kind: mean(values) for kind, values in gains.items()},
        "gain_stdev": {k: stdev(v) if len(v) > 1 else 0.0 for k, v in gains.items()},
        # Where the paper's procedure finds nothing better than uniform, there is no ratio.
        "gain_over_paper": {
            k: mean(v) / mean(gains["paper"]) if mean(gains["paper"]) > 0 else None
            for k, v in gains.items()
        },
    }


def table(document: Mapping[str, Any]) -> str:
    """Return the result for people."""
    figures, runs = document["summary"], document["runs"]
    names = {
        "paper": "the paper's procedure",
        "equal_trials": "ours, the same space and number of trials",
        "equal_time": f"ours, the same time, ± {document['range']:g}",
        "equal_time_both": "the same, scored on the calibration windows, too",
        "equal_time_best": "ours, the same time, preset `best` (weights updated by ALPS)",
    }
    lines = [
        "# Our search against the paper's procedure",
        "",
        f"{document['model']}, mean sparsity exactly 50 %, mean KV bits 7, {len(runs)} seeds; "
        f"{document['windows']['calibration']} calibration, {document['windows']['evaluation']} "
        f"evaluation and {document['windows']['held_out']} held-out windows of "
        f"{document['settings']['sequence_length']} tokens. Held-out perplexity after pruning "
        f"layer by layer: dense {figures['held_out_dense']:.3f}, uniform "
        f"{figures['held_out_uniform']:.3f}.",
        "",
        "| search | trials | seconds | held-out perplexity | gain over uniform (stdev) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind, name in names.items():
        lines.append(
            f"| {name} | {mean(r[kind]['trials'] for r in runs):.0f} "
            f"| {_seconds(kind, runs):.1f} "
            f"| {figures['held_out'][kind]:.3f} "
            f"| {figures['gain_over_uniform'][kind]:.3f} ({figures['gain_stdev'][kind]:.3f}) |"
        )
    lines += [
        "",
        "| time per trial | seconds | the paper's trial takes |",
        "| --- | ---: | ---: |",
        f"| the paper's procedure | {figures['paper_trial_seconds']:.2f} | |",
        f"| ours, evaluated in full | {figures['full_trial_seconds']:.2f} "
        f"| {figures['full_trial_speedup']:.1f} × as long |",
        f"| ours, median trial | {figures['median_trial_seconds']:.3f} "
        f"| {figures['median_trial_speedup']:.1f} × as long |",
        "",
        *_said(document),
        "",
        f"Load average at the end {document['load_average'][0]:.1f} on "
        f"{document['environment']['cores']} cores: where it is above their number, other jobs ran "
        "beside, and times and what was found in equal time are provisional.",
    ]
    return "\n".join(lines)


def _seconds(kind: str, runs: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean time; that of updating weights counts."""
    pruning = kind == "equal_time_best"
    return mean(
        float(r[kind]["seconds"]) + (r[kind]["pruning_seconds"] if pruning else 0) for r in runs
    )


def _said(document: Mapping[str, Any]) -> list[str]:
    figures = document["summary"]
    plain, both, best = (figures["gain_over_paper"][kind] for kind in KINDS[2:])
    if plain is None:
        return ["The paper's procedure found nothing better than the uniform profile."]
    lines = [
        f"In the same time ours gains {plain:.2f} times what the paper's procedure gains over "
        f"uniform, {both:.2f} times where trials are scored on all windows, and {best:.2f} times "
        "with the preset `best`, whose final prune is part of the time (means of the seeds)."
    ]
    if document["bound"] is not None:
        paper, wide = (
            figures["held_out_uniform"] - document["bound"][name]["held_out"]
            for name in ("paper", "wide")
        )
        lines += [
            "",
            f"A search on the held-out windows themselves, for "
            f"{document['settings']['bound_seconds']:.0f} s, gains {paper:.3f} within the paper's "
            f"range and {wide:.3f} within ± {document['range']:g}: about what a profile by itself "
            "can gain on them.",
        ]
    return lines
