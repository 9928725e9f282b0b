"""Opens a study that several workers may open at once: one makes it, the others check it.

A storage lets only one worker create a study of a given name. That worker enqueues the baseline and
then stores the fingerprint, which tells the others that the study is ready and whether it is the
one they want.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_adaptive_sparse.search.errors import SearchError, StudyMismatch
from hf_adaptive_sparse.search.fingerprint import (
    check_fingerprint,
    config_differences,
    study_versions,
)
from hf_adaptive_sparse.search.trials import UNIFORM

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study

logger = logging.getLogger(__name__)

FINGERPRINT = "fingerprint"
"""Study attribute: what it was made for. Its presence says that the study is ready."""

PATIENCE_SECONDS = 20.0
"""How long the worker that created a study has to make it ready."""

POLL_SECONDS = 0.1


def open_study(
    storage: BaseStorage,
    name: str,
    *,
    made_for: Mapping[str, Any],
    baseline: Mapping[str, Any],
    attributes: Mapping[str, Any],
    values: int = 1,
) -> Study:
    """Open a study, and make it if nobody has.

    Args:
        storage: Where it is kept.
        name: Its name.
        made_for: Its fingerprint.
        baseline: Parameters of the uniform profile, enqueued once; empty if there are none.
        attributes: What else is stored with a new study: its ``"seed"``, and the model's
            ``"config"`` by `config_fields`, which a later search that has another is warned of.
        values: Figures that its trials minimise.

    Raises:
        StudyMismatch: If the study is there and was made for something else, or is empty and was
            made for other figures.
        SearchError: If it was not made by this package.
    """
    import optuna

    created = False
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        try:
            study = optuna.create_study(
                storage=storage, study_name=name, directions=["minimize"] * values
            )
            created = True
        except optuna.exceptions.DuplicatedStudyError:  # another worker was faster
            study = optuna.load_study(study_name=name, storage=storage)
    if FINGERPRINT not in study.user_attrs:  # it would say better what the study was made for
        _check_directions(study, values)
    stored = None if created else _wait_for_fingerprint(study)
    if stored is None:
        _make_ready(study, made_for, baseline, attributes)
        return study
    seeds = [study.user_attrs.get("seed"), attributes.get("seed")]
    check_fingerprint(stored, made_for, name, seeds=seeds if seeds[0] != seeds[1] else ())
    # A study from before this was stored has none.
    changes = config_differences(study.user_attrs.get("config", {}), attributes.get("config", {}))
    if changes:
        logger.warning(
            "The study was started with another config of the model, so values may differ: %s.",
            changes,
        )
    versions, current = study.user_attrs.get("versions"), study_versions()
    if versions != current:
        logger.warning(
            "The study was started with %s, this run has %s: values may differ.", versions, current
        )
    return study


def _check_directions(study: Study, values: int) -> None:
    """Refuse to fill a study that was not created to minimise as many figures."""
    found = [direction.name.lower() for direction in study.directions]
    needed = ["minimize"] * values
    if found != needed:
        raise StudyMismatch(
            f"The study {study.study_name!r} must have the directions {', '.join(needed)} for this "
            f"search, got {', '.join(found)}. Give another study_name (--study) or storage."
        )


def _make_ready(
    study: Study,
    made_for: Mapping[str, Any],
    baseline: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> None:
    for key, value in {"versions": study_versions(), **attributes}.items():
        study.set_user_attr(key, value)
    if baseline and not study.get_trials(deepcopy=False):
        study.enqueue_trial(dict(baseline), user_attrs={UNIFORM: True})
    study.set_user_attr(FINGERPRINT, dict(made_for))


def _wait_for_fingerprint(study: Study) -> Any:
    """Return the fingerprint of a study that is there already; ``None`` if its maker died."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        stored = study.user_attrs.get(FINGERPRINT)
        if stored is not None:
            return stored
        if any(UNIFORM not in t.user_attrs for t in study.get_trials(deepcopy=False)):
            raise SearchError(
                f"The study {study.study_name!r} was not made by hf_adaptive_sparse: it holds "
                "trials but no fingerprint. Give another study_name or storage."
            )
        if time.monotonic() > deadline:
            logger.warning(
                "The study %r was still empty %d s after it was found; this search sets it up.",
                study.study_name,
                PATIENCE_SECONDS,
            )
            return None
        time.sleep(POLL_SECONDS)
