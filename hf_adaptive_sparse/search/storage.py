"""Where a study is kept: any Optuna storage, opened from a name, with what a killed run left.

A run that is killed leaves a trial in the state RUNNING. When the study is opened again, such a
trial is marked as failed if it was run by a process of this machine that no longer exists. Runs on
other machines are told by their heartbeat, which only database storages have; in a journal file
their unfinished trials stay listed as running, which costs nothing: only completed trials count.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from hf_adaptive_sparse.search.errors import StorageError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study

    Storage = str | os.PathLike[str] | BaseStorage | None

logger = logging.getLogger(__name__)

JOURNAL_SUFFIXES = (".log", ".journal")
DATABASE_SUFFIXES = (".db", ".sqlite", ".sqlite3")
HEARTBEAT_SECONDS = 60
"""How often a database storage is told that a trial still runs; dead after twice as long."""

WORKER_ATTRIBUTE = "worker"
"""Trial attribute naming the process that runs it: ``host:pid``."""

UNCLAIMED_SECONDS = 60
"""A running trial that names no process after this long was killed before it could."""


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence Optuna's line per trial; the progress bar and the stored attributes replace it."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def detached_study(study: Study) -> Study:
    """Return a copy of ``study`` that lives in memory and no longer depends on its storage."""
    from optuna.storages import InMemoryStorage
    from optuna.study import Study

    with quiet_optuna():
        storage = InMemoryStorage()
        storage.create_new_study([study.direction], study.study_name)
        copy = Study(study.study_name, storage)
        for key, value in study.user_attrs.items():
            copy.set_user_attr(key, value)
        copy.add_trials(study.get_trials(deepcopy=False))
    return copy


def open_storage(storage: Storage) -> BaseStorage:
    """Open a storage.

    Args:
        storage: ``None`` (kept in memory), a URL (``sqlite:///study.db``, ``postgresql://…``,
            ``redis://…``), the path of a journal file (``.log``, ``.journal``) or of an SQLite
            file (``.db``, ``.sqlite``), or an Optuna storage.

    Raises:
        ValueError: If the name says none of these.
        StorageError: If it cannot be opened.
    """
    import optuna
    from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, journal

    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    name = os.fspath(storage)
    with storage_errors(name, opening=True):
        if name.startswith(("redis://", "rediss://", "unix://")):
            return JournalStorage(journal.JournalRedisBackend(name))
        if "://" not in name:
            path = Path(name)
            if path.suffix in JOURNAL_SUFFIXES:
                _check_parent(path)
                _drop_torn_line(path)
                return JournalStorage(journal.JournalFileBackend(name))
            if path.suffix not in DATABASE_SUFFIXES:
                raise ValueError(
                    "storage must be a URL (sqlite:///study.db, postgresql://…), a journal file "
                    f"({', '.join(JOURNAL_SUFFIXES)}) or an SQLite file "
                    f"({', '.join(DATABASE_SUFFIXES)}), got {name!r}."
                )
            _check_parent(path)
            name = f"sqlite:///{name}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.storages.RDBStorage(name, heartbeat_interval=HEARTBEAT_SECONDS)


def _check_parent(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise StorageError(f"The folder of the storage {str(path)!r} must exist; it does not.")


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a killed process left unfinished.

    Readers ignore such a line, but the next record would be appended to it and be lost with it.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    if not path.exists() or path.stat().st_size == 0:
        return
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()  # no other process is writing while the end of the file is looked at
    try:
        with path.open("r+b") as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                logger.warning("%s ends in an unfinished record, which is dropped.", path)
                file.truncate(end)
    finally:
        lock.release()


@contextlib.contextmanager
def storage_errors(name: str, *, opening: bool = False) -> Iterator[None]:
    """Turn what a storage raises when it is locked, unreachable or broken into `StorageError`.

    Args:
        name: What the storage was opened from.
        opening: Whether only the storage is at work, so that a missing driver or an error of the
            file system is its own too.
    """
    try:
        yield
    except (ValueError, StorageError):
        raise
    except Exception as error:
        origin = _storage_error_behind(error)
        if origin is None and opening and isinstance(error, ImportError | OSError):
            origin = error
        if origin is None:
            raise
        raise StorageError(_describe(name, origin)) from error


def _storage_error_behind(error: BaseException | None) -> BaseException | None:
    """Return what a storage's driver raised on the way to ``error``.

    Optuna wraps only some of the drivers' exceptions, and trips over others itself. The drivers are
    optional, so their exceptions are told by the module that they come from.
    """
    found = None
    while error is not None:
        if type(error).__module__.split(".")[0] in ("sqlalchemy", "redis"):
            found = error
        error = error.__cause__ or error.__context__
    return found


def _describe(name: str, error: BaseException) -> str:
    detail = next(iter(str(error).splitlines()), type(error).__name__)
    return (
        f"The storage {_without_password(name)} cannot be used: {detail}. Check that it exists, "
        "that its driver is installed, and that no other program holds it locked; completed "
        "trials are kept, so the same call resumes the search."
    )


def _without_password(name: str) -> str:
    scheme, separator, rest = name.partition("://")
    return f"{scheme}://…@{rest.rpartition('@')[2]}" if separator and "@" in rest else name


def worker_name() -> str:
    """Return the name of this process as stored with the trials that it runs."""
    return f"{socket.gethostname()}:{os.getpid()}"


def fail_abandoned_trials(study: Study) -> list[int]:
    """Mark trials as failed that a process which no longer exists left running.

    Returns:
        Numbers of these trials.
    """
    from optuna.trial import TrialState

    abandoned = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_abandoned(trial.user_attrs.get(WORKER_ATTRIBUTE), trial.datetime_start):
            study.tell(trial.number, state=TrialState.FAIL)
            abandoned.append(trial.number)
    if abandoned:
        logger.info("Trials %s were left unfinished by a stopped run.", abandoned)
    return abandoned


def _is_abandoned(worker: str | None, started: datetime | None) -> bool:
    if worker is None:
        return started is not None and datetime.now() - started > timedelta(
            seconds=UNCLAIMED_SECONDS
        )
    host, _, pid = worker.rpartition(":")
    if host != socket.gethostname():
        return False
    if int(pid) == os.getpid():
        return True  # this process runs no trial while it opens a study
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
