"""Searches with weight bits and with budgets in bytes, from end to end."""

from __future__ import annotations

import pytest
import torch

from hf_adaptive_sparse.architecture import prunable_weights
from hf_adaptive_sparse.evaluation.perplexity import perplexity
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.pruning.apply import prune_model
from hf_adaptive_sparse.report.study_analysis import choices
from hf_adaptive_sparse.report.study_facts import facts_of
from hf_adaptive_sparse.search.errors import SearchError
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search

KV = {"kv_group_size": 16, "kv_residual_length": 8}


@pytest.fixture
def run(tiny_llama, text_batches):
    def call(space, n_trials=4, **changes):
        return search(
            tiny_llama,
            text_batches,
            text_batches[:2],
            space,
            n_trials=n_trials,
            progress=False,
            **changes,
        )

    return call


def test_a_trials_figure_is_that_of_the_weights_as_stored(run, tiny_llama, text_batches):
    space = SearchSpace(blocks=2, weight_bits=(4, 16), weight_mean_bits=10, kv_bits=8, **KV)
    result = run(space)
    profile = result.best_profile
    assert sorted(set(profile.weight_bits.values())) == [4, 16]
    prune_model(
        tiny_llama,
        ratios=profile.sparsity.ratios,
        batches=text_batches,
        sequential=False,
        progress=False,
    )
    for name, linear in prunable_weights(tiny_llama).items():
        if profile.weight_bits[name] < 16:
            stored = SparseWeight.from_dense(linear.weight.data, profile.weight_bits[name], 64)
            linear.weight.data.copy_(stored.to_dense())
    assert perplexity(tiny_llama, text_batches[:2], profile.kv_cache) == result.best_value


def test_weight_bits_are_searched_without_pruning(run, tiny_llama):
    before = {n: p.detach().clone() for n, p in tiny_llama.named_parameters()}
    space = SearchSpace(
        target_sparsity=None, blocks=4, weight_bits=(4, 8), weight_mean_bits=6, kv_bits=None
    )
    result = run(space)
    for row in result.history:
        assert row["mean_weight_bits"] == 6
        assert sorted(row["weight_bits"]) == [4, 4, 8, 8]
        assert row["mean_sparsity"] is None
    names, _ = choices(facts_of(result.study))
    assert names == [f"weight bits, layer {layer}" for layer in range(4)]
    config = result.best_config
    assert set(config.weight_bits.values()) == {4, 8}
    assert set(config.sparsity.values()) == {0.0}
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kv_bits": (6, 8), "fit_bytes": "1GiB", "context_length": 400},
            "holds all weights at 16 bits and the KV cache at 8, so .* smaller budget",
        ),
        ({"kv_bits": None, "size_bytes": "1GiB"}, "holds all weights at 16 bits, so nothing"),
        (
            {"kv_bits": None, "weight_bits": None, "size_bytes": "1GiB"},
            "holds all weights, so nothing",
        ),
    ],
)
def test_a_budget_that_holds_the_whole_model_says_so(run, changes, message):
    settings = {"target_sparsity": "free", "blocks": 2, "weight_bits": (4, 8, 16), **KV}
    with pytest.raises(SearchError, match=message):
        run(SearchSpace(**{**settings, **changes}), n_trials=30)


def test_a_budget_that_fixes_one_profile_is_not_one_that_holds_the_model(run):
    space = SearchSpace(
        target_sparsity=None,
        weight_bits=None,
        kv_bits=(2, 8),
        kv_split="free",
        fit_bytes=795_000,
        context_length=400,
        **KV,
    )
    with pytest.raises(SearchError, match="All profiles come out alike"):
        run(space, n_trials=30)


def test_every_trial_under_a_limit_in_bytes_meets_it(run):
    space = SearchSpace(
        target_sparsity="free",
        blocks=2,
        weight_bits=(4, 8, 16),
        kv_bits=(2, 4, 8),
        fit_bytes=220_000,
        context_length=400,
        **KV,
    )
    result = run(space, n_trials=5)
    seen = set()
    for row in result.history:
        assert 0.999 * 220_000 <= row["bytes"]["fit_bytes"] <= 220_000
        seen.add((round(row["mean_sparsity"], 3), row["mean_weight_bits"], row["mean_kv_bits"]))
    assert len(seen) > 2
    assert result.best_config.target_sparsity == result.best_trial.user_attrs["mean_sparsity"]
    assert result.history[0]["uniform"]


def test_a_free_mean_starts_from_what_each_block_minds_too(run):
    space = SearchSpace(target_sparsity="free", blocks=4, size_bytes=330_000, kv_bits=None)
    result = run(space, n_trials=2)
    measured = result.study.user_attrs["sensitivity"]
    uniform, start = result.history
    assert measured["target"] == uniform["mean_sparsity"]
    assert measured["low"] < measured["target"] < measured["high"]
    felt = [max(pair) for pair in zip(measured["strengths"], measured["errors"], strict=True)]
    ratios = start["block_ratios"]
    assert ratios[felt.index(max(felt))] == min(ratios) < max(ratios)
    assert 0.999 * 330_000 <= start["bytes"]["size_bytes"] <= 330_000


def test_an_impossible_limit_is_refused_before_anything_is_ranked(run, monkeypatch):
    from hf_adaptive_sparse.search import evaluator

    monkeypatch.setattr(evaluator, "rank_model", None)
    space = SearchSpace(target_sparsity="free", size_bytes=10_000, kv_bits=None)
    with pytest.raises(ValueError, match="the smallest reachable"):
        run(space)


def test_an_impossible_limit_leaves_no_study_that_a_higher_one_would_meet(run, tmp_path):
    storage = tmp_path / "search.journal"
    space = SearchSpace(target_sparsity="free", size_bytes=10_000, kv_bits=None)
    with pytest.raises(ValueError, match="the smallest reachable"):
        run(space, storage=storage)
    assert not storage.exists()
