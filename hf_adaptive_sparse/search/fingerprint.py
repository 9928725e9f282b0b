"""Identifies what a study was made for, so that it is never resumed with anything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.evaluation.digests import batches_digest, weights_digest
from hf_adaptive_sparse.search.errors import StudyMismatch
from hf_adaptive_sparse.version import library_versions

STUDY_FORMAT = 1
"""Version of what a search stores in a study."""


def fingerprint(
    model: PreTrainedModel,
    *,
    space: Mapping[str, Any],
    objective: Any,
    metric: str,
    image_weight: float,
    excluded: Sequence[str],
    calibration: Sequence[Mapping[str, torch.Tensor]] | None,
    evaluation: Sequence[Mapping[str, torch.Tensor]],
) -> dict[str, Any]:
    """Return what decides the values of a study's trials, as plain JSON types.

    The seed and the versions of the libraries are left out on purpose: with another one the
    trials still compare.
    """
    return {
        "study_format": STUDY_FORMAT,
        "model": type(model).__name__,
        "weights": weights_digest(model),
        "space": dict(space),
        "objective": objective,
        "metric": metric,
        "image_weight": image_weight,
        "modules_to_not_convert": list(excluded),
        "calibration": None if calibration is None else batches_digest(calibration),
        "evaluation": batches_digest(evaluation),
    }


def check_fingerprint(stored: Mapping[str, Any], current: Mapping[str, Any], study: str) -> None:
    """Refuse to resume a study that was made for something else.

    Raises:
        StudyMismatch: If anything differs; it is named, with both values where they are short.
    """
    differences = []
    for key in sorted(set(stored) | set(current)):
        old, new = stored.get(key), current.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            parts = [k for k in sorted(set(old) | set(new)) if old.get(k) != new.get(k)]
            differences += [f"{key}.{k} ({old.get(k)!r}, now {new.get(k)!r})" for k in parts]
        else:
            differences.append(f"{key} ({_short(old)}, now {_short(new)})")
    if differences:
        raise StudyMismatch(
            f"The study {study!r} was made for something else and cannot be resumed with this: "
            f"{'; '.join(differences)} differ. To resume it, give the former arguments; to start a "
            "new search, another output folder, storage or study_name (--study)."
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 32 else text[:16] + "…"


def study_versions() -> dict[str, str]:
    """Return the versions of the libraries that a study's values depend on."""
    return {**library_versions(), "optuna": version("optuna")}
