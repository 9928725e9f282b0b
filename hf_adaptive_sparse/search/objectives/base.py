"""The interface of an objective, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from hf_adaptive_sparse.evaluation.scoring import Predictions

Batch = Mapping[str, torch.Tensor]


class Objective(ABC):
    """A figure of merit that is summed over batches; lower is better.

    Its *loss* is the sum over the batches by the sum of counts, so that batch size and padding
    change nothing. Subclasses are registered by name and hold what they need of the dense model.

    Attributes:
        name: What ``search(objective=...)`` calls it.
        label: What people call its figure; the name unless it says otherwise.
        needs_dense: Whether `observe` is to be shown what the dense model predicts, before any
            weight is masked.
    """

    name: ClassVar[str]
    label: ClassVar[str] = ""
    needs_dense: ClassVar[bool] = False

    def check(self, batches: Sequence[Batch]) -> None:  # noqa: B027 - most take any data
        """Check that the objective can be read off these evaluation batches.

        Raises:
            ValueError: If it cannot.
        """

    def observe(self, index: int, dense: Predictions) -> None:  # noqa: B027 - few need it
        """Keep what is needed of the dense model's predictions on the batch ``index``."""

    @abstractmethod
    def score(self, index: int, predictions: Predictions) -> tuple[float, int]:
        """Return the summed loss of the batch ``index`` and what it is to be divided by."""

    def value(self, loss: float) -> float:
        """Return the figure that people read, from the mean loss; it rises with the loss."""
        return loss


OBJECTIVES: dict[str, type[Objective]] = {}
"""Registered objectives by name."""


def register_objective(kind: type[Objective]) -> type[Objective]:
    """Register an objective under its name.

    Raises:
        ValueError: If the name is taken.
    """
    if kind.name in OBJECTIVES:
        raise ValueError(f"An objective named {kind.name!r} is registered already.")
    OBJECTIVES[kind.name] = kind
    return kind


def objective_label(name: str) -> str:
    """Return what people call the figure of an objective; of one that is not known, its name."""
    kind = OBJECTIVES.get(name)
    return (kind.label if kind is not None else "") or name


def get_objective(name: str) -> Objective:
    """Return a new objective.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(sorted(OBJECTIVES))}, got {name!r}.")
    return OBJECTIVES[name]()
