"""The state of a study: which trials count, which profiles are known, and the history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_adaptive_sparse.architecture import layer_of

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

FAILURE = "failure"
"""Trial attribute: why it failed. A failed trial without it was interrupted and does not count."""

DIGEST = "profile_digest"
"""Trial attribute: key of the projected profile."""

REPEATABLE = "failure_repeatable"
"""Trial attribute: the same profile would fail again."""

DUPLICATE_OF = "duplicate_of"
"""Trial attribute: number of the trial that evaluated the same projected profile."""

UNIFORM = "uniform"
"""Trial attribute: this is the baseline."""

WITHDRAWN = "withdrawn"
"""Trial attribute: enough trials were under way when it was drawn, so it was not evaluated. One
whose parameters were set before it began is tried again should the search be extended."""

RETRY_OF = "retry_of"
"""Trial attribute: number of the interrupted trial whose parameters it takes."""


@dataclass(frozen=True)
class Tally:
    """The trials of a study, sorted by their meaning for the search.

    Attributes:
        completed: Evaluated trials, one per distinct profile, by number.
        stopped: Trials that were given up early, being worse than the best one, by number.
        failed: Trials that failed for a reason of their own.
        known: Digest of a projected profile -> the trial that settled its value.
        repeats: Duplicates since the last trial that was not one.
        running: Trials that a worker runs, or ran when it was killed.
        waiting: Trials that are enqueued.
        interrupted: Trials that ended without a result and that no other trial has repeated yet.
    """

    completed: tuple[FrozenTrial, ...]
    stopped: tuple[FrozenTrial, ...]
    failed: tuple[FrozenTrial, ...]
    known: Mapping[str, FrozenTrial] = field(repr=False)
    repeats: int
    running: tuple[FrozenTrial, ...] = ()
    waiting: tuple[FrozenTrial, ...] = ()
    interrupted: tuple[FrozenTrial, ...] = ()

    @property
    def attempts(self) -> int:
        """Distinct profiles tried, which is what ``n_trials`` limits."""
        return len(self.completed) + len(self.stopped) + len(self.failed)

    @property
    def pending(self) -> int:
        """Trials that are still to run whatever is drawn: enqueued and interrupted ones."""
        return len(self.waiting) + len(self.interrupted)

    @property
    def best(self) -> FrozenTrial | None:
        """The completed trial of lowest (first) value, the earliest of equals."""
        return min(self.completed, key=_value, default=None)

    @property
    def best_number(self) -> int | None:
        """Number of that trial."""
        best = self.best
        return None if best is None else best.number

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
    interrupted: list[FrozenTrial] = []
    known: dict[str, FrozenTrial] = {}
    repeats = 0
    trials = sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number)
    for trial in trials:
        attributes = trial.user_attrs
        if not trial.state.is_finished():
            continue
        if WITHDRAWN in attributes:
            # A fresh draw that was faster took its place; the enqueued one is still to run.
            if is_enqueued(trial):
                interrupted.append(trial)
            continue
        if DUPLICATE_OF in attributes:
            repeats += 1
            continue
        kind = {TrialState.COMPLETE: completed, TrialState.PRUNED: stopped}.get(trial.state, failed)
        if kind is failed and FAILURE not in attributes:
            if should_retry(trial):
                interrupted.append(trial)
            continue
        repeats = 0
        kind.append(trial)
        if kind is not failed or (attributes.get(REPEATABLE) and DIGEST in attributes):
            known[attributes[DIGEST]] = trial
    retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    return Tally(
        completed=tuple(completed),
        stopped=tuple(stopped),
        failed=tuple(failed),
        known=known,
        repeats=repeats,
        running=tuple(t for t in trials if t.state == TrialState.RUNNING),
        waiting=tuple(t for t in trials if t.state == TrialState.WAITING),
        interrupted=tuple(t for t in interrupted if t.number not in retried),
    )


def is_enqueued(trial: FrozenTrial) -> bool:
    """Return whether a trial takes parameters that were set before it began."""
    return "fixed_params" in trial.system_attrs


def should_retry(trial: FrozenTrial) -> bool:
    """Return whether an interrupted trial is to be tried again.

    A trial that had not drawn its profile yet is not. Its parameters cannot tell, since a profile
    may have none.
    """
    return is_enqueued(trial) or DIGEST in trial.user_attrs


def _value(trial: FrozenTrial) -> float:
    return float("inf") if trial.values is None else trial.values[0]


def evaluated(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of a `history` with a value or an estimate, one per distinct profile."""
    states = ("complete", "pruned")
    return [row for row in rows if row["state"] in states and not is_set_aside(row)]


def is_set_aside(row: Mapping[str, Any]) -> bool:
    """Whether a row of a `history` repeats another one, or was drawn and not evaluated."""
    return row["duplicate_of"] is not None or bool(row.get("withdrawn"))


def history(study: Study) -> list[dict[str, Any]]:
    """Return one plain dict per trial, in order, as written to ``search.json``.

    Keys: ``number``, ``state`` (``"pruned"`` where it was stopped early), ``value`` (``None`` where
    it is not known exactly), ``values`` (one per part of a front), ``estimate`` (of a trial that
    was stopped), ``batches`` (evaluated), ``reused`` (fraction of the layers that need not be run),
    ``uniform``, ``duplicate_of``, ``failure``, ``withdrawn`` (enough trials were under way when it
    was drawn), ``retry_of``, ``seconds``, ``block_ratios`` (one per block),
    ``key_bits`` and ``value_bits`` (one per decoder layer), ``mean_sparsity``, ``mean_kv_bits``,
    ``weight_bits`` (one per decoder layer, whose linears share a width; ``None`` for one without
    prunable linears), ``mean_weight_bits``, ``bytes`` (limit -> what the profile weighs).
    """
    from optuna.trial import TrialState

    rows = []
    for trial in study.get_trials(deepcopy=False):
        attributes = trial.user_attrs
        values = trial.values
        profile = attributes.get("profile") or {}
        kv_cache = profile.get("kv_cache") or {}
        rows.append(
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "value": values[0] if values and trial.state == TrialState.COMPLETE else None,
                "values": values if values and len(values) > 1 else None,
                "estimate": values[0] if values and trial.state == TrialState.PRUNED else None,
                "batches": attributes.get("batches"),
                "reused": attributes.get("reused"),
                "uniform": bool(attributes.get(UNIFORM)),
                "duplicate_of": attributes.get(DUPLICATE_OF),
                "failure": attributes.get(FAILURE),
                "withdrawn": bool(attributes.get(WITHDRAWN)),
                "retry_of": attributes.get(RETRY_OF),
                "seconds": attributes.get("seconds"),
                "block_ratios": attributes.get("block_ratios"),
                "key_bits": kv_cache.get("key_bits"),
                "value_bits": kv_cache.get("value_bits"),
                "mean_sparsity": attributes.get("mean_sparsity"),
                "mean_kv_bits": attributes.get("mean_kv_bits"),
                "weight_bits": _by_layer(profile.get("weight_bits") or {}),
                "mean_weight_bits": attributes.get("mean_weight_bits"),
                "bytes": attributes.get("bytes"),
            }
        )
    return rows


def _by_layer(weight_bits: Mapping[str, int]) -> list[int | None] | None:
    places = ((layer_of(name), bits) for name, bits in weight_bits.items())
    found = {place[1]: bits for place, bits in places if place is not None}
    return [found.get(layer) for layer in range(max(found) + 1)] if found else None
