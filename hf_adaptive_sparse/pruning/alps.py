"""ALPS: choose mask and weights together by ADMM, then solve for the weights on that mask.

"ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models"
(arXiv:2406.07831): ``min tr((W − W₀) H (W − W₀)ᵀ)`` subject to a count of zeros is split into a
dense ``W`` and a sparse ``D`` that are drawn together by a multiplier ``V`` and a penalty ``ρ``
(its ADMM updates; ``ρ`` grows by its rule while the mask still moves). As there, inputs are scaled
so that ``H`` has a diagonal of ones, and one eigendecomposition serves all values of ``ρ``.

As there, weights compare over the whole tensor: scaled so, they are what each contributes to one
loss. Where this differs from the paper: exactly ``round(ratio * numel)`` weights go, ties by flat
index; the penalty begins at 0.03 rather than 0.1, which takes a third more steps and loses a few
percent less; and the refinement on the final mask runs until it has converged rather than for ten
steps.
"""

from __future__ import annotations

import torch

from hf_adaptive_sparse.pruning.least_squares import least_squares
from hf_adaptive_sparse.pruning.output_loss import OutputLoss
from hf_adaptive_sparse.pruning.patterns import UNSTRUCTURED, Pattern
from hf_adaptive_sparse.pruning.ranking import count_mask, mask_from_scores

PENALTY = 0.03
CHECK_EVERY = 3
MAX_STEPS = 300
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Share of the kept weights that changed since the last check -> growth of the penalty."""


def alps(
    weight: torch.Tensor,
    loss: OutputLoss,
    count: int,
    pattern: Pattern = UNSTRUCTURED,
    max_steps: int = MAX_STEPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune one linear.

    Args:
        weight: ``(out, in)``, any floating dtype. Not modified.
        loss: The output loss.
        count: Weights to remove; ignored where a pattern says what goes.
        pattern: n:m keeps n of every m.
        max_steps: Steps of ADMM at most; it ends when the mask stands still.

    Returns:
        The new weight ``(out, in)``, float32 with +0 where removed, and what was removed
        ``(out, in)``, bool.
    """
    scale, eigenvalues, eigenvectors = loss.spectrum()
    scaled = weight.detach().to(torch.float32) / scale
    # A feature without any signal is worth nothing here; what of it stays, keeps its weight below.
    scaled[:, loss.dead] = 0.0
    pull = ((scaled @ eigenvectors) * eigenvalues) @ eigenvectors.mT
    removed = _project(scaled, count, pattern)
    kept = max(1, removed.numel() - int(removed.sum()))
    sparse = scaled.masked_fill(removed, 0.0)
    multiplier = torch.zeros_like(scaled)
    penalty = PENALTY
    checked = removed
    for step in range(1, max_steps + 1):
        wanted = pull - multiplier + penalty * sparse
        dense = ((wanted @ eigenvectors) / (eigenvalues + penalty)) @ eigenvectors.mT
        candidate = dense + multiplier / penalty
        removed = _project(candidate, count, pattern)
        sparse = candidate.masked_fill(removed, 0.0)
        multiplier += penalty * (dense - sparse)
        if step % CHECK_EVERY == 0:
            # Every exchange shows twice: as one weight that went and one that came.
            moved = int((removed != checked).sum()) / 2
            if not moved:
                break
            checked = removed
            penalty *= next(growth for share, growth in GROWTH if moved >= share * kept)
    return least_squares(weight, removed, loss, start=sparse * scale), removed


def _project(weight: torch.Tensor, count: int, pattern: Pattern) -> torch.Tensor:
    """Return what the nearest weight of this sparsity removes: the smallest magnitudes."""
    if pattern.ratio is not None:
        return mask_from_scores(weight.abs(), pattern.ratio, pattern=pattern)
    return count_mask(weight.abs(), count, "tensor")
