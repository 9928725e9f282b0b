"""Output folders that appear complete or not at all.

A job writes into ``<output>.adaptive-sparse.partial`` beside its output and renames that folder
when everything is in it. A job that dies leaves the output as it was; what lets it resume (the
search's journal) stays in the partial folder, where the next run finds it. An output that is a
symbolic link stands for the folder it points at.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryFile

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError

from hf_adaptive_sparse.errors import AdaptiveSparseError

logger = logging.getLogger(__name__)

_OURS = ".adaptive-sparse."
"""What stands between an output's name and the role of a file or folder beside it."""


class OutputError(AdaptiveSparseError, OSError):
    """The output folder cannot be used as asked; the message says why and what to do."""


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turn what libraries in Rust raise where a file cannot be written into `OutputError`.

    Safetensors has an error of its own for it; tokenizers raises a bare `Exception`, which is told
    by its text.

    Args:
        what: What the body writes, as in "The weights".
        folder: Where to.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, SafetensorError) and "(os error " not in str(error):
            raise
        raise OutputError(
            f"{what} cannot be written to {folder}: {error}. Free space there, or choose "
            "another output folder."
        ) from error


def check_output(output: Path, *, overwrite: bool) -> None:
    """Check, before any work is done, that ``output`` can be written.

    Raises:
        OutputError: If it is a file, is not empty and ``overwrite`` is off, lies in a folder that
            cannot be written, or cannot be renamed: a mount point, or the working directory.
    """
    output = output.resolve()
    if os.path.ismount(output):
        raise OutputError(
            f"{output} is a mount point, so the finished folder cannot be renamed to it. "
            f"Choose a folder inside it, such as {output / 'model'}."
        )
    if Path.cwd().is_relative_to(output):
        raise OutputError(
            f"The output folder is replaced as a whole, but {output} is the working directory or "
            "holds it. Choose a folder inside it, or run from elsewhere."
        )
    if output.exists() and not output.is_dir():
        raise OutputError(
            f"The output must be a folder, but {output} is a file. Choose another path."
        )
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(
            f"The output folder must be empty, but {output} is not. Choose another folder, or pass "
            "--overwrite (overwrite=True) to replace it when the job is done."
        )
    parent = output.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"The output folder {output} cannot be made: {parent} is no folder that can be written."
        )


@contextmanager
def staged_folder(
    output: Path, *, overwrite: bool = False, keep: tuple[str, ...] = ()
) -> Iterator[Path]:
    """Yield a folder to write into, which becomes ``output`` if the body succeeds.

    Args:
        output: The folder to make.
        overwrite: Replace what is in ``output``; otherwise it must be missing or empty.
        keep: Names of files that a failed run leaves in the partial folder, and that this run
            finds there: what it needs to resume.

    Raises:
        OutputError: As :func:`check_output`, also where that has come true since; if the folder
            cannot be made, locked or renamed; or if another job is writing it.
    """
    with _partial_folder(output, overwrite=overwrite) as partial:
        _clear(partial, keep)
        _make(partial)
        try:
            yield partial
        except BaseException:
            _clear(partial, keep)
            raise


@contextmanager
def resumable_folder(
    output: Path, state_names: tuple[str, ...], *, parts: str, overwrite: bool = False
) -> Iterator[Path]:
    """Yield a folder to write into, which becomes ``output`` if the body succeeds.

    If it does not, state files and parts stay for the next run where one of the former is there.

    Args:
        output: The folder to make.
        state_names: Names of the files that say how far a run came.
        parts: Pattern of the names of the files that they speak of.
        overwrite: Replace what is in ``output``; otherwise it must be missing or empty.

    Raises:
        OutputError: As `staged_folder`.
    """
    with _partial_folder(output, overwrite=overwrite) as partial:
        _clear_but_state(partial, state_names, parts)
        _make(partial)
        try:
            yield partial
        except BaseException:
            _clear_but_state(partial, state_names, parts)
            raise


@contextmanager
def _partial_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield the path of the partial folder, this job's alone, and rename it if the body succeeds.

    The lock goes with the process that holds it, however that ends.
    """
    check_output(output, overwrite=overwrite)
    output = output.resolve()
    _make(output.parent)
    path = _beside(output, "lock")
    lock = _acquired(path, output)
    try:
        check_output(output, overwrite=overwrite)  # a job that has just ended may have filled it
        partial = partial_of(output)
        yield partial
        _replace_folder(partial, output, overwrite=overwrite)
    finally:
        # While it is locked, so that no other job locks a file that is gone. Windows removes no
        # file that is open; there the release does.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()


def _acquired(path: Path, output: Path) -> BaseFileLock:
    lock = FileLock(path)
    try:
        _acquire(lock, path)
    except Timeout as error:
        raise OutputError(
            f"Another job is writing the output folder {output}. Wait until it has ended, or "
            "choose another folder."
        ) from error
    except (OSError, NotImplementedError) as error:  # the latter: no locks on this file system
        raise OutputError(
            f"The output folder {output} cannot be locked by {path}: "
            f"{getattr(error, 'strerror', None) or error}. Choose a folder beside which files can "
            "be made."
        ) from error
    return lock


def _acquire(lock: BaseFileLock, path: Path) -> None:
    """Acquire a lock.

    Raises:
        Timeout: If another process holds it.
        OSError: If its file cannot be made.
    """
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not path.exists():  # which filelock also takes for one that was just removed
            TemporaryFile(dir=path.parent).close()
        raise


def is_partial(folder: Path) -> bool:
    """Whether ``folder`` is one that an interrupted job left, or that a job is writing to."""
    return folder.name.endswith(_OURS + "partial")


def partial_of(output: Path) -> Path:
    """Return the folder in which a job makes ``output``, and may leave what it goes on from."""
    return _beside(output.resolve(), "partial")


def _beside(output: Path, role: str) -> Path:
    """Return a path beside ``output`` by a name that no other program uses."""
    return output.parent / (output.name + _OURS + role)  # a root has no name to be changed


def _make(partial: Path) -> None:
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {partial} cannot be made: {error.strerror}.") from error


def _clear_but_state(partial: Path, state_names: tuple[str, ...], parts: str) -> None:
    """Remove all of ``partial`` but state files and parts; these too without a state file."""
    resumes = any((partial / name).is_file() for name in state_names)
    _clear(partial, (*state_names, parts) if resumes else ())


def _clear(partial: Path, keep: tuple[str, ...]) -> None:
    """Remove all of ``partial`` but files named as in ``keep``, and itself if nothing is left."""
    if not partial.is_dir():
        return
    for entry in partial.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif not any(fnmatchcase(entry.name, pattern) for pattern in keep):
            entry.unlink()
    if not any(partial.iterdir()):
        partial.rmdir()


def _replace_folder(partial: Path, output: Path, *, overwrite: bool) -> None:
    """Rename ``partial`` to ``output``; an old ``output`` is removed only once that is done.

    Without ``overwrite`` only an empty one is.
    """
    previous = _beside(output, "previous")
    try:
        if output.exists() and not overwrite:
            output.rmdir()  # fails if something was put there meanwhile
        elif output.exists():
            if previous.exists():
                shutil.rmtree(previous)
            output.rename(previous)
        partial.rename(output)
    except OSError as error:
        if previous.exists() and not output.exists():
            previous.rename(output)
        raise OutputError(
            f"The result is complete and lies in {partial}, which cannot be renamed to {output}: "
            f"{error.strerror}. Move it elsewhere: the next job with this output clears it."
        ) from error
    if previous.exists():
        try:
            shutil.rmtree(previous)
        except OSError as error:
            logger.warning("The former output is left in %s: %s", previous, error)
