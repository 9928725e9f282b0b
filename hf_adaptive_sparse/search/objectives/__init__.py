"""What a search minimises: one figure, a weighted sum of several, or several side by side."""

from hf_adaptive_sparse.search.objectives import divergence, tokens
from hf_adaptive_sparse.search.objectives.base import (
    OBJECTIVES,
    Objective,
    get_objective,
    objective_label,
    register_objective,
)
from hf_adaptive_sparse.search.objectives.goal import BYTES, Goal, ObjectiveSpec

__all__ = [
    "BYTES",
    "OBJECTIVES",
    "Goal",
    "Objective",
    "ObjectiveSpec",
    "divergence",
    "get_objective",
    "objective_label",
    "register_objective",
    "tokens",
]
