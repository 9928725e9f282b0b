"""Samples the mean ratio as well, for a Pareto front of quality against bytes.

Under an exact budget every profile has the same size. Where the size is itself an objective, each
trial first draws its mean ratio from the range that the space allows a block, and is then projected
onto that mean.
"""

from __future__ import annotations

from dataclasses import replace

from hf_adaptive_sparse.search.candidate import Candidate
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.suggesting import Suggests, suggest, uniform_params

MEAN = "mean_sparsity"
"""Parameter of a trial: the mean ratio it is to have."""


def suggest_on_front(trial: Suggests, space: SearchSpace, shape: ModelShape) -> Candidate:
    """Draw a mean ratio above 0, which is the dense model, then a profile that has it."""
    low, high = space.grid
    low = low if low > 0 else round(low + space.step, 12)
    mean = trial.suggest_float(MEAN, low, high, step=space.step)
    held = replace(space, target_sparsity=mean, sparsity_low=space.low, sparsity_high=space.high)
    return suggest(trial, held, shape)


def uniform_params_on_front(space: SearchSpace, shape: ModelShape) -> dict[str, float]:
    """Return the parameters of the baseline: the space's own target everywhere."""
    return {MEAN: space.target, **uniform_params(space, shape)}
