"""The range that the scale of a group covers: all of it, or at 2 and 3 bits a little less.

With 2 or 3 bits a scale from minimum to maximum spends its few codes on rare extremes. A step of
least squares keeps the codes of that scale and fits the step and the minimum to the elements::

    step = cov(x, q) / var(q)    min = mean(x) - step * mean(q)

Few steps are better than the converged ones: on a trained model (``benchmarks/kv_codecs.py``)
perplexity prefers a larger mean error to one that falls on the large elements.
"""

from __future__ import annotations

import torch

from hf_adaptive_sparse.kvcache.affine import divide, inverse_step

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
        count = elements.shape[dim]
        mean = divide(sum_in_halves(elements, dim), count)
        centred = elements - mean
    for _ in range(steps):
        step = divide(high - low, 2**bits - 1)
        codes = ((elements - low) * inverse_step(step)).round_().clamp_(0, 2**bits - 1)
        mean_code = divide(sum_in_halves(codes, dim), count)
        codes -= mean_code
        variance = sum_in_halves(codes.square(), dim)
        fitted = sum_in_halves(codes.mul_(centred), dim) / variance
        step = torch.where((variance > 0) & (fitted > 0), fitted, step)
        begin = torch.where(step > 0, mean - step * mean_code, low)
        low, high = torch.maximum(begin, lowest), begin + step * (2**bits - 1)
        high = torch.minimum(high, highest)
    return low.squeeze(dim), high.squeeze(dim)


def sum_in_halves(elements: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the sum along ``dim``, which stays as a dimension of 1.

    The second half is added to the first until one element is left: an order that kernels can
    follow to the last bit, unlike that of ``torch.sum``, which depends on the processor.
    """
    count = elements.shape[dim]
    while count > 1:
        half = (count + 1) // 2
        first, second = elements.split((half, count - half), dim)
        if count % 2:
            paired, middle = first.split((half - 1, 1), dim)
            elements = torch.cat([paired + second, middle], dim)
        else:
            elements = first + second
        count = half
    return elements
