"""Optimal brain surgeon, block by block: prune a linear and let the kept weights make up for it.

SparseGPT (arXiv:2301.00774, algorithm 1). Memory: the Hessian ``Σ x xᵀ`` takes ``in_features²``
float32 per distinct input of a linear, for one decoder layer at a time (query, key and value share
one, gate and up share one), and factorising it takes one more of its size for a moment; the solver
itself adds one float32 copy of the weight.

Where this differs from the paper's code: exactly ``round(ratio * numel)`` weights go and every row
loses its share (the paper's code takes one threshold per block of columns, so neither count is
exact); a feature that is zero in all calibration data loses its weights first but keeps those that
are not needed to reach the count.
"""

from __future__ import annotations

import torch

from hf_adaptive_sparse.pruning.patterns import UNSTRUCTURED, Pattern
from hf_adaptive_sparse.pruning.ranking import count_mask

BLOCK_SIZE = 128
DAMPING = 0.01
_ATTEMPTS = 6


def inverse_factor(
    hessian: torch.Tensor, damping: float = DAMPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factorise the inverse of a damped Hessian.

    Args:
        hessian: ``(in, in)``, float32, symmetric. Used as working memory: overwritten.
        damping: Multiple of the mean diagonal that is added to the diagonal; ten times more on each
            failure to factorise.

    Returns:
        ``U`` ``(in, in)``, float32, upper triangular with ``UᵀU = H⁻¹``, and ``dead`` ``(in,)``,
        bool: features that were zero in all calibration data.

    Raises:
        ValueError: If no damping makes the matrix positive definite.
    """
    dead = fill_dead_(hessian)
    lower = _damped_cholesky(hessian, damping, upper=False)
    # Transposed, because LAPACK writes columns: into rows it would work on a copy.
    inverse: torch.Tensor = torch.cholesky_inverse(lower, out=hessian.mT)
    del lower
    return _damped_cholesky(inverse, 0.0, upper=True), dead


def fill_dead_(hessian: torch.Tensor) -> torch.Tensor:
    """Give features without any signal the mean diagonal of the others, or 1 if there are none.

    Such a feature is tied to no other: any positive value keeps it apart from the rest, and this
    one leaves the mean of the diagonal, which damping is measured by, as it is.

    Args:
        hessian: ``(in, in)``, float32, symmetric, positive semi-definite.

    Returns:
        ``(in,)``, bool: the features that were filled in.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if bool(dead.any()):
        live = diagonal[~dead]
        diagonal[dead] = float(live.mean(dtype=torch.float64)) if live.numel() else 1.0
    return dead


def _damped_cholesky(matrix: torch.Tensor, damping: float, upper: bool) -> torch.Tensor:
    scale = float(matrix.diagonal().mean(dtype=torch.float64))
    added = 0.0
    for attempt in range(_ATTEMPTS):
        # Without damping of its own, a first failure is one of rounding.
        step = damping * 10**attempt if damping else 1e-6 * 10**attempt * (attempt > 0)
        matrix.diagonal().add_((step - added) * scale)
        added = step
        factor: torch.Tensor
        factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
        if not bool(failed) and bool(factor.diagonal().isfinite().all()):
            return factor
    raise ValueError(
        f"A Hessian of {matrix.shape[0]} inputs could not be factorised even with {added:g} of its "
        "mean diagonal added to the diagonal. Use more calibration data, or metric='lognorm'."
    )


def solve(
    weight: torch.Tensor,
    factor: torch.Tensor,
    dead: torch.Tensor,
    count: int,
    pattern: Pattern = UNSTRUCTURED,
    mask: torch.Tensor | None = None,
    block_size: int = BLOCK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune one linear and update the weights that stay.

    Args:
        weight: ``(out, in)``, any floating dtype. Not modified.
        factor: ``(in, in)``, float32: upper factor of the inverse Hessian (`inverse_factor`).
        dead: ``(in,)``, bool: features without any signal.
        count: Weights to remove; ignored where a pattern or ``mask`` says what goes.
        pattern: n:m keeps n of every m.
        mask: ``(out, in)``, bool: remove exactly these (True) and only update the others.
        block_size: Columns whose removal is decided at once; rounded to whole n:m groups.

    Returns:
        The new weight ``(out, in)``, float32 with +0 where removed, and what was removed
        ``(out, in)``, bool.
    """
    rows, columns = weight.shape
    weight = weight.detach().to(torch.float32, copy=True)
    removed = torch.zeros_like(weight, dtype=torch.bool)
    if pattern.group is not None:
        block_size = max(1, block_size // pattern.group) * pattern.group
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, inverse = weight[:, start:stop], factor[start:stop, start:stop]
        gone = removed[:, start:stop]
        if mask is not None:
            gone.copy_(mask[:, start:stop])
        elif pattern.group is None:
            wanted = _block_count(rows, columns, count, start, stop)
            gone.copy_(count_mask(_saliency(block, inverse, dead[start:stop]), wanted))
        errors = torch.empty_like(block)
        for j in range(stop - start):
            if mask is None and pattern.group is not None and j % pattern.group == 0:
                group = slice(j, min(j + pattern.group, stop - start))
                scores = _saliency(block[:, group], inverse[group, group], dead[start:stop][group])
                lose = pattern.removed_per_group(scores.shape[1])
                gone[:, group] = count_mask(scores, lose * rows)
            # Equation 3: what a removed weight contributed moves to the columns still to come.
            error = block[:, j] / inverse[j, j] * gone[:, j]
            block[:, j:] -= error.unsqueeze(1) * inverse[j, j:].unsqueeze(0)
            errors[:, j] = error
        weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return weight.masked_fill_(removed, 0.0), removed


def row_losses(change: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return what a change of a weight does to each output, over all calibration tokens.

    Args:
        change: ``(out, in)``, float32.
        factor: ``(in, in)``, float32: upper factor ``U`` of the inverse Hessian.

    Returns:
        ``(out,)``, float32: ``δ H δᵀ = ‖δ U⁻¹‖²`` of each row, damping included.
    """
    scaled: torch.Tensor = torch.linalg.solve_triangular(factor, change, upper=True, left=False)
    return scaled.square_().sum(dim=1)


def _saliency(block: torch.Tensor, inverse: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """Return ``w² / [U_jj]²`` (rows, columns), 0 where the feature is dead."""
    scores = (block / inverse.diagonal()).square_()
    return scores.masked_fill_(dead, 0.0)


def _block_count(rows: int, columns: int, count: int, start: int, stop: int) -> int:
    """Return how many weights columns ``start:stop`` lose.

    Each row loses the same in every block but the last, which takes what is left of ``count``: so
    each row loses ``count // rows``, and the last block spreads the remainder one per row. What the
    columns to come have no room for goes before them.
    """

    def row_share(end: int) -> int:
        beyond_room = -(-count // rows) - (columns - end)
        return max(count // rows * end // columns, beyond_room)

    before = row_share(start) * rows
    return (count if stop == columns else row_share(stop) * rows) - before
