from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_sparse.search.space import SearchSpace


def test_the_default_is_the_papers():
    space = SearchSpace()
    assert (space.target, space.low, space.high) == (0.5, 0.45, 0.55)
    assert space.grid == (0.45, 0.55)
    assert space.step == 0.025
    assert space.blocks == 8
    assert space.kv_bits == (6, 8)
    assert space.mean_kv_bits == 7


@given(st.integers(1, 100), st.integers(1, 100))
def test_blocks_are_consecutive_and_as_even_as_possible(layers, blocks):
    spans = SearchSpace(blocks=blocks).layer_blocks(layers)
    assert [layer for span in spans for layer in span] == list(range(layers))
    assert len(spans) == min(layers, blocks)
    assert max(map(len, spans)) - min(map(len, spans)) <= 1


def test_ratios_below_zero_are_cut_off():
    space = SearchSpace(target_sparsity=0.02, sparsity_range=0.05, step=0.01)
    assert space.low == 0.0
    assert space.grid == (0.0, 0.07)


def test_the_grid_contains_the_target_where_the_range_is_no_multiple_of_the_step():
    space = SearchSpace(target_sparsity=0.6, sparsity_range=0.05, step=0.02)
    assert space.grid == (0.56, 0.64)
    assert (space.low, space.high) == (0.55, 0.65)


@pytest.mark.parametrize("target", [None, 0, 0.0])
def test_no_target_means_no_sparsity_search(target):
    space = SearchSpace(target_sparsity=target)
    assert not space.prunes
    assert not space.searches_sparsity
    assert space.searches_kv


def test_a_single_width_is_fixed():
    assert SearchSpace(kv_bits=8).kv_bits == (8,)
    assert not SearchSpace(kv_bits=8).searches_kv
    assert SearchSpace(kv_bits=[8, 6]).kv_bits == (6, 8)


def test_its_json_form_is_plain():
    form = SearchSpace().to_dict()
    assert json.loads(json.dumps(form)) == form
    assert form["kv_bits"] == [6, 8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_sparsity": 1.0}, r"target_sparsity must be a number in \[0, 1\)"),
        ({"target_sparsity": -0.1}, r"\[0, 1\)"),
        ({"target_sparsity": None, "kv_bits": None}, "The space is empty"),
        ({"target_sparsity": 0.97}, r"must be below 1, got 0\.97 \+ 0\.05"),
        ({"sparsity_range": 0.01}, "sparsity_range must be 0 or at least step"),
        ({"sparsity_range": -1}, "sparsity_range must be a number >= 0"),
        ({"sparsity_range": float("nan")}, "sparsity_range must be a number >= 0"),
        ({"step": 0}, "step must be > 0"),
        ({"blocks": 0}, "blocks must be a whole number >= 1"),
        ({"blocks": 2.5}, "blocks must be a whole number >= 1"),
        ({"kv_bits": (5, 8)}, "widths from 2, 3, 4, 6, 8, 16"),
        ({"kv_bits": ()}, "widths from 2, 3, 4, 6, 8, 16"),
        ({"kv_bits": "8"}, "widths from 2, 3, 4, 6, 8, 16"),
        ({"kv_bits": (8, 8)}, "each width once"),
        ({"kv_group_size": 0}, "group_size must be a whole number >= 1"),
        ({"pattern": "2:4"}, "n:m fixes every ratio"),
    ],
)
def test_bad_settings_are_refused_with_the_way_out(settings, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace(**settings)
