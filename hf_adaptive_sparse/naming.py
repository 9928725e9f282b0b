"""What models and data are called in files that may be published."""

from __future__ import annotations

import os
from pathlib import Path


def public_name(name: str | os.PathLike[str]) -> str:
    """Return a name as it is on the Hub; of a local path only its last part.

    A path is what exists, or is absolute: a folder may have been removed since it was read.
    """
    path = Path(name).expanduser()
    is_local = path.is_absolute() or path.exists()
    return Path(os.path.abspath(path)).name if is_local else os.fspath(name)
