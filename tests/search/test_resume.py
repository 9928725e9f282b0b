"""A search that is stopped, killed or run against another study."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
from pathlib import Path

import optuna
import pytest
import torch
from optuna.storages.journal import JournalFileSymlinkLock
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from hf_adaptive_sparse.search import evaluator as evaluator_module
from hf_adaptive_sparse.search import runner
from hf_adaptive_sparse.search.errors import SearchError, StorageError, StudyMismatch
from hf_adaptive_sparse.search.evaluator import Evaluator
from hf_adaptive_sparse.search.runner import TrialRunner
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.storage import open_storage, storage_errors
from hf_adaptive_sparse.search.study import STUDY_NAME, search
from hf_adaptive_sparse.search.trials import tally
from tests.search import processes

SPACE = SearchSpace(blocks=4, kv_bits=None)


def counted(result):
    kept = [row for row in result.history if row["state"] == "complete"]
    return [(row["value"], row["block_ratios"]) for row in kept]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["study.db", "study.journal"])
def test_a_killed_search_resumes_and_loses_no_completed_trial(tmp_path, name):
    storage = tmp_path / name
    processes.run_together(storage, tmp_path / "evaluated", kill_at=[5], n_trials=14)
    before = optuna.load_study(study_name=STUDY_NAME, storage=open_storage(storage))
    done = {t.number: t.value for t in before.trials if t.state == TrialState.COMPLETE}
    assert len(done) == 4
    assert [t.state for t in before.trials].count(TrialState.RUNNING) == 1

    resumed = processes.small_search(storage, n_trials=14)
    assert tally(resumed.study).attempts == 14
    assert {number: resumed.history[number]["value"] for number in done} == done
    assert [row["state"] for row in resumed.history].count("fail") == 1
    straight = processes.small_search(None, n_trials=14)
    assert counted(resumed) == counted(straight)


@pytest.fixture
def run(tiny_llama, text_batches):
    def call(**changes):
        arguments = {"space": SPACE, "n_trials": 3, "progress": False} | changes
        model = arguments.pop("model", tiny_llama)
        calibration = arguments.pop("calibration", text_batches[:2])
        evaluation = arguments.pop("evaluation", text_batches[2:])
        return search(model, calibration, evaluation, **arguments)

    return call


@pytest.mark.parametrize("name", ["study.db", "study.log"])
def test_an_interrupted_search_goes_on_where_it_stopped(run, tmp_path, monkeypatch, name):
    straight = run(n_trials=6)
    original, calls = Evaluator.measure, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(Evaluator, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(n_trials=6, storage=tmp_path / name)
    resumed = run(n_trials=6, storage=tmp_path / name)
    assert len(calls) == 7
    kept = [row for row in resumed.history if row["state"] == "complete"]
    assert [(r["value"], r["block_ratios"]) for r in kept] == [
        (r["value"], r["block_ratios"]) for r in straight.history
    ]
    assert [row["state"] for row in resumed.history].count("fail") == 1


def test_an_interrupted_baseline_is_tried_again(run, tmp_path, monkeypatch):
    storage = tmp_path / "study.log"
    with monkeypatch.context() as patch:

        def interrupted(*_):
            raise KeyboardInterrupt

        patch.setattr(Evaluator, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(storage=storage)
    result = run(storage=storage)
    baselines = [row for row in result.history if row["uniform"]]
    assert [row["state"] for row in baselines] == ["fail", "complete"]
    assert result.baseline == baselines[1]["value"]


def test_a_finished_study_is_returned_without_ranking_or_evaluating(run, tmp_path, monkeypatch):
    storage = f"sqlite:///{tmp_path}/study.db"
    first = run(storage=storage)
    monkeypatch.setattr(evaluator_module, "rank_model", None)
    assert run(storage=storage).history == first.history


def test_more_trials_extend_a_study(run, tmp_path):
    run(storage=tmp_path / "study.log", n_trials=2)
    extended = run(storage=tmp_path / "study.log", n_trials=5)
    assert [row["state"] for row in extended.history] == ["complete"] * 5
    assert [row["uniform"] for row in extended.history].count(True) == 1


def test_studies_of_one_storage_keep_apart_by_name(run, tmp_path):
    run(storage=tmp_path / "study.log", study_name="a")
    other = run(
        storage=tmp_path / "study.log",
        study_name="b",
        space=SearchSpace(blocks=2, kv_bits=None),
    )
    assert len(other.history[0]["block_ratios"]) == 2


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"space": SearchSpace(blocks=2, kv_bits=None)}, r"space\.blocks \(4, now 2\)"),
        (
            {"space": SearchSpace(blocks=4, target_sparsity=0.6, kv_bits=None)},
            r"space\.target_sparsity \(0\.5, now 0\.6\)",
        ),
        ({"metric": "wanda"}, r"metric \('lognorm', now 'wanda'\)"),
        ({"modules_to_not_convert": ["*.q_proj"]}, "modules_to_not_convert"),
        ({"calibration": [{"input_ids": torch.ones(1, 9, dtype=torch.long)}]}, "calibration"),
        ({"evaluation": [{"input_ids": torch.ones(2, 9, dtype=torch.long)}]}, "evaluation"),
    ],
)
def test_a_study_made_for_something_else_is_refused(run, tmp_path, change, difference):
    run(storage=tmp_path / "study.log", n_trials=1)
    with pytest.raises(SearchError, match=rf"made for something else.*{difference}"):
        run(storage=tmp_path / "study.log", n_trials=1, **change)


def test_a_study_made_for_other_weights_is_refused(run, tmp_path, tiny_llama):
    run(storage=tmp_path / "study.log", n_trials=1)
    tiny_llama.model.layers[2].mlp.gate_proj.weight.data.mul_(1.01)
    with pytest.raises(SearchError, match="weights"):
        run(storage=tmp_path / "study.log", n_trials=1)


def test_a_study_of_other_library_versions_resumes_with_a_warning(run, tmp_path, caplog):
    storage = open_storage(tmp_path / "study.log")
    result = run(storage=storage, n_trials=1)
    result.study.set_user_attr("versions", {"torch": "1.0"})
    with caplog.at_level(logging.WARNING):
        run(storage=storage, n_trials=2)
    assert "values may differ" in caplog.text


def test_a_study_of_another_config_resumes_with_a_warning(run, tmp_path, tiny_llama, caplog):
    storage = tmp_path / "study.log"
    run(storage=storage, n_trials=1)
    tiny_llama.config.use_cache = not tiny_llama.config.use_cache  # of no effect
    run(storage=storage, n_trials=1)
    assert "config" not in caplog.text
    tiny_llama.config.rope_parameters = {**tiny_llama.config.rope_parameters, "rope_theta": 5.0}
    run(storage=storage, n_trials=1)
    assert "values may differ: rope_parameters.rope_theta (10000.0, now 5.0)." in caplog.text


def test_other_data_that_another_seed_drew_are_refused_with_both_seeds(run, tmp_path):
    run(storage=tmp_path / "study.log", n_trials=1)
    drawn = [{"input_ids": torch.ones(1, 9, dtype=torch.long)}]
    with pytest.raises(
        StudyMismatch, match=r"What differs: calibration .*\. The seed differs, too \(0, now 1\)"
    ):
        run(storage=tmp_path / "study.log", n_trials=1, seed=1, calibration=drawn)
    with pytest.raises(StudyMismatch) as caught:
        run(storage=tmp_path / "study.log", n_trials=1, calibration=drawn)
    assert "seed" not in str(caught.value)


def test_somebody_elses_study_is_left_alone(run, tmp_path):
    storage = open_storage(tmp_path / "study.log")
    study = optuna.create_study(study_name=STUDY_NAME, storage=storage)
    study.add_trial(optuna.create_trial(value=1.0))
    with pytest.raises(SearchError, match="was not made by hf_adaptive_sparse"):
        run(storage=storage)


@pytest.mark.parametrize("directions", [["maximize"], ["minimize", "minimize"]])
def test_an_empty_study_of_other_directions_is_left_alone(run, tmp_path, directions):
    storage = open_storage(tmp_path / "study.log")
    study = optuna.create_study(study_name=STUDY_NAME, storage=storage, directions=directions)
    with pytest.raises(StudyMismatch, match=f"minimize for .*, got {', '.join(directions)}"):
        run(storage=storage)
    assert study.user_attrs == {}
    assert study.trials == []


def test_a_locked_database_is_one_clear_error(run, tmp_path, monkeypatch):
    path = tmp_path / "study.db"
    run(storage=path, n_trials=1)
    blocker = sqlite3.connect(path)
    blocker.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr("hf_adaptive_sparse.search.storage.BUSY_SECONDS", 0.1)
    try:
        with pytest.raises(StorageError, match=r"study\.db cannot be used: .*locked"):
            run(storage=path)
    finally:
        blocker.close()


def test_a_database_that_becomes_locked_keeps_what_was_completed(run, tmp_path, monkeypatch):
    path = tmp_path / "study.db"
    blocker = sqlite3.connect(path, isolation_level=None)
    impatient = optuna.storages.RDBStorage(
        f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 0.1}}
    )
    original, calls = Evaluator.measure, []

    def locking(*arguments):
        calls.append(1)
        if len(calls) == 3:
            blocker.execute("BEGIN EXCLUSIVE")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "measure", locking)
        with pytest.raises(
            StorageError, match=r"RDBStorage cannot be used: .*locked.*trials are kept"
        ):
            run(storage=impatient)
    blocker.close()
    resumed = run(storage=path)
    assert [row["state"] for row in resumed.history].count("complete") == 3


def test_a_database_on_a_full_disk_asks_for_space(tmp_path):
    full = sqlite3.OperationalError("database or disk is full")
    with (
        pytest.raises(StorageError, match=r"disk is full\. Free space there; completed") as caught,
        storage_errors(str(tmp_path / "study.db")),
    ):
        raise OperationalError("INSERT", {}, full)
    assert "password" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nodialect://user:secret@host/db", "nodialect://…@host/db"),
        ("nodialect://host/db?user=me&password=secret", "nodialect://host/db?…"),
        ("nodialect://host/db?password=a@secret", "nodialect://…"),
        ("nodialect://user:a?secret@host/db", "nodialect://…"),
        ("nodialect://host/db", "nodialect://host/db"),
    ],
)
def test_passwords_stay_out_of_messages(run, url, shown):
    with pytest.raises(StorageError) as caught:
        run(storage=url)
    assert "secret" not in str(caught.value)
    assert f"The storage {shown} cannot be used" in str(caught.value)


def test_a_torn_last_line_of_a_journal_is_dropped(run, tmp_path, caplog):
    path = tmp_path / "study.journal"
    run(storage=path, n_trials=2)
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"x","study_')
    result = run(storage=path, n_trials=3)
    assert "unfinished record" in caplog.text
    assert [row["state"] for row in result.history] == ["complete"] * 3
    assert len(run(storage=path, n_trials=3).history) == 3


def test_a_journal_that_can_grow_no_more_is_one_clear_error(run, tmp_path):
    """As on a full disk: what was completed is kept, a record that was cut off is dropped."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "study.journal"
    run(storage=path, n_trials=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 2000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"study\.journal cannot be used: .* resumes the"):
            run(storage=path, n_trials=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [row["state"] for row in run(storage=path).history].count("complete") == 3


@pytest.mark.parametrize("called", ["symlink", "unlink"])
def test_an_interruption_at_a_journals_lock_is_one(run, tmp_path, monkeypatch, called):
    """Optuna gives up the lock once more then, which fails and hides the interruption."""
    path = tmp_path / "study.journal"
    run(storage=path, n_trials=1)
    call, interrupts = getattr(os, called), [KeyboardInterrupt()]

    def interrupted(*arguments, **options):
        if called == "unlink":
            call(*arguments, **options)
        if ".lock" in str(arguments[-1]) and interrupts:
            raise interrupts.pop()
        if called == "symlink":
            call(*arguments, **options)

    monkeypatch.setattr(os, called, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(storage=path, n_trials=3)
    assert not interrupts
    assert [row["state"] for row in run(storage=path, n_trials=3).history] == ["complete"] * 3


def test_an_error_after_an_interruption_that_was_handled_is_named(run):
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(StorageError, match="cannot be used"):
            run(storage="sqlite:////no/such/folder/s.db")


def test_a_lock_that_a_killed_process_left_is_not_waited_for_without_end(
    run, tmp_path, monkeypatch
):
    """Optuna tells the age of a lock by what it links to, which a relative path may not be."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(JournalFileSymlinkLock.__init__, "__defaults__", (3,))
    journal = Path("out/study.journal")
    run(storage=journal, n_trials=1)
    with monkeypatch.context() as patch:
        patch.setattr(JournalFileSymlinkLock, "release", lambda lock: None)
        open_storage(journal)
    assert Path("out/study.journal.lock").is_symlink()

    def alarm(*_):
        raise AssertionError("The lock is waited for.")

    previous = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(30)
    try:
        assert len(run(storage=journal, n_trials=2).history) == 2
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def test_a_profile_without_any_choice_is_tried_again(
    tiny_llama, text_batches, tmp_path, monkeypatch
):
    """Its trial has no parameters, by which others are told from trials that drew nothing."""
    space = SearchSpace(blocks=4, kv_bits=None, sparsity_range=0)

    def run():
        storage = tmp_path / "study.journal"
        data = (text_batches[:1], text_batches[1:])
        return search(tiny_llama, *data, space, n_trials=1, storage=storage, progress=False)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    def no_end(seconds):
        raise AssertionError("the search waits for a trial that nobody will run")

    # While it is evaluated, and in the moment before it is drawn again.
    for owner, name in ((Evaluator, "measure"), (TrialRunner, "_evaluate")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, interrupt)
            run()
    monkeypatch.setattr(runner.time, "sleep", no_end)
    assert [row["state"] for row in run().history if row["state"] == "complete"] == ["complete"]
