"""The result of evaluating a profile, and the interface that receives interim values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class Reporter(Protocol):
    """What a trial is told while it is evaluated; Optuna's ``Trial`` is one."""

    def report(self, value: float, step: int) -> None:
        """Take the value that one batch gives, as the ``step``-th of the fixed order."""

    def should_prune(self) -> bool:
        """Return whether the trial is hopeless and may stop."""


@dataclass(frozen=True)
class Evaluation:
    """What became of one profile.

    Attributes:
        values: What is minimised, one figure per part of the goal; where the evaluation was
            stopped, an estimate of it from the batches seen, corrected by what the uniform profile
            lost on the same batches.
        batches: Batches that were evaluated.
        of_batches: Batches that there are.
        reused: Fraction of the decoder layers that did not have to be run.
    """

    values: tuple[float, ...]
    batches: int
    of_batches: int
    reused: float = 0.0

    @property
    def value(self) -> float:
        """The first figure."""
        return self.values[0]

    @property
    def stopped(self) -> bool:
        """Whether it was given up before the last batch."""
        return self.batches < self.of_batches

    def to_attributes(self) -> dict[str, Any]:
        """Return what is stored with a trial: plain JSON types."""
        return {"batches": self.batches, "of_batches": self.of_batches, "reused": self.reused}
