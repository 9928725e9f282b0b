"""Checks of single values, each with a message that says the rule and what was given."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any


def check_ratio(ratio: Any, what: str) -> float:
    """Return ``ratio`` as a float in [0, 1).

    Raises:
        ValueError: If it is not a real number in [0, 1).
    """
    is_number = isinstance(ratio, Real) and not isinstance(ratio, bool)
    # Compared before it is converted: a whole number of any size is a Real, and no float.
    if not (is_number and 0 <= ratio < 1):
        raise ValueError(
            f"{what} must be a number in [0, 1) (the fraction of weights removed), got {ratio!r}."
        )
    return float(ratio)


def check_count(value: object, what: str, least: int = 1, also: str = "") -> int:
    """Return a whole number that is at least ``least``.

    Args:
        value: What was given.
        what: Its name, for the message.
        least: The lowest number.
        also: What else may be given, for the message.

    Raises:
        ValueError: If ``value`` is no such number.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{what} must be a whole number >= {least}{also}, got {value!r}.")
    return int(value)


def check_mapping(value: object, what: str) -> Mapping[str, Any]:
    """Return a mapping whose keys are names.

    Raises:
        ValueError: If ``value`` is no such mapping.
    """
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{what} must be a mapping from module names, got {value!r}.")
    return value


def check_form(data: object, what: str) -> Mapping[str, Any]:
    """Return what was read from JSON, as an object.

    Raises:
        ValueError: If ``data`` is no JSON object.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} must be a JSON object, got {data!r}.")
    return data


def check_keys(data: Mapping[str, Any], known: Collection[str], what: str) -> None:
    """Refuse keys that mean nothing.

    Args:
        data: What was given.
        known: The keys that it may have.
        what: Its name, for the message.

    Raises:
        ValueError: If it has others.
    """
    unknown = sorted(str(key) for key in set(data) - set(known))
    if unknown:
        raise ValueError(f"{what} knows the keys {', '.join(known)}; got {', '.join(unknown)}.")
