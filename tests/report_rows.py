"""Made-up studies for the tests of their report."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_adaptive_sparse.report.study_facts import StudyFacts

SPANS = ((0, 1), (2, 2), (3, 3), (4, 5))


def row(number: int, value: float | None = None, **changes: Any) -> dict[str, Any]:
    """Return one trial as a history has it."""
    return {
        "number": number,
        "state": "complete",
        "value": value,
        "estimate": None,
        "batches": 8,
        "uniform": False,
        "duplicate_of": None,
        "failure": None,
        "withdrawn": False,
        "retry_of": None,
        "seconds": 2.0,
        "block_ratios": [0.5, 0.5, 0.5, 0.5],
        "key_bits": [8] * 6,
        "value_bits": [6] * 6,
        "mean_sparsity": 0.5,
        "mean_kv_bits": 7.0,
    } | changes


def facts(rows: list[dict[str, Any]], **changes: Any) -> StudyFacts:
    """Return a study of these trials."""
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(6)]
    settings: dict[str, Any] = {
        "name": "study <1>",
        "space": {"target_sparsity": 0.5, "sparsity_range": 0.05, "step": 0.025, "kv_bits": [6, 8]},
        "metric": "lognorm",
        "spans": SPANS,
        "rows": tuple(rows),
        "profile": {
            "format_version": 1,
            "sparsity": dict.fromkeys(names, 0.5),
            "kv_cache": {"key_bits": [8] * 6, "value_bits": [6] * 6},
        },
        "numel": dict.fromkeys(names, 100),
        "labels": ("perplexity",),
        "measured": None,
        "held_out": None,
        "narrowing": None,
        "workers": 2,
        "seconds": 300.0,
        "versions": {"torch": "2"},
    }
    return StudyFacts(**(settings | changes))


def linear_rows(count: int = 40, stopped: int = 0) -> list[dict[str, Any]]:
    """Trials in which only the second group's ratio matters: 2 % for 10 points; uniform first."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        drawn = generator.uniform(-0.05, 0.05, 4) * (number > 0)
        ratios = 0.5 + drawn - drawn.mean()
        value = float(100 * np.exp(0.2 * (ratios[1] - 0.5)))
        made = row(number, value, block_ratios=[float(r) for r in ratios], uniform=number == 0)
        if 0 < number <= stopped:
            made |= {"state": "pruned", "value": None, "estimate": value, "batches": 4}
        rows.append(made)
    return rows
