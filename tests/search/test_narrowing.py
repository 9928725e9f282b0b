"""What a search says of widths that make no difference, and when it takes the narrower."""

from __future__ import annotations

import math
import re
from html import escape

import pytest
import torch

from hf_adaptive_sparse.architecture import kv_widths
from hf_adaptive_sparse.evaluation.perplexity import perplexity
from hf_adaptive_sparse.profiles import CompressionProfile
from hf_adaptive_sparse.report.study_facts import read_study
from hf_adaptive_sparse.report.study_page import write_study_report
from hf_adaptive_sparse.search.errors import TrialFailure
from hf_adaptive_sparse.search.evaluator import Evaluator
from hf_adaptive_sparse.search.narrowing_result import MARGIN
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search

KV = {"kv_group_size": 16, "kv_residual_length": 8}
MEAN_SEVEN = SearchSpace(target_sparsity=None, kv_bits=(6, 8), **KV)
IN_MEMORY = SearchSpace(
    target_sparsity=None, kv_bits=(2, 4, 8), fit_bytes=10**7, context_length=64, **KV
)


@pytest.fixture
def run(tiny_llama):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 128, (10, 16), generator=generator)

    def call(space, **changes) -> SearchResult:
        settings = {"n_trials": 2, "warm_start": False, "progress": False} | changes
        windows = settings.pop("windows", 10)
        return search(tiny_llama, None, [{"input_ids": ids[:windows]}], space, **settings)

    return call


@pytest.fixture
def costs(monkeypatch):
    """Let the mean loss depend on the widest width alone, with some noise; count the readings."""
    readings = []

    def put(by_width, noise=0.0, of="kv"):
        def losses(self, candidate, windows):
            readings.append(candidate)
            if of == "kv":
                widest = max(candidate.kv_cache.layer_bits(4)[0])
            else:
                widest = max(candidate.weight_bits.values())
            signs = [noise * (-1) ** (widest // 2 + index) for index in range(len(windows))]
            return [(15 * (4.0 + by_width[widest] + sign), 15) for sign in signs]

        monkeypatch.setattr(Evaluator, "losses", losses)
        return readings

    return put


def widest(profile):
    return {width for pair in profile.kv_cache.layer_bits(4) for width in pair}


def test_under_an_exact_mean_the_search_says_what_could_be_saved_and_keeps_it(run, costs):
    costs({8: 0.0, 6: 0.0001})
    result = run(MEAN_SEVEN)
    assert widest(result.best_profile) == {6, 8}
    said = result.narrowing
    assert said.trial == result.best_trial.number
    assert not said.taken
    assert widest(said.profile) == {6}
    # Half of the elements lose two bits each: 4 layers of 64 elements, 1 of 8 bits.
    elements = sum(map(sum, [(32, 32)] * 4))
    assert said.kv_bytes_per_token == elements / 8
    first, last = said.lines
    assert first.startswith("8 and 6 KV bits do not differ measurably here: with 6")
    assert "+0.010%" in first
    assert last.startswith(
        "The mean of 7 KV bits is kept, as the search space says (by default all widths in equal "
        "parts); without it 32 bytes"
    )


def test_under_a_ceiling_in_bytes_the_narrower_is_taken(run, costs, tmp_path):
    costs({8: 0.0, 4: 0.0002, 2: 0.3})
    result = run(IN_MEMORY, n_trials=1, storage=tmp_path / "search.journal")
    assert set(result.history[0]["key_bits"]) == {8}
    assert widest(result.best_profile) == widest(result.pareto[0].profile) == {4}
    assert result.best_config.kv_cache == result.best_profile.kv_cache
    same, other, last = result.narrowing.lines
    assert same.startswith("8 and 4 KV bits do not differ")
    assert other.startswith("2 KV bits lose measurably against 8: with 2")
    assert last.startswith("The narrower widths are used; this saves ")
    # Its files and its report say the same.
    result.save(tmp_path)
    assert SearchResult.load_profile(tmp_path) == result.best_profile
    facts = read_study(tmp_path)
    assert CompressionProfile.from_dict(dict(facts.profile)) == result.best_profile
    page = write_study_report(facts, tmp_path / "report").read_text()
    assert escape(same) in page
    assert escape(last) in page
    assert facts.narrowing == result.narrowing
    assert result.detached().best_profile == result.best_profile
    (tmp_path / "search.journal").unlink()
    assert read_study(tmp_path).narrowing == facts.narrowing


def test_held_out_figures_are_those_of_the_profile_that_is_returned(run, costs, tmp_path):
    costs({8: 0.0, 4: 0.0002, 2: 0.3})
    held_out = [{"input_ids": torch.ones(4, 16, dtype=torch.long)}]
    settings = {"n_trials": 1, "storage": tmp_path / "search.journal"}
    wide = run(IN_MEMORY, held_out=held_out, compare_widths=False, **settings)
    assert wide.to_dict()["held_out"]["change_percent"] == 0
    assert wide.lines == []
    narrowed = run(IN_MEMORY, **settings)
    assert widest(narrowed.best_profile) == {4}
    assert narrowed.to_dict()["held_out"] is None
    assert read_study(tmp_path).held_out is None
    compared = run(IN_MEMORY, held_out=held_out, **settings)
    assert re.match(r"On held-out data: perplexity .* \(uniform\): \+0.02 %", compared.lines[0])
    again = compared.to_dict()["held_out"]
    assert again["change_percent"] == pytest.approx(100 * math.expm1(0.0002))
    assert read_study(tmp_path).held_out == again


@pytest.mark.parametrize(
    ("loss", "noise", "said"),
    [
        (0.02, 0.0, "6 KV bits lose measurably against 8: with 6"),
        (0.0, 0.01, "Whether 6 KV bits lose against 8 cannot be told on these data"),
        (MARGIN * 1.01, 0.0, "6 KV bits lose measurably against 8"),
        (math.nan, 0.0, "6 KV bits lose measurably against 8"),
    ],
)
def test_widths_that_differ_or_cannot_be_told_apart_are_kept(run, costs, loss, noise, said):
    costs({8: 0.0, 6: loss}, noise)
    result = run(MEAN_SEVEN)
    [line] = result.narrowing.lines
    assert line.startswith(said)
    assert result.narrowing.profile is None
    assert widest(result.best_profile) == {6, 8}


@pytest.mark.parametrize("repeatable", [True, False])
def test_what_breaks_it_off_is_told_and_tried_again_if_it_may_pass(
    run, monkeypatch, tmp_path, repeatable
):
    calls = []

    def fail(self, candidate, windows):
        calls.append(1)
        raise TrialFailure("Out of memory: 5", repeatable=repeatable)

    monkeypatch.setattr(Evaluator, "losses", fail)
    result = run(MEAN_SEVEN, n_trials=1, storage=tmp_path / "search.journal")
    assert result.narrowing.lines == (
        "Narrower widths could not all be compared: Out of memory: 5",
    )
    assert read_study(tmp_path).narrowing == result.narrowing
    assert widest(result.best_profile) == {6, 8}
    run(MEAN_SEVEN, n_trials=1, storage=tmp_path / "search.journal")
    assert len(calls) == (1 if repeatable else 2)


def test_weight_bits_are_narrowed_likewise(run, costs):
    costs({16: 0.0, 8: 0.0001, 4: 0.5}, of="weights")
    space = SearchSpace(
        target_sparsity=None, blocks=2, weight_bits=(4, 8, 16), size_bytes=10**7, kv_bits=None
    )
    result = run(space, n_trials=1)
    assert set(result.best_profile.weight_bits.values()) == {8}
    assert result.narrowing.weight_bytes > 0
    assert result.narrowing.kv_bytes_per_token == 0
    assert result.narrowing.lines[0].startswith("16 and 8 weight bits do not differ")


def test_a_limit_on_disk_takes_narrower_weights_but_leaves_the_mean_of_the_cache(run, costs):
    costs({8: 0.0, 6: 0.0001})
    space = SearchSpace(
        target_sparsity=None, blocks=2, weight_bits=(8, 16), size_bytes=10**7, kv_bits=(6, 8), **KV
    )
    result = run(space, n_trials=1)
    assert [step.part for step in result.narrowing.steps] == ["KV", "weight"]
    assert result.narrowing.taken
    assert result.narrowing.kv_bytes_per_token == 0
    assert widest(result.best_profile) == {6, 8}
    assert set(result.best_profile.weight_bits.values()) == {8}


def test_the_figures_are_those_of_the_model(run, tiny_llama):
    result = run(IN_MEMORY, n_trials=1)
    generator = torch.Generator().manual_seed(3)
    data = [{"input_ids": torch.randint(5, 128, (10, 16), generator=generator)}]
    [step, *_] = result.narrowing.steps
    assert step.wide == (8,)
    before = result.best_trial.values[0]
    cache = CompressionProfile.from_dict(result.best_trial.user_attrs["profile"]).kv_cache
    assert cache.mean_bits(kv_widths(tiny_llama)) == 8
    after = perplexity(tiny_llama, data, MEAN_SEVEN.kv_config(step.narrow, step.narrow))
    assert step.increase.mean == pytest.approx(after / before - 1, abs=1e-6)


def test_it_is_done_once_and_also_for_a_search_that_is_finished(run, costs, tmp_path):
    readings = costs({8: 0.0, 6: 0.0})
    storage = tmp_path / "s.journal"
    assert run(MEAN_SEVEN, storage=storage, compare_widths=False).narrowing is None
    assert readings == []
    first = run(MEAN_SEVEN, storage=storage).narrowing
    assert len(readings) == 2
    assert run(MEAN_SEVEN, storage=storage).narrowing == first
    assert len(readings) == 2


@pytest.mark.parametrize(
    "changes", [{"windows": 7}, {"objective": "kl"}, {"objective": ("perplexity", "kl")}]
)
def test_where_it_would_say_nothing_it_is_left_out(run, costs, changes):
    readings = costs({8: 0.0, 6: 0.0})
    assert run(MEAN_SEVEN, **changes).narrowing is None
    assert readings == []
