"""Ranking the weights of a whole model once, from the activations of the dense model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import decoder_layers, fused_rows, prunable_linears
from hf_adaptive_sparse.calibration.activations import collect_inputs, token_weights
from hf_adaptive_sparse.calibration.replay import evaluation_mode, run_decoder
from hf_adaptive_sparse.pruning.method import PruningMethod
from hf_adaptive_sparse.pruning.metrics import get_metric, score_stacked
from hf_adaptive_sparse.pruning.preparation import (
    Batches,
    check_batches,
    progress_bar,
    warn_of_experts,
)
from hf_adaptive_sparse.pruning.ranking import Ranking
from hf_adaptive_sparse.pruning.storage import check_finite, stored_weight


def rank_model(
    model: PreTrainedModel,
    batches: Batches | None,
    *,
    low: float,
    high: float,
    metric: str = "lognorm",
    modules_to_not_convert: Iterable[str] | None = None,
    image_weight: float = 1.0,
    progress: bool = True,
) -> dict[str, Ranking]:
    """Rank the weights of all prunable linears once, for every ratio in a range.

    One pass of the dense model over the batches ("one-shot"); the model is not changed. Holds 4
    bytes per weight ranked inside the range and one bit per weight.

    Args:
        model: The model.
        batches: Calibration batches; ``None`` only for data-free metrics.
        low: Lowest ratio that a mask will be asked for.
        high: Highest ratio.
        metric: Name of a registered metric that scores weights (not ``sparsegpt``).
        modules_to_not_convert: Names or globs left out.
        image_weight: Weight of an image token in the statistics.
        progress: Show a progress bar.

    Returns:
        Runtime module name -> ranking, in layer order.

    Raises:
        ValueError: If an argument is invalid, or weights or activations are NaN or infinite.
    """
    chosen = get_metric(metric)
    linears = prunable_linears(model, modules_to_not_convert)
    if chosen.updates_weights:
        chosen.score(next(iter(linears.values())).weight, None)
    check_batches(PruningMethod(chosen), batches)
    warn_of_experts(model)
    for name, module in linears.items():
        check_finite(stored_weight(module, name), name)
    _, layers = decoder_layers(model)
    steps = len(linears) + (len(batches or ()) if chosen.needs_calibration else 0)
    rankings: dict[str, Ranking] = {}
    with progress_bar(steps, f"Ranking ({metric})", progress) as bar:
        norms: dict[str, torch.Tensor | None] = dict.fromkeys(linears)
        if chosen.needs_calibration:
            with collect_inputs(linears) as statistics, evaluation_mode(model):
                for batch in batches or ():
                    statistics.token_weights = token_weights(batch, model.config, image_weight)
                    run_decoder(model, batch, stop_after=layers)
                    statistics.forget_inputs()
                    bar.update()
            norms |= {name: statistics.input_norm(name) for name in linears}
        for name, module in linears.items():
            rows = fused_rows(model, name)
            scores = score_stacked(chosen, stored_weight(module, name), norms[name], rows)
            rankings[name] = Ranking(scores, low, high, chosen.grouping)
            bar.update()
    return rankings
