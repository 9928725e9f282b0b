"""Prune a model in place, layer by layer.

Besides the model, memory holds one layer's statistics and one set of hidden states, which can wait
in CPU memory while the layers are on an accelerator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import decoder_layers, fused_rows, layer_index
from hf_adaptive_sparse.pruning.layerwise import layer_statistics
from hf_adaptive_sparse.pruning.masking import MaskedModel, masked
from hf_adaptive_sparse.pruning.method import PruningMethod
from hf_adaptive_sparse.pruning.one_shot import rank_model
from hf_adaptive_sparse.pruning.patterns import Pattern, parse_pattern
from hf_adaptive_sparse.pruning.preparation import (
    Batches,
    check_batches,
    named_linears,
    progress_bar,
    warn_of_experts,
)
from hf_adaptive_sparse.pruning.ratios import resolve_ratios
from hf_adaptive_sparse.pruning.report import ModuleReport, PruningReport
from hf_adaptive_sparse.pruning.residence import EVERYWHERE, LayerResidence
from hf_adaptive_sparse.pruning.storage import check_finite, stored_weight

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
    hidden_states_device: str | torch.device = "cpu",
    progress: bool = True,
    residence: LayerResidence = EVERYWHERE,
    on_layer: Callable[[int], None] | None = None,
) -> PruningReport:
    """Set the least valuable weights of a model to zero, in place.

    Each linear loses exactly ``round(ratio * numel)`` weights (n:m: n stay of every m). Parameters
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
        hidden_states_device: Where hidden states wait between layers.
        progress: Show a progress bar.
        residence: Brings each layer into memory for its turn, and keeps it when it is pruned.
            Weights are then checked in their turn, not before any is modified.
        on_layer: Called with the index of a layer when it is pruned, before it is kept and before
            later layers are calibrated on it; it may change the layer's weights further.

    Returns:
        What went, per linear.

    Raises:
        ValueError: If a name, ratio, metric or pattern is invalid, calibration is missing or empty,
            or weights or activations are NaN or infinite (named).
    """
    started = time.perf_counter()
    method, parsed = PruningMethod.of(metric, weight_update), parse_pattern(pattern)
    layers_name, _ = decoder_layers(model)
    linears = named_linears(model, ratios)
    targets = {name: parsed.check(ratios[name], f"ratio of {name!r}") for name in linears}
    check_batches(method, batches)
    warn_of_experts(model)
    by_layer: dict[int, dict[str, nn.Linear]] = {}
    for name, module in linears.items():
        if targets[name] > 0:
            if residence is EVERYWHERE:
                check_finite(stored_weight(module, name), name)
            by_layer.setdefault(layer_index(name, layers_name), {})[name] = module
    removed = dict.fromkeys(linears, 0)
    with progress_bar(len(by_layer), f"Pruning ({method})", progress) as bar:
        for index, statistics in layer_statistics(
            model,
            by_layer,
            method,
            batches,
            sequential=sequential,
            image_weight=image_weight,
            hidden_states_device=hidden_states_device,
            bar=bar,
            residence=residence,
        ):
            if residence is not EVERYWHERE:
                for name, module in by_layer[index].items():
                    check_finite(stored_weight(module, name), name)
            for name, module in by_layer[index].items():
                weight = stored_weight(module, name)
                rows = fused_rows(model, name)
                removed[name] = method.prune_(weight, name, targets[name], parsed, statistics, rows)
            gone = sum(removed[name] for name in by_layer[index])
            size = sum(module.weight.numel() for module in by_layer[index].values())
            if on_layer is not None:
                on_layer(index)
            residence.keep(index, {name: removed[name] for name in by_layer[index]})
            if statistics is not None:
                statistics.release()
            bar.set_postfix(layer=index, sparsity=f"{gone / size:.4f}")
            bar.update()
    return PruningReport(
        modules=tuple(
            ModuleReport(name, module.weight.numel(), removed[name], targets[name])
            for name, module in linears.items()
        ),
        metric=metric,
        pattern=str(parsed),
        weight_update=weight_update,
        seconds=time.perf_counter() - started,
    )
