"""Costs of profiles, where a search lets them vary: bytes, or mean bits."""

from __future__ import annotations

from dataclasses import dataclass

from hf_adaptive_sparse.report.study_facts import Row, StudyFacts

_LIMITS = (
    ("fit_bytes", "weights and KV cache in memory (MB)"),
    ("size_bytes", "size on disk (MB)"),
)
"""Limits in bytes that a trial's row tells its profile's weight for."""

_MEANS = (("mean_kv_bits", "mean KV bits"), ("mean_weight_bits", "mean weight bits"))
"""Keys of a trial's row that stand for its size where it has no bytes."""


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
    found = {label: [_megabytes(row, limit) for row in rows] for limit, label in _LIMITS}
    found |= {label: [row.get(key) for row in rows] for key, label in _MEANS}
    for label, column in found.items():
        numbers = [float(cost) for cost in column if cost is not None]
        if len(numbers) == len(rows) > 1 and max(numbers) > (1 + 1e-3) * min(numbers):
            points = [(number, float(r["value"])) for number, r in zip(numbers, rows, strict=True)]
            return Costs(label, tuple(points))
    return None


def _megabytes(row: Row, limit: str) -> float | None:
    size = (row.get("bytes") or {}).get(limit)
    return None if size is None else size / 1e6
