"""Claims, recovery and leases, one storage operation at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import datetime, timedelta

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from hf_adaptive_sparse.search import opening, recovery, worker
from hf_adaptive_sparse.search.claims import TICKET, claim, judge
from hf_adaptive_sparse.search.errors import SearchError
from hf_adaptive_sparse.search.opening import FINGERPRINT, open_study
from hf_adaptive_sparse.search.per_trial_sampler import trial_place
from hf_adaptive_sparse.search.recovery import KILLS, MOST_KILLS, recover
from hf_adaptive_sparse.search.runner import has_work
from hf_adaptive_sparse.search.trials import (
    DIGEST,
    FAILURE,
    RETRY_OF,
    UNIFORM,
    WITHDRAWN,
    tally,
)
from hf_adaptive_sparse.search.worker import (
    LEASE_ATTRIBUTE,
    WORKER_ATTRIBUTE,
    Watch,
    Worker,
    lease,
    machine_name,
    process_start,
    working,
)

DISTRIBUTION = optuna.distributions.FloatDistribution(0.0, 1.0)


@pytest.fixture
def study():
    return optuna.create_study()


def running(study, name=None, x=0.5):
    trial = study.ask()
    trial.suggest_float("x", 0.0, 1.0)
    if name is not None:
        trial.set_user_attr(WORKER_ATTRIBUTE, str(name))
    return trial


def claimed(study, digest, ticket, name=None):
    trial = running(study, name)
    trial.set_user_attr(DIGEST, digest)
    trial.set_user_attr(TICKET, ticket)
    return trial


def dead_worker():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = Worker(machine_name(), child.pid, process_start(child.pid), "x")
    child.communicate()
    return name


def verdict(study, trial, n_trials=10):
    return judge(study.trials[trial.number], tally(study), n_trials)


class TestJudging:
    def test_of_two_claims_on_a_profile_the_lower_ticket_holds_it(self, study):
        late, early = claimed(study, "a", 2), claimed(study, "a", 1)
        assert verdict(study, early).holder is None
        assert verdict(study, late).holder.number == early.number

    def test_equal_tickets_are_ordered_by_number(self, study):
        first, second = claimed(study, "a", 1), claimed(study, "a", 1)
        assert verdict(study, first).holder is None
        assert verdict(study, second).holder.number == first.number

    def test_a_finished_trial_holds_its_profile_whatever_its_ticket(self, study):
        late, early = claimed(study, "a", 5), claimed(study, "a", 1)
        study.tell(late.number, 1.0)
        assert verdict(study, early).holder.number == late.number

    def test_a_claim_beyond_the_number_of_trials_is_surplus(self, study):
        study.tell(claimed(study, "a", 1).number, 1.0)
        second, third = claimed(study, "b", 2), claimed(study, "c", 3)
        assert not verdict(study, second, n_trials=2).surplus
        assert verdict(study, third, n_trials=2).surplus
        assert not verdict(study, third, n_trials=3).surplus

    def test_claims_on_one_profile_count_once(self, study):
        claimed(study, "a", 1), claimed(study, "a", 2)
        assert not verdict(study, claimed(study, "b", 3), n_trials=2).surplus

    def test_pending_trials_go_before_a_fresh_one(self, study):
        study.enqueue_trial({"x": 0.1})
        popped = claimed(study, "a", 1)
        study.enqueue_trial({"x": 0.2})
        waiting = study.trials[1].number
        study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={DIGEST: "lost"}))
        fresh = optuna.trial.Trial(study, study._storage.create_new_trial(study._study_id))
        fresh.set_user_attr(DIGEST, "b")
        fresh.set_user_attr(TICKET, 2)
        assert study.trials[waiting].state == TrialState.WAITING
        assert verdict(study, fresh, n_trials=3).surplus
        assert not verdict(study, fresh, n_trials=4).surplus
        assert not verdict(study, popped, n_trials=1).surplus


class TestClaiming:
    def test_tickets_rise(self, study):
        first, second = running(study), running(study)
        first.set_user_attr(TICKET, 7)
        claim(study, second, "b", 10, Watch())
        assert study.trials[second.number].user_attrs[TICKET] == 8

    def test_a_trial_that_is_still_drawing_is_waited_for(self, study):
        with working() as name:
            slow, fast = running(study, name), running(study, name)
            answers = []
            thread = threading.Thread(
                target=lambda: answers.append(claim(study, fast, "a", 10, Watch()))
            )
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
            assert claim(study, slow, "b", 10, Watch()).holder is None
            thread.join(10)
        assert [answer.holder for answer in answers] == [None]

    def test_a_trial_whose_worker_is_gone_is_not(self, study):
        running(study, dead_worker())
        assert claim(study, running(study), "a", 10, Watch()).holder is None


class TestWorkers:
    def test_a_worker_is_told_alive_from_gone(self):
        assert dead_worker().is_gone is True
        with working() as name:
            assert name.is_gone is False
        assert name.is_gone is True

    def test_a_process_id_that_was_used_again_is_another_worker(self):
        with working() as name:
            other = Worker(name.machine, name.pid, "1", name.search)
            assert other.is_gone is True

    def test_a_killed_child_that_nobody_waited_for_is_gone(self):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        name = Worker(machine_name(), child.pid, process_start(child.pid), "x")
        assert name.is_gone is False
        child.kill()
        child.stdin.close()
        deadline = datetime.now() + timedelta(seconds=10)
        while not name.is_gone:
            assert datetime.now() < deadline
        child.wait()

    def test_on_windows_no_signal_is_sent_to_another_process(self, monkeypatch):
        monkeypatch.setattr(os, "kill", None)
        monkeypatch.setattr(sys, "platform", "win32")
        assert Worker(machine_name(), os.getppid(), "", "x").is_gone is None
        with working() as name:
            assert name.is_gone is False
        assert name.is_gone is True

    def test_another_machines_worker_cannot_be_told(self):
        assert Worker("elsewhere", 1, "2", "x").is_gone is None

    def test_a_name_survives_its_text(self):
        name = Worker("host/boot:1/2", 3, "4", "ab")
        assert Worker.parse(str(name)) == name

    def test_a_lease_that_is_not_renewed_runs_out(self, study, monkeypatch):
        monkeypatch.setattr(worker, "LEASE_SECONDS", 0.0)
        trial, watch = running(study, "elsewhere:1:2:x"), Watch()
        assert not watch.is_abandoned(study.trials[0])
        assert watch.is_abandoned(study.trials[0])
        trial.set_user_attr(LEASE_ATTRIBUTE, 1)
        assert not watch.is_abandoned(study.trials[0])
        monkeypatch.setattr(worker, "LEASE_SECONDS", 1e6)
        assert not watch.is_abandoned(study.trials[0])

    def test_a_lease_is_renewed_while_a_trial_runs(self, study, monkeypatch):
        monkeypatch.setattr(worker, "RENEWAL_SECONDS", 0.01)
        trial = running(study)
        deadline = datetime.now() + timedelta(seconds=10)
        with lease(trial):
            while study.trials[0].user_attrs.get(LEASE_ATTRIBUTE, 0) < 2:
                assert datetime.now() < deadline
        held = study.trials[0].user_attrs[LEASE_ATTRIBUTE]
        assert not any("lease" in thread.name for thread in threading.enumerate())
        assert study.trials[0].user_attrs[LEASE_ATTRIBUTE] == held

    def test_a_lease_outlives_a_storage_that_fails(self, study, monkeypatch):
        monkeypatch.setattr(worker, "RENEWAL_SECONDS", 0.001)
        trial = running(study)
        failed = threading.Event()

        def fail(*_):
            failed.set()
            raise OSError("gone")

        monkeypatch.setattr(study._storage, "set_trial_user_attr", fail)
        with lease(trial):
            assert failed.wait(10)

    @pytest.mark.parametrize("hours", [-1, 1])
    def test_a_trial_is_abandoned_once_it_is_seen_to_name_no_worker_for_long(
        self, study, monkeypatch, hours
    ):
        running(study)
        watch, trial = Watch(), study.trials[0]
        trial.datetime_start += timedelta(hours=hours)  # the clock of the machine that runs it
        assert not watch.is_abandoned(trial)
        monkeypatch.setattr(worker, "UNCLAIMED_SECONDS", 0.0)
        assert watch.is_abandoned(trial)


class TestRecovery:
    def test_a_dead_workers_trial_ends_and_is_repeated_once(self, study):
        lost = claimed(study, "a", 1, dead_worker())
        recover(study, Watch())
        recover(study, Watch())
        ended, retry = study.trials
        assert ended.state == TrialState.FAIL
        assert retry.state == TrialState.WAITING
        assert retry.system_attrs["fixed_params"] == lost.params
        assert retry.user_attrs == {RETRY_OF: 0, KILLS: 1}
        assert tally(study).interrupted == ()

    def test_a_living_workers_trial_is_left_alone(self, study):
        with working() as name:
            claimed(study, "a", 1, name)
            recover(study, Watch())
        assert [t.state for t in study.trials] == [TrialState.RUNNING]

    def test_a_profile_that_keeps_killing_workers_counts_as_failed(self, study):
        claimed(study, "a", 1, dead_worker()).set_user_attr(KILLS, MOST_KILLS - 1)
        recover(study, Watch())
        assert [t.state for t in study.trials] == [TrialState.FAIL]
        assert "killed 3 times" in study.trials[0].user_attrs[FAILURE]
        assert tally(study).attempts == 1

    def test_an_enqueued_trial_killed_before_its_draw_keeps_its_parameters(self, study):
        study.enqueue_trial({"x": 0.25})
        study.ask().set_user_attr(WORKER_ATTRIBUTE, str(dead_worker()))
        recover(study, Watch())
        assert study.trials[1].system_attrs["fixed_params"] == {"x": 0.25}

    def test_a_fresh_trial_killed_before_its_draw_leaves_nothing_to_repeat(self, study):
        study.ask().set_user_attr(WORKER_ATTRIBUTE, str(dead_worker()))
        recover(study, Watch())
        assert [t.state for t in study.trials] == [TrialState.FAIL]

    def test_an_interrupted_trial_is_left_to_its_worker_for_a_while(self, study, monkeypatch):
        study.tell(claimed(study, "a", 1).number, state=TrialState.FAIL)
        recover(study, Watch())
        assert len(study.trials) == 1
        monkeypatch.setattr(recovery, "ORPHAN_SECONDS", 0.0)
        recover(study, Watch())
        assert study.trials[1].user_attrs == {RETRY_OF: 0, KILLS: 0}

    def test_how_long_is_told_without_the_clock_of_the_worker_that_ended_it(self, study):
        ended = {"datetime_start": datetime(2020, 1, 1), "datetime_complete": datetime(2020, 1, 2)}
        lost = create_trial(state=TrialState.FAIL, user_attrs={DIGEST: "a"})
        for name, value in ended.items():
            setattr(lost, name, value)
        study.add_trial(lost)
        recover(study, Watch())
        assert len(study.trials) == 1

    def test_a_search_that_begins_repeats_it_at_once(self, study):
        study.tell(claimed(study, "a", 1).number, state=TrialState.FAIL)
        recover(study, Watch(), opening=True)
        assert study.trials[1].user_attrs[RETRY_OF] == 0

    def test_what_another_worker_ended_first_is_not_enqueued_twice(self, study, monkeypatch):
        claimed(study, "a", 1, dead_worker())

        def late(*_, **__):
            raise optuna.exceptions.UpdateFinishedTrialError

        monkeypatch.setattr(study._storage, "set_trial_state_values", late)
        recover(study, Watch())
        assert len(study.trials) == 1


class TestWork:
    def test_the_last_worker_waits_for_those_that_run(self, study):
        study.tell(claimed(study, "a", 1).number, 1.0)
        claimed(study, "b", 2)
        assert not has_work(tally(study), 2)
        assert has_work(tally(study), 3)

    def test_an_interrupted_trial_keeps_its_place(self, study):
        study.tell(claimed(study, "a", 1).number, 1.0)
        study.tell(claimed(study, "b", 2).number, state=TrialState.FAIL)
        assert not has_work(tally(study), 2)
        recover(study, Watch(), opening=True)
        assert has_work(tally(study), 2)

    def test_a_withdrawn_trial_counts_nowhere(self, study):
        trial = claimed(study, "a", 1)
        trial.set_user_attr(WITHDRAWN, True)
        study.tell(trial.number, state=TrialState.FAIL)
        count = tally(study)
        assert (count.attempts, count.pending, count.repeats) == (0, 0, 0)

    def test_an_enqueued_trial_that_was_withdrawn_is_still_pending(self, study):
        study.enqueue_trial({"x": 0.25})
        trial = claimed(study, "a", 1)
        trial.set_user_attr(WITHDRAWN, True)
        study.tell(trial.number, state=TrialState.FAIL)
        assert [t.number for t in tally(study).interrupted] == [trial.number]
        recover(study, Watch(), opening=True)
        assert study.trials[1].system_attrs["fixed_params"] == {"x": 0.25}
        assert (tally(study).attempts, tally(study).pending) == (0, 1)
        assert trial_place(study, 1) == 0

    def test_places_pass_over_what_was_interrupted(self, study):
        study.tell(claimed(study, "a", 1).number, 1.0)
        study.tell(claimed(study, "b", 2).number, state=TrialState.FAIL)
        assert trial_place(study, claimed(study, "c", 3).number) == 1
        recover(study, Watch(), opening=True)
        study.ask()
        # 0, 2 and the repetition of 1 come before it.
        assert trial_place(study, study.ask().number) == 3

    def test_places_pass_over_what_was_killed_before_its_draw(self, study):
        study.tell(claimed(study, "a", 1).number, 1.0)
        study.ask().set_user_attr(WORKER_ATTRIBUTE, str(dead_worker()))
        recover(study, Watch())
        assert trial_place(study, study.ask().number) == 1


class TestOpening:
    @pytest.fixture
    def arguments(self):
        return {
            "made_for": {"model": "A"},
            "baseline": {"x": 0.5},
            "attributes": {"seed": 3},
        }

    def test_many_at_once_make_one_study_with_one_baseline(self, tmp_path, arguments):
        storages = [
            optuna.storages.JournalStorage(
                optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log"))
            )
            for _ in range(6)
        ]
        barrier, studies = threading.Barrier(6), []

        def enter(storage):
            barrier.wait()
            studies.append(open_study(storage, "s", **arguments))

        threads = [threading.Thread(target=enter, args=(storage,)) for storage in storages]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(studies) == 6
        assert [t.user_attrs for t in studies[0].trials] == [{UNIFORM: True}]
        assert studies[0].user_attrs["seed"] == 3

    def test_a_study_whose_maker_died_is_made_ready(self, monkeypatch, arguments, caplog):
        monkeypatch.setattr(opening, "PATIENCE_SECONDS", 0.0)
        storage = optuna.storages.InMemoryStorage()
        begun = optuna.create_study(storage=storage, study_name="s")
        begun.enqueue_trial({"x": 0.5}, user_attrs={UNIFORM: True})
        study = open_study(storage, "s", **arguments)
        assert study.user_attrs[FINGERPRINT] == {"model": "A"}
        assert len(study.trials) == 1
        assert "was still empty 0 s after it was found" in caplog.text

    def test_another_models_study_is_refused(self, arguments):
        storage = optuna.storages.InMemoryStorage()
        open_study(storage, "s", **arguments)
        with pytest.raises(SearchError, match=r"model \('A', now 'B'\)"):
            open_study(storage, "s", **arguments | {"made_for": {"model": "B"}})
