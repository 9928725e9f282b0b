"""Output folders that appear complete or not at all.

A job writes into ``<output>.partial`` beside its output and renames that folder when everything is
in it. A job that dies leaves the output as it was; what lets it resume (the search's journal) stays
in the partial folder, where the next run finds it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OutputError(OSError):
    """The output folder cannot be used as asked; the message says why and what to do."""


def check_output(output: Path, *, overwrite: bool) -> None:
    """Check, before any work is done, that ``output`` can be written.

    Raises:
        OutputError: If it is a file, is not empty and ``overwrite`` is off, or lies in a folder
            that cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"The output must be a folder, {output} is a file. Choose another path.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(
            f"The output folder must be empty, {output} is not. Choose another folder, or pass "
            "--overwrite (overwrite=True) to replace it when the job is done."
        )
    parent = output.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"The output folder {output} cannot be made: {parent} is not writable.")


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
        OutputError: As :func:`check_output`, or if the folder cannot be made.
    """
    check_output(output, overwrite=overwrite)
    partial = output.with_name(output.name + ".partial")
    _clear(partial, keep)
    _make(partial)
    try:
        yield partial
    except BaseException:
        _clear(partial, keep)
        raise
    _replace_folder(partial, output)


@contextmanager
def resumable_folder(
    output: Path, state_names: tuple[str, ...], *, overwrite: bool = False
) -> Iterator[Path]:
    """Yield a folder to write into, which becomes ``output`` if the body succeeds.

    If it does not, everything in it stays for the next run, which finds it where one of the state
    files is there; without any the folder is emptied first.

    Args:
        output: The folder to make.
        state_names: Names of the files that say how far a run came.
        overwrite: Replace what is in ``output``; otherwise it must be missing or empty.

    Raises:
        OutputError: As `staged_folder`.
    """
    check_output(output, overwrite=overwrite)
    partial = output.with_name(output.name + ".partial")
    if not any((partial / name).is_file() for name in state_names):
        _clear(partial, ())
    _make(partial)
    yield partial
    _replace_folder(partial, output)


def _make(partial: Path) -> None:
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {partial} cannot be made: {error.strerror}.") from error


def _clear(partial: Path, keep: tuple[str, ...]) -> None:
    """Remove all of ``partial`` but the files named in ``keep``, and itself if nothing is left."""
    if not partial.is_dir():
        return
    for entry in partial.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name not in keep:
            entry.unlink()
    if not any(partial.iterdir()):
        partial.rmdir()


def _replace_folder(partial: Path, output: Path) -> None:
    """Rename ``partial`` to ``output``; an old ``output`` is removed only once that is done."""
    if not output.exists():
        partial.rename(output)
        return
    previous = output.with_name(output.name + ".previous")
    if previous.exists():
        shutil.rmtree(previous)
    output.rename(previous)
    try:
        partial.rename(output)
    except OSError:
        previous.rename(output)
        raise
    shutil.rmtree(previous)
