from __future__ import annotations

import math
import random

import pytest

from hf_adaptive_sparse.search.increase import increase_of, student_t


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),
    [(0.95, 15, 1.75305), (0.975, 15, 2.13145), (0.95, 5, 2.01505), (0.99, 30, 2.45726)],
)
def test_the_quantile_is_that_of_the_tables(probability, freedom, value):
    assert student_t(probability, freedom) == pytest.approx(value, rel=2e-3)


def test_every_token_counts_the_same():
    before = [(10.0, 10), (100.0, 100), (5.0, 5)]
    after = [(20.0, 10), (101.0, 100), (5.0, 5)]
    found = increase_of(before, after, 0.95)
    assert found.mean == pytest.approx(math.expm1(11 / 115))
    assert found.low < found.mean < found.high


def test_a_window_without_tokens_changes_nothing():
    before, after = [(1.0, 2), (3.0, 4), (2.0, 3)], [(1.5, 2), (3.1, 4), (2.2, 3)]
    with_empty = increase_of([*before, (0.0, 0)], [*after, (0.0, 0)], 0.95)
    assert with_empty == increase_of(before, after, 0.95)


def test_the_bound_holds_as_often_as_it_says():
    """Small samples of windows of two lengths."""
    draw = random.Random(0)
    missed = 0
    for _ in range(2000):
        tokens = [draw.choice([50, 100]) for _ in range(16)]
        before = [(3.0 * n, n) for n in tokens]
        after = [(loss + n * draw.gauss(0.01, 0.02), n) for loss, n in before]
        missed += increase_of(before, after, 0.95).high < math.expm1(0.01)
    assert 0.03 < missed / 2000 < 0.07


def test_a_loss_that_is_not_finite_is_an_infinite_increase():
    before = [(1.0, 1), (1.0, 1)]
    for loss in (math.nan, math.inf):
        assert increase_of(before, [(1.0, 1), (loss, 1)], 0.95).low == math.inf
    assert increase_of(before, [(9e3, 1), (9e3, 1)], 0.95).mean > 1e300  # no overflow


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ([(1.0, 1), (math.nan, 1)], "not finite"),
        ([(1.0, 1), (0.0, 0)], "two windows must score a token, got 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(before, message):
    with pytest.raises(ValueError, match=message):
        increase_of(before, before, 0.95)
