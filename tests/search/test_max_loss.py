from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace

import pytest
import torch

from hf_adaptive_sparse import SparsityConfig, prune
from hf_adaptive_sparse.architecture import kv_widths, prunable_weights
from hf_adaptive_sparse.errors import NonFiniteError
from hf_adaptive_sparse.evaluation.perplexity import negative_log_likelihood, perplexity
from hf_adaptive_sparse.profiles import CalibrationConfig, CompressionProfile, SparsityProfile
from hf_adaptive_sparse.search import increase
from hf_adaptive_sparse.search import max_loss as module
from hf_adaptive_sparse.search.errors import SearchError, TrialsFailed
from hf_adaptive_sparse.search.max_loss import search_within
from hf_adaptive_sparse.search.space import SearchSpace

KV = {"kv_group_size": 16, "kv_residual_length": 8}
CACHE = SearchSpace(target_sparsity=None, kv_bits=(2, 4, 8), **KV)
WEIGHTS = SearchSpace(target_sparsity="free", blocks=2, weight_bits=(8, 16), kv_bits=None)
HELD_OUT, TOKENS = 24, 16


@torch.no_grad()
def rows(model, count, seed, tokens=TOKENS):
    """Sequences drawn from the dense model, which nothing predicts better than itself."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 128, (count, 1), generator=generator)
    for _ in range(tokens - 1):
        chances = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return [{"input_ids": ids}]


@pytest.fixture
def within(tiny_llama):
    # Attention and logits that matter: with the initial weights no width would.
    tiny_llama.model.embed_tokens.weight.data.mul_(8)
    for layer in tiny_llama.model.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            linear.weight.data.mul_(8)

    def call(space, max_loss, **changes):
        arguments = {"n_trials": 1, "progress": False, "warm_start": False} | changes
        tokens = arguments.pop("tokens", TOKENS)
        held_out = rows(tiny_llama, arguments.pop("windows", HELD_OUT), 3, tokens)
        ranked, seen = rows(tiny_llama, 2, 1, tokens), rows(tiny_llama, 16, 2, tokens)
        return search_within(
            tiny_llama, ranked, seen, held_out, space, max_loss=max_loss, **arguments
        )

    return call


@pytest.fixture
def shifted(monkeypatch):
    """Add a loss per token to what is measured outside of the searches."""
    original = module.losses_under

    def put(shift, *, alone=False):
        def losses_under(model, windows, profile, *arguments, **settings):
            measured = CompressionProfile() if alone else profile
            found = original(model, windows, measured, *arguments, **settings)
            return [
                (loss + count * shift(index, len(windows), profile), count)
                for index, (loss, count) in enumerate(found)
            ]

        monkeypatch.setattr(module, "losses_under", losses_under)

    return put


def test_the_smallest_cache_within_the_loss_is_found_and_verified(within, tiny_llama):
    loose, tight = within(CACHE, 0.9), within(CACHE, 0.03, n_trials=2)
    assert loose.budget < tight.budget <= 8
    for found in (loose, tight):
        profile = found.search.best_profile.kv_cache
        assert profile.mean_bits(kv_widths(tiny_llama)) == found.budget
        # Smaller ones were searched; those that held there were refused by the held-out data.
        held = [b for b in found.tried if b < found.budget and found.tried[b] <= found.max_loss]
        assert len(held) < module.LOOKS
    assert any(budget < tight.budget for budget in tight.tried)
    held_out = rows(tiny_llama, HELD_OUT, 3)
    before = perplexity(tiny_llama, held_out, False)
    after = perplexity(tiny_llama, held_out, tight.search.best_profile.kv_cache)
    assert tight.held_out.mean == pytest.approx(after / before - 1, abs=1e-5)
    assert tight.held_out.mean <= tight.held_out.high <= 0.03
    assert f"{tight.budget:g} mean KV bits. Perplexity on 24 held-out windows" in str(tight)
    assert json.loads(json.dumps(tight.to_dict()))["held_out"]["at_most"] == tight.held_out.high


def test_the_smallest_model_within_the_loss_is_found(within, tiny_llama):
    before = {n: p.detach().clone() for n, p in tiny_llama.named_parameters()}
    found = within(WEIGHTS, 0.05, n_trials=2)
    assert found.unit == "bytes on disk"
    spent = found.search.best_trial.user_attrs["bytes"]["size_bytes"]
    assert 0.998 * found.budget <= spent <= found.budget
    assert found.budget < sum(p.nbytes for p in tiny_llama.parameters())
    assert found.held_out.high <= 0.05
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_widths_without_a_measurable_difference_are_named_and_the_cheaper_is_taken(within, shifted):
    def flat(index, windows, profile):
        # 4 bits are as good as 8 but for noise, 2 are worse by half a nat.
        if profile.kv_cache is None or profile.kv_cache.key_bits == 8:
            return 0.0
        return (0.5 if profile.kv_cache.key_bits == 2 else 0.0) + 0.01 * (-1) ** index

    shifted(flat, alone=True)
    found = within(CACHE, 0.9)
    assert found.indistinct == ((8, 4),)
    assert "between 8 and 4 KV bits: 4 taken" in str(found)
    assert found.search.space.kv_bits == (2, 4)


def test_a_bound_that_only_the_search_data_meet_is_refused_with_the_figures(within, shifted):
    shifted(lambda _, windows, profile: 1.0 if windows == HELD_OUT and profile.kv_cache else 0.0)
    with pytest.raises(SearchError, match=r"held-out data: \S+ mean KV bits: \+[12]\d\d\.") as no:
        within(CACHE, 0.9)
    assert str(no.value).count("mean KV bits: +") == module.LOOKS


def test_larger_budgets_are_tried_where_the_held_out_data_refuse_the_smallest(within, shifted):
    allowed = within(CACHE, 0.9)

    def refuses_the_first(_, windows, profile):
        refused = windows == HELD_OUT and profile == allowed.search.best_profile
        return 1.0 if refused else 0.0

    shifted(refuses_the_first)
    found = within(CACHE, 0.9)
    assert found.budget > allowed.budget
    assert found.held_out.high <= 0.9


def test_a_bound_below_every_budget_names_the_nearest(within):
    with pytest.raises(SearchError, match=r"even on the evaluation data; the nearest was 2 mean"):
        within(replace(CACHE, kv_bits=(2,)), 0.0001)


def test_a_budget_whose_trials_all_fail_does_not_hold(within, monkeypatch):
    original = module.search

    def fails_below_four(*arguments, **settings):
        if arguments[3].kv_mean_bits < 4:
            raise TrialsFailed("No trial succeeded. Most often: the loss is nan.")
        return original(*arguments, **settings)

    monkeypatch.setattr(module, "search", fails_below_four)
    found = within(CACHE, 0.9)
    assert found.budget >= 4
    assert math.inf in found.tried.values()
    assert None in [one["increase"] for one in found.to_dict()["tried"]]


@pytest.fixture
def refuse(monkeypatch):
    """Have the cache refuse what comes with KV profiles of which a function says so."""

    def those(is_refused):
        original = increase.negative_log_likelihood

        def refusing(model, batch, kv_cache):
            if kv_cache and is_refused(kv_cache.mean_bits(kv_widths(model))):
                raise NonFiniteError("Keys must be finite.")
            return original(model, batch, kv_cache)

        monkeypatch.setattr(increase, "negative_log_likelihood", refusing)

    return those


@contextlib.contextmanager
def kept(result):
    """Make nothing but what was found final."""
    yield result.best_profile.kv_cache


@pytest.mark.parametrize("final", [None, kept])
def test_a_profile_that_the_cache_refuses_does_not_hold(within, refuse, final):
    refuse(lambda mean: mean < 3)
    assert within(CACHE, 0.9, final=final).budget >= 3


def test_a_cache_that_no_width_suits_is_a_bound_that_nothing_keeps(within, refuse):
    refuse(lambda mean: True)
    with pytest.raises(SearchError, match="the nearest was none, as no loss is finite"):
        within(replace(CACHE, kv_mean_bits=None, kv_bits=(2, 4)), 0.9, final=kept)


def test_a_dense_model_that_computes_nan_is_refused_at_once(within, monkeypatch):
    monkeypatch.setattr(module, "search", None)
    monkeypatch.setattr(increase, "negative_log_likelihood", lambda *_: (math.nan, 1))
    with pytest.raises(ValueError, match="dense model's loss must be finite"):
        within(CACHE, 0.9)


def test_the_bound_is_that_of_the_final_prune_where_one_is_given(within, tiny_llama):
    made = []

    @contextlib.contextmanager
    def final(result):
        """Keep two bits, whatever was found."""
        made.append(result.space.kv_mean_bits)
        yield CACHE.kv_config(2, 2)

    with pytest.raises(SearchError, match="even on the evaluation data"):
        within(CACHE, 0.03, final=final)
    assert made
    found = within(CACHE, 0.9, final=final)
    held_out = rows(tiny_llama, HELD_OUT, 3)
    before = perplexity(tiny_llama, held_out, False)
    after = perplexity(tiny_llama, held_out, CACHE.kv_config(2, 2))
    assert found.held_out.mean == pytest.approx(after / before - 1, abs=1e-5)


def test_the_dense_model_is_measured_as_the_searches_measure(within, tiny_llama):
    found = within(replace(CACHE, kv_bits=(8,)), 0.9)
    seen = rows(tiny_llama, 16, 2)
    dense = perplexity(tiny_llama, seen, False)
    assert found.tried[8] == pytest.approx(found.search.best_value / dense - 1, abs=1e-6)


@pytest.mark.parametrize(
    ("space", "changes", "message"),
    [
        (CACHE, {"max_loss": 0}, "max_loss must be a fraction between 0 and 1"),
        (CACHE, {"max_loss": True}, "max_loss must be a fraction between 0 and 1"),
        (CACHE, {"max_loss": math.nan}, "max_loss must be a fraction between 0 and 1"),
        (CACHE, {"windows": 3}, "at least 16 held-out windows, got 3"),
        (CACHE, {"tokens": 7}, r"longest: 7 tokens\) fills .* \(residual_length=8"),
        (CACHE, {"objective": "kl"}, "bounds the perplexity, got objective='kl'"),
        (CACHE, {"timeout_seconds": 5.0}, r"no timeout_seconds \(--timeout\), got 5.0"),
        (replace(CACHE, kv_mean_bits=4, kv_split="free"), {}, r"fixed by kv_mean_bits \(\S+\)"),
        (replace(WEIGHTS, weight_mean_bits=12), {}, r"fixed by weight_mean_bits \(\S+\)"),
        (replace(WEIGHTS, fit_bytes=10**9, context_length=8), {}, r"fixed by fit_bytes \(--fit\)"),
        (replace(WEIGHTS, size_bytes=10**9), {}, r"fixed by size_bytes \(--size\)"),
        (SearchSpace(kv_bits=None), {}, r"fixed by target_sparsity \(\S+\)"),
    ],
)
def test_bad_input_is_refused_with_the_way_out(within, space, changes, message):
    arguments = {"max_loss": 0.01} | changes
    with pytest.raises(ValueError, match=message):
        within(space, arguments.pop("max_loss"), **arguments)


@pytest.mark.parametrize(
    ("seen", "unseen", "final", "message"),
    [
        (16, 10, None, "at least 16 held-out windows with a token to score, got 10"),
        (1, 16, kept, "at least 2 evaluation windows with a token to score, got 1"),
    ],
)
def test_windows_without_a_token_to_score_do_not_count(
    tiny_llama, monkeypatch, seen, unseen, final, message
):
    """Which is told before any search."""
    monkeypatch.setattr(module, "search", None)

    def labelled(count, seed):
        [batch] = rows(tiny_llama, 20, seed)
        labels = batch["input_ids"].clone()
        labels[count:] = -100
        return [batch | {"labels": labels}]

    with pytest.raises(ValueError, match=message):
        search_within(
            tiny_llama,
            None,
            labelled(seen, 2),
            labelled(unseen, 3),
            CACHE,
            max_loss=0.1,
            final=final,
        )


def test_an_empty_profile_is_the_dense_model(tiny_llama):
    data = rows(tiny_llama, 2, 0)
    [(loss, count)] = module.losses_under(tiny_llama, data, CompressionProfile())
    assert math.exp(loss / count) == pytest.approx(perplexity(tiny_llama, data, False), rel=1e-9)


def test_losses_are_those_of_the_model_that_the_profile_makes(within, tiny_llama):
    linears = prunable_weights(tiny_llama)
    profile = CompressionProfile(
        SparsityProfile(dict.fromkeys(linears, 0.5)),
        CACHE.kv_config(4, 2),
        dict.fromkeys(linears, 4),
    )
    ranked, data = rows(tiny_llama, 2, 1), rows(tiny_llama, 4, 0)
    [found] = module.losses_under(tiny_llama, data, profile, ranked)
    config = SparsityConfig(
        sparsity=profile.sparsity.ratios,
        weight_bits=4,
        calibration=CalibrationConfig(sequential=False),
        kv_cache=profile.kv_cache,
    )
    prune(tiny_llama, config, ranked, progress=False)
    assert found == pytest.approx(negative_log_likelihood(tiny_llama, data[0]), rel=1e-6)
