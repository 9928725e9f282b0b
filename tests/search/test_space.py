from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_sparse.compressor.search_plan import SearchPlan
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search


def test_the_default_is_the_papers():
    space = SearchSpace()
    assert (space.target, space.low, space.high) == (0.5, 0.45, 0.55)
    assert space.grid == (0.45, 0.55)
    assert space.step == 0.025
    assert space.blocks == 8
    assert space.kv_bits == (6, 8)
    assert space.held_kv_mean == 7


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


@pytest.mark.parametrize("target", [1 / 3, 2 / 3, 0.1 + 0.2])
def test_a_target_of_many_digits_lies_in_every_range(target):
    space = SearchSpace(target_sparsity=target, sparsity_range=0.0)
    assert (space.low, space.high) == (target, target)
    assert not space.searches_sparsity


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
    form = SearchSpace(kv_mean_bits=7, granularity="layer").to_dict()
    assert json.loads(json.dumps(form)) == form
    assert form["kv_bits"] == [6, 8]
    assert form["kv_split"] == "free"


def test_the_form_of_a_space_of_the_first_version_is_unchanged():
    """Studies compare it, so that one made before a field existed is resumed."""
    assert SearchSpace().to_dict() == {
        "target_sparsity": 0.5,
        "sparsity_range": 0.05,
        "step": 0.025,
        "blocks": 8,
        "kv_bits": [6, 8],
        "kv_group_size": 64,
        "kv_residual_length": 128,
        "kv_key_mode": "channel",
        "kv_tolerance_bits": 0.0,
        "pattern": "unstructured",
    }


def test_an_explicit_range_need_not_be_symmetric():
    space = SearchSpace(sparsity_low=0.2, sparsity_high=0.6)
    assert (space.low, space.high) == (0.2, 0.6)
    assert space.grid == (0.2, 0.6)
    assert SearchSpace(sparsity_high=0.7).low == 0.45
    assert SearchSpace(sparsity_low=0.21).grid == (0.225, 0.55)


def test_a_granularity_by_layer_makes_every_layer_a_block():
    assert SearchSpace(granularity="layer").layer_blocks(10) == [range(i, i + 1) for i in range(10)]
    assert len(SearchSpace(granularity="block-projection").layer_blocks(10)) == 8


def test_a_limit_in_bytes_frees_what_it_counts():
    space = SearchSpace(target_sparsity="free", fit_bytes="1GiB", context_length=8)
    assert (space.fit_bytes, space.low, space.high) == (2**30, 0.0, 0.75)
    assert space.kv_split == "free"
    assert space.held_kv_mean is None
    assert space.grid == (0.0, 0.75)
    assert SearchSpace(target_sparsity="free", size_bytes=9).held_kv_mean == 7
    form = space.to_dict()
    assert json.loads(json.dumps(form)) == form
    assert SearchSpace(**form) == space


def test_a_mean_asks_for_the_free_split():
    assert SearchSpace().kv_split == "equal"
    space = SearchSpace(kv_bits=(2, 3, 4, 6, 8, 16), kv_mean_bits=4)
    assert (space.kv_split, space.held_kv_mean) == ("free", 4)
    assert SearchSpace(kv_split="free").held_kv_mean == 7


def test_a_mean_may_be_that_of_the_upper_of_three_widths():
    assert SearchSpace(weight_bits=(4, 8, 16), weight_mean_bits=12).weight_mean_bits == 12
    assert SearchSpace(kv_bits=(4, 8, 16), kv_mean_bits=12).held_kv_mean == 12


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
        ({"sparsity_range": 1e6}, "must be a number >= 0 and < 1,000,000, got 1000000.0"),
        ({"sparsity_range": 10**400}, "must be a number >= 0 and < 1,000,000, got 1000"),
        ({"step": 0}, "step must be > 0"),
        ({"blocks": 0}, "blocks must be a whole number >= 1"),
        ({"blocks": 2.5}, "blocks must be a whole number >= 1"),
        ({"kv_bits": (5, 8)}, "widths from 2, 3, 4, 6, 8, 16"),
        ({"kv_bits": ()}, "widths from 2, 3, 4, 6, 8, 16"),
        ({"kv_bits": "8"}, "widths from 2, 3, 4, 6, 8, 16"),
        ({"kv_bits": (8, 8)}, "each width once"),
        ({"kv_group_size": 0}, "group_size must be a whole number >= 1"),
        ({"pattern": "2:4"}, "n:m fixes every ratio"),
        ({"granularity": "head"}, "granularity must be one of block, layer, block-projection"),
        (
            {"sparsity_low": 0.6},
            r"target_sparsity \(0\.5\) <= sparsity_high, got 0\.6",
        ),
        ({"sparsity_high": 0.4}, "sparsity_low <= target_sparsity"),
        ({"sparsity_high": 1.0}, r"sparsity_high must be a number in \[0, 1\)"),
        ({"sparsity_low": 0.49, "sparsity_high": 0.51}, "step must fit into the range"),
        ({"target_sparsity": None, "sparsity_low": 0.1}, "need weights to be pruned"),
        ({"kv_split": "fair"}, "kv_split must be one of equal, free"),
        ({"kv_split": "equal", "kv_mean_bits": 7}, r"needs kv_split='free'.*mean, 7"),
        ({"kv_mean_bits": 9}, r"narrowest and the widest of kv_bits=\(6, 8\), got 9"),
        ({"kv_mean_bits": "7"}, "kv_mean_bits must be a number"),
        ({"kv_bits": None, "kv_mean_bits": 7}, "kv_mean_bits needs kv_bits"),
        ({"kv_bits": None, "kv_apart": True}, "kv_apart needs kv_bits"),
        ({"target_sparsity": "half"}, r"target_sparsity must be a number in \[0, 1\)"),
        ({"fit_bytes": "6GiB"}, "fit_bytes needs context_length"),
        ({"fit_bytes": "6G", "context_length": 9}, "fit_bytes must be a size"),
        ({"context_length": 9}, "need fit_bytes; got context_length=9"),
        ({"batch_size": 2}, r"need fit_bytes.*batch_size=2"),
        ({"size_bytes": 0}, "size_bytes must be a size of at least one byte"),
        ({"size_bytes": 9, "batch_size": 0}, "batch_size must be a whole number >= 1"),
        ({"weight_bits": (8, 6)}, "weight_bits must be None or widths from 4, 8, 16"),
        ({"weight_mean_bits": 6}, "weight_mean_bits=6.0 needs weight_bits"),
        ({"weight_bits": (8, 4), "weight_mean_bits": 9}, "narrowest and the widest of weight_bits"),
        (
            {"target_sparsity": None, "pattern": "2:4", "weight_bits": 8},
            "weight_bits must be None with a pattern",
        ),
    ],
)
def test_bad_settings_are_refused_with_the_way_out(settings, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_sparsity": "free"}, "leaves the mean ratio to a budget in bytes"),
        (
            {"target_sparsity": None, "weight_bits": (8, 4)},
            r"weight_bits=\(4, 8\) leaves the mean open",
        ),
    ],
)
def test_a_search_refuses_a_mean_left_to_a_budget_that_is_missing(tiny_llama, settings, message):
    space = SearchSpace(**settings)
    with pytest.raises(ValueError, match=message):
        search(tiny_llama, space=space)
    with pytest.raises(ValueError, match=message):
        SearchPlan(space, storage="")
    SearchPlan(space, storage="", max_loss=0.01)
    SearchPlan(replace(space, size_bytes="1GB"), storage="")
