"""Where calibration data come from."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

from hf_adaptive_sparse.profiles.checks import check_count

MIN_EXPERT_TOKENS = 32
"""Calibration tokens that an expert must have seen to be pruned by them: with so many, the norm of
an input feature is known to about an eighth of itself."""


@dataclass(frozen=True)
class CalibrationConfig:
    """Where calibration data come from and how much of them is used.

    Attributes:
        dataset: Hub dataset as ``name``, ``name:config`` or ``name:config:split``, or the path of
            a local parquet, jsonl or text file. ``None``: WikiText-2's training split.
        num_samples: Windows of text, questions or conversations that are used at most.
        sequence_length: Tokens per window of text. ``None``: ``min(2048, the model's context)``.
        batch_size: Windows, questions or conversations per batch.
        sequential: Each layer is calibrated on the output of the pruned layers before it
            (``True``) or of the dense ones (``False``, "one-shot").
        image_weight: Weight of an image token in the activation statistics; text tokens weigh 1.
        seed: Seed of the choice of samples.
        min_expert_tokens: Experts that saw fewer calibration tokens are scored without data, and
            named in the report.
    """

    dataset: str | None = None
    num_samples: int = 128
    sequence_length: int | None = None
    batch_size: int = 1
    sequential: bool = True
    image_weight: float = 1.0
    seed: int = 0
    min_expert_tokens: int = MIN_EXPERT_TOKENS

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "min_expert_tokens"):
            object.__setattr__(self, name, check_count(getattr(self, name), name))
        if self.sequence_length is not None:
            length = check_count(self.sequence_length, "sequence_length")
            object.__setattr__(self, "sequence_length", length)
        weight = self.image_weight
        if not isinstance(weight, Real) or isinstance(weight, bool) or not float(weight) >= 0.0:
            raise ValueError(f"image_weight must be a number >= 0, got {weight!r}.")

    def for_source(self, source: object) -> CalibrationConfig:
        """Return the settings by which a source is read.

        Args:
            source: Settings, which say all; a name or path, which these settings take; or data.
        """
        if isinstance(source, CalibrationConfig):
            return source
        if isinstance(source, str | os.PathLike):
            return replace(self, dataset=os.fspath(source))
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)
