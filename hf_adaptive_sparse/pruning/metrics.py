"""The pruning metrics, one class each, behind one registry.

A new metric is one class with ``@register_metric`` here: a `ScoringMetric`, or a `SolvedMetric`
with its solver in `pruning.solvers`. Scores are computed in float32 and are >= 0; what scores
lowest goes first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, TypeVar

import torch

Grouping = Literal["row", "tensor"]

METRICS: dict[str, type[Metric]] = {}
"""Registered metrics by name."""

_CHUNK_ELEMENTS = 1 << 20
"""Elements that are scored at once, so that temporaries stay at a few megabytes."""


class Metric:
    """A rule that chooses which weights of a linear are removed.

    Attributes:
        name: Name in configs and on the command line.
        needs_calibration: Whether it needs calibration data.
        grouping: Weights compete within each output ``"row"`` or over the whole ``"tensor"``.
        updates_weights: Whether the kept weights change too.
    """

    name: ClassVar[str]
    needs_calibration: ClassVar[bool] = True
    grouping: ClassVar[Grouping] = "row"
    updates_weights: ClassVar[bool]


class ScoringMetric(Metric, ABC):
    """A metric that scores every weight; the kept weights stay as they are."""

    updates_weights = False

    @abstractmethod
    def score(self, weight: torch.Tensor, input_norm: torch.Tensor | None) -> torch.Tensor:
        """Score every weight of a linear.

        Args:
            weight: ``(out, in)``, any floating dtype, finite. Not modified.
            input_norm: ``(in,)``, float32: the 2-norm of each input feature over all calibration
                tokens. ``None`` only where ``needs_calibration`` is false.

        Returns:
            ``(out, in)``, float32, >= 0, no NaN.

        Raises:
            ValueError: If the metric needs ``input_norm`` and it is missing or has another size.
        """


class SolvedMetric(Metric):
    """A metric that is a solver of `pruning.solvers`: mask and weights come out together.

    It needs the Hessian of the inputs.
    """

    updates_weights = True


MetricClass = TypeVar("MetricClass", bound=type[Metric])


def register_metric(metric: MetricClass) -> MetricClass:
    """Class decorator that adds a metric under its ``name``.

    Raises:
        TypeError: If the class is neither a `ScoringMetric` nor a `SolvedMetric`.
        ValueError: If the name is taken.
    """
    if not issubclass(metric, ScoringMetric | SolvedMetric):
        raise TypeError(
            f"A metric must derive from ScoringMetric, and have score(), or from SolvedMetric, and "
            f"have a solver in pruning.solvers.SOLVERS; {metric.__name__} does not."
        )
    if metric.name in METRICS:
        raise ValueError(
            f"A metric named {metric.name!r} is already registered "
            f"({METRICS[metric.name].__name__}); choose another name."
        )
    METRICS[metric.name] = metric
    return metric


def get_metric(name: str) -> Metric:
    """Return the metric registered under ``name``.

    Raises:
        ValueError: If there is none; the known names are listed.
    """
    if not isinstance(name, str) or name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(sorted(METRICS))}; got {name!r}.")
    return METRICS[name]()


def check_scores(metric: Metric) -> ScoringMetric:
    """Return a metric that scores weights, so that it can rank them.

    Raises:
        ValueError: If it does not; the metrics that do are listed.
    """
    if not isinstance(metric, ScoringMetric):
        scoring = sorted(name for name, m in METRICS.items() if issubclass(m, ScoringMetric))
        raise ValueError(
            f"Metric {metric.name!r} updates the weights that stay, so it cannot rank weights once "
            f"for all ratios of a search. Search with one of {', '.join(scoring)}; the profile "
            f"found can be pruned with {metric.name!r}."
        )
    return metric


def score_stacked(
    metric: ScoringMetric,
    weight: torch.Tensor,
    input_norm: torch.Tensor | None,
    rows: Sequence[int],
) -> torch.Tensor:
    """Score matrices that are stacked along their outputs, each as if it were alone.

    Column norms belong to one matrix: query, key and value rows of a fused projection differ.

    Args:
        metric: The metric.
        weight: ``(out, in)``.
        input_norm: ``(in,)`` or ``None``, as for `ScoringMetric.score`.
        rows: Rows of each matrix; they add up to ``out``.

    Returns:
        ``(out, in)``, float32.
    """
    if len(rows) < 2:
        return metric.score(weight, input_norm)
    scores = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for part, place in zip(weight.split(list(rows)), scores.split(list(rows)), strict=True):
        place.copy_(metric.score(part, input_norm))
    return scores


def _required(input_norm: torch.Tensor | None, weight: torch.Tensor, name: str) -> torch.Tensor:
    if input_norm is None:
        raise ValueError(f"Metric {name!r} needs the norms of the inputs, so calibration data.")
    if input_norm.shape != weight.shape[1:]:
        raise ValueError(
            f"input_norm must have one entry per input feature, shape {tuple(weight.shape[1:])}; "
            f"got {tuple(input_norm.shape)}."
        )
    return input_norm.to(device=weight.device, dtype=torch.float32)


def _magnitudes(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to(torch.float32, copy=True).abs_()


def _never_zero(divisor: torch.Tensor) -> torch.Tensor:
    # A zero norm means that every numerator is zero as well: 0 / inf = 0 instead of NaN.
    return divisor.masked_fill(divisor == 0, torch.inf)


def _by_row_chunks_(
    values: torch.Tensor, formula: Callable[[torch.Tensor, slice], torch.Tensor]
) -> torch.Tensor:
    rows = max(1, _CHUNK_ELEMENTS // max(1, values.shape[1]))
    for start in range(0, values.shape[0], rows):
        part = slice(start, start + rows)
        values[part] = formula(values[part], part)
    return values


@register_metric
class LogNorm(ScoringMetric):
    """``S_ij = log(1 + |W_ij|/‖W_i,:‖₂ + |W_ij|/‖W_:,j‖₂) · ‖X_j‖₂^{1/2}``.

    The metric of arXiv:2507.20613 (section "metric"), evaluated in the order in which it is
    written, in float32. A zero row or column contributes 0.
    """

    name = "lognorm"

    def score(self, weight: torch.Tensor, input_norm: torch.Tensor | None) -> torch.Tensor:
        """See `ScoringMetric.score`."""
        scale = _required(input_norm, weight, self.name).sqrt()
        values = _magnitudes(weight)
        row = _never_zero(torch.linalg.vector_norm(values, dim=1, keepdim=True))
        column = _never_zero(torch.linalg.vector_norm(values, dim=0, keepdim=True))
        return _by_row_chunks_(
            values, lambda w, part: torch.log(1 + w / row[part] + w / column) * scale
        )


@register_metric
class Wanda(ScoringMetric):
    """``S_ij = |W_ij| · ‖X_j‖₂`` (arXiv:2306.11695, equation 1)."""

    name = "wanda"

    def score(self, weight: torch.Tensor, input_norm: torch.Tensor | None) -> torch.Tensor:
        """See `ScoringMetric.score`."""
        return _magnitudes(weight).mul_(_required(input_norm, weight, self.name))


@register_metric
class RIA(ScoringMetric):
    """``S_ij = (|W_ij|/Σ|W_i,:| + |W_ij|/Σ|W_:,j|) · ‖X_j‖₂^{1/2}``.

    Relative importance and activations (ICLR 2024, "Plug-and-Play", equation 4, with a = 1/2). A
    zero row or column contributes 0.
    """

    name = "ria"

    def score(self, weight: torch.Tensor, input_norm: torch.Tensor | None) -> torch.Tensor:
        """See `ScoringMetric.score`."""
        scale = _required(input_norm, weight, self.name).sqrt()
        values = _magnitudes(weight)
        row = _never_zero(values.sum(dim=1, keepdim=True))
        column = _never_zero(values.sum(dim=0, keepdim=True))
        return _by_row_chunks_(values, lambda w, part: (w / row[part] + w / column) * scale)


@register_metric
class Magnitude(ScoringMetric):
    """``S_ij = |W_ij|``, compared over the whole tensor; needs no data."""

    name = "magnitude"
    needs_calibration = False
    grouping: ClassVar[Grouping] = "tensor"

    def score(self, weight: torch.Tensor, input_norm: torch.Tensor | None) -> torch.Tensor:
        """See `ScoringMetric.score`."""
        return _magnitudes(weight)


@register_metric
class SparseGPT(SolvedMetric):
    """Optimal brain surgeon with weight update (arXiv:2301.00774); see `pruning.sparsegpt`."""

    name = "sparsegpt"


@register_metric
class ALPS(SolvedMetric):
    """Mask and weights by ADMM, then least squares (arXiv:2406.07831); see `pruning.alps`."""

    name = "alps"
    grouping: ClassVar[Grouping] = "tensor"
