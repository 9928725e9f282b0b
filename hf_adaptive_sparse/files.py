"""Write files atomically: under a temporary name, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".partial"
"""Ending of the name of a file that is being written."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that is renamed to ``path`` on success, and removed otherwise.

    The name is this writer's alone: of several writers of one file, the last to finish wins. An
    error of a full disk, which names no file, comes to name ``path``.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        yield partial
        partial.replace(target)
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:
            error.filename = os.fspath(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
