"""Modules by their name, the name of what contains them, or a glob."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import TypeVar

_Value = TypeVar("_Value")


def match_names(pattern: str, names: Iterable[str], what: str) -> list[str]:
    """Return the ``names`` that a name or glob stands for.

    Args:
        pattern: A module name, the name of a module that contains some of them, or a glob
            (``*`` also crosses dots, as in `fnmatch`).
        names: Known module names.
        what: Where the pattern came from, for the message.

    Raises:
        ValueError: If nothing matches; examples of real names are listed.
    """
    known = list(names)
    matched = [n for n in known if n == pattern or n.startswith(pattern + ".")]
    if not matched:
        matched = [n for n in known if fnmatch.fnmatchcase(n, pattern)]
    if not matched:
        raise ValueError(
            f"{what} must name prunable modules of the model, or be a glob that matches some; "
            f"{pattern!r} matches none. Names look like: {', '.join(known[:4])}."
        )
    return matched


def spread_by_name(
    entries: Mapping[str, _Value], names: Iterable[str], default: _Value, what: str
) -> dict[str, _Value]:
    """Return the value of every name, from entries by name or glob.

    An exact name wins over a glob or the name of a containing module, and among those a later entry
    over an earlier one.

    Args:
        entries: Module name, name of a containing module, or glob -> value.
        names: Known module names.
        default: The value of a name that no entry matches.
        what: Where the entries came from, for the message.

    Returns:
        Name -> value, in the order of ``names``.

    Raises:
        ValueError: As `match_names`.
    """
    values = dict.fromkeys(names, default)
    exact = {name: value for name, value in entries.items() if name in values}
    for pattern, value in entries.items():
        if pattern not in exact:
            values |= dict.fromkeys(match_names(pattern, values, what), value)
    return values | exact
