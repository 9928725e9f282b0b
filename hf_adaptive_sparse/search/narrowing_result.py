"""The result of comparing the best profile with narrower ones, and its wording."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_adaptive_sparse.profiles import CompressionProfile
from hf_adaptive_sparse.search.increase import CONFIDENCE, Increase

NARROWER = "narrower"
"""Study attribute, and key of ``search.json``, with what was found."""

MARGIN = 0.0005
"""Relative increase of the perplexity that is taken for none: 0.05 %."""

KV, WEIGHTS = "KV", "weight"


def narrowing_of(attributes: Mapping[str, Any], best: int | None) -> Narrowing | None:
    """Return the comparison that is stored, if it is of the trial that is the best now.

    Args:
        attributes: Of a study, or what ``search.json`` holds.
        best: Number of the best trial.
    """
    stored = attributes.get(NARROWER)
    if stored is None or stored["trial"] != best:
        return None
    return Narrowing.from_dict(stored)


@dataclass(frozen=True)
class WidthStep:
    """One comparison with the best profile.

    Attributes:
        part: ``"KV"`` or ``"weight"``: whose bits were cut down.
        wide: Widths that the best profile has beyond ``narrow``.
        narrow: What they were cut down to.
        increase: Of the perplexity.
    """

    part: str
    wide: tuple[int, ...]
    narrow: int
    increase: Increase

    @property
    def is_same(self) -> bool:
        """Whether the difference is below the margin, with confidence."""
        return self.increase.high <= MARGIN

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; an increase that is not finite is ``None``."""
        figures = {
            "increase": self.increase.mean,
            "at_least": self.increase.low,
            "at_most": self.increase.high,
        }
        return {
            "part": self.part,
            "wide": list(self.wide),
            "narrow": self.narrow,
            **{name: x if math.isfinite(x) else None for name, x in figures.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WidthStep:
        """Read the JSON form."""
        figures = (data[name] for name in ("increase", "at_least", "at_most"))
        increase = Increase(*(math.inf if x is None else x for x in figures))
        return cls(data["part"], tuple(data["wide"]), data["narrow"], increase)

    def __str__(self) -> str:
        wide = " and ".join(map(str, sorted(self.wide, reverse=True)))
        figures = (
            f"with {self.narrow} the best profile's perplexity changes by "
            f"{self.increase.mean:+.3%}, {{}} at {CONFIDENCE:.0%} confidence"
        )
        if self.is_same:
            bound = figures.format(f"at most {self.increase.high:+.3%}")
            return (
                f"{wide} and {self.narrow} {self.part} bits do not differ measurably here: {bound} "
                f"({MARGIN:.2%} counts as none)."
            )
        if self.increase.low > 0.0:
            bound = figures.format(f"at least {self.increase.low:+.3%}")
            return f"{self.narrow} {self.part} bits lose measurably against {wide}: {bound}."
        bounds = figures.format(f"between {self.increase.low:+.3%} and {self.increase.high:+.3%}")
        return (
            f"Whether {self.narrow} {self.part} bits lose against {wide} cannot be told on these "
            f"data: {bounds}."
        )


@dataclass(frozen=True)
class Narrowing:
    """What came of the comparisons.

    Attributes:
        trial: Number of the best trial.
        windows: Windows of the evaluation data that were compared.
        steps: The comparisons, in order.
        profile: The narrowest profile that does not differ; ``None`` if the best one's widths are
            needed.
        taken: Whether it takes the best profile's place.
        kv_bytes_per_token: Bytes of codes that it saves per token in the KV cache.
        weight_bytes: Bytes of the prunable weights that it saves in a checkpoint.
        kept: The exact means that keep the best profile in its place, in words; else empty.
        failure: Why the comparison broke off; else empty.
        repeatable: Whether a repeated comparison would break off in the same way.
    """

    trial: int
    windows: int
    steps: tuple[WidthStep, ...]
    profile: CompressionProfile | None
    taken: bool
    kv_bytes_per_token: float
    weight_bytes: int
    kept: str
    failure: str = ""
    repeatable: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "trial": self.trial,
            "windows": self.windows,
            "margin": MARGIN,
            "confidence": CONFIDENCE,
            "steps": [step.to_dict() for step in self.steps],
            "profile": None if self.profile is None else self.profile.to_dict(),
            "taken": self.taken,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "weight_bytes": self.weight_bytes,
            "kept": self.kept,
            "failure": self.failure,
            "repeatable": self.repeatable,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Narrowing:
        """Read the JSON form."""
        profile = data["profile"]
        return cls(
            trial=data["trial"],
            windows=data["windows"],
            steps=tuple(map(WidthStep.from_dict, data["steps"])),
            profile=None if profile is None else CompressionProfile.from_dict(profile),
            taken=data["taken"],
            kv_bytes_per_token=data["kv_bytes_per_token"],
            weight_bytes=data["weight_bytes"],
            kept=data["kept"],
            # Not in the first form, which only holds what came to an end.
            failure=data.get("failure", ""),
            repeatable=data.get("repeatable", True),
        )

    @property
    def lines(self) -> tuple[str, ...]:
        """What to tell a person.

        Per part the last width that makes no difference and the first that does, and what follows.
        """
        told = []
        for part in (KV, WEIGHTS):
            steps = [step for step in self.steps if step.part == part]
            told += [str(step) for step in steps[-2:] if step.is_same or step is steps[-1]]
        if self.failure:
            told.append(f"Narrower widths could not all be compared: {self.failure}")
        if self.profile is None:
            return tuple(told)
        saved = []
        if self.kv_bytes_per_token:
            saved.append(f"{self.kv_bytes_per_token:,.0f} bytes of KV cache per token")
        if self.weight_bytes:
            saved.append(f"{self.weight_bytes:,} bytes of weights")
        amount = " and ".join(saved)
        if self.taken:
            told.append(
                f"The narrower widths are used; this saves {amount} without a measurable loss."
            )
        else:
            told.append(
                f"The mean of {self.kept} is kept, as the search space says (by default all widths "
                f"in equal parts); without it {amount} could be saved at no measurable loss."
            )
        return tuple(told)
