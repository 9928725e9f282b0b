"""Ends trials whose worker is gone, and enqueues each of them again.

Storages end a trial atomically: of several workers that try, one succeeds, and that one enqueues
the parameters again. If it is killed just between the two, the trial counts as interrupted, and any
worker enqueues it a little later. If two workers do, the second finds the profile claimed (see
`claims`), so it is still evaluated once.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hf_adaptive_sparse.search.trials import FAILURE, REPEATABLE, RETRY_OF, should_retry, tally
from hf_adaptive_sparse.search.worker import Watch

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

logger = logging.getLogger(__name__)

KILLS = "kills"
"""Trial attribute: how many workers were killed while they evaluated these parameters."""

MOST_KILLS = 3
"""After so many the profile is taken to be what kills them, and its trial counts as failed."""

ORPHAN_SECONDS = 20.0
"""How long the worker that ended an interrupted trial has to enqueue it again, from when another
first sees it."""

_INTERRUPTED = "interrupted"


def recover(study: Study, watch: Watch, *, opening: bool = False) -> None:
    """End what killed workers left running, and enqueue again what was interrupted.

    Args:
        study: The study.
        watch: Tells which running trials are nobody's any more.
        opening: Whether a search begins: what an earlier one left is then enqueued at once.
    """
    count = tally(study)
    for trial in count.running:
        if watch.is_abandoned(trial):
            _end(study, trial)
    patience = 0.0 if opening else ORPHAN_SECONDS
    for trial in count.interrupted:
        if watch.unchanged_seconds(trial, _INTERRUPTED) >= patience:
            _enqueue_again(study, trial, trial.user_attrs.get(KILLS, 0))


def _end(study: Study, trial: FrozenTrial) -> None:
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    storage = study._storage
    kills = trial.user_attrs.get(KILLS, 0) + 1
    hopeless = kills >= MOST_KILLS
    try:
        if hopeless:
            reason = (
                f"Its worker was killed {kills} times while it evaluated this profile; most often "
                "that is the system, short of memory."
            )
            storage.set_trial_user_attr(trial._trial_id, REPEATABLE, True)
            storage.set_trial_user_attr(trial._trial_id, FAILURE, reason)
        if not storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL):
            return
    except UpdateFinishedTrialError:  # another worker was first, or its own came back to life
        return
    then = "It is tried again." if should_retry(trial) else "It had drawn no profile yet."
    logger.warning(
        "Trial %d was left unfinished: its worker has stopped. %s",
        trial.number,
        "It counts as failed." if hopeless else then,
    )
    if not hopeless:
        _enqueue_again(study, trial, kills)


def _enqueue_again(study: Study, trial: FrozenTrial, kills: int) -> None:
    if should_retry(trial):
        params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        study.enqueue_trial(params, user_attrs={RETRY_OF: trial.number, KILLS: kills})
