"""Analyse the trials of a search: importance, sensitivity, early stopping, failures."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_adaptive_sparse.report.study_facts import Row, StudyFacts
from hf_adaptive_sparse.search.comparison import held_out_verdict
from hf_adaptive_sparse.search.storage import quiet_optuna

FEWEST_TRIALS = 10
"""Evaluated trials below which neither importance nor sensitivity is told."""

COLLAPSE = 1.2
"""A trial of this many times the uniform profile's value has lost its quality."""

LOW_BITS = 4


_CHOICES = ("block_ratios", "key_bits", "value_bits", "weight_bits")
_LABELS = {
    "block_ratios": "sparsity",
    "key_bits": "key bits",
    "value_bits": "value bits",
    "kv_bits": "KV bits",
    "weight_bits": "weight bits",
}


@dataclass(frozen=True)
class Effect:
    """How much the value changes where one group of layers is pruned more than the others.

    Attributes:
        label: The group.
        percent: Change of the value in percent for 10 points more sparsity there.
        error: Standard error of it.
    """

    label: str
    percent: float
    error: float


def choices(facts: StudyFacts) -> tuple[list[str], np.ndarray]:
    """Return what the trials chose, as evaluated: names, and one row per evaluated trial.

    A choice that all trials share is left out. Neighbouring layers that have the same weight bits
    in every trial, as those of a block have, are one choice.
    """
    rows = facts.evaluated
    drawn: dict[str, list[Any]] = {key: [row.get(key) for row in rows] for key in _CHOICES}
    if drawn["key_bits"] == drawn["value_bits"]:
        drawn["kv_bits"] = drawn.pop("value_bits")
        del drawn["key_bits"]
    names: list[str] = []
    columns: list[tuple[float, ...]] = []
    for key, lists in drawn.items():
        if not lists or not all(isinstance(one, Sequence) for one in lists):
            continue
        for first, last, column in _columns(lists, joined=key == "weight_bits"):
            if len(set(column)) > 1:
                where = _group(facts, first) if key == "block_ratios" else _layers(first, last)
                names.append(f"{_LABELS[key]}, {where}")
                columns.append(column)
    return names, np.array(columns, dtype=float).reshape(len(names), len(rows)).T


def _columns(
    lists: Sequence[Sequence[float]], *, joined: bool
) -> Iterator[tuple[int, int, tuple[float, ...]]]:
    """Yield what the trials chose at each place: first and last place, and the choices.

    Args:
        lists: Choices of each trial.
        joined: Whether neighbouring places with the same choices are one.
    """
    places = enumerate(zip(*lists, strict=True))
    for _, group in itertools.groupby(places, lambda one: one[1] if joined else one[0]):
        (first, column), *others = group
        yield first, others[-1][0] if others else first, column


def values(facts: StudyFacts) -> np.ndarray:
    """Return the value of each evaluated trial, estimated where it was stopped early."""
    rows = facts.evaluated
    return np.array([r["estimate"] if r["value"] is None else r["value"] for r in rows], float)


def _group(facts: StudyFacts, place: int) -> str:
    if place >= len(facts.spans):
        return f"group {place}"
    where = _layers(*facts.spans[place])
    same = [i for i, span in enumerate(facts.spans) if span == facts.spans[place]]
    return where if len(same) == 1 else f"{where}, part {same.index(place) + 1}"


def _layers(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first}–{last}"


def importance(facts: StudyFacts) -> list[tuple[str, float]]:
    """Return how much each choice decides which trials are among the best, largest first.

    Optuna's PED-ANOVA on the profiles as they were evaluated, not as they were sampled; the shares
    add up to 1. Empty where there are too few trials.
    """
    names, matrix = choices(facts)
    targets = values(facts)
    if len(targets) < FEWEST_TRIALS or len(names) < 2 or np.ptp(targets) == 0:
        return []
    import optuna

    spans = [(float(column.min()), float(column.max())) for column in matrix.T]
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(*span)
        for name, span in zip(names, spans, strict=True)
    }
    with quiet_optuna(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study()
        study.add_trials(
            [
                optuna.create_trial(
                    params=dict(zip(names, map(float, row), strict=True)),
                    distributions=distributions,
                    value=float(value),
                )
                for row, value in zip(matrix, targets, strict=True)
            ]
        )
        quantile = max(0.2, 5 / len(targets))
        shares = optuna.importance.get_param_importances(
            study,
            evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile),
        )
    return [(name, float(share)) for name, share in shares.items()]


def sensitivity(facts: StudyFacts) -> list[Effect]:
    """Return what pruning one group more, and the others less, does to the value.

    A linear fit to the logarithm of the values, with a little ridge because ratios under one budget
    are not independent. Empty where there are fewer trials than it needs.
    """
    rows = facts.evaluated
    ratios = [row.get("block_ratios") for row in rows]
    if not rows or not all(ratios):
        return []
    matrix, targets = np.array(ratios, float), values(facts)
    fewest = max(FEWEST_TRIALS, matrix.shape[1] + 4)
    if matrix.shape[1] < 2 or len(rows) < fewest or np.ptp(matrix, axis=0).max() == 0:
        return []
    if not (np.isfinite(targets) & (targets > 0)).all():
        return []
    centred = (matrix - matrix.mean(0)) * 10  # one unit is 10 points of sparsity
    response = 100 * (np.log(targets) - np.log(targets).mean())
    gram = centred.T @ centred
    ridge = 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
    inverse = np.linalg.inv(gram + ridge)
    slopes = inverse @ centred.T @ response
    residual = response - centred @ slopes
    variance = float(residual @ residual) / max(1, len(rows) - len(slopes) - 1)
    errors = np.sqrt(np.diag(inverse @ gram @ inverse) * variance)
    return [
        Effect(_group(facts, place), float(slope), float(error))
        for place, (slope, error) in enumerate(zip(slopes, errors, strict=True))
    ]


def measured_effects(facts: StudyFacts) -> list[Effect]:
    """Return the sensitivity that was measured before the search, one group at a time.

    In percent for 10 points more sparsity; empty where the study does not hold it, or where it was
    begun by a version that measured a group at the target again.
    """
    found = facts.measured
    if found is None or found["high"] == found["target"]:
        return []
    unit = 0.1 / (found["high"] - found["target"])
    return [
        Effect(_readable(label), 100 * unit * change, 0.0)
        for label, change in zip(found["labels"], found["at_high"], strict=True)
    ]


def _readable(label: str) -> str:
    return label.replace("_", " ")


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other is better than in both coordinates."""
    order = sorted(range(len(points)), key=lambda index: points[index])
    kept: list[int] = []
    for index in order:
        if not kept or points[index][1] < points[kept[-1]][1]:
            kept.append(index)
    return kept


def stopping(facts: StudyFacts) -> dict[str, Any] | None:
    """Return what stopping early saved; ``None`` where no trial was stopped."""
    rows = [row for row in facts.evaluated if row.get("batches")]
    stopped = [row for row in rows if row["value"] is None]
    if not stopped:
        return None
    whole = max(row["batches"] for row in rows)
    done = sum(row["batches"] for row in rows)
    return {
        "stopped": len(stopped),
        "kept": len(rows) - len(stopped),
        "batches": done,
        "of_batches": whole * len(rows),
        "saved_percent": 100 * (1 - done / (whole * len(rows))),
    }


def failure_signs(facts: StudyFacts) -> list[str]:
    """Return warnings for the reader, one sentence each."""
    signs = []
    best, uniform = facts.best, facts.uniform
    if best is None:
        signs.append("No trial was evaluated in full, so there is no best profile.")
    elif best["uniform"]:
        signs.append("The search found nothing better than the uniform profile.")
    elif _nearly_uniform(best, facts):
        signs.append(
            "The best profile has collapsed to uniform: no ratio lies further from the target than "
            "half a step. Use more trials, a wider range, or more evaluation data."
        )
    if uniform is None and facts.evaluated:
        signs.append("The uniform profile's trial did not succeed: there is no baseline.")
    signs += _low_bits(facts)
    signs += _failures(facts)
    held = facts.held_out
    if held is not None and best is not None and not best["uniform"]:
        verdict = held_out_verdict(held)
        signs += [verdict] if verdict else []
    return signs


def _nearly_uniform(best: Row, facts: StudyFacts) -> bool:
    ratios, target, space = best.get("block_ratios"), facts.target, facts.space
    if not ratios or target is None or not space.get("sparsity_range"):
        return False
    bits = best.get("key_bits")
    if bits and len(set(bits)) > 1:
        return False
    furthest: float = max(abs(ratio - target) for ratio in ratios)
    return furthest <= float(space.get("step", 0.0)) / 2


def _low_bits(facts: StudyFacts) -> list[str]:
    uniform = facts.uniform
    if uniform is None or not uniform["value"]:
        return []
    lost: dict[int, int] = {}
    for row in facts.evaluated:
        value = row["estimate"] if row["value"] is None else row["value"]
        bits = [*(row.get("key_bits") or ()), *(row.get("value_bits") or ())]
        if bits and min(bits) <= LOW_BITS and value > COLLAPSE * uniform["value"]:
            lost[min(bits)] = lost.get(min(bits), 0) + 1
    return [
        f"Quality collapses at low KV bits: with {bits} bits in the narrowest layer, {count} of "
        f"{len(facts.evaluated)} trials came out more than {COLLAPSE:g} times as bad as uniform. "
        f"Leave {bits} out of the palette."
        for bits, count in sorted(lost.items())
    ]


def _failures(facts: StudyFacts) -> list[str]:
    reasons = [str(row["failure"]).lower() for row in facts.failed]
    endless = sum(any(word in r for word in ("finite", "nan", "is inf")) for r in reasons)
    memory = sum("memory" in reason for reason in reasons)
    signs = []
    if endless:
        signs.append(
            f"{endless} of {len(facts.rows)} trials had scores that are not finite. Evaluate in a "
            "wider dtype, or leave the narrowest bits out."
        )
    if memory:
        signs.append(
            f"{memory} of {len(facts.rows)} trials ran out of memory and were passed over."
        )
    others = len(reasons) - endless - memory
    if others > 0:
        signs.append(f"{others} of {len(facts.rows)} trials failed for other reasons.")
    return signs
