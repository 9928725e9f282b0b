"""The report of a study: one HTML page that needs nothing else, and its plots as PNG files."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from hf_adaptive_sparse.files import replacing
from hf_adaptive_sparse.naming import expanded
from hf_adaptive_sparse.report.markup import duration
from hf_adaptive_sparse.report.study_analysis import failure_signs
from hf_adaptive_sparse.report.study_facts import StudyFacts
from hf_adaptive_sparse.report.study_mark import PAGE, study_mark
from hf_adaptive_sparse.report.study_sections import SECTIONS
from hf_adaptive_sparse.report.tables import format_bytes

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
    top = [_head(facts), *map(_warning, failure_signs(facts)), _figures(facts)]
    folder = expanded(directory)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        *top,
        *(section(facts, folder) for section in SECTIONS),
        _foot(facts),
    ]
    page = folder / PAGE
    title = escape(f"Search {facts.name}")
    with replacing(page) as partial:
        partial.write_text(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"{study_mark(facts)}<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n"
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
    if facts.prunes:
        parts.append(f"ranked by {facts.metric}")
    return f"<h1>{escape(facts.name)}</h1>\n<p class=note>{escape('; '.join(parts))}</p>"


def _warning(text: str) -> str:
    return f'<div class="warning">{escape(text)}</div>'


def _figures(facts: StudyFacts) -> str:
    best, uniform = facts.best, facts.uniform
    entries: list[tuple[str, str]] = []
    if best is not None:
        entries.append((f"{best['value']:#.5g}", f"best {facts.labels[0]}, trial {best['number']}"))
    if uniform is not None:
        entries.append((f"{uniform['value']:#.5g}", "uniform profile"))
        if best is not None and uniform["value"]:
            change = 100 * (best["value"] / uniform["value"] - 1)
            entries.append((f"{change:+.2f} %", "best against uniform, searched data"))
    if facts.held_out is not None:
        entries.append((f"{facts.held_out['change_percent']:+.2f} %", "on held-out data"))
    entries.append((str(len(facts.evaluated) + len(facts.failed)), "profiles tried"))
    if facts.seconds is not None:
        entries.append((duration(facts.seconds), "wall-clock"))
    boxes = "".join(
        f'<div class="figure"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in entries
    )
    return f'<div class="figures">{boxes}</div>'


def _foot(facts: StudyFacts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    counts = {"failed": len(facts.failed), "all": len(facts.rows)}
    return (
        f'<p class="note">{counts["all"]} trials in the study, {counts["failed"]} failed; repeated '
        f"profiles count once. {escape(versions)}</p>"
    )
