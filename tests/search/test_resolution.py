"""Telling the best profile from the uniform one, or saying that the data do not suffice."""

from __future__ import annotations

import logging

import numpy as np
import optuna
import pytest
import torch

from hf_adaptive_sparse.search.evaluator import Evaluator
from hf_adaptive_sparse.search.resolution import Gain, gain_over_uniform
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search
from hf_adaptive_sparse.search.trials import UNIFORM, tally


def study_of(uniform, best):
    study = optuna.create_study()
    for reports, is_uniform in ((uniform, True), (best, False)):
        study.add_trial(
            optuna.create_trial(
                value=float(np.mean(reports)),
                intermediate_values=dict(enumerate(reports)),
                user_attrs={UNIFORM: is_uniform, "profile_digest": str(is_uniform)},
            )
        )
    return study


def test_the_error_is_that_of_the_paired_differences():
    differences = [0.1, 0.3, 0.2, 0.4]
    gain = gain_over_uniform(tally(study_of([5.0] * 4, [5.0 - d for d in differences])))
    assert gain.value == pytest.approx(0.25)
    assert gain.standard_error == pytest.approx(np.std(differences, ddof=1) / 2)
    assert gain.batches == 4
    assert gain.is_certain


def test_the_tokens_that_suffice_make_the_gain_two_errors():
    gain = Gain(value=0.1, standard_error=0.1, batches=4)
    assert not gain.is_certain
    assert gain.sufficient(1000) == 4000
    assert Gain(0.0, 0.1, 4).sufficient(1000) is None


@pytest.mark.parametrize("best", [[5.0] * 4, [6.0] * 4])
def test_a_uniform_winner_has_no_gain(best):
    assert gain_over_uniform(tally(study_of([5.0] * 4, best))) is None


@pytest.mark.parametrize(("noise", "warned"), [(0.05, True), (0.0, False)])
def test_a_search_says_when_its_data_do_not_suffice(
    tiny_llama, text_batches, monkeypatch, caplog, noise, warned
):
    evaluation = [{"input_ids": torch.full((1, 10 + i), 7)} for i in range(8)]

    def score(self, index, candidate, settings):
        loss = 4.0
        if candidate.digest != self.uniform.digest:
            loss += -0.01 + noise * (1 if index % 2 else -1)
        return {"perplexity": (loss, 1)}

    monkeypatch.setattr(Evaluator, "score", score)
    with caplog.at_level(logging.WARNING):
        result = search(
            tiny_llama,
            text_batches[:1],
            evaluation,
            SearchSpace(blocks=4, kv_bits=None),
            n_trials=2,
            warm_start=False,
            progress=False,
        )
    assert ("it may be chance" in caplog.text) == warned
    if warned:
        assert "8 batches with 108 tokens" in caplog.text
        assert "tokens would tell them apart" in caplog.text
    assert result.gain.batches == 8
