"""Identifies what a study was made for, so that it is never resumed with anything else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_adaptive_sparse.evaluation.digests import batches_digest, weights_digest
from hf_adaptive_sparse.search.errors import StudyMismatch
from hf_adaptive_sparse.version import library_versions

STUDY_FORMAT = 1
"""Version of what a search stores in a study."""

_NOT_COMPARED = ("transformers_version", "architectures", "dtype", "use_cache")
"""Fields of a config that say how a model was saved or loaded, or what the fingerprint has."""


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


def check_fingerprint(
    stored: Mapping[str, Any], current: Mapping[str, Any], study: str, *, seeds: Sequence[Any] = ()
) -> None:
    """Refuse to resume a study that was made for something else.

    Args:
        stored: The study's fingerprint.
        current: That of this search.
        study: Name of the study.
        seeds: The seeds of both, where they differ: data may differ for that reason.

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
        drawn = ""
        if seeds:
            changed = f"({seeds[0]}, now {seeds[1]})"
            drawn = f" The seed differs, too {changed}, which may draw other samples."
        raise StudyMismatch(
            f"The study {study!r} was made for something else and cannot be resumed with this. "
            f"What differs: {'; '.join(differences)}.{drawn} To resume it, give the former "
            "arguments; to start a new search, give another output folder, storage or study_name "
            "(--study)."
        )


def config_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of a model's config, nested ones by dotted names, as plain JSON types."""
    form = json.loads(json.dumps(config.to_dict(), default=str, skipkeys=True))
    return dict(_flat(form))


def _flat(form: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in form.items():
        if key.startswith("_") or key in _NOT_COMPARED:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def config_differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Say which fields that both configs have differ, with both values; empty if none do."""
    names = sorted(name for name in stored.keys() & current.keys() if stored[name] != current[name])
    return "; ".join(f"{n} ({_short(stored[n])}, now {_short(current[n])})" for n in names)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 32 else text[:16] + "…"


def study_versions() -> dict[str, str]:
    """Return the versions of the libraries that a study's values depend on."""
    return {**library_versions(), "optuna": version("optuna")}
