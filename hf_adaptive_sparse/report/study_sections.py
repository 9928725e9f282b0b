"""The sections of a study's report: each takes the study and the folder of its plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

from hf_adaptive_sparse.profiles import CompressionProfile
from hf_adaptive_sparse.report.layers import largest_stack, mean_by_layer
from hf_adaptive_sparse.report.markup import duration, plot, section, table
from hf_adaptive_sparse.report.plots import layer_count, plot_profile
from hf_adaptive_sparse.report.study_analysis import (
    importance,
    measured_effects,
    sensitivity,
    stopping,
)
from hf_adaptive_sparse.report.study_costs import costs
from hf_adaptive_sparse.report.study_facts import StudyFacts
from hf_adaptive_sparse.report.study_plots import (
    plot_front,
    plot_history,
    plot_importance,
    plot_sensitivity,
)
from hf_adaptive_sparse.report.tables import format_value
from hf_adaptive_sparse.search.comparison import held_out_text

SHOWN_TRIALS = 15


def _held_out(facts: StudyFacts, folder: Path) -> str:
    held = facts.held_out
    if held is None:
        text = (
            "The study holds no comparison on data that the search did not see. The command line's "
            "<code>search</code> and <code>compress</code> make one; in Python, pass "
            "<code>held_out=</code> to <code>search()</code>. A front of quality and bytes "
            "has none: its profiles differ in size."
        )
        return section("Against uniform, on held-out data", f'<p class="note">{text}</p>')
    text = f"On these, {held_out_text(held)}{_masks(facts)}."
    return section("Against uniform, on held-out data", f"<p>{text}</p>")


def _masks(facts: StudyFacts) -> str:
    return ", with the one-shot masks of the search" if facts.prunes else ""


def _history(facts: StudyFacts, folder: Path) -> str:
    if not facts.complete:
        return ""
    return section("History", plot(folder, "history", lambda path: plot_history(facts, path)))


def _best(facts: StudyFacts, folder: Path) -> str:
    if facts.profile is None:
        return ""
    profile = CompressionProfile.from_dict(dict(facts.profile))
    numel = facts.numel or None

    def draw(path: Path) -> None:
        plot_profile(profile, path, numel=numel, target_sparsity=facts.target)

    rows = table(_profile_rows(profile, facts.numel))
    return section("Best profile, layer by layer", plot(folder, "profile", draw) + rows)


def _profile_rows(profile: CompressionProfile, numel: Mapping[str, int]) -> list[dict[str, object]]:
    layers: dict[int, dict[str, object]] = {}
    if profile.sparsity is not None and profile.sparsity.ratios:
        ratios = profile.sparsity.ratios
        stacks = mean_by_layer(ratios, numel or None)
        for layer, ratio in stacks[largest_stack(stacks, ratios)].items():
            layers.setdefault(layer, {})["sparsity"] = f"{100 * ratio:.2f} %"
    if profile.weight_bits:
        stacks = mean_by_layer(profile.weight_bits, numel or None)
        for layer, mean in stacks[largest_stack(stacks, profile.weight_bits)].items():
            layers.setdefault(layer, {})["weight bits"] = f"{mean:.4g}"
    cache = profile.kv_cache
    if cache is not None:
        pairs = cache.layer_bits(layer_count(profile, None, layers))
        for layer, (keys, values) in enumerate(pairs):
            layers.setdefault(layer, {}).update({"key bits": keys, "value bits": values})
    return [{"layer": layer, **cells} for layer, cells in sorted(layers.items())]


def _widths(facts: StudyFacts, folder: Path) -> str:
    if facts.narrowing is None or not facts.narrowing.lines:
        return ""
    lines = "".join(f"<p>{escape(line)}</p>" for line in facts.narrowing.lines)
    note = (
        f"The best profile against the same with narrower bits, on {facts.narrowing.windows} "
        f"windows of the evaluation data{_masks(facts)}."
    )
    return section("Whether its widths are needed", f'{lines}<p class="note">{note}</p>')


def _sensitivity(facts: StudyFacts, folder: Path) -> str:
    body = ""
    measured = measured_effects(facts)
    if measured:
        note = (
            "Measured before the search: change of the loss for 10 points more sparsity in one "
            "group alone."
        )
        image = plot(
            folder,
            "measured_sensitivity",
            lambda path: plot_sensitivity(measured, path, measure="loss"),
        )
        body += f'<p class="note">{note}</p>{image}'
    effects = sensitivity(facts)
    if effects:
        note = (
            f"From the trials: change of {facts.labels[0]} for 10 points more sparsity in one "
            "group, the others giving way; a linear fit to all trials, with its standard error. "
            "Below zero: prune more here."
        )
        image = plot(
            folder,
            "sensitivity",
            lambda path: plot_sensitivity(effects, path, measure=facts.labels[0]),
        )
        body += f'<p class="note">{escape(note)}</p>{image}'
    return section("Sensitivity", body) if body else ""


def _importance(facts: StudyFacts, folder: Path) -> str:
    shares = importance(facts)
    if not shares:
        return ""
    note = (
        "How much each choice decides which trials are among the best (PED-ANOVA on the profiles "
        "that were evaluated)."
    )
    image = plot(folder, "importance", lambda path: plot_importance(shares, path))
    return section("Importance of the choices", f'<p class="note">{note}</p>{image}')


def _front(facts: StudyFacts, folder: Path) -> str:
    cost = costs(facts)
    if cost is None:
        text = "Every profile meets one budget, so all take the same bytes: there is no trade-off."
        return section("Quality against size", f'<p class="note">{text}</p>')
    image = plot(
        folder,
        "pareto",
        lambda path: plot_front(cost.points, path, cost=cost.label, measure=facts.labels[0]),
    )
    return section("Quality against size", image)


def _stopping(facts: StudyFacts, folder: Path) -> str:
    saved = stopping(facts)
    if saved is None:
        return section("Early stopping", '<p class="note">No trial was stopped early.</p>')
    text = (
        f"Of {saved['stopped'] + saved['kept']} trials, {saved['stopped']} ended early, because a "
        "paired test on the batches seen so far said that their profile is worse than the best "
        f"one, and {saved['kept']} ran in full. {saved['batches']:,} of "
        f"{saved['of_batches']:,} batches were evaluated: {saved['saved_percent']:.0f} % saved."
    )
    return section("Early stopping", f"<p>{text}</p>")


def _time(facts: StudyFacts, folder: Path) -> str:
    full = sorted(row["seconds"] for row in facts.complete if row["seconds"] is not None)
    if not full:
        return ""
    every = sorted(row["seconds"] for row in facts.evaluated if row["seconds"] is not None)
    cells: dict[str, object] = {}
    if facts.seconds is not None:
        cells["wall-clock"] = duration(facts.seconds)
    if facts.workers is not None:
        cells["workers"] = facts.workers
    cells["all trials"] = duration(sum(every))
    cells["median trial"] = duration(every[len(every) // 2])
    cells["median trial in full"] = duration(full[len(full) // 2])
    return section("Time", table([cells]))


def _trials(facts: StudyFacts, folder: Path) -> str:
    rows = sorted(facts.complete, key=lambda row: row["value"])[:SHOWN_TRIALS]
    if not rows:
        return ""
    cells = [
        {
            "trial": f"{row['number']}{' (uniform)' if row['uniform'] else ''}",
            facts.labels[0]: f"{row['value']:#.5g}",
            "sparsity by group (%)": " ".join(
                f"{100 * ratio:.1f}" for ratio in row.get("block_ratios") or ()
            ),
            "seconds": format_value(row["seconds"], ".1f"),
        }
        for row in rows
    ]
    return section("Best trials", table(cells))


SECTIONS: tuple[Callable[[StudyFacts, Path], str], ...] = (
    _held_out,
    _history,
    _best,
    _widths,
    _sensitivity,
    _importance,
    _front,
    _stopping,
    _time,
    _trials,
)
"""In the order of the page; one that has nothing to say returns an empty text."""
