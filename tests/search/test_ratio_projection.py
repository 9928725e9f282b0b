from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.search.ratio_projection import project_ratios, removal_counts

LOW, HIGH = Fraction(45, 100), Fraction(55, 100)
GRID = [0.45, 0.475, 0.5, 0.525, 0.55]


@st.composite
def sampled_blocks(draw):
    count = draw(st.integers(1, 12))
    ratios = draw(st.lists(st.sampled_from(GRID), min_size=count, max_size=count))
    weights = draw(st.lists(st.integers(1, 10**9), min_size=count, max_size=count))
    return ratios, weights


def mean(ratios, weights):
    return sum(r * w for r, w in zip(ratios, weights, strict=True)) / sum(weights)


@given(sampled_blocks())
def test_the_budget_is_held_exactly_and_the_range_is_respected(blocks):
    ratios, weights = blocks
    projected = project_ratios(ratios, weights, 0.5, 0.45, 0.55)
    assert mean(projected, weights) == Fraction(1, 2)
    assert all(LOW <= ratio <= HIGH for ratio in projected)


@given(sampled_blocks())
def test_projecting_twice_changes_nothing(blocks):
    ratios, weights = blocks
    once = project_ratios(ratios, weights, 0.5, 0.45, 0.55)
    assert project_ratios(once, weights, 0.5, 0.45, 0.55) == once


@given(sampled_blocks())
def test_order_of_the_blocks_survives(blocks):
    ratios, weights = blocks
    projected = project_ratios(ratios, weights, 0.5, 0.45, 0.55)
    for i, a in enumerate(ratios):
        for j, b in enumerate(ratios):
            if a <= b:
                assert projected[i] <= projected[j]


@given(sampled_blocks())
def test_it_is_the_nearest_profile_on_the_budget(blocks):
    """Optimality (KKT): every block inside the range moved alike; at a bound, no further."""
    ratios, weights = blocks
    projected = project_ratios(ratios, weights, 0.5, 0.45, 0.55)
    moves = [p - Fraction(repr(r)) for p, r in zip(projected, ratios, strict=True)]
    inside = {m for m, p in zip(moves, projected, strict=True) if LOW < p < HIGH}
    assert len(inside) <= 1
    for shift in inside:
        for move, value in zip(moves, projected, strict=True):
            if value == LOW:
                assert move >= shift
            if value == HIGH:
                assert move <= shift


@pytest.mark.parametrize("ratio", GRID)
def test_any_uniform_sample_becomes_the_uniform_target(ratio):
    assert project_ratios([ratio] * 3, [5, 70, 11], 0.5, 0.45, 0.55) == [Fraction(1, 2)] * 3


def test_clipped_blocks_leave_the_rest_to_the_others():
    projected = project_ratios([0.55, 0.55, 0.45], [1, 1, 8], 0.5, 0.45, 0.55)
    assert [float(r) for r in projected] == [0.55, 0.55, 0.4875]


def test_a_range_of_one_point_is_the_target():
    assert project_ratios([0.5, 0.5], [3, 4], 0.5, 0.5, 0.5) == [Fraction(1, 2)] * 2


def test_a_target_outside_the_range_is_refused():
    with pytest.raises(ValueError, match=r"0\.7 is outside \[0\.45, 0\.55\]"):
        project_ratios([0.5], [10], 0.7, 0.45, 0.55)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 ratios were given for 3 blocks"):
        project_ratios([0.5, 0.5], [1, 2, 3], 0.5, 0.45, 0.55)
    with pytest.raises(ValueError, match="0 ratios were given"):
        project_ratios([], [], 0.5, 0.45, 0.55)


@settings(max_examples=200)
@given(sampled_blocks(), st.data())
def test_whole_weights_sum_to_the_rounded_target(blocks, data):
    ratios, _ = blocks
    numels = [data.draw(st.integers(10, 10**7)) for _ in ratios]
    projected = project_ratios(ratios, numels, 0.5, 0.45, 0.55)
    counts = removal_counts(projected, numels)
    assert sum(counts) == round(sum(numels) * 0.5)
    for count, ratio, numel in zip(counts, projected, numels, strict=True):
        assert abs(count - ratio * numel) < 1
        # What a linear is pruned by is count / numel, which must give the count back.
        assert round(count / numel * numel) == count


def test_left_over_weights_go_to_the_largest_remainders_earlier_first():
    assert removal_counts([0.5, 0.5, 0.5, 0.5], [3, 3, 4, 5]) == [2, 2, 2, 2]
    assert removal_counts([0.25, 0.25], [7, 9]) == [2, 2]


def test_a_tiny_linear_keeps_a_weight_if_another_can_lose_it():
    assert removal_counts([0.95, 0.95], [10, 30]) == [9, 29]
    assert removal_counts([0.99, 0.97], [64, 100]) == [63, 97]
    assert removal_counts([0.5, 0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1, 9]) == [0, 0, 0, 0, 6]
    assert removal_counts([0.9], [3]) == [3]
