"""How one matrix is pruned: a metric chooses what goes, a weight update may follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_adaptive_sparse.calibration.activations import InputStatistic
from hf_adaptive_sparse.pruning.metrics import Metric, ScoringMetric, get_metric, score_stacked
from hf_adaptive_sparse.pruning.output_loss import OutputLoss
from hf_adaptive_sparse.pruning.patterns import Pattern
from hf_adaptive_sparse.pruning.ranking import count_mask, mask_from_scores
from hf_adaptive_sparse.pruning.solvers import SOLVERS, WEIGHT_UPDATES, check_weight_update
from hf_adaptive_sparse.pruning.storage import check_finite


@dataclass(frozen=True)
class PruningMethod:
    """A metric and what follows it.

    Attributes:
        metric: Says which weights go.
        weight_update: Name of the update of those that stay, or ``None``.
    """

    metric: Metric
    weight_update: str | None = None

    @classmethod
    def of(cls, metric: str, weight_update: str | None = None) -> PruningMethod:
        """Return the method of two names.

        Raises:
            ValueError: If there is no such metric or update, the two exclude each other, or the
                metric's solver is missing.
        """
        chosen = get_metric(metric)
        if not isinstance(chosen, ScoringMetric) and metric not in SOLVERS:
            raise ValueError(
                f"A SolvedMetric must have a solver of its name; {metric!r} has none. Add it to "
                "pruning.solvers.SOLVERS."
            )
        return cls(chosen, check_weight_update(weight_update, chosen))

    @property
    def needs_hessian(self) -> bool:
        """Whether weights are updated, which takes the Hessian of the inputs."""
        return self.metric.updates_weights or self.weight_update is not None

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration data are needed."""
        return self.metric.needs_calibration or self.weight_update is not None

    def __str__(self) -> str:
        if self.weight_update is None:
            return self.metric.name
        return f"{self.metric.name} + {self.weight_update}"

    def prune_(
        self,
        weight: torch.Tensor,
        name: str,
        count: int,
        pattern: Pattern,
        inputs: InputStatistic | None,
        rows: Sequence[int] = (),
    ) -> int:
        """Prune one weight in place.

        Args:
            weight: ``(out, in)``, any floating dtype.
            name: Its name, for messages.
            count: Weights to remove; ignored where a pattern says what goes.
            pattern: The pattern.
            inputs: Statistics of its inputs; ``None`` only for data-free methods.
            rows: Rows of the matrices that the weight stacks, if there are several.

        Returns:
            How many weights went.

        Raises:
            ValueError: If statistics are missing, or the updated weight is not finite in its dtype.
        """
        if not isinstance(self.metric, ScoringMetric):
            solver = SOLVERS[self.metric.name]
            updated, removed = solver(weight, _loss(inputs, name), count, pattern)
        else:
            norm = None if inputs is None else inputs.norm
            scores = score_stacked(self.metric, weight, norm, rows)
            if pattern.ratio is None:
                removed = count_mask(scores, count, self.metric.grouping)
            else:
                removed = mask_from_scores(scores, pattern.ratio, pattern=pattern)
            del scores
            if self.weight_update is None:
                # Never by multiplication: that leaves -0.0, which the checkpoint format keeps.
                weight.masked_fill_(removed, 0.0)
                return int(removed.sum())
            update = WEIGHT_UPDATES[self.weight_update]
            updated = update(weight, removed, _loss(inputs, name))
        updated = updated.to(weight.dtype)
        check_finite(updated, name)
        weight.copy_(updated)
        weight.masked_fill_(removed, 0.0)
        return int(removed.sum())


def _loss(inputs: InputStatistic | None, name: str) -> OutputLoss:
    """Return the output loss of a weight, shared with those that read the same tensor."""
    if inputs is None:
        raise ValueError(f"Updating {name!r} needs calibration data, got none.")
    return inputs.turned_into(OutputLoss)
