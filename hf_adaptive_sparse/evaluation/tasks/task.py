"""The interface of a benchmark: items for the model, an outcome of each, figures of all of them.

Outcomes are plain JSON, so that a run writes them down as it goes and another continues it. A new
benchmark is one class with `register_task` in a module of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.records import DataError, Table
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice

Outcome = dict[str, Any]
"""What came of one item: plain JSON types."""


@dataclass(frozen=True)
class Setting:
    """How a benchmark is run.

    Attributes:
        kv_cache: ``None``: the model's own KV profile, if any; ``False``: none; or that one.
        max_new_tokens: Tokens per answer at most; ``None``: the task's own limit.
        prompt: Text around ``{question}`` instead of the task's own, see `format_question`.
        sequence_length: Tokens per window of text; ``None``: ``min(2048, the model's context)``.
    """

    kv_cache: KVCacheChoice = None
    max_new_tokens: int | None = None
    prompt: str | None = None
    sequence_length: int | None = None


@dataclass(frozen=True)
class Item:
    """One item that the model is asked about.

    Attributes:
        key: Tells it from all others of the data, in every run.
        content: What the task needs of it.
        group: Only items of one group share a batch.
    """

    key: str
    content: Any = field(repr=False)
    group: str = ""


@dataclass(frozen=True)
class TaskResult:
    """The figures of one benchmark.

    Attributes:
        task: Its name.
        data: What it was run on.
        metric: The main figure: ``"perplexity"`` (lower is better) or ``"accuracy"`` in [0, 1].
        value: Its value.
        count: Items it was computed from.
        standard_error: Standard error of ``value``, from the spread over the items; ``None`` for a
            single item.
        details: Further figures.
        seconds: Time this run took; outcomes that an earlier run left cost none.
    """

    task: str
    data: str
    metric: str
    value: float
    count: int
    standard_error: float | None
    details: Mapping[str, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class Figures:
    """What a task makes of its outcomes; the fields are those of `TaskResult`."""

    value: float
    standard_error: float | None
    details: Mapping[str, float] = field(default_factory=dict)


class Task(ABC):
    """One benchmark.

    Attributes:
        name: Its name on the command line.
        metric: Its main figure.
        default_data: The Hub dataset it is run on unless told otherwise.
        columns: Columns that the data must have.
        needs_images: Whether the model and its processor must take images.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    default_data: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    needs_images: ClassVar[bool] = False

    @abstractmethod
    def items(
        self, table: Table, processor: Any, model: PreTrainedModel, setting: Setting
    ) -> Iterator[Item]:
        """Read the items of the data, lazily and always in the same order.

        Raises:
            DataError: If a row is not as the task needs it.
        """

    @abstractmethod
    def evaluate(
        self, model: PreTrainedModel, processor: Any, items: Sequence[Item], setting: Setting
    ) -> list[Outcome]:
        """Put one batch of items of one group to the model; return an outcome of each."""

    @abstractmethod
    def figures(self, outcomes: Sequence[Outcome]) -> Figures:
        """Compute the figures of at least one outcome."""

    def check_columns(self, table: Table) -> None:
        """Refuse data that lack a column.

        Raises:
            DataError: If one is missing.
        """
        missing = [column for column in self.columns if column not in table.columns]
        if missing:
            raise DataError(
                f"{self.name} needs the columns {', '.join(self.columns)}; {table.name} lacks "
                f"{', '.join(missing)} (it has {', '.join(table.columns) or 'none'})."
            )


_TASKS: dict[str, Task] = {}
_AnyTask = TypeVar("_AnyTask", bound=type[Task])


def register_task(task: _AnyTask) -> _AnyTask:
    """Register a task under its name; a class decorator.

    Raises:
        ValueError: If the name is taken.
    """
    if task.name in _TASKS:
        raise ValueError(f"A task named {task.name!r} is registered already.")
    _TASKS[task.name] = task()
    return task


def known_tasks() -> tuple[str, ...]:
    """Return the names of all registered tasks."""
    return tuple(sorted(_TASKS))


def find_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in _TASKS:
        raise ValueError(f"The task must be one of {', '.join(known_tasks())}; got {name!r}.")
    return _TASKS[name]


def mean_figures(scores: Sequence[float], details: Mapping[str, float] | None = None) -> Figures:
    """Return the mean of scores with its standard error (that of independent items)."""
    count = len(scores)
    mean = sum(scores) / count
    error = None
    if count > 1:
        variance = sum((score - mean) ** 2 for score in scores) / (count - 1)
        error = (variance / count) ** 0.5
    return Figures(mean, error, dict(details or {}))


__all__ = [
    "Figures",
    "Item",
    "Outcome",
    "Setting",
    "Task",
    "TaskResult",
    "find_task",
    "known_tasks",
    "mean_figures",
    "register_task",
]
