"""What models and data are called: as paths, and in files that may be published."""

from __future__ import annotations

import os
from pathlib import Path

CARD_NAME = "README.md"
"""The file that is a model's card."""

UNNAMED_REPO = "path/to/this/folder"
"""What a model card calls its repo until `push_folder` knows it."""


def public_name(name: str | os.PathLike[str]) -> str:
    """Return a name as it is on the Hub; of a local path only its last part.

    A path is what exists, or looks like one: a folder may have been removed since it was read.
    """
    path = expanded(name)
    is_local = path.exists() or looks_like_path(name)
    return Path(os.path.abspath(path)).name if is_local else os.fspath(name)


def expanded(name: str | os.PathLike[str]) -> Path:
    """Return a path with the home folder for ``~``; that of an unknown user stays as it is."""
    return Path(os.path.expanduser(name))


def looks_like_path(name: str | os.PathLike[str]) -> bool:
    """Return whether a name can be no repo of the Hub, ``owner/name``, but a path."""
    text = os.fspath(name)
    starts = Path(text).is_absolute() or text.startswith((".", "~"))
    return starts or "\\" in text or text.count("/") > 1
