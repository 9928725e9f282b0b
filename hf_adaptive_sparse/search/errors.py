"""Errors of a search that the caller can act on."""

from __future__ import annotations

from hf_adaptive_sparse.errors import AdaptiveSparseError


class SearchError(AdaptiveSparseError, ValueError):
    """A search that cannot give a result: nothing to choose, or nearly every trial failed."""


class NothingToChoose(SearchError):
    """Every profile of the space comes out alike, so there is nothing to search."""


class StudyMismatch(SearchError):
    """The study is there and was made for something else."""


class TrialsFailed(SearchError):
    """All trials failed, or so many that going on was pointless."""


class StorageError(AdaptiveSparseError, OSError):
    """The storage of a study cannot be opened, read or written."""


class TrialFailure(Exception):
    """One trial failed for a reason that lets the search go on.

    Attributes:
        reason: What happened, stored with the trial.
        repeatable: Whether the same profile would fail again, so that it need not be tried again.
    """

    def __init__(self, reason: str, *, repeatable: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.repeatable = repeatable
