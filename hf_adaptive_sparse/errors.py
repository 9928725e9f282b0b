"""The base of the public errors, and those that no one part of the package has to itself."""

from __future__ import annotations


class AdaptiveSparseError(Exception):
    """Base of the public errors of this package.

    Each is also a ``ValueError``, ``OSError`` or ``RuntimeError``, as what it stands for is. An
    invalid argument raises a plain ``ValueError``.
    """


class NonFiniteError(AdaptiveSparseError, ValueError):
    """A model computed NaN or infinity, or states whose steps would be infinite."""
