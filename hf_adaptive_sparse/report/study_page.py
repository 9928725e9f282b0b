"""The report of a study: one HTML page that needs nothing else, and its plots as PNG files."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hf_adaptive_sparse.profiles import CompressionProfile
from hf_adaptive_sparse.report.files import replacing
from hf_adaptive_sparse.report.layers import largest_stack, mean_by_layer
from hf_adaptive_sparse.report.plots import plot_profile
from hf_adaptive_sparse.report.study_analysis import (
    failure_signs,
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
from hf_adaptive_sparse.report.tables import format_bytes, format_value

PAGE = "report.html"

SHOWN_TRIALS = 15

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; } .note { color: #57606a; font-size: .9rem; }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.figure { border: 1px solid #d0d7de; border-radius: 8px; padding: .6rem 1rem; min-width: 9rem; }
.figure b { display: block; font-size: 1.35rem; font-weight: 600; }
.figure span { color: #57606a; font-size: .85rem; }
.warning { border-left: 4px solid #d55e00; background: #fff5ee; padding: .5rem .9rem;
  margin: .5rem 0; }
img { max-width: 100%; height: auto; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #d8dee4; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
"""


def write_study_report(facts: StudyFacts, directory: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` and its plots into a folder.

    Args:
        facts: The study, from `read_study`.
        directory: Folder; made if it does not exist. Former files of the same names are replaced.

    Returns:
        The page.

    Raises:
        ValueError: If no trial has been evaluated yet.
        OSError: If the folder cannot be written.
    """
    if not facts.evaluated and not facts.failed:
        raise ValueError(
            f"The study {facts.name!r} has no finished trial yet; there is nothing to report."
        )
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    sections = (_held_out, _history, _best, _sensitivity, _importance, _front, _stopping, _time)
    parts = [
        _head(facts),
        *map(_warning, failure_signs(facts)),
        _figures(facts),
        *(section(facts, folder) for section in (*sections, _trials)),
        _foot(facts),
    ]
    page = folder / PAGE
    title = escape(f"Search {facts.name}")
    with replacing(page) as partial:
        partial.write_text(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(part for part in parts if part)
            + "\n</body></html>\n",
            encoding="utf-8",
        )
    return page


def _head(facts: StudyFacts) -> str:
    space, parts = facts.space, []
    if facts.target is not None:
        parts.append(f"{100 * facts.target:.4g} % of the weights removed")
    for key, label in (("kv_bits", "KV bits"), ("weight_bits", "weight bits")):
        if space.get(key):
            parts.append(f"{label} from {', '.join(map(str, space[key]))}")
    for key, label in (("fit_bytes", "in memory"), ("size_bytes", "on disk")):
        if space.get(key):
            parts.append(f"at most {format_bytes(space[key])} {label}")
    if space.get("target_sparsity"):
        parts.append(f"ranked by {facts.metric}")
    return f"<h1>{escape(facts.name)}</h1>\n<p class=note>{escape('; '.join(parts))}</p>"


def _warning(text: str) -> str:
    return f'<div class="warning">{escape(text)}</div>'


def _figures(facts: StudyFacts) -> str:
    best, uniform = facts.best, facts.uniform
    entries: list[tuple[str, str]] = []
    if best is not None:
        entries.append((f"{best['value']:.5g}", f"best {facts.labels[0]}, trial {best['number']}"))
    if uniform is not None:
        entries.append((f"{uniform['value']:.5g}", "uniform profile"))
        if best is not None:
            change = 100 * (best["value"] / uniform["value"] - 1)
            entries.append((f"{change:+.2f} %", "best against uniform, searched data"))
    if facts.held_out is not None:
        entries.append((f"{facts.held_out['change_percent']:+.2f} %", "on held-out data"))
    entries.append((str(len(facts.evaluated) + len(facts.failed)), "profiles tried"))
    if facts.seconds is not None:
        entries.append((_duration(facts.seconds), "wall-clock"))
    boxes = "".join(
        f'<div class="figure"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in entries
    )
    return f'<div class="figures">{boxes}</div>'


def _held_out(facts: StudyFacts, folder: Path) -> str:
    held = facts.held_out
    if held is None:
        text = (
            "The study holds no comparison on data that the search did not see. The command line's "
            "<code>search</code> and <code>compress</code> make one; in Python, pass "
            "<code>held_out=</code> to <code>search()</code>."
        )
        return _section("Against uniform, on held-out data", f'<p class="note">{text}</p>')
    text = (
        f"Perplexity {held['best_perplexity']:.5g} (trial {held['trial']}) against "
        f"{held['uniform_perplexity']:.5g} (uniform): <b>{held['change_percent']:+.2f} %</b>, "
        f"{100 * held['confidence']:.0f} % interval {held['low_percent']:+.2f} to "
        f"{held['high_percent']:+.2f} % (paired bootstrap over {held['windows']} windows, "
        f"{held['tokens']:,} tokens), with the one-shot masks of the search."
    )
    return _section("Against uniform, on held-out data", f"<p>{text}</p>")


def _history(facts: StudyFacts, folder: Path) -> str:
    if not facts.complete:
        return ""
    return _section("History", _plot(folder, "history", lambda path: plot_history(facts, path)))


def _best(facts: StudyFacts, folder: Path) -> str:
    if facts.profile is None:
        return ""
    profile = CompressionProfile.from_dict(dict(facts.profile))
    numel = facts.numel or None

    def draw(path: Path) -> None:
        plot_profile(profile, path, numel=numel, target_sparsity=facts.target)

    table = _table(_profile_rows(profile, facts.numel))
    return _section("Best profile, layer by layer", _plot(folder, "profile", draw) + table)


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
        for label, bits in (("key bits", cache.key_bits), ("value bits", cache.value_bits)):
            per_layer = bits if isinstance(bits, Sequence) else [bits] * len(layers)
            for layer, width in enumerate(per_layer):
                layers.setdefault(layer, {})[label] = width
    return [{"layer": layer, **cells} for layer, cells in sorted(layers.items())]


def _sensitivity(facts: StudyFacts, folder: Path) -> str:
    body = ""
    measured = measured_effects(facts)
    if measured:
        note = (
            "Measured before the search: change of the loss for 10 points more sparsity in one "
            "group alone."
        )
        plot = _plot(
            folder,
            "measured_sensitivity",
            lambda path: plot_sensitivity(measured, path, measure="loss"),
        )
        body += f'<p class="note">{note}</p>{plot}'
    effects = sensitivity(facts)
    if effects:
        note = (
            f"From the trials: change of {facts.labels[0]} for 10 points more sparsity in one "
            "group, the others giving way; a linear fit to all trials, with its standard error. "
            "Below zero: prune more here."
        )
        plot = _plot(
            folder,
            "sensitivity",
            lambda path: plot_sensitivity(effects, path, measure=facts.labels[0]),
        )
        body += f'<p class="note">{escape(note)}</p>{plot}'
    return _section("Sensitivity", body) if body else ""


def _importance(facts: StudyFacts, folder: Path) -> str:
    shares = importance(facts)
    if not shares:
        return ""
    note = (
        "How much each choice decides which trials are among the best (PED-ANOVA on the profiles "
        "that were evaluated)."
    )
    plot = _plot(folder, "importance", lambda path: plot_importance(shares, path))
    return _section("Importance of the choices", f'<p class="note">{note}</p>{plot}')


def _front(facts: StudyFacts, folder: Path) -> str:
    cost = costs(facts)
    if cost is None:
        text = "Every profile meets one budget, so all take the same bytes: there is no trade-off."
        return _section("Quality against size", f'<p class="note">{text}</p>')
    plot = _plot(
        folder,
        "pareto",
        lambda path: plot_front(cost.points, path, cost=cost.label, measure=facts.labels[0]),
    )
    return _section("Quality against size", plot)


def _stopping(facts: StudyFacts, folder: Path) -> str:
    saved = stopping(facts)
    if saved is None:
        return _section("Early stopping", '<p class="note">No trial was stopped early.</p>')
    text = (
        f"{saved['stopped']} of {saved['stopped'] + saved['kept']} trials were stopped, as a "
        "paired test on the batches seen so far said that they are worse than the best one; "
        f"{saved['kept']} were kept and evaluated in full. {saved['batches']:,} of "
        f"{saved['of_batches']:,} batches were evaluated: {saved['saved_percent']:.0f} % saved."
    )
    return _section("Early stopping", f"<p>{text}</p>")


def _time(facts: StudyFacts, folder: Path) -> str:
    full = sorted(row["seconds"] for row in facts.complete if row["seconds"] is not None)
    if not full:
        return ""
    every = sorted(row["seconds"] for row in facts.evaluated if row["seconds"] is not None)
    cells: dict[str, object] = {}
    if facts.seconds is not None:
        cells["wall-clock"] = _duration(facts.seconds)
    if facts.workers is not None:
        cells["workers"] = facts.workers
    cells["all trials"] = _duration(sum(every))
    cells["median trial"] = _duration(every[len(every) // 2])
    cells["median trial in full"] = _duration(full[len(full) // 2])
    return _section("Time", _table([cells]))


def _trials(facts: StudyFacts, folder: Path) -> str:
    rows = sorted(facts.complete, key=lambda row: row["value"])[:SHOWN_TRIALS]
    if not rows:
        return ""
    cells = [
        {
            "trial": f"{row['number']}{' (uniform)' if row['uniform'] else ''}",
            facts.labels[0]: f"{row['value']:.5g}",
            "sparsity by group (%)": " ".join(
                f"{100 * ratio:.1f}" for ratio in row.get("block_ratios") or ()
            ),
            "seconds": format_value(row["seconds"], ".1f"),
        }
        for row in rows
    ]
    return _section("Best trials", _table(cells))


def _foot(facts: StudyFacts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    counts = {"failed": len(facts.failed), "all": len(facts.rows)}
    return (
        f'<p class="note">{counts["all"]} trials in the study, {counts["failed"]} failed; repeated '
        f"profiles count once. {escape(versions)}</p>"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}"


def _plot(folder: Path, name: str, draw: Callable[[Path], None]) -> str:
    path = folder / f"{name}.png"
    draw(path)
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join(
        "<tr>"
        + "".join(f"<td>{escape(format_value(row.get(column)))}</td>" for column in columns)
        + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><tr>{head}</tr>\n{body}</table></div>'


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.3g} min"
    return f"{minutes / 60:.3g} h"
