"""Which worker runs a trial, and whether that worker is still alive.

Every running trial names its worker. A worker on this machine is alive as long as its process is;
one on another machine renews a lease, a counter stored with the trial, from a thread of its own.
How long a lease has not changed is measured by the reader's own clock, from when the reader first
saw its value, so no two machines have to agree on the time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

logger = logging.getLogger(__name__)

WORKER_ATTRIBUTE = "worker"
"""Trial attribute naming who runs it, see `Worker`."""

LEASE_ATTRIBUTE = "lease"
"""Trial attribute that its worker counts up while it lives."""

RENEWAL_SECONDS = 20.0
"""How often a lease is renewed."""

LEASE_SECONDS = 180.0
"""A lease that was not renewed for this long has run out."""

UNCLAIMED_SECONDS = 60.0
"""A running trial that is seen to name no worker for this long was killed before it could."""

_active: set[str] = set()
"""Searches that this process is carrying out, by the last part of their worker's name."""


@dataclass(frozen=True)
class Worker:
    """One search in one process of one machine; stored as ``machine:pid:start:search``.

    Attributes:
        machine: Name of the host, of its boot, and of the process namespace: containers that share
            a host do not take each other's processes for their own.
        pid: Process id.
        start: When the process started, in the system's ticks, as ids are used again; empty where
            the system does not tell.
        search: Distinguishes searches of one process.
    """

    machine: str
    pid: int
    start: str
    search: str

    @classmethod
    def parse(cls, text: str) -> Worker:
        """Read a stored name; raises ValueError if it is none."""
        machine, pid, start, search = text.rsplit(":", 3)
        return cls(machine, int(pid), start, search)

    def __str__(self) -> str:
        return f"{self.machine}:{self.pid}:{self.start}:{self.search}"

    @property
    def is_gone(self) -> bool | None:
        """Whether it has stopped; ``None`` for one of another machine, or process of Windows."""
        if self.machine != machine_name():
            return None
        if self.pid == os.getpid() and self.start == process_start(self.pid):
            return self.search not in _active
        if sys.platform == "win32":  # where os.kill would end a process that it is to look for
            return None
        return process_start(self.pid) != self.start or not _exists(self.pid)


@contextlib.contextmanager
def working() -> Iterator[Worker]:
    """Count as a worker of this process for as long as the body runs."""
    pid = os.getpid()
    worker = Worker(machine_name(), pid, process_start(pid), uuid.uuid4().hex[:8])
    _active.add(worker.search)
    try:
        yield worker
    finally:
        _active.discard(worker.search)


@cache
def machine_name() -> str:
    """Return a name that two processes share exactly if they can see each other."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8])
        parts.append(os.readlink("/proc/self/ns/pid").strip("pid:[]"))
    return "/".join(parts)


def process_start(pid: int) -> str:
    """Return when a process started; empty if it is gone, a zombie, or the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The name before the last parenthesis may hold anything; state and start follow it.
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in ("Z", "X") else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def lease(trial: Trial) -> Iterator[None]:
    """Renew the lease of a trial from a thread for as long as the body runs."""
    stop = threading.Event()
    storage, trial_id = trial.study._storage, trial._trial_id

    def renew() -> None:
        renewals = 0
        while not stop.wait(RENEWAL_SECONDS):
            renewals += 1
            try:
                storage.set_trial_user_attr(trial_id, LEASE_ATTRIBUTE, renewals)
            except Exception as error:
                # The trial itself meets the same storage and says what is wrong with it.
                logger.debug("The lease of trial %d was not renewed: %s", trial.number, error)
        storage.remove_session()

    thread = threading.Thread(target=renew, name=f"lease of trial {trial.number}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Watch:
    """Watches the trials of a study, and tells which of them have lost their worker."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[object, float]] = {}

    def is_abandoned(self, trial: FrozenTrial) -> bool:
        """Return whether the worker of a running trial has stopped.

        If its process ran on this machine, its end is known at once. Otherwise the lease has to
        stay as it is for `LEASE_SECONDS` while this process looks on, or the trial has to name no
        worker for `UNCLAIMED_SECONDS`.
        """
        name = trial.user_attrs.get(WORKER_ATTRIBUTE)
        if name is not None:
            try:
                if Worker.parse(name).is_gone:
                    return True
            except ValueError:
                logger.debug("Trial %d names no worker that can be told: %r", trial.number, name)
        unchanged = self.unchanged_seconds(trial, (name, trial.user_attrs.get(LEASE_ATTRIBUTE)))
        # A worker names itself as soon as it has a trial.
        return unchanged > (UNCLAIMED_SECONDS if name is None else LEASE_SECONDS)

    def unchanged_seconds(self, trial: FrozenTrial, state: object) -> float:
        """Return for how long this process has seen a trial in one state; 0 at the first look.

        Args:
            trial: The trial.
            state: What is compared with the last look.
        """
        now = time.monotonic()
        seen, since = self._seen.get(trial.number, (None, now))
        if seen != state:
            since = now
        self._seen[trial.number] = (state, since)
        return now - since
