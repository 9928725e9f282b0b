"""Parameters that somebody set before a trial began, with `optuna.study.Study.enqueue_trial`.

Optuna takes them as they are, and only warns of what lies outside of a range. Samplers fail on
values from there, and one that is no number fails itself, in every search that resumes the study.
"""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING

from hf_adaptive_sparse.search.errors import TrialFailure

if TYPE_CHECKING:
    from optuna.trial import Trial


ROUNDING = 1e-9
"""How far a parameter may lie outside of its range: a target of many digits does, by less."""


class CheckedTrial:
    """A trial that refuses set parameters which no sampler would draw.

    Args:
        trial: The trial.
    """

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        stored = trial.study._storage.get_trial(trial._trial_id)
        self._set = stored.system_attrs.get("fixed_params", {})

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None
    ) -> float:
        """Return the value of a parameter, set or drawn.

        Raises:
            TrialFailure: If it was set to anything but a number from ``low`` to ``high``.
        """
        value = self._set.get(name, low)
        if not (isinstance(value, Real) and low - ROUNDING <= float(value) <= high + ROUNDING):
            raise TrialFailure(
                f"The enqueued parameter {name!r} must be a number from {low:g} to {high:g}, got "
                f"{value!r}. Enqueue another trial.",
                repeatable=False,
            )
        return self._trial.suggest_float(name, low, high, step=step)
