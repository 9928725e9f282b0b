"""What profiles cost where a search lets that vary: bytes, or mean bits."""

from __future__ import annotations

from dataclasses import dataclass

from hf_adaptive_sparse.report.study_facts import StudyFacts

_COSTS = (
    ("total_bytes", "bytes in memory (MB)", 1e-6),
    ("size_bytes", "bytes (MB)", 1e-6),
    ("kv_bytes", "bytes of the KV cache (MB)", 1e-6),
    ("mean_kv_bits", "mean KV bits", 1.0),
)
"""Keys of a trial's row that are costs: the first that varies is shown."""


@dataclass(frozen=True)
class Costs:
    """A cost of each complete trial.

    Attributes:
        label: What it is, with its unit.
        points: ``(cost, value)`` per trial.
    """

    label: str
    points: tuple[tuple[float, float], ...]


def costs(facts: StudyFacts) -> Costs | None:
    """Return what the complete trials cost; ``None`` where all cost the same."""
    rows = facts.complete
    if len(facts.labels) > 1 and len(rows) > 1:
        points = [(float(row["values"][1]), float(row["value"])) for row in rows]
        return Costs(facts.labels[1], tuple(points))
    for key, label, unit in _COSTS:
        found = [row.get(key) for row in rows]
        numbers = [float(cost) for cost in found if cost is not None]
        if len(numbers) == len(rows) > 1 and max(numbers) > (1 + 1e-3) * min(numbers):
            points = [(unit * n, float(r["value"])) for n, r in zip(numbers, rows, strict=True)]
            return Costs(label, tuple(points))
    return None
