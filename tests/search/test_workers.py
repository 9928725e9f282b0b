"""Several workers on one study: nothing is evaluated twice, nothing is lost, none is too many."""

from __future__ import annotations

from collections import Counter
from functools import partial

import optuna
import pytest
from optuna.trial import TrialState

from hf_adaptive_sparse.search.storage import open_storage, quiet_optuna
from hf_adaptive_sparse.search.study import STUDY_NAME
from hf_adaptive_sparse.search.trials import (
    DIGEST,
    DUPLICATE_OF,
    RETRY_OF,
    UNIFORM,
    WITHDRAWN,
    tally,
)
from tests import servers
from tests.search import processes

TRIALS = 12
run_together = partial(processes.run_together, n_trials=TRIALS, early_stopping=False)


def load(storage: str) -> optuna.Study:
    with quiet_optuna():
        return optuna.load_study(study_name=STUDY_NAME, storage=open_storage(storage))


def assert_whole(study: optuna.Study) -> None:
    """Exactly ``TRIALS`` distinct profiles, each by one trial, and one baseline."""
    count = tally(study)
    assert count.attempts == TRIALS
    digests = Counter(trial.user_attrs[DIGEST] for trial in count.completed)
    assert len(digests) == TRIALS
    assert not count.running
    assert not count.waiting
    assert not count.interrupted
    assert [trial.number for trial in count.completed if trial.user_attrs[UNIFORM]] == [
        count.baseline.number
    ]


@pytest.fixture(params=["journal", "sqlite", "postgresql", "redis"])
def storage(request, tmp_path):
    if request.param == "postgresql":
        with servers.postgres() as url:
            yield url
    elif request.param == "redis":
        with servers.redis() as url:
            yield url
    else:
        yield str(tmp_path / {"journal": "study.journal", "sqlite": "study.db"}[request.param])


@pytest.mark.slow
def test_three_workers_of_which_one_is_killed_share_a_study(storage, tmp_path):
    log = tmp_path / "evaluated"
    found = run_together(storage, log, kill_at=[0, 0, 2])
    study = load(storage)
    assert_whole(study)
    assert found == [(tally(study).best.value, len(study.trials))] * 2

    evaluated = Counter(log.read_text().split())
    retries = [trial for trial in study.trials if RETRY_OF in trial.user_attrs]
    if storage.endswith(".db"):
        # SQLite locks no rows: two workers may repeat a dead one's trial, or be handed one that
        # waits, of whom one ends it and the other finds it ended. How often that happens is chance;
        # that each profile counts once, as `assert_whole` has seen, is not.
        assert retries
        assert len(evaluated) == TRIALS
        return
    assert len(retries) == 1
    killed = study.trials[retries[0].user_attrs[RETRY_OF]]
    assert killed.state == TrialState.FAIL
    assert retries[0].params == killed.params
    # The killed worker had begun to evaluate; every other profile was evaluated once.
    assert evaluated.pop(killed.user_attrs[DIGEST]) == 2
    assert set(evaluated.values()) == {1}
    assert len(evaluated) == TRIALS - 1


@pytest.mark.slow
def test_the_last_workers_death_leaves_a_study_that_resumes_whole(tmp_path):
    storage, log = str(tmp_path / "study.journal"), tmp_path / "evaluated"
    run_together(storage, log, kill_at=[3, 4])
    assert len(tally(load(storage)).running) in (1, 2)
    run_together(storage, log, kill_at=[0])
    study = load(storage)
    assert_whole(study)
    killed = [t for t in study.trials if t.state == TrialState.FAIL and not set_aside(t)]
    assert [t.user_attrs[RETRY_OF] for t in study.trials if RETRY_OF in t.user_attrs] == [
        t.number for t in killed
    ]


def set_aside(trial: optuna.trial.FrozenTrial) -> bool:
    return WITHDRAWN in trial.user_attrs or DUPLICATE_OF in trial.user_attrs
