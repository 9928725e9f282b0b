"""One trial at a time, and who else may have ended it."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from hf_adaptive_sparse.search.errors import TrialFailure
from hf_adaptive_sparse.search.runner import TrialRunner
from hf_adaptive_sparse.search.worker import working


@pytest.fixture
def study():
    return optuna.create_study()


def run_one(study, evaluate, monkeypatch):
    runner = object.__new__(TrialRunner)  # of which nothing else is asked
    runner.study = study
    monkeypatch.setattr(TrialRunner, "_evaluate", lambda self, trial: evaluate(trial))
    with working() as runner.worker:
        runner._run_one()


@pytest.mark.parametrize("outcome", ["value", "failure", "stopped"])
def test_what_another_worker_ended_first_stays_as_it_is(study, outcome, monkeypatch, caplog):
    """A database without row locks may hand a waiting trial to two workers."""

    def evaluate(trial):
        study.tell(trial.number, 2.0)
        if outcome == "failure":
            raise TrialFailure("out of memory", repeatable=True)
        if outcome == "stopped":
            raise optuna.TrialPruned
        return 1.0

    run_one(study, evaluate, monkeypatch)
    (trial,) = study.trials
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 2.0)
    assert caplog.text.count("ended by another worker") == 1


def test_an_error_behind_the_evaluation_is_not_taken_for_that_either(study, monkeypatch):
    def mistaken(*_):
        raise ValueError("a mistake of the sampler")

    monkeypatch.setattr(study.sampler, "after_trial", mistaken)
    with pytest.raises(ValueError, match="a mistake of the sampler"):
        run_one(study, lambda trial: 1.0, monkeypatch)


def test_an_error_of_the_evaluation_is_not_taken_for_that(study, monkeypatch):
    def evaluate(trial):
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        run_one(study, evaluate, monkeypatch)
    assert study.trials[0].state == TrialState.FAIL
