"""The command line ``hf-adaptive-sparse``.

Exit codes: 0 on success; 2 on bad usage or input, with one line on stderr; 1 on a bug of this
package, with its traceback; 130 when interrupted by Ctrl-C, 143 by ``SIGTERM``, 129 by a terminal
that is closed. ``--json`` prints one JSON document on stdout; progress and messages go to stderr.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from huggingface_hub.errors import StrictDataclassError
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from hf_adaptive_sparse.checkpoint.offloaded import STATE_NAME
from hf_adaptive_sparse.cli.arguments import build_parser
from hf_adaptive_sparse.search.storage import JOURNAL, hides_interruption
from hf_adaptive_sparse.search.study import STUDY_NAME
from hf_adaptive_sparse.staging import partial_of

INPUT_ERRORS = (ValueError, OSError, StrictDataclassError)
"""Errors that a user can fix; the last is of a model's config with a value of the wrong type.

All others are bugs of this package and keep their traceback.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: Command and options; ``None`` takes those of the process.
    """
    options = build_parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr
    )
    received = [signal.SIGINT]
    try:
        with _interrupting(received), _hidden_bars(getattr(options, "no_progress", False)):
            answer = options.run(options)
    except KeyboardInterrupt:
        return _stop(options, received[-1])
    except INPUT_ERRORS as error:
        if hides_interruption(error):
            return _stop(options, received[-1])
        if options.traceback:
            raise
        return _complain(options.command, str(error).strip() or type(error).__name__)
    _say(answer.json() if options.json else answer.text)
    return 0 if answer.error is None else _complain(options.command, answer.error)


@contextmanager
def _interrupting(received: list[signal.Signals]) -> Iterator[None]:
    """Let what ends a process interrupt the body like Ctrl-C, so that it leaves nothing unfinished.

    Batch systems and containers send ``SIGTERM``, a terminal that is closed ``SIGHUP``.

    Args:
        received: Signals that came are appended.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    numbers: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():  # others may set no handler
        ending = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
        # `nohup` ignores, and the caller of `main` may have a handler of its own.
        numbers = [n for n in ending if n and signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _stop(options: argparse.Namespace, by: signal.Signals) -> int:
    """Say that the command was interrupted, and return the exit code."""
    print(f"hf-adaptive-sparse: {_interrupted(options)}", file=sys.stderr)
    return 128 + by


def _interrupted(options: argparse.Namespace) -> str:
    """Return what an interruption leaves to go on from."""
    states = {"prune": (STATE_NAME,), "search": (JOURNAL,), "compress": (JOURNAL, STATE_NAME)}
    if getattr(options, "output", None) is not None:
        partial = partial_of(Path(options.output))
        if any((partial / name).is_file() for name in states.get(options.command, ())):
            return f"interrupted; the same command goes on from what is in {partial}."
    storage = getattr(options, "storage", None)
    if storage is not None and ("://" in storage or Path(storage).is_file()):
        study = options.study or STUDY_NAME
        if getattr(options, "max_loss", None) is not None:
            return f"interrupted; the same command resumes its studies, which begin with {study!r}."
        return f"interrupted; the same command resumes study {study!r}."
    return "interrupted."


def _say(text: str) -> None:
    """Print to a reader that may have gone, as ``head`` does once it has seen enough.

    What the output's encoding lacks is printed as question marks.

    Raises:
        SystemExit: If it cannot be written.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except OSError as error:
        # Python flushes once more as it ends, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"hf-adaptive-sparse: the result cannot be printed: {error}", file=sys.stderr)
            raise SystemExit(2) from error


def _complain(command: str, message: str) -> int:
    """Print the error as one line, and return the exit code."""
    print(f"hf-adaptive-sparse {command}: {' '.join(message.split())}", file=sys.stderr)
    return 2


@contextmanager
def _hidden_bars(hidden: bool) -> Iterator[None]:
    """Hide the progress bars of transformers and the Hub in the body, if ``hidden``."""
    if not hidden or not is_progress_bar_enabled():
        yield
        return
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()
