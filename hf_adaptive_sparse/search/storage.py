"""Opens the storage of a study: any Optuna storage, by name.

Optuna's heartbeats are not used, since only databases have them. Whether a running trial is alive
is found out in the same way on every storage, see `worker`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_adaptive_sparse.search.errors import StorageError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study

    Storage = str | os.PathLike[str] | BaseStorage | None

logger = logging.getLogger(__name__)

JOURNAL = "search.journal"
"""The journal in a job's folder: it outlives a killed run, and the next one resumes from it."""

JOURNAL_SUFFIXES = (".log", ".journal")
DATABASE_SUFFIXES = (".db", ".sqlite", ".sqlite3")
BUSY_SECONDS = 60
"""How long an SQLite file that another worker is writing to is waited for."""

OPENING_ATTEMPTS = 10
"""How often a database is opened while other workers make its tables."""

_RECORD = b'{"op_code":'  # what Optuna begins each of a journal's lines with
_STORAGES = "optuna.storages"

_quiet_lock = threading.Lock()
_verbosities: list[int] = []  # what each `quiet_optuna` that is open found


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence Optuna's line per trial; the progress bar and the stored attributes replace it.

    Of threads that are in here together, the last to leave restores what the first one found.
    """
    import optuna

    with _quiet_lock:
        _verbosities.append(optuna.logging.get_verbosity())
        optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        with _quiet_lock:
            verbosity = _verbosities.pop()
            if not _verbosities:
                optuna.logging.set_verbosity(verbosity)


def detached_study(study: Study) -> Study:
    """Return a copy of ``study`` that lives in memory and no longer depends on its storage."""
    from optuna.storages import InMemoryStorage
    from optuna.study import Study

    with quiet_optuna():
        storage = InMemoryStorage()
        storage.create_new_study(study.directions, study.study_name)
        copy = Study(study.study_name, storage)
        for key, value in study.user_attrs.items():
            copy.set_user_attr(key, value)
        copy.add_trials(study.get_trials(deepcopy=False))
    return copy


def open_storage(storage: Storage, *, to_read: bool = False) -> BaseStorage:
    """Open a storage.

    Args:
        storage: ``None`` (kept in memory), a URL (``sqlite:///study.db``, ``postgresql://…``,
            ``redis://…``; the extras ``postgresql`` and ``redis`` have their drivers), the path of
            a journal file (``.log``, ``.journal``) or of an SQLite
            file (``.db``, ``.sqlite``), or an Optuna storage.
        to_read: Write nothing: no tables into a database that has none, and no end to a journal.

    Raises:
        ValueError: If the name says none of these.
        StorageError: If it cannot be opened, or is a file of something else.
    """
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, journal

    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    name = os.fspath(storage)
    with storage_errors(name, opening=True):
        if name.startswith(("redis://", "rediss://", "unix://")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                return JournalStorage(journal.JournalRedisBackend(name))
        if "://" not in name:
            # Not relative: Optuna's lock is a link to this path, and one that a killed process left
            # would be waited for without end if the link led nowhere.
            path = Path(name).absolute()
            if path.suffix in JOURNAL_SUFFIXES:
                _check_parent(path)
                _check_journal(path)
                if not to_read:
                    _drop_torn_line(path)
                return JournalStorage(journal.JournalFileBackend(str(path)))
            if path.suffix not in DATABASE_SUFFIXES:
                raise ValueError(
                    "storage must be a URL (sqlite:///study.db, postgresql://…), a journal file "
                    f"({', '.join(JOURNAL_SUFFIXES)}) or an SQLite file "
                    f"({', '.join(DATABASE_SUFFIXES)}), got {name!r}."
                )
            _check_parent(path)
            name = f"sqlite:///{name}"
        return _open_database(name, to_read)


def _open_database(url: str, to_read: bool) -> BaseStorage:
    """Open a database, retrying while other workers make its tables."""
    import optuna
    from sqlalchemy.engine import make_url

    options: dict[str, Any] = {}
    if url.startswith("sqlite:"):
        file = make_url(url).database
        if to_read and file and not Path(file).is_file():  # connecting would make it
            raise StorageError(f"A study is needed; there is no file {file}.")
        options["connect_args"] = {"timeout": BUSY_SECONDS}
    else:
        # A connection that the server closed during a long trial is replaced, not used.
        options["pool_pre_ping"] = True
    for attempt in range(1, OPENING_ATTEMPTS + 1):
        try:
            return optuna.storages.RDBStorage(
                _with_driver(url), engine_kwargs=options, skip_table_creation=to_read
            )
        except Exception as error:
            if attempt == OPENING_ATTEMPTS or not _is_being_made(error):
                raise
            time.sleep(random.uniform(0.05, 0.3) * attempt)
    raise AssertionError("not reached")


def _with_driver(url: str) -> str:
    """Name the driver that the extra ``postgresql`` installs where the URL names none."""
    for scheme in ("postgres://", "postgresql://"):
        if url.startswith(scheme) and find_spec("psycopg") is not None:
            return "postgresql+psycopg://" + url.removeprefix(scheme)
    return url


def _is_being_made(error: BaseException) -> bool:
    """Whether opening failed because another process is making the same tables."""
    signs = ("already exists", "duplicate key", "UNIQUE constraint", "pg_type_typname_nsp_index")
    # Optuna asserts that the version row is there, which it is not between two statements.
    return isinstance(error, AssertionError) or any(sign in str(error) for sign in signs)


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise StorageError(f"The folder of the storage {str(path)!r} must exist; it does not.")


def _check_journal(path: Path) -> None:
    """Refuse a file that is no journal before anything is cut off or appended.

    Raises:
        StorageError: If the first line is no record of a journal.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        begin = file.read(len(_RECORD))
    # Of a new file, or one whose first record was left unfinished, there is less.
    if not _RECORD.startswith(begin):
        raise StorageError(
            f"{path} is no journal of a search: its first line is no record of one. Name another "
            "file; this one stays as it is."
        )


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

    Raises:
        StorageError: In place of what the storage raised.
        KeyboardInterrupt: In place of what the storage raised when it was interrupted.
    """
    handled = sys.exc_info()[1]
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if hides_interruption(error, handled):
            raise KeyboardInterrupt from error
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            raise
        origin = _storage_error_behind(error)
        if origin is None and opening and isinstance(error, ImportError | OSError):
            origin = error
        if origin is None:
            raise
        raise StorageError(_describe(name, origin)) from error


def hides_interruption(error: BaseException | None, handled: BaseException | None = None) -> bool:
    """Return whether an error was raised on the way out of an interruption, which it hides.

    Optuna gives up a journal's lock when it is interrupted, which fails if that was just done.

    Args:
        error: The error.
        handled: What was being handled before, and the error has nothing to do with.
    """
    while error is not None and error is not handled:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _storage_error_behind(error: BaseException | None) -> BaseException | None:
    """Return what a storage's driver raised on the way to ``error``.

    Optuna wraps only some of the drivers' exceptions, and trips over others itself. The drivers are
    optional, so their exceptions are told by the module that they come from; those of a journal, by
    where they were raised.
    """
    found = None
    while error is not None:
        if type(error).__module__.split(".")[0] in ("sqlalchemy", "redis"):
            found = error
        modules = _modules_of(error)
        if isinstance(error, OSError) and modules[-1:] and modules[-1].startswith(_STORAGES):
            found = error
        if isinstance(error, json.JSONDecodeError):  # raised below them
            found = error if any(name.startswith(_STORAGES) for name in modules) else found
        error = error.__cause__ or error.__context__
    return found


def _modules_of(error: BaseException) -> list[str]:
    """Return the names of the modules that an error came through, the last of which raised it."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return [str(frame.f_globals.get("__name__", "")) for frame in frames]


def _describe(name: str, error: BaseException) -> str:
    detail = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
    if isinstance(error, ImportError):
        extras = {"redis": "redis", "unix": "redis", "postgres": "postgresql"}
        extra = next((extra for scheme, extra in extras.items() if name.startswith(scheme)), None)
        install = (
            "the driver that SQLAlchemy wants for it"
            if extra is None
            else f"'hf-adaptive-sparse[{extra}]'"
        )
        return (
            f"The storage {_without_password(name)} cannot be used: {detail}. Its driver is not "
            f"installed: pip install {install}."
        )
    if isinstance(error, json.JSONDecodeError):
        return (
            f"The storage {_without_password(name)} is damaged: a record of it is not JSON "
            f"({detail}). Use another storage, or restore this one from a backup."
        )
    if isinstance(error, OSError):
        return (
            f"The storage {_without_password(name)} cannot be used: {detail}. Completed trials are "
            "kept, so once that is fixed, the same call resumes the search."
        )
    if "disk is full" in detail or "No space left" in detail:
        return (
            f"The storage {_without_password(name)} cannot be used: {detail}. Free space there; "
            "completed trials are kept, so the same call resumes the search."
        )
    return (
        f"The storage {_without_password(name)} cannot be used: {detail}. Check that it exists, "
        "that user and password are right, and that no other program holds it locked; completed "
        "trials are kept, so the same call resumes the search."
    )


def _without_password(name: str) -> str:
    """Return a URL without user, password and query, which may hold another password."""
    scheme, separator, rest = name.partition("://")
    if not separator:
        return name
    place, query, hidden = rest.partition("?")
    user, at, place = place.rpartition("@")
    if not at and "@" in hidden:  # a question mark in the password, or an at sign in the query
        return f"{scheme}://…"
    return f"{scheme}://{'…' if user else ''}{at}{place}{'?…' if query else ''}"
