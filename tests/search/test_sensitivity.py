"""The pass that measures how much each block minds, and the start it suggests."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hf_adaptive_sparse.evaluation.perplexity import perplexity
from hf_adaptive_sparse.report.study_facts import facts_of
from hf_adaptive_sparse.report.study_page import write_study_report
from hf_adaptive_sparse.search.candidate import Candidate
from hf_adaptive_sparse.search.evaluator import Evaluator, open_evaluator
from hf_adaptive_sparse.search.kv_plan import kv_plan
from hf_adaptive_sparse.search.kv_sensitivity import measure_kv_sensitivity
from hf_adaptive_sparse.search.sensitivity import GROWTH, Sensitivity, measure_sensitivity
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.start import KV_SENSITIVITY, SENSITIVITY
from hf_adaptive_sparse.search.study import search
from hf_adaptive_sparse.search.suggesting import uniform_candidate

SPACE = SearchSpace(blocks=4, kv_bits=None)


def sensitivity(strengths, low=0.4, high=0.6, errors=None):
    """Groups whose damage grows exactly as the model of it says."""
    labels = tuple(f"block_{index}" for index in range(len(strengths)))
    at_low = tuple(s * (low**GROWTH - 0.5**GROWTH) for s in strengths)
    at_high = tuple(s * (high**GROWTH - 0.5**GROWTH) for s in strengths)
    errors = tuple(errors or [0.0] * len(strengths))
    return Sensitivity(labels, low, high, 0.5, at_low, at_high, errors, 4)


class TestBestRatios:
    def test_the_strengths_are_found_again(self):
        assert sensitivity([0.5, 2.0, 7.0]).strengths == pytest.approx((0.5, 2.0, 7.0))

    def test_alike_blocks_stay_at_the_target(self):
        assert sensitivity([2.0] * 3).best_ratios([10] * 3) == pytest.approx([0.5] * 3)

    def test_the_block_that_minds_least_gives_most(self):
        ratios = sensitivity([5.0, 1.0, 0.5]).best_ratios([7, 7, 7])
        assert ratios == sorted(ratios)
        assert sum(ratios) == pytest.approx(1.5, abs=1e-9)
        assert ratios[0] < 0.5 < ratios[2]

    @pytest.mark.parametrize("strengths", [[4.0, 1.0, 2.0], [5.0, 7.0, 9.0]])
    def test_it_is_the_minimum_under_the_budget(self, strengths):
        """At an end of the range for the first strengths, inside of it for the others."""
        weights = [5, 10, 20]
        ratios = sensitivity(strengths).best_ratios(weights)
        assert sum(r * w for r, w in zip(ratios, weights, strict=True)) == pytest.approx(17.5)

        def damage(candidate):
            return sum(s * r**GROWTH for s, r in zip(strengths, candidate, strict=True))

        grid = [0.4 + i / 500 for i in range(101)]
        feasible = (
            (a, b, c)
            for a, b in itertools.product(grid, grid)
            if 0.4 <= (c := (17.5 - 5 * a - 10 * b) / 20) <= 0.6
        )
        assert damage(ratios) <= min(map(damage, feasible)) + 1e-12

    def test_noise_does_not_decide(self):
        # Measured below 0 and near 0, but neither is certain: they are treated alike.
        ratios = sensitivity([-0.5, 0.01, 4.0], errors=[1.0, 1.0, 1.0]).best_ratios([1, 1, 1])
        assert ratios[0] == pytest.approx(ratios[1])
        assert ratios[0] > ratios[2]

    def test_the_ends_of_the_range_hold(self):
        ratios = sensitivity([1000.0, 1.0, 1e-9], low=0.45, high=0.55).best_ratios([1, 1, 1])
        assert ratios == pytest.approx([0.45, 0.5, 0.55])

    def test_groups_that_nothing_hurts_share_alike(self):
        ratios = sensitivity([0.0, 0.0]).best_ratios([3, 5])
        assert sum(r * w for r, w in zip(ratios, (3, 5), strict=True)) == pytest.approx(4.0)


@pytest.fixture
def evaluation():
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(5, 128, (1, 16), generator=generator)} for _ in range(6)]


def test_each_block_is_probed_alone_at_both_ratios(tiny_llama, text_batches, evaluation):
    shape = ModelShape.of(tiny_llama, SPACE)
    uniform = uniform_candidate(SPACE, shape)
    groups = {str(index): names for index, names in enumerate(shape.blocks)}
    with open_evaluator(
        tiny_llama,
        SPACE,
        shape,
        uniform,
        calibration=text_batches[:1],
        evaluation=evaluation,
        metric="wanda",
        progress=False,
    ) as evaluator:
        found = measure_sensitivity(evaluator, groups, low=0.45, high=0.55, target=0.5)
        assert evaluator.reusing.layers_skipped > 0
        seen = [evaluation[index] for index in evaluator.order[: found.batches]]

        def loss(changes):
            evaluator.mask.apply(uniform.ratios | changes)
            return torch.tensor(perplexity(tiny_llama, seen, False)).double().log()

        base = loss({})
        for index, names in enumerate(shape.blocks):
            for measured, ratio in ((found.at_low, 0.45), (found.at_high, 0.55)):
                expected = float(loss(dict.fromkeys(names, ratio)) - base)
                assert measured[index] == pytest.approx(expected, abs=1e-6)


def test_it_is_the_second_trial_and_is_kept_with_the_study(tiny_llama, text_batches, evaluation):
    arguments = (tiny_llama, text_batches[:1], evaluation, SPACE)
    result = search(*arguments, n_trials=3, progress=False)
    stored = result.study.user_attrs[SENSITIVITY]
    assert stored["labels"] == [f"block_{index}" for index in range(4)]
    assert [row["uniform"] for row in result.history] == [True, False, False]
    # What minds most is pruned least; equal blocks, so the order is that of the strengths.
    second = result.history[1]["block_ratios"]
    felt = [max(pair) for pair in zip(stored["strengths"], stored["errors"], strict=True)]
    assert second[felt.index(max(felt))] == min(second)
    assert second[felt.index(min(felt))] == max(second)
    cold = search(*arguments, n_trials=3, warm_start=False, progress=False)
    assert SENSITIVITY not in cold.study.user_attrs


@pytest.mark.parametrize(("width", "step", "low"), [(0.2, 0.025, 0.45), (0.2, 0.1, 0.4)])
def test_probes_stay_close_to_the_target_in_a_wide_range(
    width, step, low, tiny_llama, text_batches, evaluation
):
    space = replace(SPACE, sparsity_range=width, step=step)
    result = search(tiny_llama, text_batches[:1], evaluation, space, n_trials=2, progress=False)
    stored = result.study.user_attrs[SENSITIVITY]
    assert (stored["low"], stored["high"]) == pytest.approx((low, 1 - low))
    # Ratios are moved to the exact budget by less than a step.
    assert min(result.history[1]["block_ratios"]) > low - step
    assert max(result.history[1]["block_ratios"]) < 1 - low + step


@pytest.mark.parametrize("bound", ["sparsity_low", "sparsity_high"])
def test_nothing_is_measured_where_every_group_takes_the_target(
    bound, tiny_llama, text_batches, evaluation, tmp_path
):
    space = SearchSpace(blocks=4, kv_bits=(6, 8), kv_residual_length=8, **{bound: 0.5})
    result = search(tiny_llama, text_batches[:1], evaluation, space, n_trials=2, progress=False)
    assert SENSITIVITY not in result.study.user_attrs
    assert {*result.history[1]["block_ratios"]} == {0.5}
    write_study_report(facts_of(result.study), tmp_path)


def test_it_is_measured_once_per_study(tiny_llama, text_batches, evaluation, tmp_path):
    arguments = (tiny_llama, text_batches[:1], evaluation, SPACE)
    options = {"storage": tmp_path / "s.log", "progress": False}
    first = search(*arguments, n_trials=2, **options)
    again = search(*arguments, n_trials=4, **options)
    assert [row["uniform"] for row in again.history] == [True, False, False, False]
    assert again.history[:2] == first.history[:2]


def test_a_study_that_is_finished_gets_no_start(tiny_llama, text_batches, evaluation, tmp_path):
    arguments = (tiny_llama, text_batches[:1], evaluation, SPACE)
    options = {"n_trials": 2, "storage": tmp_path / "s.log", "progress": False}
    search(*arguments, warm_start=False, **options)
    again = search(*arguments, held_out=text_batches, **options)
    assert again.to_dict()["held_out"] is not None
    assert [row["state"] for row in again.history] == ["complete"] * 2
    assert SENSITIVITY not in again.study.user_attrs


def test_where_a_probe_fails_the_search_starts_from_uniform(
    tiny_llama, text_batches, evaluation, monkeypatch, caplog
):
    original, calls = Evaluator.score, []

    def failing(self, index, candidate, settings):
        calls.append(1)
        if len(calls) == 9:
            raise MemoryError("no room")
        return original(self, index, candidate, settings)

    monkeypatch.setattr(Evaluator, "score", failing)
    result = search(tiny_llama, text_batches[:1], evaluation, SPACE, n_trials=2, progress=False)
    assert "cannot be measured: Out of memory: no room" in caplog.text
    assert [row["state"] for row in result.history] == ["complete"] * 2


def test_masks_that_find_no_memory_are_a_probe_that_failed():
    def apply(candidate):
        raise RuntimeError("CUDA out of memory.")

    evaluator = SimpleNamespace(apply=apply, layers_name="model.layers", num_layers=1, order=[0, 1])
    evaluator.uniform = Candidate((), {}, {}, None, None)
    assert measure_sensitivity(evaluator, {}, low=0.4, high=0.6, target=0.5) is None


def test_a_free_split_of_kv_bits_starts_from_its_sensitivity(tiny_llama, text_batches):
    space = SearchSpace(
        target_sparsity=None,
        kv_bits=(2, 4, 8),
        kv_mean_bits=4,
        kv_group_size=16,
        kv_residual_length=8,
    )
    result = search(tiny_llama, None, text_batches, space, n_trials=3, progress=False)
    assert set(result.study.user_attrs[KV_SENSITIVITY]) == {f"layer_{i}" for i in range(4)}
    assert SENSITIVITY not in result.study.user_attrs
    assert [row["mean_kv_bits"] for row in result.history] == [4.0] * 3
    assert result.history[0]["uniform"]


def kv_sensitivity(kv_bits, kv_mean_bits, loss):
    """The sensitivity of three equal layers by a made-up loss of the keys' bits."""
    space = SearchSpace(
        target_sparsity=None, kv_bits=kv_bits, kv_split="free", kv_mean_bits=kv_mean_bits
    )
    plan = kv_plan([(64, 64)] * 3, space)
    return measure_kv_sensitivity(lambda kv_cache: loss(kv_cache.key_bits), plan, space)


@pytest.mark.parametrize("kv_bits", [(6, 8), (2, 4, 6, 8, 16)])
def test_the_layers_that_mind_most_keep_the_most_bits(kv_bits):
    def loss(bits):
        return 3.0 + sum(s * 4.0**-b for s, b in zip((1.0, 900.0, 30.0), bits, strict=True))

    mean = {2: 20 / 3, 5: 4}[len(kv_bits)]
    best = kv_sensitivity(kv_bits, mean, loss).best_bits()
    assert best == {2: ((6, 6), (8, 8), (6, 6)), 5: ((2, 2), (6, 6), (4, 4))}[len(kv_bits)]


def test_changes_too_small_to_measure_follow_from_wider_errors():
    """A quarter with every bit above four, none unquantised, and never less with fewer bits."""
    measured = {2: 0.3, 3: -0.1, 4: 0.4, 16: 0.0}
    found = kv_sensitivity((2, 3, 4, 6, 16), 4, lambda bits: 1 + sum(measured[b] for b in bits))
    expected = {"2": 0.4, "3": 0.4, "4": 0.4, "6": 0.025, "16": 0.0}
    assert found.to_dict() == {f"layer_{i}": pytest.approx(expected) for i in range(3)}
