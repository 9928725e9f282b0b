"""Updates of the kept weights on a given mask, and solvers that choose mask and weights together.

An update (`WEIGHT_UPDATES`) follows the mask of any metric; a solver (`SOLVERS`) is the whole of a
`SolvedMetric`, and has its name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_adaptive_sparse.pruning.alps import alps
from hf_adaptive_sparse.pruning.least_squares import least_squares
from hf_adaptive_sparse.pruning.metrics import Metric
from hf_adaptive_sparse.pruning.output_loss import OutputLoss
from hf_adaptive_sparse.pruning.patterns import Pattern
from hf_adaptive_sparse.pruning.sparsegpt import row_losses, solve

Update = Callable[[torch.Tensor, torch.Tensor, OutputLoss], torch.Tensor]
"""From weight ``(out, in)``, what is removed of it (bool) and the loss to the new weight, float32
with +0 where removed."""

Solver = Callable[[torch.Tensor, OutputLoss, int, Pattern], tuple[torch.Tensor, torch.Tensor]]
"""From weight, loss, count and pattern to the new weight and what was removed."""


def _obs(weight: torch.Tensor, removed: torch.Tensor, loss: OutputLoss) -> torch.Tensor:
    """Update by SparseGPT; rows keep their weights where that does not lower the output error.

    It can raise it: what a removed weight hands on to one that goes after it is lost again.
    """
    factor = loss.inverse_factor(keep_hessian=False)
    updated = solve(weight, factor, loss.dead, 0, mask=removed)[0]
    dense = weight.detach().to(torch.float32)
    masked = dense.masked_fill(removed, 0.0)
    worse = row_losses(dense - updated, factor) > row_losses(dense - masked, factor)
    return torch.where(worse.unsqueeze(1), masked, updated)


def _sparsegpt(
    weight: torch.Tensor, loss: OutputLoss, count: int, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    return solve(weight, loss.inverse_factor(keep_hessian=False), loss.dead, count, pattern)


WEIGHT_UPDATES: dict[str, Update] = {"obs": _obs, "least_squares": least_squares}
"""Updates of the kept weights on a given mask, by name."""

SOLVERS: dict[str, Solver] = {"sparsegpt": _sparsegpt, "alps": alps}
"""Solvers of the metrics that choose mask and weights together, by the metric's name."""


def check_weight_update(name: str | None, metric: Metric) -> str | None:
    """Return the name of a weight update.

    Raises:
        ValueError: If there is no such update, or the metric updates the weights itself.
    """
    if name is None:
        return None
    if not isinstance(name, str) or name not in WEIGHT_UPDATES:
        raise ValueError(
            f"weight_update must be None or one of {', '.join(sorted(WEIGHT_UPDATES))}; got "
            f"{name!r}."
        )
    if metric.updates_weights:
        raise ValueError(
            f"Metric {metric.name!r} updates the weights by itself, so weight_update must be None; "
            f"got {name!r}. Leave it out, or choose a metric that only scores, such as 'lognorm'."
        )
    return name
