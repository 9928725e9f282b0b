"""What models and data are called in files that may be published."""

from __future__ import annotations

import os
from pathlib import Path


def public_name(name: str | os.PathLike[str]) -> str:
    """Return a name as it is on the Hub; of a local path only its last part."""
    path = Path(name).expanduser()
    return Path(os.path.abspath(path)).name if path.exists() else os.fspath(name)
