"""The best weights on a given mask: least squares, row by row, by conjugate gradients.

Each row ``w'`` minimises ``(w − w') H (w − w')ᵀ`` over the weights that are kept; all rows of a
chunk are solved together, so that a step is one product with ``H``. The loss never rises from one
step to the next, wherever the solver is stopped.
"""

from __future__ import annotations

import torch

from hf_adaptive_sparse.pruning.output_loss import OutputLoss

MAX_STEPS = 200
TOLERANCE = 1e-3
"""A row is done when its preconditioned residual has shrunk to this share of what it was."""

_CHUNK_ELEMENTS = 1 << 23


def least_squares(
    weight: torch.Tensor,
    removed: torch.Tensor,
    loss: OutputLoss,
    start: torch.Tensor | None = None,
    *,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> torch.Tensor:
    """Return the weights of least output error that are zero where ``removed``.

    Args:
        weight: ``(out, in)``, any floating dtype: what is to be matched. Not modified.
        removed: ``(out, in)``, bool: True where the weight must be zero.
        loss: The output loss.
        start: ``(out, in)``: where to start; ``None``: the masked ``weight``. Not modified.
        tolerance: Where to stop, per row.
        max_steps: Steps at most.

    Returns:
        ``(out, in)``, float32, +0 where removed.
    """
    solution = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    rows = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for first in range(0, weight.shape[0], rows):
        part = slice(first, first + rows)
        begin = weight[part] if start is None else start[part]
        solution[part] = _solve(
            weight[part].detach().to(torch.float32),
            removed[part],
            loss.hessian(),
            begin.detach().to(torch.float32),
            tolerance,
            max_steps,
        )
    return solution


def _solve(
    target: torch.Tensor,
    removed: torch.Tensor,
    hessian: torch.Tensor,
    start: torch.Tensor,
    tolerance: float,
    max_steps: int,
) -> torch.Tensor:
    """Solve all rows of a chunk; arguments as for `least_squares`, float32."""
    diagonal = hessian.diagonal()
    found = start.masked_fill(removed, 0.0)
    # The loss's negative gradient, halved; what a removed weight wants does not count.
    residual = ((target - found) @ hessian).masked_fill_(removed, 0.0)
    direction = residual / diagonal
    squared = (residual * direction).sum(dim=1, keepdim=True)
    goal = squared * tolerance**2
    for _ in range(max_steps):
        active = squared > goal
        if not bool(active.any()):
            break
        image = (direction @ hessian).masked_fill_(removed, 0.0)
        curvature = (direction * image).sum(dim=1, keepdim=True)
        active &= curvature > 0
        step = torch.where(active, squared / curvature, 0.0)
        found.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        image = residual / diagonal
        renewed = (residual * image).sum(dim=1, keepdim=True)
        growth = torch.where(active, renewed / squared, 0.0)
        direction.mul_(growth).add_(image)
        squared = torch.where(active, renewed, 0.0)
    return found
