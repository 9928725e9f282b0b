"""Dividing trials among workers that share nothing but a storage.

A worker that has drawn a profile claims it: it stores the profile's digest and a ticket, one higher
than any ticket it can see, and then waits until every other running trial has its ticket too. From
then on all workers see the same order of claims, so each can tell whether an earlier one holds its
profile, and whether the number of trials that was asked for is reached. This is Lamport's bakery
algorithm: it needs no lock, so a worker that is killed leaves none behind.

With SQLite, which locks no rows, Optuna itself may hand an enqueued trial to two workers at once.
Both then evaluate it; one ends it, and it counts once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_adaptive_sparse.search.trials import DIGEST, Tally, is_enqueued, tally
from hf_adaptive_sparse.search.worker import Watch

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

TICKET = "ticket"
"""Trial attribute: place of its claim among those of all workers."""

PATIENCE_SECONDS = 30.0
"""How long a trial without a ticket is waited for; drawing a profile takes far less."""

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Verdict:
    """The outcome of a claim.

    Attributes:
        holder: The trial that has the same profile and came first, finished or running; ``None``
            if the profile is this trial's to evaluate.
        surplus: Whether enough trials are finished or under way without this one.
    """

    holder: FrozenTrial | None
    surplus: bool


def claim(study: Study, trial: Trial, digest: str, n_trials: int, watch: Watch) -> Verdict:
    """Claim a profile for a running trial.

    Args:
        study: The study.
        trial: The trial, which has no ticket yet.
        digest: Digest of its profile.
        n_trials: Distinct profiles to be tried in all.
        watch: Tells which running trials have lost their worker.
    """
    trial.set_user_attr(DIGEST, digest)
    tickets = [t.user_attrs.get(TICKET, 0) for t in study.get_trials(deepcopy=False)]
    trial.set_user_attr(TICKET, 1 + max(tickets))
    deadline = time.monotonic() + PATIENCE_SECONDS
    drawing: set[int] | None = None
    while True:
        count = tally(study)
        late = [t for t in count.running if TICKET not in t.user_attrs]
        if drawing is None:  # a trial that begins later sees this ticket and takes a higher one
            drawing = {t.number for t in late}
        late = [t for t in late if t.number in drawing]
        if all(watch.is_abandoned(t) for t in late) or time.monotonic() > deadline:
            own = next((t for t in count.running if t.number == trial.number), None)
            if own is None:
                from optuna.exceptions import UpdateFinishedTrialError

                raise UpdateFinishedTrialError("Another worker has ended this trial meanwhile.")
            return judge(own, count, n_trials)
        time.sleep(POLL_SECONDS)


def judge(trial: FrozenTrial, count: Tally, n_trials: int) -> Verdict:
    """Return the outcome of a claim, given all trials at a time when no worker is drawing."""
    digest = trial.user_attrs[DIGEST]
    earlier = _before(trial, count.running)
    holders = [t for t in earlier if t.user_attrs[DIGEST] == digest]
    holder = count.known.get(digest) or (holders[0] if holders else None)
    under_way = {t.user_attrs[DIGEST] for t in earlier} - set(count.known)
    ahead = count.attempts + len(under_way)
    if not is_enqueued(trial):
        ahead += count.pending  # what was interrupted, or enqueued, goes first
    return Verdict(holder, surplus=holder is None and ahead >= n_trials)


def _before(trial: FrozenTrial, running: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    claimed = [t for t in running if TICKET in t.user_attrs and DIGEST in t.user_attrs]
    place = (trial.user_attrs[TICKET], trial.number)
    claimed = [t for t in claimed if (t.user_attrs[TICKET], t.number) < place]
    return sorted(claimed, key=lambda t: (t.user_attrs[TICKET], t.number))
