from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.search.bit_allocation import BitAllocation

palettes = st.lists(st.sampled_from((2, 3, 4, 6, 8, 16)), min_size=1, max_size=4, unique=True).map(
    lambda widths: tuple(sorted(widths))
)


def mean(bits, sizes):
    return Fraction(sum(b * s for b, s in zip(bits, sizes, strict=True)), sum(sizes))


@st.composite
def reachable(draw, most_units=40):
    sizes = tuple(draw(st.lists(st.sampled_from((64, 128, 192)), min_size=1, max_size=most_units)))
    palette = draw(palettes)
    some = [draw(st.sampled_from(palette)) for _ in sizes]
    top = len(palette) - 1
    wishes = [draw(st.floats(0, top)) for _ in sizes]
    return BitAllocation(sizes, palette, mean(some, sizes)), wishes


@given(reachable())
def test_the_mean_is_exact_and_the_palette_is_kept_to(case):
    allocation, wishes = case
    bits = allocation.nearest(wishes)
    assert mean(bits, allocation.sizes) == allocation.mean_bits
    assert set(bits) <= set(allocation.palette)
    assert allocation.exact_mean == pytest.approx(float(allocation.mean_bits), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(reachable(most_units=5))
def test_nothing_on_the_budget_is_nearer_to_the_wishes(case):
    allocation, wishes = case

    def distance(bits):
        places = [allocation.palette.index(b) for b in bits]
        return sum((p - w) ** 2 for p, w in zip(places, wishes, strict=True))

    best = min(
        distance(bits)
        for bits in itertools.product(allocation.palette, repeat=len(wishes))
        if mean(bits, allocation.sizes) == allocation.mean_bits
    )
    # Costs are compared in steps of 2**-20 of the largest, which is 25 at most.
    assert distance(allocation.nearest(wishes)) <= best + len(wishes) * 25 * 2**-19


@given(reachable())
def test_wishing_for_what_is_on_the_budget_gives_it(case):
    allocation, wishes = case
    bits = allocation.nearest(wishes)
    places = [float(allocation.palette.index(b)) for b in bits]
    assert allocation.nearest(places) == bits


@given(reachable())
def test_the_baseline_takes_the_widths_next_to_the_mean(case):
    allocation, _ = case
    assume(len(set(allocation.sizes)) == 1)
    palette, wanted = allocation.palette, float(allocation.mean_bits)
    below = max(b for b in palette if b <= wanted)
    above = min(b for b in palette if b >= wanted)
    share = 0 if above == below else (wanted - below) / (above - below)
    count = len(allocation.sizes)
    # Where whole units of these two widths have the mean, it is made of them.
    assume(abs(share * count - round(share * count)) < 1e-9)
    bits = allocation.nearest(allocation.uniform_wishes())
    assert set(bits) <= {below, above}


def test_the_baseline_spreads_the_wider_width_evenly():
    allocation = BitAllocation((64,) * 8, (2, 4, 6, 8), Fraction(9, 2))
    bits = allocation.nearest(allocation.uniform_wishes())
    assert bits == (4, 4, 4, 6, 4, 4, 4, 6)


def test_a_mean_that_decimals_cannot_write_is_met():
    allocation = BitAllocation((64,) * 3, (4, 5), Fraction("4.3333333333"))
    assert sorted(allocation.nearest([0.0, 1.0, 0.0])) == [4, 4, 5]
    assert allocation.exact_mean == 13 / 3


def test_an_unreachable_mean_is_refused_with_the_nearest_ones():
    with pytest.raises(ValueError, match=r"has kv_mean_bits of 4\.1: .* are 4 and 4\.5\."):
        BitAllocation((64,) * 4, (4, 6), Fraction("4.1"), "kv_mean_bits")
    with pytest.raises(ValueError, match="between the narrowest and the widest of 4, 6 bits"):
        BitAllocation((64,) * 4, (4, 6), Fraction(7))


def test_sizes_without_a_common_measure_are_refused_before_memory_runs_out():
    with pytest.raises(ValueError, match=r"such unequal sizes.*Use fewer blocks"):
        BitAllocation((10_000_019, 9_999_991, 64), (4, 8), Fraction(6))


def test_there_must_be_a_wish_per_unit():
    with pytest.raises(ValueError, match="there are 2 units, got 1 wishes"):
        BitAllocation((8, 8), (4, 8), Fraction(6)).nearest([0.0])
