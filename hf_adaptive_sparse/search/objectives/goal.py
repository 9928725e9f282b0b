"""The goal of a search: what the caller asks for, as the figures that a study minimises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from hf_adaptive_sparse.search.objectives.base import (
    OBJECTIVES,
    Objective,
    get_objective,
    objective_label,
)

BYTES = "bytes"
"""Name of the objective that is a profile's size; it needs no evaluation."""

ObjectiveSpec = str | Mapping[str, float] | Sequence[str | Mapping[str, float]]
"""A name; weights by name, for a sum; or a sequence of either, for a Pareto front."""


@dataclass(frozen=True)
class Quality:
    """One figure that is evaluated: an objective, or a weighted sum of objectives.

    Attributes:
        terms: Name -> weight, in order. A sum adds the objectives' *losses*: the perplexity enters
            it by its logarithm, so that it, ``kl`` and ``answers`` are all in nats per token.
    """

    terms: tuple[tuple[str, float], ...]

    @property
    def label(self) -> str:
        """Its name for people: ``perplexity``, or ``0.5 perplexity + 0.5 kl``."""
        return self._joined([objective_label(name) for name, _ in self.terms])

    @property
    def name(self) -> str:
        """Its name for programs: the same of the objectives' names."""
        return self._joined([name for name, _ in self.terms])

    def _joined(self, names: Sequence[str]) -> str:
        if self._single:
            return names[0]
        weights = [weight for _, weight in self.terms]
        return " + ".join(f"{w:g} {name}" for w, name in zip(weights, names, strict=True))

    @property
    def _single(self) -> bool:
        return len(self.terms) == 1

    def value(self, losses: Mapping[str, float], objectives: Mapping[str, Objective]) -> float:
        """Return the figure from the mean loss of each objective."""
        if self._single:
            name = self.terms[0][0]
            return objectives[name].value(losses[name])
        return sum(weight * losses[name] for name, weight in self.terms)


@dataclass(frozen=True)
class Goal:
    """What a study minimises.

    Attributes:
        parts: One part per direction: a quality, or ``BYTES``. More than one: a Pareto front.
    """

    parts: tuple[Quality | str, ...]

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Read the command line's form of it.

        ``kl``; ``perplexity=0.5,kl=0.5`` for a sum; ``perplexity,bytes`` for a front.

        Raises:
            ValueError: If it is none of these.
        """
        parts = [part.strip() for part in text.split(",")]
        if not any("=" in part for part in parts):
            return cls.of(parts[0] if len(parts) == 1 else parts)
        weights = {}
        for part in parts:
            name, _, weight = part.partition("=")
            try:
                weights[name.strip()] = float(weight)
            except ValueError:
                raise ValueError(
                    "objective must be a name, names joined by commas, or NAME=WEIGHT joined by "
                    f"commas, got {text!r}."
                ) from None
        return cls.of(weights)

    @classmethod
    def of(cls, spec: ObjectiveSpec) -> Goal:
        """Read what ``search(objective=...)`` was given.

        Raises:
            ValueError: If a name is unknown or repeated, a weight is not above 0, or nothing but
                bytes is asked for.
        """
        if isinstance(spec, str | Mapping):
            return cls((_part(spec, alone=True),))
        if not isinstance(spec, Sequence) or not 2 <= len(spec) <= 4:
            raise ValueError(
                "objective must be a name, weights by name, or a sequence of 2 to 4 of these for "
                f"a Pareto front, got {spec!r}."
            )
        parts = tuple(_part(part, alone=False) for part in spec)
        if len(set(parts)) < len(parts):
            raise ValueError(f"Each objective of a front must be another one, got {spec!r}.")
        return cls(parts)

    @property
    def is_front(self) -> bool:
        """Whether several figures are minimised side by side."""
        return len(self.parts) > 1

    @property
    def sweeps_budget(self) -> bool:
        """Whether the size is to be found as well, so that no budget holds it."""
        return BYTES in self.parts

    @property
    def labels(self) -> tuple[str, ...]:
        """Name of each part for people."""
        return tuple(part if isinstance(part, str) else part.label for part in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each part for programs."""
        return tuple(part if isinstance(part, str) else part.name for part in self.parts)

    def objectives(self) -> dict[str, Objective]:
        """Return a new objective for each name that occurs."""
        names = dict.fromkeys(
            name for part in self.parts if isinstance(part, Quality) for name, _ in part.terms
        )
        return {name: get_objective(name) for name in names}

    def to_json(self) -> Any:
        """Return the plain JSON form, which `of` reads."""
        parts = [
            part
            if isinstance(part, str)
            else part.name
            if len(part.terms) == 1
            else dict(part.terms)
            for part in self.parts
        ]
        return parts if self.is_front else parts[0]


def _part(spec: object, *, alone: bool) -> Quality | str:
    known = ", ".join(sorted(OBJECTIVES))
    if spec == BYTES:
        if alone:
            raise ValueError(
                "'bytes' alone leaves nothing to weigh it against: the smallest profile is the one "
                "that removes most. Ask for a front, such as ('perplexity', 'bytes')."
            )
        return BYTES
    weights = {spec: 1.0} if isinstance(spec, str) else spec
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"objective must be one of {known}, or weights by name, got {spec!r}.")
    for name, weight in weights.items():
        if name not in OBJECTIVES:
            also = "" if alone else f", or {BYTES!r} by itself"
            raise ValueError(f"objective must be one of {known}{also}; got {name!r}.")
        number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not number or not 0.0 < float(weight) < math.inf:
            raise ValueError(f"The weight of {name!r} must be a number above 0, got {weight!r}.")
    return Quality(tuple((str(name), float(weight)) for name, weight in weights.items()))
