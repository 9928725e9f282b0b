from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_sparse.profiles import KVCacheConfig
from hf_adaptive_sparse.search.kv_plan import EqualSplit, FreeSplit, kv_plan, kv_units
from hf_adaptive_sparse.search.kv_split import UNCACHED_BITS
from hf_adaptive_sparse.search.space import SearchSpace

ALL = (2, 3, 4, 6, 8, 16)


def mean_bits(bits, widths):
    keys, values = zip(*bits, strict=True)
    return KVCacheConfig(key_bits=keys, value_bits=values).mean_bits(widths)


@st.composite
def plans(draw):
    layers = draw(st.integers(1, 24))
    space = draw(
        st.sampled_from(
            [
                SearchSpace(),
                SearchSpace(kv_apart=True),
                SearchSpace(kv_bits=(4, 8), kv_apart=True),
                SearchSpace(kv_bits=ALL, kv_mean_bits=4),
                SearchSpace(kv_bits=ALL, kv_mean_bits=3, kv_apart=True),
                SearchSpace(kv_bits=(6, 8), kv_mean_bits=7, kv_apart=True),
            ]
        )
    )
    widths = [(64, 64)] * layers
    plan = kv_plan(widths, space)
    values = {name: draw(st.floats(*bounds)) for name, bounds in plan.parameters.items()}
    return space, widths, plan, values


@given(plans())
def test_every_draw_has_the_mean_exactly(case):
    space, widths, plan, values = case
    assert mean_bits(plan.assign(values), widths) == space.held_kv_mean == plan.mean_bits


@given(plans())
def test_keys_and_values_go_together_unless_they_are_apart(case):
    space, widths, plan, values = case
    bits = plan.assign(values)
    assert len(bits) == len(widths)
    if not space.kv_apart:
        assert sum(keys != value for keys, value in bits) <= len(widths) % 2


@given(plans())
def test_a_profile_is_found_again_from_its_own_parameters(case):
    _, _, plan, values = case
    bits = plan.assign(values)
    parameters = plan.parameters_for(bits)
    assert set(parameters) == set(plan.parameters)
    assert all(low <= parameters[n] <= high for n, (low, high) in plan.parameters.items())
    assert plan.assign(parameters) == bits


@given(plans())
def test_the_baseline_names_every_parameter(case):
    _, widths, plan, _ = case
    parameters = plan.uniform_parameters()
    assert set(parameters) == set(plan.parameters)
    assert mean_bits(plan.assign(parameters), widths) == plan.mean_bits


def test_apart_each_width_goes_to_as_many_keys_and_values():
    plan = kv_plan([(64, 64)] * 3, SearchSpace(kv_apart=True))
    assert isinstance(plan, EqualSplit)
    assert list(plan.parameters)[:2] == ["kv_priority_layer_0_keys", "kv_priority_layer_0_values"]
    priorities = dict.fromkeys(plan.parameters, 0.0)
    bits = plan.assign(priorities | {"kv_priority_layer_2_values": 1.0})
    assert bits[2][1] == 8
    assert Counter(b for pair in bits for b in pair) == {6: 3, 8: 3}


def test_a_mean_in_the_palette_is_uniform_and_another_takes_turns():
    widths = [(64, 64)] * 4
    four = kv_plan(widths, SearchSpace(kv_bits=ALL, kv_mean_bits=4, kv_apart=True))
    assert four.assign(four.uniform_parameters()) == ((4, 4),) * 4
    five = kv_plan(widths, SearchSpace(kv_bits=ALL, kv_mean_bits=5))
    assert Counter(five.assign(five.uniform_parameters())) == {(4, 4): 2, (6, 6): 2}


def test_what_caches_nothing_is_no_unit_and_does_not_count():
    widths = [(64, 64), (0, 0), (96, 64)]
    assert [unit.label for unit in kv_units(widths, apart=True)] == [
        "layer_0_keys",
        "layer_0_values",
        "layer_2_keys",
        "layer_2_values",
    ]
    plan = kv_plan(widths, SearchSpace(kv_bits=(2, 4, 8), kv_mean_bits=4, kv_apart=True))
    bits = plan.assign(dict.fromkeys(plan.parameters, 1.9))
    assert bits[1] == (UNCACHED_BITS, UNCACHED_BITS)
    assert mean_bits(bits, widths) == 4


def test_a_single_width_leaves_no_parameter():
    plan = kv_plan([(64, 64)] * 2, SearchSpace(kv_bits=4, kv_split="free"))
    assert isinstance(plan, FreeSplit)
    assert plan.parameters == plan.uniform_parameters() == plan.parameters_for(((4, 4),) * 2) == {}
    assert plan.assign({}) == ((4, 4),) * 2


def test_a_mean_no_assignment_has_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"kv_mean_bits of 4\.3: the nearest .* are 4\.2 and 4\.4"):
        kv_plan([(64, 64)] * 5, SearchSpace(kv_bits=(4, 5 + 1), kv_mean_bits=4.3, kv_apart=True))


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(ValueError, match=r"no decoder layer of this one does.*kv_bits=None"):
        kv_plan([(0, 0)] * 2, SearchSpace(kv_mean_bits=7))
