"""What pruning and ranking check before they start, and the progress bar they show."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from hf_adaptive_sparse.architecture import Prunable, dense_expert_weights, prunable_weights
from hf_adaptive_sparse.pruning.method import PruningMethod

logger = logging.getLogger(__name__)

Batches = Sequence[Mapping[str, torch.Tensor]]


def named_weights(model: nn.Module, ratios: Mapping[str, float]) -> dict[str, Prunable]:
    """Return the prunable weights that ``ratios`` names, in layer order.

    Raises:
        ValueError: If it names anything else.
    """
    weights = prunable_weights(model)
    unknown = [name for name in ratios if name not in weights]
    if unknown:
        raise ValueError(
            f"ratios must name prunable linears of the model; {unknown[0]!r} is none. Names look "
            f"like: {', '.join(list(weights)[:4])}. Globs are resolved by resolve_ratios()."
        )
    return {name: weight for name, weight in weights.items() if name in ratios}


def require_batches(method: PruningMethod, batches: Batches | None) -> None:
    """Refuse missing or empty calibration data where the method needs some.

    Raises:
        ValueError: If they are needed and there are none.
    """
    if not method.needs_calibration:
        return
    if batches is None:
        raise ValueError(
            f"{_words(method)} needs calibration data, got none. Pass calibration batches, a "
            "dataset name or a path, or use metric='magnitude', which needs no data."
        )
    if not len(batches):
        raise ValueError(
            f"{_words(method)} needs at least one calibration batch, got an empty list."
        )


def _words(method: PruningMethod) -> str:
    if method.metric.needs_calibration:
        return f"Metric {method.metric.name!r}"
    return f"weight_update={method.weight_update!r}"


def warn_of_experts(model: nn.Module) -> None:
    """Say once that some expert weights stay dense, where their layout is not known."""
    experts = dense_expert_weights(model)
    if experts:
        logger.warning(
            "%d expert weights (such as %s) are 3-D parameters in a layout that is not known: they "
            "stay dense and are not counted.",
            len(experts),
            experts[0],
        )


@contextmanager
def progress_bar(total: int, description: str, progress: bool) -> Iterator[Any]:
    """Show a bar of ``total`` steps while the context is open."""
    with tqdm(total=total, desc=description, disable=not progress, leave=True) as bar:
        yield bar
