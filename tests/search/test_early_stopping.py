"""Trials that are given up early: when, with which estimate, and what the study makes of them."""

from __future__ import annotations

import math

import optuna
import pytest
import torch
from optuna.trial import TrialState

from hf_adaptive_sparse.evaluation.perplexity import perplexity
from hf_adaptive_sparse.search.candidate_projection import Draw, project
from hf_adaptive_sparse.search.evaluator import Evaluator, open_evaluator
from hf_adaptive_sparse.search.runner import FEWEST_BATCHES, TrialRunner
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search
from hf_adaptive_sparse.search.suggesting import uniform_candidate
from hf_adaptive_sparse.search.trials import tally

SPACE = SearchSpace(blocks=4, kv_bits=None)
BATCHES = 12


@pytest.fixture
def evaluation():
    generator = torch.Generator().manual_seed(7)
    return [
        {"input_ids": torch.randint(5, 128, (1, 12 + index), generator=generator)}
        for index in range(BATCHES)
    ]


@pytest.fixture
def run(tiny_llama, text_batches, evaluation):
    def call(**changes):
        arguments = {"n_trials": 5, "warm_start": False, "progress": False} | changes
        arguments.setdefault("space", SPACE)
        return search(tiny_llama, text_batches[:1], evaluation, **arguments)

    return call


@pytest.fixture
def evaluator(tiny_llama, text_batches, evaluation):
    shape = ModelShape.of(tiny_llama, SPACE)
    with open_evaluator(
        tiny_llama,
        SPACE,
        shape,
        uniform_candidate(SPACE, shape),
        calibration=text_batches[:1],
        evaluation=evaluation,
        metric="wanda",
        progress=False,
    ) as opened:
        opened.other = project(Draw((0.55, 0.5, 0.5, 0.45), {}), SPACE, shape)
        yield opened


class Reports:
    """A reporter that stops after a number of batches."""

    def __init__(self, stop_after=math.inf):
        self.stop_after, self.values = stop_after, {}

    def report(self, value, step):
        self.values[step] = value

    def should_prune(self):
        return len(self.values) >= self.stop_after


def worse_by(losses):
    """Make every profile but the uniform one lose so much more per token, batch by batch."""

    def score(self, index, candidate, settings):
        tokens = 10 + index
        loss = 2.0 + index % 5  # batches differ far more than profiles
        if candidate.digest != self.uniform.digest:
            loss += losses(index)
        return {"perplexity": (loss * tokens, tokens)}

    return score


def test_profiles_worse_on_every_batch_are_stopped_at_the_first_chance(run, monkeypatch):
    monkeypatch.setattr(Evaluator, "score", worse_by(lambda index: 0.01 + index * 1e-4))
    result = run()
    rows = result.history
    assert [row["state"] for row in rows] == ["complete"] + ["pruned"] * 4
    assert [row["batches"] for row in rows] == [BATCHES] + [FEWEST_BATCHES] * 4
    assert result.best_trial.number == 0
    assert [row["value"] for row in rows[1:]] == [None] * 4
    counts = tally(result.study)
    assert (len(counts.completed), len(counts.stopped), counts.attempts) == (1, 4, 5)


def test_better_profiles_are_never_stopped(run, monkeypatch):
    calls = []

    def score(self, index, candidate, settings):
        calls.append(candidate.digest)
        tokens = 10
        known = list(dict.fromkeys(calls))  # the later a profile comes, the better it is
        loss = 3.0 + index % 5 - 0.01 * known.index(candidate.digest)
        return {"perplexity": (loss * tokens, tokens)}

    monkeypatch.setattr(Evaluator, "score", score)
    result = run()
    assert [row["state"] for row in result.history] == ["complete"] * 5
    assert result.best_trial.number == 4


def test_profiles_that_cannot_be_told_apart_are_evaluated_in_full(run, monkeypatch):
    monkeypatch.setattr(Evaluator, "score", worse_by(lambda index: 0.01 * (-1) ** index))
    assert {row["batches"] for row in run().history} == {BATCHES}


def test_the_estimate_adds_the_paired_difference_to_the_uniform_profile(evaluator):
    uniform = evaluator(evaluator.uniform, Reports())
    full = evaluator(evaluator.other, Reports())
    reports = Reports(stop_after=5)
    stopped = evaluator(evaluator.other, reports)
    assert (stopped.batches, stopped.stopped, full.stopped) == (5, True, False)

    seen = [evaluator.evaluation[index] for index in evaluator.order[:5]]
    mine = math.log(scored(evaluator, evaluator.other, seen))
    theirs = math.log(scored(evaluator, evaluator.uniform, seen))
    assert stopped.value == pytest.approx(uniform.value * math.exp(mine - theirs), rel=1e-6)
    first = [evaluator.evaluation[evaluator.order[0]]]
    mine = math.log(scored(evaluator, evaluator.other, first))
    theirs = math.log(scored(evaluator, evaluator.uniform, first))
    assert reports.values[0] == pytest.approx(uniform.value * math.exp(mine - theirs), rel=1e-6)
    assert full.value == scored(evaluator, evaluator.other, evaluator.evaluation)


def scored(evaluator, candidate, batches):
    evaluator.mask.apply(candidate.ratios)
    return perplexity(evaluator.model, batches, candidate.kv_cache)


def test_the_uniform_profile_reports_its_own_value(evaluator):
    reports = Reports(stop_after=1)
    evaluation = evaluator(evaluator.uniform, reports)
    assert not evaluation.stopped
    assert set(reports.values.values()) == {evaluation.value}


def test_without_its_trial_the_uniform_profile_is_evaluated_for_comparison(evaluator):
    fresh = Reports()
    evaluator(evaluator.other, fresh)
    evaluator._reference = None
    evaluator(evaluator.uniform, Reports())
    again = Reports()
    evaluator(evaluator.other, again)
    assert fresh.values == again.values


def test_batches_are_taken_in_one_shuffled_order(evaluator):
    assert sorted(evaluator.order) == list(range(BATCHES))
    assert evaluator.order != list(range(BATCHES))


def test_complete_values_do_not_depend_on_early_stopping(run):
    stopping, full = run(n_trials=8), run(n_trials=8, early_stopping=False)
    assert {row["state"] for row in full.history} == {"complete"}
    known = {tuple(row["block_ratios"]): row["value"] for row in full.history}
    same = [row for row in stopping.history if tuple(row["block_ratios"]) in known]
    assert len(same) >= 2
    for row in same:
        if row["value"] is not None:
            assert row["value"] == known[tuple(row["block_ratios"])]


def test_a_repetition_takes_the_figures_of_the_batches_too():
    study = optuna.create_study()
    former = optuna.trial.create_trial(value=1.5, intermediate_values={0: 1.0, 1: 2.0})
    study.add_trial(former)
    trial = study.ask()
    assert TrialRunner._repeat(object.__new__(TrialRunner), trial, study.trials[0]) == 1.5
    study.tell(trial, 1.5)
    assert study.trials[1].intermediate_values == former.intermediate_values


def test_a_stopped_profile_is_known_and_not_evaluated_again(run, monkeypatch, tmp_path):
    evaluated = []
    score = worse_by(lambda index: 0.01)

    def counting(self, index, candidate, settings):
        evaluated.append((candidate.digest, index))
        return score(self, index, candidate, settings)

    monkeypatch.setattr(Evaluator, "score", counting)
    space = SearchSpace(blocks=2, sparsity_range=0.025, kv_bits=None)
    result = run(space=space, n_trials=5, storage=tmp_path / "study.log")
    repeated = [t for t in result.study.trials if "duplicate_of" in t.user_attrs]
    stopped = [t for t in repeated if t.state == TrialState.PRUNED]
    assert stopped
    for trial in stopped:
        assert trial.value == result.study.trials[trial.user_attrs["duplicate_of"]].value
    assert len(evaluated) == len(set(evaluated))
    assert tally(result.study).attempts == 5
