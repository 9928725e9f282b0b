"""Prune a model in place, layer by layer.

Besides the model, memory holds one layer's statistics and one set of hidden states, which wait in
CPU memory while the layers are on an accelerator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import (
    Prunable,
    decoder_layers,
    expert_linears,
    fused_rows,
    layer_index,
    parameter_name,
)
from hf_adaptive_sparse.experts import ExpertStack
from hf_adaptive_sparse.profiles import MIN_EXPERT_TOKENS
from hf_adaptive_sparse.pruning.experts import (
    experts_without_data,
    prune_experts_,
    warn_of_unreached_experts,
)
from hf_adaptive_sparse.pruning.layerwise import Turn, layer_statistics
from hf_adaptive_sparse.pruning.masking import MaskedModel, masked
from hf_adaptive_sparse.pruning.method import PruningMethod
from hf_adaptive_sparse.pruning.one_shot import rank_model
from hf_adaptive_sparse.pruning.patterns import Pattern, parse_pattern
from hf_adaptive_sparse.pruning.preparation import (
    Batches,
    named_weights,
    progress_bar,
    require_batches,
    warn_of_experts,
)
from hf_adaptive_sparse.pruning.ranking import removal_count
from hf_adaptive_sparse.pruning.ratios import resolve_ratios
from hf_adaptive_sparse.pruning.report import ModuleReport, PruningReport
from hf_adaptive_sparse.pruning.residence import EVERYWHERE, LayerResidence
from hf_adaptive_sparse.pruning.storage import check_sound, stored_weight
from hf_adaptive_sparse.pruning.unreached import (
    linear_inputs,
    linears_without_data,
    warn_of_unreached_linears,
)

__all__ = [
    "MaskedModel",
    "ModuleReport",
    "PruningReport",
    "masked",
    "prune_model",
    "rank_model",
    "resolve_ratios",
]


def prune_model(
    model: PreTrainedModel,
    *,
    ratios: Mapping[str, float],
    metric: str = "lognorm",
    pattern: str | Pattern = "unstructured",
    weight_update: str | None = None,
    batches: Batches | None = None,
    sequential: bool = True,
    image_weight: float = 1.0,
    min_expert_tokens: int = MIN_EXPERT_TOKENS,
    progress: bool = True,
    residence: LayerResidence = EVERYWHERE,
    on_layer: Callable[[int], None] | None = None,
) -> PruningReport:
    """Set the least valuable weights of a model to zero, in place.

    Each linear, and each stack of experts, loses exactly ``round(ratio * numel)`` weights (n:m: n
    stay of every m); of a stack, every expert the same number, give or take one. Parameters
    stay the objects they are; buffers, biases and everything that ``ratios`` does not name stay
    untouched. Weights are checked before any is modified; should activations turn out NaN or
    infinite, the layers before the one that is named are pruned already.

    Args:
        model: The model.
        ratios: Runtime module name -> ratio in [0, 1), as `resolve_ratios` returns them. 0 leaves
            a linear alone but counts it in the report.
        metric: Name of a registered metric.
        pattern: ``"unstructured"`` or ``"n:m"``.
        weight_update: Update of the kept weights after the metric's mask, by name
            (`pruning.solvers`), or ``None``.
        batches: Calibration batches; needed by all metrics but data-free ones, and by updates.
        sequential: Each layer is calibrated on the output of the pruned layers before it; False:
            on that of the dense ones ("one-shot").
        image_weight: Weight of an image token in the statistics; a text token weighs 1.
        min_expert_tokens: Experts that saw fewer calibration tokens are scored without data.
        progress: Show a progress bar.
        residence: Brings each layer into memory for its turn, and keeps it when it is pruned.
            Weights are then checked in their turn, not before any is modified.
        on_layer: Called with the index of a layer when it is pruned, before it is kept and before
            later layers are calibrated on it; it may change the layer's weights further.

    Returns:
        What went, per linear and stack of experts.

    Raises:
        ValueError: If a name, ratio, metric or pattern is invalid, calibration is missing or empty,
            or weights or activations are NaN or infinite (named).
    """
    started = time.perf_counter()
    method, parsed = PruningMethod.of(metric, weight_update), parse_pattern(pattern)
    layers_name, _ = decoder_layers(model)
    weights = named_weights(model, ratios)
    targets = {name: parsed.check(ratios[name], f"ratio of {name!r}") for name in weights}
    require_batches(method, batches)
    warn_of_experts(model)
    pruned = {name: weight for name, weight in weights.items() if targets[name] > 0}
    if residence is EVERYWHERE:
        _check_sound(pruned)
    by_layer: dict[int, dict[str, Prunable]] = {}
    for name, weight in pruned.items():
        by_layer.setdefault(layer_index(name, layers_name), {})[name] = weight
    removed = dict.fromkeys(weights, 0)
    own_experts = expert_linears(model)
    without_data: dict[str, tuple[int, ...]] = {}  # of a stack: these experts; of a linear: it
    with progress_bar(len(by_layer), f"Pruning ({method})", progress) as bar:
        for turn in layer_statistics(
            model,
            by_layer,
            method,
            batches,
            sequential=sequential,
            image_weight=image_weight,
            bar=bar,
            residence=residence,
        ):
            if residence is not EVERYWHERE:
                _check_sound(turn.weights)
            for name, weight in turn.weights.items():
                expert = name in own_experts or isinstance(weight, ExpertStack)
                min_tokens = min_expert_tokens if expert else 1
                count, experts = _prune_weight_(
                    model, name, targets[name], method, parsed, turn, min_tokens
                )
                removed[name] += count
                if experts is not None:
                    without_data[name] = (*without_data.get(name, ()), *experts)
            if turn.statistics is not None:
                turn.statistics.release()
            if not turn.last:
                continue
            if on_layer is not None:
                on_layer(turn.index)
            members = by_layer[turn.index]
            gone = {name: removed[name] for name in members}
            residence.keep(
                turn.index,
                gone,
                {name: without_data[name] for name in members if name in without_data},
            )
            size = sum(weight.weight.numel() for weight in members.values())
            bar.set_postfix(layer=turn.index, sparsity=f"{sum(gone.values()) / size:.4f}")
            bar.update()
    report = PruningReport(
        modules=tuple(
            ModuleReport(name, weight.weight.numel(), removed[name], targets[name])
            for name, weight in weights.items()
        ),
        metric=metric,
        pattern=str(parsed),
        weight_update=weight_update,
        experts_without_data=experts_without_data(without_data),
        linears_without_data=linears_without_data(without_data),
        seconds=time.perf_counter() - started,
    )
    warn_of_unreached_experts(report.experts_without_data)
    warn_of_unreached_linears(report.linears_without_data, layers_name)
    return report


def _check_sound(weights: Mapping[str, Prunable]) -> None:
    for name, weight in weights.items():
        check_sound(weight, name)


def _prune_weight_(
    model: PreTrainedModel,
    name: str,
    ratio: float,
    method: PruningMethod,
    pattern: Pattern,
    turn: Turn,
    min_tokens: int,
) -> tuple[int, Sequence[int] | None]:
    """Prune one linear, or the experts of a turn, in place.

    Returns:
        How many elements went, and what was scored without data though there are some: these
        experts, of a linear an empty sequence; ``None``: nothing was.
    """
    weight = turn.weights[name]
    stored = stored_weight(weight, name)
    if isinstance(weight, ExpertStack):
        gone, experts = prune_experts_(
            weight,
            stored,
            name,
            ratio,
            method,
            pattern,
            turn.statistics,
            min_tokens,
            turn.experts,
        )
        return gone, experts or None
    inputs, known = None, True
    if turn.statistics is not None:
        inputs, known = linear_inputs(
            weight,
            name,
            turn.weights,
            turn.statistics,
            hessian=method.needs_hessian,
            min_tokens=min_tokens,
            device=stored.device,
        )
    gone = method.prune_(
        stored,
        parameter_name(name, weight),
        removal_count(stored.numel(), ratio),
        pattern,
        inputs,
        fused_rows(model, name),
    )
    return gone, None if known else ()
