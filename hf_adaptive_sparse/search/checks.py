"""Checks of the arguments of a search and of its outcome."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

from torch import nn

from hf_adaptive_sparse.architecture import check_no_adapters, weight_place
from hf_adaptive_sparse.profiles import check_count
from hf_adaptive_sparse.pruning.metrics import check_scores, get_metric
from hf_adaptive_sparse.pruning.parametrizations import check_in_memory
from hf_adaptive_sparse.search.errors import NothingToChoose, SearchError, TrialsFailed
from hf_adaptive_sparse.search.objectives import Goal
from hf_adaptive_sparse.search.runner import REPEATS_UNTIL_EXHAUSTED
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.space_rules import check_has_budget
from hf_adaptive_sparse.search.suggesting import uniform_params
from hf_adaptive_sparse.search.trials import Tally

logger = logging.getLogger(__name__)


def check_model(model: object) -> None:
    """Check that a model was loaded, and not only named.

    Raises:
        TypeError: If it was not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a model in memory, got {type(model).__name__}. Load it with "
            "from_pretrained(); compress() takes a name or a folder."
        )


def check_arguments(n_trials: int, seed: int, metric: str, space: SearchSpace) -> None:
    """Check the arguments of `search`.

    Raises:
        ValueError: If a number is out of range, the metric cannot rank weights once, or the space
            lacks a budget.
        TypeError: If ``space`` is not a `SearchSpace`.
    """
    check_count(n_trials, "n_trials")
    check_count(seed, "seed", least=0)
    if not isinstance(space, SearchSpace):
        raise TypeError(f"space must be a SearchSpace, got {type(space).__name__}.")
    check_has_budget(space)
    chosen = get_metric(metric)
    if space.prunes:
        check_scores(chosen)


def check_limits(timeout_seconds: object, goal: Goal, space: SearchSpace) -> None:
    """Check the time limit, and that the size can vary where it is an objective.

    Raises:
        ValueError: If either check fails.
    """
    if timeout_seconds is not None:
        number = isinstance(timeout_seconds, Real) and not isinstance(timeout_seconds, bool)
        if not number or not float(timeout_seconds) > 0.0:  # type: ignore[arg-type]
            raise ValueError(
                f"timeout_seconds must be a number > 0 or None, got {timeout_seconds!r}."
            )
    if goal.sweeps_budget and space.in_bytes:
        raise ValueError(
            "The objective 'bytes' and a budget in bytes exclude each other: leave fit_bytes and "
            "size_bytes out for a front, or minimise the quality alone under the budget."
        )
    if goal.sweeps_budget and not space.searches_sparsity:
        raise ValueError(
            "The objective 'bytes' needs ratios to choose from: a space with target_sparsity and "
            "sparsity_range above 0."
        )


def check_left_to_choose(n_trials: int, goal: Goal, space: SearchSpace, shape: ModelShape) -> None:
    """Check that there is more than the uniform profile to try.

    Raises:
        SearchError: If there is not.
    """
    # On a front each trial draws its mean ratio, whatever else there is to choose.
    if n_trials > 1 and not goal.sweeps_budget and not uniform_params(space, shape):
        raise SearchError(
            "The space leaves nothing to choose on this model: every trial would be the uniform "
            f"profile ({len(shape.blocks)} blocks, sparsity_range={space.sparsity_range}, "
            f"kv_bits={space.kv_bits}). Use more blocks, a wider range or two KV widths, or "
            "hf_adaptive_sparse.prune(...), which needs no search."
        )


def check_weights(model: nn.Module, names: Collection[str]) -> None:
    """Check that the weights to be compressed are in memory, and are those of one model.

    Args:
        model: The model.
        names: Names of linears and of stacks of experts.

    Raises:
        ValueError: If one is offloaded, or the model has adapters.
    """
    if names:
        check_no_adapters(model)
    for name in names:
        place = weight_place(model, name)
        if place is not None:
            check_in_memory(getattr(*place), name)


def check_outcome(count: Tally, n_trials: int, goal: Goal, space: SearchSpace) -> None:
    """Check the outcome of the trials, and log what makes it unreliable.

    Raises:
        TrialsFailed: If all failed.
        NothingToChoose: If all profiles are the same.
    """
    if not count.completed:
        raise TrialsFailed(f"No trial succeeded. Most often: {count.reasons()}")
    if count.attempts < n_trials and count.repeats >= REPEATS_UNTIL_EXHAUSTED:
        if len(count.known) == 1:
            whole = _whole_model(count.completed[0].user_attrs, space)
            if whole is not None:
                raise NothingToChoose(
                    f"The budget holds {whole}, so nothing has to go and there is nothing to "
                    "choose. Give a smaller budget (fit_bytes, size_bytes; --fit, --size), or do "
                    "without a search."
                )
            raise NothingToChoose(
                "All profiles come out alike after projection onto the budget: there is nothing to "
                "choose. Use more blocks, a wider range, two KV widths or another budget."
            )
        logger.warning(
            "The search stopped at %d of %d trials: %d further draws in a row repeated known "
            "profiles, so the space seems exhausted.",
            count.attempts,
            n_trials,
            count.repeats,
        )
    values = {trial.values[0] for trial in count.completed}
    if len(count.completed) > 1 and len(values) == 1:
        logger.warning(
            "All %d profiles have the same %s, %r: the evaluation data cannot tell them apart.",
            len(count.completed),
            goal.labels[0],
            values.pop(),
        )


def _whole_model(profile: Mapping[str, Any], space: SearchSpace) -> str | None:
    """Say what the largest profile of a budget in bytes is; ``None`` of a smaller one.

    Args:
        profile: The attributes of its trial.
        space: The search space.
    """
    widest = {
        "mean_weight_bits": max(space.weight_bits or (), default=None),
        "mean_kv_bits": max(space.kv_bits or (), default=None),
    }
    if not space.in_bytes or profile["mean_sparsity"]:
        return None
    if any(profile.get(name) != width for name, width in widest.items()):
        return None
    weights, cache = widest.values()
    text = "all weights" if weights is None else f"all weights at {weights} bits"
    return text if cache is None else f"{text} and the KV cache at {cache}"
