from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.profiles import KVCacheConfig
from hf_adaptive_sparse.search.kv_split import UNCACHED_BITS, split_equally


def mean_bits(bits, widths):
    keys, values = zip(*bits, strict=True)
    return KVCacheConfig(key_bits=keys, value_bits=values).mean_bits(widths)


priorities = st.floats(0, 1)


@given(st.lists(priorities, min_size=1, max_size=40), st.integers(1, 2048))
def test_eight_and_six_bits_have_mean_seven_for_any_number_of_layers(order, width):
    widths = [(width, width)] * len(order)
    bits = split_equally(widths, (6, 8)).assign(order)
    assert mean_bits(bits, widths) == 7
    counts = Counter(bits)
    assert counts[(8, 8)] == counts[(6, 6)] == len(order) // 2
    assert counts[(8, 6)] == len(order) % 2


@given(
    st.lists(priorities, min_size=1, max_size=30),
    st.lists(st.sampled_from((2, 3, 4, 6, 8, 16)), min_size=1, max_size=3, unique=True),
)
def test_any_palette_is_shared_out_evenly_with_its_mean(order, palette):
    widths = [(64, 64)] * len(order)
    split = split_equally(widths, palette, tolerance_bits=16)
    bits = split.assign(order)
    assert mean_bits(bits, widths) == pytest.approx(split.mean_bits, abs=1e-12)
    if len(order) % len(palette) == 0:
        assert split.mean_bits == pytest.approx(sum(palette) / len(palette), abs=1e-12)
        assert set(Counter(bits).values()) == {len(order) // len(palette)}


@settings(max_examples=50)
@given(st.lists(st.sampled_from([(64, 64), (128, 128), (256, 256)]), min_size=1, max_size=14))
def test_layers_of_unequal_width_meet_the_mean_and_split_within_their_group(widths):
    split = split_equally(widths, (6, 8))
    bits = split.assign([0.0] * len(widths))
    assert mean_bits(bits, widths) == 7
    for group in set(widths):
        counts = Counter(b for b, w in zip(bits, widths, strict=True) if w == group)
        assert counts[(8, 8)] == counts[(6, 6)]


@given(st.lists(priorities, min_size=1, max_size=20))
def test_assigning_by_the_assigned_bits_changes_nothing(order):
    split = split_equally([(32, 32)] * len(order), (4, 6, 8))
    bits = split.assign(order)
    assert split.assign([k + v + k / 100 for k, v in bits]) == bits


def test_the_highest_priority_gets_the_widest_bits_and_ties_go_to_earlier_layers():
    split = split_equally([(8, 8)] * 5, (6, 8))
    assert split.assign([0.1, 0.9, 0.5, 0.2, 0.8]) == ((6, 6), (8, 8), (8, 6), (6, 6), (8, 8))
    assert split.assign([0.5] * 5) == ((8, 8), (8, 8), (8, 6), (6, 6), (6, 6))


def test_the_baseline_spreads_widths_over_the_depth():
    split = split_equally([(8, 8)] * 6, (6, 8))
    bits = split.assign(split.interleaved_priorities(2))
    assert [k for k, _ in bits] == [8, 6, 8, 6, 8, 6]
    odd = split_equally([(8, 8)] * 5, (6, 8))
    assert Counter(odd.assign(odd.interleaved_priorities(2))) == {(8, 8): 2, (6, 6): 2, (8, 6): 1}
    three = split_equally([(8, 8)] * 6, (4, 6, 8))
    assert [k for k, _ in three.assign(three.interleaved_priorities(3))] == [8, 6, 4, 8, 6, 4]


def test_one_width_is_given_to_every_layer():
    assert split_equally([(8, 8)] * 3, (4,)).assign([0, 0, 0]) == ((4, 4),) * 3


def test_layers_without_a_cache_do_not_count():
    widths = [(8, 8), (0, 0), (8, 8), (0, 0)]
    split = split_equally(widths, (6, 8))
    bits = split.assign([0.0, 1.0, 1.0, 1.0])
    assert bits == ((6, 6), (UNCACHED_BITS,) * 2, (8, 8), (UNCACHED_BITS,) * 2)
    assert mean_bits(bits, widths) == 7


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(ValueError, match=r"no decoder layer of this one does.*kv_bits=None"):
        split_equally([(0, 0)] * 2, (6, 8))


def test_a_mean_that_cannot_be_reached_is_refused_unless_tolerated():
    widths = [(192, 128)] * 3
    with pytest.raises(ValueError, match=r"nearest has 7\.0666.*kv_tolerance_bits=0\.067"):
        split_equally(widths, (6, 8))
    split = split_equally(widths, (6, 8), tolerance_bits=0.07)
    assert split.mean_bits == pytest.approx(7 + 1 / 15)
    assert mean_bits(split.assign([0, 0, 0]), widths) == pytest.approx(split.mean_bits)


def test_keys_wider_than_values_are_no_obstacle_to_an_even_number_of_layers():
    widths = [(192, 128)] * 4
    assert mean_bits(split_equally(widths, (6, 8)).assign([0, 1, 2, 3]), widths) == 7


def test_priorities_must_name_every_layer():
    with pytest.raises(ValueError, match="has 2 layers, got 3 priorities"):
        split_equally([(8, 8)] * 2, (6, 8)).assign([0, 1, 2])
