"""Ranking the weights of a whole model once, from the activations of the dense model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import (
    decoder_layers,
    expert_linears,
    fused_rows,
    layer_index,
    prunable_weights,
)
from hf_adaptive_sparse.calibration.activations import InputStatistics, collect_inputs
from hf_adaptive_sparse.calibration.forward import evaluation_mode, run_decoder
from hf_adaptive_sparse.calibration.token_weights import encoder_weights, token_weights
from hf_adaptive_sparse.experts import ExpertStack
from hf_adaptive_sparse.memory import release_freed
from hf_adaptive_sparse.profiles import MIN_EXPERT_TOKENS
from hf_adaptive_sparse.pruning.expert_ranking import ExpertRanking
from hf_adaptive_sparse.pruning.experts import (
    expert_inputs,
    experts_without_data,
    warn_of_unreached_experts,
)
from hf_adaptive_sparse.pruning.method import PruningMethod
from hf_adaptive_sparse.pruning.metrics import (
    ScoringMetric,
    check_scores,
    get_metric,
    score_stacked,
)
from hf_adaptive_sparse.pruning.preparation import (
    Batches,
    progress_bar,
    require_batches,
    warn_of_experts,
)
from hf_adaptive_sparse.pruning.ranking import Ranking
from hf_adaptive_sparse.pruning.storage import check_sound, stored_weight
from hf_adaptive_sparse.pruning.unreached import (
    linear_inputs,
    linears_without_data,
    warn_of_unreached_linears,
)


def rank_model(
    model: PreTrainedModel,
    batches: Batches | None,
    *,
    low: float,
    high: float,
    metric: str = "lognorm",
    modules_to_not_convert: Iterable[str] | None = None,
    image_weight: float = 1.0,
    min_expert_tokens: int = MIN_EXPERT_TOKENS,
    progress: bool = True,
) -> dict[str, Ranking]:
    """Rank all prunable weights once, for every ratio in a range.

    One pass of the dense model over the batches ("one-shot"); the model is not changed. Holds 4
    bytes per weight ranked inside the range and one bit per weight.

    Args:
        model: The model.
        batches: Calibration batches; ``None`` only for data-free metrics.
        low: Lowest ratio that a mask will be asked for.
        high: Highest ratio.
        metric: Name of a metric that scores weights.
        modules_to_not_convert: Names or globs left out.
        image_weight: Weight of an image token in the statistics.
        min_expert_tokens: Experts that saw fewer calibration tokens are scored without data.
        progress: Show a progress bar.

    Returns:
        Runtime name -> ranking, in layer order.

    Raises:
        ValueError: If an argument is invalid, or weights or activations are NaN or infinite.
    """
    chosen = check_scores(get_metric(metric))
    weights = prunable_weights(model, modules_to_not_convert)
    require_batches(PruningMethod(chosen), batches)
    warn_of_experts(model)
    for name, weight in weights.items():
        check_sound(weight, name)
    layers_name, layers = decoder_layers(model)
    by_layer: dict[int, list[str]] = {}
    for name in weights:
        by_layer.setdefault(layer_index(name, layers_name), []).append(name)
    steps = len(weights) + (len(batches or ()) if chosen.needs_calibration else 0)
    own_experts = expert_linears(model)
    rankings: dict[str, Ranking] = {}
    without_data: dict[str, tuple[int, ...]] = {}
    with progress_bar(steps, f"Ranking ({metric})", progress) as bar:
        known: InputStatistics | None = None
        if chosen.needs_calibration:
            with collect_inputs(weights) as known, evaluation_mode(model):
                for batch in batches or ():
                    known.token_weights = token_weights(batch, model.config, image_weight)
                    known.encoder_weights = encoder_weights(batch, model.config, image_weight)
                    run_decoder(model, batch, stop_after=layers)
                    known.forget_inputs()
                    bar.update()
        for name, weight in weights.items():
            stored = stored_weight(weight, name)
            if isinstance(weight, ExpertStack):
                scores = _ExpertScores(weight, stored, name, chosen, known, min_expert_tokens)
                rankings[name] = ExpertRanking(weight, scores, low, high, chosen.grouping)
                if scores.without_data:
                    without_data[name] = tuple(scores.without_data)
            else:
                norm = None
                if known is not None:
                    inputs, of_data = linear_inputs(
                        weight,
                        name,
                        by_layer[layer_index(name, layers_name)],
                        known,
                        hessian=False,
                        min_tokens=min_expert_tokens if name in own_experts else 1,
                        device=stored.device,
                    )
                    norm = inputs.norm
                    if not of_data:
                        without_data[name] = ()
                found = score_stacked(chosen, stored, norm, fused_rows(model, name))
                rankings[name] = Ranking(found, low, high, chosen.grouping)
            release_freed()  # a ranking takes a tenth of what it is made from
            bar.update()
    warn_of_unreached_experts(experts_without_data(without_data))
    warn_of_unreached_linears(linears_without_data(without_data), layers_name)
    return rankings


class _ExpertScores:
    """Scores the matrices of a stack, one expert at a time."""

    def __init__(
        self,
        stack: ExpertStack,
        stored: torch.Tensor,
        name: str,
        metric: ScoringMetric,
        known: InputStatistics | None,
        min_tokens: int,
    ) -> None:
        self._stack, self._stored, self._name = stack, stored, name
        self._metric, self._known, self._min_tokens = metric, known, min_tokens
        self.without_data: list[int] = []

    def __call__(self, expert: int) -> torch.Tensor:
        norm = None
        if self._known is not None:
            inputs, of_data = expert_inputs(
                self._stack,
                self._name,
                expert,
                self._known,
                hessian=False,
                min_tokens=self._min_tokens,
                device=self._stored.device,
            )
            norm = inputs.norm
            if not of_data:
                self.without_data.append(expert)
        matrix = self._stack.read(self._stored, expert)
        return score_stacked(self._metric, matrix, norm, self._stack.fused_rows)
