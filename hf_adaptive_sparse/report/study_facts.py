"""The facts of a search that a report shows, read from its storage or its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_adaptive_sparse.search.comparison import held_out_of
from hf_adaptive_sparse.search.errors import SearchError, StorageError
from hf_adaptive_sparse.search.narrowing_result import Narrowing, narrowing_of
from hf_adaptive_sparse.search.objectives import objective_label
from hf_adaptive_sparse.search.opening import FINGERPRINT
from hf_adaptive_sparse.search.result import HISTORY_FILE, SearchResult
from hf_adaptive_sparse.search.start import SENSITIVITY
from hf_adaptive_sparse.search.storage import JOURNAL, open_storage, quiet_optuna, storage_errors
from hf_adaptive_sparse.search.trials import evaluated, history, is_set_aside
from hf_adaptive_sparse.search.worker import WORKER_ATTRIBUTE
from hf_adaptive_sparse.staging import partial_of

if TYPE_CHECKING:
    from optuna.study import Study

Row = Mapping[str, Any]


@dataclass(frozen=True)
class StudyFacts:
    """A search as a report sees it.

    Attributes:
        name: Name of the study.
        space: The space's JSON form.
        metric: Metric that ranked the weights.
        spans: First and last decoder layer of every group that shares a ratio.
        rows: One per trial, keys as in `search.trials.history`.
        profile: Best profile's JSON form; ``None`` where no trial was evaluated in full.
        numel: Weights per prunable linear; empty where the study does not store them.
        labels: What the trials minimise, one name per figure.
        measured: What was measured of each group before the search, as `search` stores it.
        held_out: Comparison with the uniform profile on data that the search did not see.
        narrowing: How the best profile compares with narrower KV and weight bits.
        workers: Workers that carried trials through; ``None`` where it is not known.
        seconds: Time from the first trial's start to the last one's end, likewise.
        versions: Libraries it was started with.
    """

    name: str
    space: Mapping[str, Any]
    metric: str
    spans: tuple[tuple[int, int], ...]
    rows: tuple[Row, ...]
    profile: Mapping[str, Any] | None
    numel: Mapping[str, int]
    labels: tuple[str, ...]
    measured: Mapping[str, Any] | None
    held_out: Mapping[str, Any] | None
    narrowing: Narrowing | None
    workers: int | None
    seconds: float | None
    versions: Mapping[str, str]

    @property
    def target(self) -> float | None:
        """The mean ratio that all profiles have; ``None`` if weights stay, or if it is free."""
        target = self.space.get("target_sparsity")
        return float(target) if isinstance(target, int | float) and target else None

    @property
    def prunes(self) -> bool:
        """Whether profiles remove weights, and not only bits."""
        return bool(self.space.get("target_sparsity"))

    @property
    def evaluated(self) -> list[Row]:
        """Trials with a value or an estimate, one per distinct profile."""
        return evaluated(self.rows)

    @property
    def complete(self) -> list[Row]:
        """Trials that were evaluated in full, one per distinct profile."""
        return [row for row in self.evaluated if row["value"] is not None]

    @property
    def failed(self) -> list[Row]:
        """Trials that failed for a reason of their own."""
        return [row for row in self.rows if row["failure"] is not None and not is_set_aside(row)]

    @property
    def best(self) -> Row | None:
        """The complete trial of lowest value."""
        return min(self.complete, key=lambda row: row["value"], default=None)

    @property
    def uniform(self) -> Row | None:
        """The complete trial of the uniform profile."""
        return next((row for row in self.complete if row["uniform"]), None)


def read_study(source: str | os.PathLike[str], name: str | None = None) -> StudyFacts:
    """Read a search.

    Args:
        source: Folder that ``search`` or ``compress`` wrote or is to write, journal or SQLite file,
            or storage URL.
        name: Name of the study; ``None``: the one that a folder's result is of, else the only one.

    Raises:
        StorageError: If there is no such folder or file, or the storage cannot be used.
        SearchError: If it holds no study of that name, several of which none was named, or one
            that was not made by this package.
    """
    text = os.path.expanduser(source)
    if "://" not in text:
        path = Path(text)
        begun = partial_of(path) / JOURNAL
        if begun.is_file() and not (path.is_dir() and any(path.iterdir())):
            text = str(begun)  # of a job that runs, or was interrupted
        elif path.is_dir():
            if not (path / JOURNAL).is_file():
                return _from_file(path, name)
            if name is None and (path / HISTORY_FILE).is_file():
                # A search within a loss leaves a study per budget; this is the one that counts.
                name = SearchResult.load_history(path)["study_name"]
            text = str(path / JOURNAL)
        elif not path.is_file():
            raise StorageError(f"A study is needed; there is no file or folder {text}.")
    with quiet_optuna(), storage_errors(text):
        return facts_of(_load(text, name))


def _load(storage: str, name: str | None) -> Study:
    import optuna

    opened = open_storage(storage, to_read=True)
    names = optuna.get_all_study_names(opened)
    if name is None and len(names) == 1:
        name = names[0]
    if name is None or name not in names:
        there = ", ".join(map(repr, names)) or "none"
        wanted = "Name one of its studies with --study" if name is None else f"No study {name!r}"
        raise SearchError(f"{wanted}; the storage holds: {there}.")
    study = optuna.load_study(study_name=name, storage=opened)
    if FINGERPRINT not in study.user_attrs:
        raise SearchError(f"The study {name!r} was not made by hf_adaptive_sparse.")
    return study


def facts_of(study: Study) -> StudyFacts:
    """Return what a report says about a study."""
    attributes = study.user_attrs
    made_for, layout = attributes[FINGERPRINT], attributes.get("layout", {})
    rows = tuple(history(study))
    trials = study.get_trials(deepcopy=False)
    best = _best(rows)
    profile = None if best is None else trials[best["number"]].user_attrs["profile"]
    number = None if best is None else best["number"]
    narrowing = narrowing_of(attributes, number)
    if narrowing is not None and narrowing.taken and narrowing.profile is not None:
        profile = narrowing.profile.to_dict()
    started = [t.datetime_start for t in trials if t.datetime_start and t.state.is_finished()]
    ended = [t.datetime_complete for t in trials if t.datetime_complete]
    span = (max(ended) - min(started)).total_seconds() if started and ended else None
    named = {t.user_attrs[WORKER_ATTRIBUTE] for t in trials if WORKER_ATTRIBUTE in t.user_attrs}
    return StudyFacts(
        name=study.study_name,
        space=made_for["space"],
        metric=made_for["metric"],
        spans=_spans(layout.get("blocks")),
        rows=rows,
        profile=profile,
        numel=layout.get("numel", {}),
        labels=_labels(made_for["objective"]),
        measured=attributes.get(SENSITIVITY),
        held_out=held_out_of(attributes, number),
        narrowing=narrowing,
        workers=len(named) or None,
        seconds=span,
        versions=attributes.get("versions", {}),
    )


def _from_file(folder: Path, name: str | None) -> StudyFacts:
    if not (folder / HISTORY_FILE).is_file():
        raise StorageError(
            f"The folder {folder} holds neither {JOURNAL} nor {HISTORY_FILE}. Give a folder that "
            "`search` or `compress` wrote, or the storage of the study."
        )
    data = SearchResult.load_history(folder)
    if name is not None and name != data["study_name"]:
        raise SearchError(f"The folder holds the study {data['study_name']!r}, not {name!r}.")
    rows = tuple(data["history"])
    best = _best(rows)
    number = None if best is None else best["number"]
    return StudyFacts(
        name=data["study_name"],
        space=data["space"],
        metric=data["metric"],
        spans=_spans(data["blocks"]),
        rows=rows,
        profile=None if best is None else SearchResult.load_profile(folder).to_dict(),
        numel={},
        labels=_labels(data["objective"]),
        measured=None,
        held_out=held_out_of(data, number),
        narrowing=narrowing_of(data, number),
        workers=None,
        seconds=None,
        versions=data["versions"],
    )


def _best(rows: Sequence[Row]) -> Row | None:
    valued = [row for row in rows if row["value"] is not None]
    return min(valued, key=lambda row: row["value"], default=None)


def _labels(objective: Any) -> tuple[str, ...]:
    """Return names for the figures of an objective's JSON form: a name, weights, or a list."""
    parts = objective if isinstance(objective, list) else [objective]
    return tuple(
        " + ".join(f"{weight:g} {objective_label(name)}" for name, weight in part.items())
        if isinstance(part, Mapping)
        else objective_label(str(part))
        for part in parts
    )


def _spans(blocks: Any) -> tuple[tuple[int, int], ...]:
    return tuple((first, last) for first, last in blocks or ())
