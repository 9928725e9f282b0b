"""Scores against an evaluation of the formulas written out weight by weight."""

from __future__ import annotations

import math

import pytest
import torch

from hf_adaptive_sparse.pruning.method import PruningMethod
from hf_adaptive_sparse.pruning.metrics import (
    METRICS,
    Magnitude,
    Metric,
    SolvedMetric,
    check_scores,
    get_metric,
    register_metric,
    score_stacked,
)
from hf_adaptive_sparse.pruning.patterns import parse_pattern
from hf_adaptive_sparse.pruning.ranking import mask_from_scores

SHAPES = [(1, 1), (3, 7), (16, 16), (33, 65), (40, 257)]
SCORED = sorted(name for name, metric in METRICS.items() if not metric.updates_weights)


def sample(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight, torch.rand(shape[1], generator=generator) * 10


def by_hand(name: str, w: list[list[float]], x: list[float]) -> list[list[float]]:
    """The formulas of the papers in Python's own float64, one weight at a time."""
    rows, columns = range(len(w)), range(len(w[0]))
    row2 = [math.sqrt(sum(v * v for v in w[i])) for i in rows]
    col2 = [math.sqrt(sum(w[i][j] ** 2 for i in rows)) for j in columns]
    row1 = [sum(abs(v) for v in w[i]) for i in rows]
    col1 = [sum(abs(w[i][j]) for i in rows) for j in columns]

    def score(i: int, j: int) -> float:
        a = abs(w[i][j])
        if name == "magnitude":
            return a
        if name == "wanda":
            return a * x[j]
        if a == 0:
            return 0.0
        if name == "ria":
            return (a / row1[i] + a / col1[j]) * math.sqrt(x[j])
        assert name == "lognorm"
        return math.log(1 + a / row2[i] + a / col2[j]) * math.sqrt(x[j])

    return [[score(i, j) for j in columns] for i in rows]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCORED)
def test_scores_equal_the_formula(name, shape):
    weight, norm = sample(shape)
    scores = get_metric(name).score(weight, norm)
    assert scores.dtype == torch.float32
    expected = torch.tensor(by_hand(name, weight.tolist(), norm.tolist()))
    torch.testing.assert_close(scores, expected, rtol=2e-5, atol=5e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (700, 1999)])
def test_lognorm_masks_equal_the_float32_formula_element_for_element(shape, dtype):
    weight, norm = sample(shape, seed=3)
    weight = weight.to(dtype)
    w = weight.float().abs()
    formula = torch.log(1 + w / w.norm(dim=1, keepdim=True) + w / w.norm(dim=0)) * norm.sqrt()
    scores = get_metric("lognorm").score(weight, norm)
    assert torch.equal(scores, formula)
    expected = torch.zeros_like(w, dtype=torch.bool)
    lowest = formula.argsort(dim=1, stable=True)[:, : shape[1] // 2]
    expected.scatter_(1, lowest, True)
    ratio = (shape[1] // 2) / shape[1]
    assert torch.equal(mask_from_scores(scores, ratio), expected)


@pytest.mark.parametrize("name", SCORED)
def test_zero_rows_and_columns_score_zero(name):
    weight, norm = sample((6, 9))
    weight[2], weight[:, 4] = 0, 0
    scores = get_metric(name).score(weight, norm)
    assert scores.isfinite().all()
    assert (scores[2] == 0).all()
    assert (scores[:, 4] == 0).all()
    assert (scores[3, :4] > 0).all()
    assert (get_metric(name).score(torch.zeros(3, 4), torch.ones(4)) == 0).all()


@pytest.mark.parametrize("name", SCORED)
def test_the_weight_is_not_modified(name):
    for dtype in (torch.float32, torch.bfloat16):
        weight, norm = sample((5, 8))
        weight = weight.to(dtype)
        before = weight.clone()
        get_metric(name).score(weight, norm)
        assert torch.equal(weight, before)


@pytest.mark.parametrize("name", [n for n in SCORED if METRICS[n].needs_calibration])
def test_missing_or_misshapen_norms(name):
    with pytest.raises(ValueError, match="needs the norms of the inputs"):
        get_metric(name).score(torch.ones(2, 3), None)
    with pytest.raises(ValueError, match=r"shape \(3,\); got \(4,\)"):
        get_metric(name).score(torch.ones(2, 3), torch.ones(4))


def test_registry():
    assert set(METRICS) >= {"lognorm", "wanda", "ria", "magnitude", "sparsegpt"}
    with pytest.raises(ValueError, match=r"lognorm, magnitude.*got 'lognrm'"):
        get_metric("lognrm")
    with pytest.raises(ValueError, match="'magnitude' is already registered"):
        register_metric(type("Second", (Magnitude,), {}))
    assert METRICS["magnitude"] is Magnitude


def test_a_metric_of_no_known_kind_is_refused():
    unknown = type("Unknown", (Metric,), {"name": "unknown", "score": Magnitude.score})
    with pytest.raises(TypeError, match=r"ScoringMetric.*SolvedMetric.*; Unknown does not"):
        register_metric(unknown)
    assert "unknown" not in METRICS


def test_a_solved_metric_without_a_solver_is_refused(monkeypatch):
    unsolved = type("Unsolved", (SolvedMetric,), {"name": "unsolved"})
    monkeypatch.setitem(METRICS, "unsolved", unsolved)
    with pytest.raises(ValueError, match=r"'unsolved' has none\. Add it to .*SOLVERS"):
        PruningMethod.of("unsolved")


def test_sparsegpt_has_no_scores():
    with pytest.raises(ValueError, match=rf"cannot rank weights.*{', '.join(SCORED)}"):
        check_scores(get_metric("sparsegpt"))


def test_patterns():
    assert str(parse_pattern("unstructured")) == "unstructured"
    pattern = parse_pattern("2:4")
    assert (pattern.kept, pattern.group, pattern.ratio, str(pattern)) == (2, 4, 0.5, "2:4")
    assert parse_pattern(pattern) is pattern
    assert pattern.removal_count(rows=3, columns=10) == 3 * (2 + 2 + 1)
    assert parse_pattern("1:4").removal_count(rows=2, columns=7) == 2 * (3 + 2)
    for bad in ("4:2", "2:2", "0:4", "2-4", "", "2:4:8", "-1:4", None):
        with pytest.raises(ValueError, match=r"'n:m' with 0 < n < m"):
            parse_pattern(bad)
    with pytest.raises(ValueError, match=r"keeps 2 of every 4.*fixes the ratio at 0\.5.*0\.6"):
        pattern.check(0.6, "target_sparsity")
    assert pattern.check(0.0, "x") == 0.0
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        pattern.check(1.0, "target_sparsity")


@pytest.mark.parametrize("name", ["lognorm", "ria", "wanda", "magnitude"])
def test_stacked_matrices_are_scored_each_by_itself(name) -> None:
    torch.manual_seed(0)
    metric = get_metric(name)
    parts = [torch.randn(6, 8), 20 * torch.randn(3, 8), torch.randn(2, 8)]
    norm = torch.rand(8)
    found = score_stacked(metric, torch.cat(parts), norm, [6, 3, 2])
    assert torch.equal(found, torch.cat([metric.score(part, norm) for part in parts]))
    whole = metric.score(torch.cat(parts), norm)
    assert torch.equal(whole, found) == (name in ("wanda", "magnitude"))
