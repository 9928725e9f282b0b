"""Several workers on one study: nothing is evaluated twice, nothing is lost, none is too many."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

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

TRIALS = 12

WORKER = """
import os, signal, sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from hf_adaptive_sparse.search.evaluator import Evaluator
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search

torch.set_num_threads(1)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=2, num_key_value_heads=1,
)).eval()
generator = torch.Generator().manual_seed(5)
batches = [{"input_ids": torch.randint(0, 64, (1, 24), generator=generator)} for _ in range(2)]

storage, log, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
original, calls = Evaluator.__call__, []

def watched(self, candidate, reporter=None):
    calls.append(1)
    with open(log, "a") as file:
        file.write(candidate.digest + "\\n")
    time.sleep(0.15)
    if len(calls) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, candidate, reporter)

Evaluator.__call__ = watched
print("ready", flush=True)
sys.stdin.readline()
result = search(
    model, batches[:1], batches[1:], SearchSpace(blocks=4, kv_bits=None),
    n_trials=TRIALS, storage=storage, early_stopping=False, progress=False,
)
print(result.best_value, len(result.history))
""".replace("TRIALS", str(TRIALS))


def start(storage: str, log: Path, kill_at: int = 0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, storage, str(log), str(kill_at)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def run_together(workers: list[subprocess.Popen]) -> list[str]:
    """Let all workers go at the same moment, and return what each printed last."""
    for worker in workers:
        assert worker.stdout.readline() == "ready\n", worker.communicate()[1]
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    said = []
    for worker in workers:
        out, err = worker.communicate(timeout=240)
        assert worker.returncode in (0, -signal.SIGKILL), err
        said.append(out.strip())
    return said


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
    said = run_together([start(storage, log), start(storage, log), start(storage, log, kill_at=2)])
    study = load(storage)
    assert_whole(study)
    best = tally(study).best.value
    assert said[:2] == [f"{best} {len(study.trials)}"] * 2
    assert said[2] == ""

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
    run_together([start(storage, log, kill_at=3), start(storage, log, kill_at=4)])
    assert len(tally(load(storage)).running) in (1, 2)
    run_together([start(storage, log)])
    study = load(storage)
    assert_whole(study)
    killed = [t for t in study.trials if t.state == TrialState.FAIL and not set_aside(t)]
    assert [t.user_attrs[RETRY_OF] for t in study.trials if RETRY_OF in t.user_attrs] == [
        t.number for t in killed
    ]


def set_aside(trial: optuna.trial.FrozenTrial) -> bool:
    return WITHDRAWN in trial.user_attrs or DUPLICATE_OF in trial.user_attrs
