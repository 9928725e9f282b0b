"""Pruning the matrices of a layer's experts: each by the tokens that were sent to it.

A stack of experts has one ratio. Of its ``numel`` weights exactly ``round(ratio * numel)`` go, the
same number from every expert, give or take one: the first experts lose the one more. Within an
expert the rule is that of a linear.

An expert that saw fewer than ``min_tokens`` calibration tokens is scored without them, as if all
its inputs were alike: what the metric becomes without data. With n tokens, the norm of an input
feature is known to about 1 / sqrt(2 n) of itself: to an eighth at 32, which is about what the
features of one layer differ by, so that fewer tokens would add more noise than they tell.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping, Sequence

import torch

from hf_adaptive_sparse.calibration.activations import InputStatistic, InputStatistics
from hf_adaptive_sparse.calibration.expert_inputs import expert_name
from hf_adaptive_sparse.experts import ExpertStack
from hf_adaptive_sparse.pruning.method import PruningMethod
from hf_adaptive_sparse.pruning.patterns import Pattern
from hf_adaptive_sparse.pruning.ranking import removal_count

logger = logging.getLogger(__name__)

HESSIAN_BYTES = 2 << 30
"""Bytes of experts' Hessians that are held at once, one expert's at least; a layer with more is run
several times."""

_LISTED = 8


def expert_counts(stack: ExpertStack, ratio: float) -> list[int]:
    """Return how many weights each expert loses."""
    base, owed = divmod(removal_count(stack.weight.numel(), ratio), stack.count)
    return [base + (expert < owed) for expert in range(stack.count)]


def expert_inputs(
    stack: ExpertStack,
    name: str,
    expert: int,
    statistics: InputStatistics,
    *,
    hessian: bool,
    min_tokens: int,
    device: torch.device,
) -> tuple[InputStatistic, bool]:
    """Return the statistics to prune one expert's matrix by, and whether they are of data."""
    key = expert_name(name, expert)
    if statistics.rows(key) >= min_tokens:
        return statistics.statistic(key), True
    return InputStatistic.without_data(key, stack.in_features, hessian, device), False


def prune_experts_(
    stack: ExpertStack,
    stored: torch.Tensor,
    name: str,
    ratio: float,
    method: PruningMethod,
    pattern: Pattern,
    statistics: InputStatistics | None,
    min_tokens: int,
    experts: Container[int] | None = None,
) -> tuple[int, tuple[int, ...]]:
    """Prune the matrices of a stack in place, one after the other.

    Args:
        stack: The stack.
        stored: Its parameter's data.
        name: Its name.
        ratio: Fraction that goes.
        method: How it is chosen.
        pattern: The pattern.
        statistics: Statistics of the inputs; ``None`` only for data-free methods.
        min_tokens: Tokens below which an expert is pruned without data.
        experts: Those that are pruned; ``None``: all.

    Returns:
        How many weights went, and the experts that were pruned without data though there are some.
    """
    removed, without_data = 0, []
    for expert, count in enumerate(expert_counts(stack, ratio)):
        if experts is not None and expert not in experts:
            continue
        inputs = None
        if statistics is not None:
            inputs, known = expert_inputs(
                stack,
                name,
                expert,
                statistics,
                hessian=method.needs_hessian,
                min_tokens=min_tokens,
                device=stored.device,
            )
            if not known:
                without_data.append(expert)
        matrix = stack.read(stored, expert)
        key = expert_name(name, expert)
        removed += method.prune_(matrix, key, count, pattern, inputs, stack.fused_rows)
        stack.write_(stored, expert, matrix)
        if statistics is not None:
            statistics.forget(key)
    return removed, tuple(without_data)


def expert_passes(stacks: Iterable[ExpertStack]) -> list[range]:
    """Return the experts of one layer whose Hessians are held at once, pass by pass.

    Args:
        stacks: The stacks of the layer.
    """
    held = list(stacks)
    each = sum(4 * stack.in_features**2 for stack in held)
    count = max((stack.count for stack in held), default=0)
    step = max(1, HESSIAN_BYTES // max(1, each))
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def experts_without_data(without_data: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return module of experts -> experts pruned without data.

    Args:
        without_data: Name of a stack -> its experts that were.
    """
    found: dict[str, list[int]] = {}
    for name, experts in without_data.items():
        if experts:
            found.setdefault(name.rpartition(".")[0], sorted(experts))
    return found


def warn_of_unreached_experts(found: Mapping[str, Sequence[int]]) -> None:
    """Name what `experts_without_data` found in the log."""
    if not found:
        return
    shown = "; ".join(f"{n}: {_numbers(e)}" for n, e in list(found.items())[:_LISTED])
    more = f"; and in {len(found) - _LISTED} more layers" if len(found) > _LISTED else ""
    logger.warning(
        "%d experts saw too few calibration tokens and were scored without data: %s%s. More "
        "calibration data reaches more of them.",
        sum(map(len, found.values())),
        shown,
        more,
    )


def _numbers(experts: Sequence[int]) -> str:
    listed = ", ".join(map(str, experts[:_LISTED]))
    return listed + (f" and {len(experts) - _LISTED} more" if len(experts) > _LISTED else "")
