"""Linears that too few calibration tokens reached, in a layer where tokens reached others.

Some models multiply with a linear's weight without calling the linear (``dt_proj`` of Mamba): no
token reaches it. Some keep each expert of a layer as linears of its own, and for these the rule is
that of `pruning.experts`: fewer than ``min_tokens`` are too few. Such a linear is scored without
data. A layer in which no linear was reached was not run by the data at all, and is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from hf_adaptive_sparse.calibration.activations import InputStatistic, InputStatistics

logger = logging.getLogger(__name__)

_LISTED = 4


def linear_inputs(
    linear: nn.Linear,
    name: str,
    layer: Iterable[str],
    statistics: InputStatistics,
    *,
    hessian: bool,
    min_tokens: int,
    device: torch.device,
) -> tuple[InputStatistic, bool]:
    """Return the statistics to prune a linear by, and whether they are of data.

    Args:
        linear: The linear.
        name: Its name.
        layer: Names of the weights of its layer whose inputs were collected.
        statistics: Statistics of the inputs.
        hessian: Whether a Hessian is needed.
        min_tokens: Tokens below which it is pruned without data.
        device: Where the weight is.

    Raises:
        ValueError: If no calibration token reached it, nor any other linear of its layer.
    """
    enough = statistics.rows(name) >= min_tokens
    if enough or not any(map(statistics.reached, layer)):
        return statistics.statistic(name), True
    return InputStatistic.without_data(name, linear.in_features, hessian, device), False


def linears_without_data(without_data: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the linears pruned without data.

    Args:
        without_data: Name -> experts of a stack that were pruned without data; none of a linear.
    """
    return [name for name, experts in without_data.items() if not experts]


def warn_of_unreached_linears(found: Sequence[str], layers_name: str) -> None:
    """Name what `linears_without_data` found in the log.

    Args:
        found: Names of linears.
        layers_name: Name of the list of layers.
    """
    if not found:
        return
    places = (name.removeprefix(f"{layers_name}.").partition(".")[2] for name in found)
    globs = [f"*.{place}" for place in dict.fromkeys(places)]
    logger.warning(
        "%d linears saw no calibration token (or, of an expert, too few) and were scored "
        "without data, such as %s. The model uses their weights without calling them, or more "
        "calibration data (with images, if they read them) reaches more of them. "
        "modules_to_not_convert=%s leaves %s dense.",
        len(found),
        ", ".join(found[:_LISTED]),
        globs[:_LISTED],
        "them" if len(globs) <= _LISTED else f"the first {_LISTED} of {len(globs)} kinds",
    )
