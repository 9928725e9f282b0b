"""What a study holds so far: which trials count, which profiles are known, and the history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

FAILURE = "failure"
"""Trial attribute: why it failed. A failed trial without it was interrupted and does not count."""

REPEATABLE = "failure_repeatable"
"""Trial attribute: the same profile would fail again."""

DUPLICATE_OF = "duplicate_of"
"""Trial attribute: number of the trial that evaluated the same projected profile."""

UNIFORM = "uniform"
"""Trial attribute: this is the baseline."""


@dataclass(frozen=True)
class Tally:
    """The finished trials of a study, sorted by what they mean for the search.

    Attributes:
        completed: Evaluated trials, one per distinct profile, by number.
        stopped: Trials that were given up early, being worse than the best one, by number.
        failed: Trials that failed for a reason of their own.
        known: Digest of a projected profile -> the trial that settled its value.
        finished: Trials that were carried through, duplicates included, interrupted ones not.
        repeats: Duplicates since the last trial that was not one.
    """

    completed: tuple[FrozenTrial, ...]
    stopped: tuple[FrozenTrial, ...]
    failed: tuple[FrozenTrial, ...]
    known: Mapping[str, FrozenTrial] = field(repr=False)
    finished: int
    repeats: int

    @property
    def attempts(self) -> int:
        """Distinct profiles tried, which is what ``n_trials`` limits."""
        return len(self.completed) + len(self.stopped) + len(self.failed)

    @property
    def best(self) -> FrozenTrial | None:
        """The completed trial of lowest value, the earliest of equals."""
        return min(self.completed, key=_value, default=None)

    @property
    def baseline(self) -> FrozenTrial | None:
        """The completed trial of the uniform profile."""
        return next((t for t in self.completed if t.user_attrs.get(UNIFORM)), None)

    def reasons(self) -> str:
        """Return the most frequent reason of failure, with how often it occurred."""
        reason, count = Counter(t.user_attrs[FAILURE] for t in self.failed).most_common(1)[0]
        return f"{reason} ({count} of {len(self.failed)} failed trials)"


def tally(study: Study) -> Tally:
    """Sort the trials of ``study``."""
    from optuna.trial import TrialState

    completed: list[FrozenTrial] = []
    stopped: list[FrozenTrial] = []
    failed: list[FrozenTrial] = []
    known: dict[str, FrozenTrial] = {}
    finished, repeats = 0, 0
    for trial in study.get_trials(deepcopy=False):
        attributes = trial.user_attrs
        kind = {TrialState.COMPLETE: completed, TrialState.PRUNED: stopped}.get(trial.state)
        if kind is None:
            if trial.state != TrialState.FAIL or FAILURE not in attributes:
                continue
            kind = failed
        finished += 1
        if DUPLICATE_OF in attributes:
            repeats += 1
            continue
        repeats = 0
        kind.append(trial)
        if kind is not failed or attributes.get(REPEATABLE):
            known[attributes["profile_digest"]] = trial
    return Tally(tuple(completed), tuple(stopped), tuple(failed), known, finished, repeats)


def _value(trial: FrozenTrial) -> float:
    return float("inf") if trial.value is None else trial.value


def history(study: Study) -> list[dict[str, Any]]:
    """Return one plain dict per trial, in order, as written to ``search.json``.

    Keys: ``number``, ``state`` (``"pruned"`` where it was stopped early), ``value`` (``None`` where
    it is not known exactly), ``estimate`` (of a trial that was stopped), ``batches`` (evaluated),
    ``uniform``, ``duplicate_of``, ``failure``, ``seconds``, ``block_ratios`` (one per block),
    ``key_bits`` and ``value_bits`` (one per decoder layer), ``mean_sparsity``, ``mean_kv_bits``.
    """
    from optuna.trial import TrialState

    rows = []
    for trial in study.get_trials(deepcopy=False):
        attributes = trial.user_attrs
        kv_cache = (attributes.get("profile") or {}).get("kv_cache") or {}
        rows.append(
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "value": trial.value if trial.state == TrialState.COMPLETE else None,
                "estimate": trial.value if trial.state == TrialState.PRUNED else None,
                "batches": attributes.get("batches"),
                "uniform": bool(attributes.get(UNIFORM)),
                "duplicate_of": attributes.get(DUPLICATE_OF),
                "failure": attributes.get(FAILURE),
                "seconds": attributes.get("seconds"),
                "block_ratios": attributes.get("block_ratios"),
                "key_bits": kv_cache.get("key_bits"),
                "value_bits": kv_cache.get("value_bits"),
                "mean_sparsity": attributes.get("mean_sparsity"),
                "mean_kv_bits": attributes.get("mean_kv_bits"),
            }
        )
    return rows
