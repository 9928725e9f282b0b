"""What a search may minimise, and how several figures are put together."""

from __future__ import annotations

import logging
import math

import optuna
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import hf_adaptive_sparse as has
from hf_adaptive_sparse.evaluation.perplexity import perplexity
from hf_adaptive_sparse.evaluation.scoring import Predictions, predict
from hf_adaptive_sparse.search.front import MEAN, suggest_on_front
from hf_adaptive_sparse.search.objectives import (
    OBJECTIVES,
    Goal,
    Objective,
    get_objective,
    register_objective,
)
from hf_adaptive_sparse.search.objectives import divergence as divergence_module
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search

SPACE = SearchSpace(blocks=4, kv_bits=None)


@pytest.fixture
def questions():
    """Batches with labels on their last three tokens."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(3):
        ids = torch.randint(5, 128, (2, 12), generator=generator)
        labels = torch.full_like(ids, -100)
        labels[:, -3:] = ids[:, -3:]
        batches.append({"input_ids": ids, "labels": labels})
    return batches


@pytest.fixture
def run(tiny_llama, text_batches):
    def call(evaluation=None, **changes):
        arguments = {"space": SPACE, "n_trials": 4, "progress": False} | changes
        scored = text_batches[1:] if evaluation is None else evaluation
        return search(tiny_llama, text_batches[:1], scored, **arguments)

    return call


def predictions(seed=0, rows=2, tokens=5, vocabulary=90):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, tokens, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
    targets[0, :2] = -100
    return Predictions(logits, targets)


class TestFigures:
    @pytest.mark.parametrize("name", sorted(OBJECTIVES))
    def test_every_objective_gives_finite_sums_that_do_not_depend_on_the_chunks(
        self, name, monkeypatch
    ):
        def scored():
            objective = get_objective(name)
            objective.check([{"labels": torch.zeros(1)}])
            if objective.needs_dense:
                objective.observe(0, predictions(1))
            return objective.score(0, predictions(2))

        total, count = scored()
        assert math.isfinite(total)
        assert count > 0
        monkeypatch.setattr("hf_adaptive_sparse.evaluation.scoring.CHUNK_LOGITS", 90 * 3)
        assert scored() == (pytest.approx(total, rel=1e-6), count)

    def test_perplexity_is_that_of_the_evaluation(self, run, tiny_llama, text_batches):
        result = run(space=SearchSpace(blocks=1, kv_bits=None, target_sparsity=0.5), n_trials=1)
        result.apply(tiny_llama, progress=False)
        one_shot = result.best_value
        assert one_shot == pytest.approx(perplexity(tiny_llama, text_batches[1:]), rel=0.05)

    def test_the_loss_of_answers_is_that_of_the_labelled_tokens(self):
        objective = get_objective("answers")
        objective.check([{"labels": torch.zeros(1)}, {}])
        found = predictions()
        total, count = objective.score(0, found)
        flat = functional.cross_entropy(
            found.logits.flatten(0, 1), found.targets.flatten(), reduction="sum"
        )
        assert (total, count) == (pytest.approx(float(flat), rel=1e-6), 8)
        assert objective.score(1, found) == (0.0, 0)
        assert objective.value(0.7) == 0.7

    def test_errors_are_the_rows_with_a_token_missed(self):
        objective = get_objective("accuracy")
        objective.check([{"labels": torch.zeros(1)}])
        right = predictions()
        targets = torch.where(right.targets == -100, -100, right.logits.argmax(-1))
        assert objective.score(0, Predictions(right.logits, targets)) == (0.0, 2)
        targets[1, 3] = (targets[1, 3] + 1) % 90
        assert objective.score(0, Predictions(right.logits, targets)) == (1.0, 2)
        targets[0, 0] = -100  # not scored, so it cannot be missed
        assert objective.score(0, Predictions(right.logits, targets)) == (1.0, 2)

    def test_accuracy_is_what_generation_reaches(self, tiny_llama, questions):
        batch = dict(questions[0])
        prompt = batch["input_ids"][:, :9]
        written = tiny_llama.generate(
            prompt, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        batch["input_ids"] = written
        batch["labels"] = torch.full_like(written, -100)
        batch["labels"][:, -3:] = written[:, -3:]
        objective = get_objective("accuracy")
        objective.check([batch])
        assert objective.score(0, predict(tiny_llama, batch)) == (0.0, 2)


class TestDivergence:
    def full(self, dense, other):
        scored = dense.targets != -100
        p, q = dense.logits[scored].log_softmax(-1), other.logits[scored].log_softmax(-1)
        return float((p.exp() * (p - q)).sum())

    def test_it_is_zero_for_the_dense_model_itself(self):
        objective = get_objective("kl")
        objective.observe(0, predictions(1))
        assert objective.score(0, predictions(1)) == (pytest.approx(0.0, abs=1e-6), 8)

    def test_small_vocabularies_give_the_full_divergence(self):
        dense, other = predictions(1, vocabulary=40), predictions(2, vocabulary=40)
        other = Predictions(other.logits, dense.targets)
        objective = get_objective("kl")
        objective.observe(0, dense)
        total, count = objective.score(0, other)
        assert count == 8
        assert total == pytest.approx(self.full(dense, other), rel=1e-5)

    @pytest.mark.parametrize("kept", [1, 8, 64])
    def test_it_is_a_lower_bound_that_tightens_with_the_tokens_kept(self, kept, monkeypatch):
        monkeypatch.setattr(divergence_module, "KEPT_TOKENS", kept)
        dense = predictions(1)
        other = Predictions(dense.logits + 0.5 * predictions(2).logits, dense.targets)
        objective = get_objective("kl")
        objective.observe(0, dense)
        total, _ = objective.score(0, other)
        assert 0.0 < total <= self.full(dense, other) + 1e-6
        if kept == 64:
            assert total == pytest.approx(self.full(dense, other), rel=0.01)

    def test_all_tokens_that_are_not_kept_count_as_one(self, monkeypatch):
        monkeypatch.setattr(divergence_module, "KEPT_TOKENS", 8)
        dense = predictions(1)
        other = Predictions(dense.logits + 0.5 * predictions(2).logits, dense.targets)
        objective = get_objective("kl")
        objective.observe(0, dense)
        total, _ = objective.score(0, other)

        scored = dense.targets != -100
        p, q = (one.logits[scored].double().softmax(-1) for one in (dense, other))
        kept = p.topk(8).indices
        p, q = p.gather(1, kept), q.gather(1, kept)
        p, q = (torch.cat([one, 1 - one.sum(1, keepdim=True)], dim=1) for one in (p, q))
        assert total == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)

    def test_it_holds_eight_bytes_per_token_kept(self):
        objective = get_objective("kl")
        objective.observe(0, predictions(1))
        objective.observe(1, predictions(2, vocabulary=40))
        assert objective.nbytes == 8 * 8 * 64 + 8 * 8 * 40

    def test_a_search_minimises_it(self, run):
        result = run(objective="kl", early_stopping=False)
        assert 0.0 < result.best_value <= result.baseline < 1.0
        assert result.to_dict()["objective"] == "kl"


class TestSearches:
    def test_questions_are_searched_by_their_answers(self, run, questions):
        result = run(questions, objective="answers")
        assert result.baseline == pytest.approx(
            math.log(perplexity_of(result, run, questions)), rel=1e-9
        )
        provenance = result.best_config.provenance["search"]
        assert provenance["one_shot_answers"] == result.best_value

    def test_errors_lie_between_none_and_all(self, run, questions):
        result = run(questions, objective="accuracy")
        assert 0.0 <= result.best_value <= 1.0
        provenance = result.best_config.provenance["search"]
        assert provenance["one_shot_questions_missed"] == result.best_value

    @pytest.mark.parametrize("name", ["answers", "accuracy"])
    def test_text_has_no_answers_and_leaves_no_study(self, run, name, tmp_path):
        journal = tmp_path / "search.journal"
        with pytest.raises(ValueError, match=rf"{name}.*needs questions with answers"):
            run(objective=name, storage=str(journal))
        assert not journal.exists()

    def test_a_sum_adds_the_losses(self, run, questions):
        plain = run(questions, n_trials=1).baseline
        kl = run(questions, n_trials=1, objective="kl").baseline
        both = run(questions, n_trials=1, objective={"perplexity": 0.5, "kl": 2.0}).baseline
        assert both == pytest.approx(0.5 * math.log(plain) + 2.0 * kl, rel=1e-9)

    def test_another_objective_is_another_study(self, run, tmp_path):
        run(n_trials=1, storage=tmp_path / "s.log")
        with pytest.raises(ValueError, match=r"objective \('perplexity', now 'kl'\)"):
            run(n_trials=1, storage=tmp_path / "s.log", objective="kl")

    def test_equal_values_are_remarked_on_by_their_name(self, run, questions, monkeypatch, caplog):
        monkeypatch.setattr(OBJECTIVES["answers"], "score", lambda *_: (1.0, 1))
        with caplog.at_level(logging.WARNING):
            run(questions, objective="answers")
        assert "profiles have the same answers, 1.0" in caplog.text


def perplexity_of(result, run, questions):
    return run(questions, n_trials=1).baseline


class TestGoal:
    @pytest.mark.parametrize(
        ("spec", "labels"),
        [
            ("kl", ("kl",)),
            ({"perplexity": 0.5, "kl": 2}, ("0.5 perplexity + 2 kl",)),
            ("accuracy", ("questions missed",)),
            ({"accuracy": 0.5, "kl": 1}, ("0.5 questions missed + 1 kl",)),
            (("perplexity", "bytes"), ("perplexity", "bytes")),
            ([{"kl": 1.0, "answers": 3.0}, "bytes"], ("1 kl + 3 answers", "bytes")),
        ],
    )
    def test_it_reads_names_weights_and_fronts(self, spec, labels):
        goal = Goal.of(spec)
        assert goal.labels == labels
        assert Goal.of(goal.to_json()) == goal

    def test_programs_read_the_names(self):
        goal = Goal.of(["accuracy", {"accuracy": 0.5, "kl": 1}])
        assert goal.names == ("accuracy", "0.5 accuracy + 1 kl")
        assert goal.to_json()[0] == "accuracy"

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("perplexty", "objective must be one of accuracy, answers, kl, perplexity"),
            ("bytes", "leaves nothing to weigh it against"),
            ({}, "objective must be"),
            ({"kl": 0.0}, "weight of 'kl' must be a number above 0"),
            ({"kl": True}, "weight of 'kl'"),
            ({"bytes": 1.0}, "got 'bytes'"),
            (("kl",), "2 to 4"),
            (("kl", "kl"), "must be another one"),
            (3, "objective must be"),
        ],
    )
    def test_anything_else_is_refused(self, spec, message):
        with pytest.raises(ValueError, match=message):
            Goal.of(spec)

    def test_a_name_is_registered_once(self):
        class Again(Objective):
            name = "kl"

            def score(self, index, predictions):
                return 0.0, 1

        with pytest.raises(ValueError, match="registered already"):
            register_objective(Again)


class TestFront:
    @pytest.fixture
    def front(self, run):
        return run(
            n_trials=12,
            objective=("perplexity", "bytes"),
            space=SearchSpace(blocks=4, kv_bits=None, sparsity_range=0.2),
        )

    def test_sizes_differ_and_quality_is_weighed_against_them(self, front):
        rows = front.history
        assert len({row["mean_sparsity"] for row in rows}) > 3
        assert all(0.3 <= row["mean_sparsity"] <= 0.7 for row in rows)
        assert all(row["state"] == "complete" for row in rows)
        points = front.pareto
        assert [p.values["perplexity"] for p in points] == sorted(
            p.values["perplexity"] for p in points
        )
        sizes = [p.values["bytes"] for p in points]
        assert sizes == sorted(sizes, reverse=True)

    @pytest.mark.parametrize(("target", "lowest"), [(0.5, 0.3), (0.2, 0.025)])
    def test_means_begin_at_the_lowest_ratio_or_a_step_above_the_dense_model(
        self, tiny_llama, target, lowest
    ):
        space = SearchSpace(target_sparsity=target, blocks=4, kv_bits=None, sparsity_range=0.2)
        trial = optuna.create_study().ask()
        suggest_on_front(trial, space, ModelShape.of(tiny_llama, space))
        assert trial.distributions[MEAN].low == pytest.approx(lowest)
        assert trial.distributions[MEAN].high == pytest.approx(target + 0.2)

    def test_its_profiles_are_not_compared_with_one_of_another_size(self, run, text_batches):
        space = SearchSpace(blocks=4, kv_bits=None, sparsity_range=0.2)
        arguments = {"n_trials": 2, "held_out": text_batches, "space": space}
        assert run(objective=("perplexity", "bytes"), **arguments).to_dict()["held_out"] is None
        assert run(objective=("perplexity", "kl"), **arguments).to_dict()["held_out"] is not None

    def test_no_profile_beats_one_of_the_front(self, front):
        for point in front.pareto:
            mine = tuple(point.values.values())
            for row in front.history:
                other = tuple(row["values"])
                assert other == mine or any(o > m for o, m in zip(other, mine, strict=True))

    def test_bytes_are_kept_values_and_a_bit_per_weight(self, front, tiny_llama):
        for point in front.pareto:
            kept, numel = 0, 0
            for name, ratio in point.profile.sparsity.ratios.items():
                weight = tiny_llama.get_submodule(name).weight
                numel += weight.numel()
                kept += weight.numel() - round(ratio * weight.numel())
            assert point.values["bytes"] == 4 * kept + numel / 8

    @pytest.mark.parametrize("bits", [8, 4])
    def test_bytes_of_quantised_weights_are_those_of_the_files(
        self, run, tiny_llama, tmp_path, bits
    ):
        space = SearchSpace(blocks=4, kv_bits=None, sparsity_range=0.2, weight_bits=bits)
        front = run(n_trials=1, objective=("perplexity", "bytes"), space=space)
        point = front.pareto[0]
        ratios = point.profile.sparsity.ratios
        config = has.SparsityConfig(
            metric="magnitude", sparsity=ratios, weight_bits=bits, kv_cache=False
        )
        has.prune(tiny_llama, config, None, progress=False)
        tiny_llama.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        saved = sum(tensor.nbytes for name, tensor in stored.items() if ".weight_" in name)
        # A few kept weights round to 0.
        assert saved <= point.values["bytes"] <= 1.005 * saved

    def test_the_uniform_profile_at_the_target_comes_first(self, front):
        assert front.history[0]["uniform"]
        assert front.history[0]["block_ratios"] == [0.5] * 4

    def test_every_point_carries_its_config(self, front):
        point = front.pareto[-1]
        assert dict(point.config.sparsity) == dict(point.profile.sparsity.ratios)
        assert front.best_trial.number == front.pareto[0].trial

    def test_every_config_has_the_mean_and_the_figure_of_its_own_trial(self, front):
        assert front.target_sparsity != front.space.target
        for point in front.pareto:
            row = front.history[point.trial]
            assert point.config.target_sparsity == pytest.approx(row["mean_sparsity"], abs=1e-3)
            searched = point.config.provenance["search"]
            assert searched["best_trial"] == point.trial
            assert searched["one_shot_perplexity"] == point.values["perplexity"]
        assert front.target_sparsity == front.pareto[0].config.target_sparsity

    def test_a_range_from_nothing_on_leaves_out_the_dense_model(self, run):
        space = SearchSpace(blocks=4, kv_bits=None, sparsity_low=0.0, sparsity_high=0.75)
        front = run(n_trials=10, objective=("perplexity", "bytes"), space=space)
        assert all(0 < row["mean_sparsity"] <= 0.75 for row in front.history)
        profiles = [point.profile.to_dict() for point in front.pareto]
        assert all(profiles.count(profile) == 1 for profile in profiles)

    def test_a_single_block_still_has_a_front_of_sizes(self, run):
        space = SearchSpace(blocks=1, kv_bits=None, sparsity_range=0.2)
        front = run(n_trials=3, objective=("perplexity", "bytes"), space=space)
        assert len({row["mean_sparsity"] for row in front.history}) > 1

    def test_one_objective_has_one_point(self, run):
        result = run()
        assert [point.trial for point in result.pareto] == [result.best_trial.number]

    def test_a_detached_result_keeps_its_front(self, front):
        assert [p.trial for p in front.detached().pareto] == [p.trial for p in front.pareto]

    def test_bytes_need_ratios_to_choose(self, run):
        with pytest.raises(ValueError, match="'bytes' needs ratios to choose from"):
            run(objective=("perplexity", "bytes"), space=SearchSpace(target_sparsity=None))


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("kl", "kl"),
        ("perplexity=0.5, kl=2", {"perplexity": 0.5, "kl": 2.0}),
        ("perplexity,bytes", ("perplexity", "bytes")),
    ],
)
def test_the_command_line_says_it_shorter(text, spec):
    assert Goal.parse(text) == Goal.of(spec)


@pytest.mark.parametrize("text", ["perplexity=much", "kl=1,bytes", "kl=", ""])
def test_what_the_command_line_cannot_say_is_refused(text):
    with pytest.raises(ValueError, match="objective must be"):
        Goal.parse(text)
