"""Where the scale of a group begins and ends: at its extremes, or at few bits a little inside.

With 2 or 3 bits a scale from minimum to maximum spends its few codes on rare extremes. A step of
least squares keeps the codes of that scale and fits the step and the minimum to the elements::

    step = cov(x, q) / var(q)    min = mean(x) - step * mean(q)

Few steps are better than the converged ones: on a trained model (``benchmarks/kv_codecs.py``)
perplexity prefers a larger mean error to one that falls on the large elements.
"""

from __future__ import annotations

import torch

KEY_FITS = {2: 1, 3: 6}
"""Steps for keys per channel, by bits; 0 for those not named."""

VALUE_FITS = {2: 6}
"""Steps for values, by bits; 0 for those not named."""


def scale_ends(
    elements: torch.Tensor, bits: int, steps: int, dim: int = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of the lowest and of the highest code of each group.

    Args:
        elements: Floating, in the dtype to compute in; a group lies along ``dim``.
        bits: Bits per code.
        steps: Steps of least squares; 0: minimum and maximum.
        dim: Dimension to reduce.

    Returns:
        Two tensors of the shape of ``elements`` without ``dim``. NaN or infinite where an element
        is.
    """
    # Each alone is vectorised; torch.aminmax takes fifteen times as long as both.
    lowest, highest = elements.amin(dim, keepdim=True), elements.amax(dim, keepdim=True)
    low, high = lowest, highest
    if steps:
        mean = elements.mean(dim, keepdim=True)
        centred = elements - mean
    for _ in range(steps):
        step = (high - low) / (2**bits - 1)
        inverse = torch.where(step > 0, step, torch.ones_like(step)).reciprocal()
        codes = ((elements - low) * inverse).round_().clamp_(0, 2**bits - 1)
        mean_code = codes.mean(dim, keepdim=True)
        codes -= mean_code
        variance = codes.square().sum(dim, keepdim=True)
        fitted = codes.mul_(centred).sum(dim, keepdim=True) / variance
        step = torch.where((variance > 0) & (fitted > 0), fitted, step)
        begin = torch.where(step > 0, mean - step * mean_code, low)
        low, high = torch.maximum(begin, lowest), begin + step * (2**bits - 1)
        high = torch.minimum(high, highest)
    return low.squeeze(dim), high.squeeze(dim)
