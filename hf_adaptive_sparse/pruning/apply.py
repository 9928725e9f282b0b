"""Prune a model in place, layer by layer, or rank its weights for a search.

Besides the model, memory holds one layer's statistics and one set of hidden states, which can wait
in CPU memory while the layers are on an accelerator.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import (
    decoder_layers,
    dense_expert_weights,
    layer_index,
    prunable_linears,
)
from hf_adaptive_sparse.calibration.activations import (
    InputStatistics,
    collect_inputs,
    token_weights,
)
from hf_adaptive_sparse.calibration.replay import DecoderReplay, evaluation_mode, run_decoder
from hf_adaptive_sparse.pruning.masking import MaskedModel, masked
from hf_adaptive_sparse.pruning.metrics import Metric, get_metric
from hf_adaptive_sparse.pruning.patterns import Pattern, parse_pattern
from hf_adaptive_sparse.pruning.ranking import Ranking, mask_from_scores, removal_count
from hf_adaptive_sparse.pruning.ratios import resolve_ratios
from hf_adaptive_sparse.pruning.report import ModuleReport, PruningReport
from hf_adaptive_sparse.pruning.sparsegpt import inverse_factor, solve
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

logger = logging.getLogger(__name__)

Batches = Sequence[Mapping[str, torch.Tensor]]


def prune_model(
    model: PreTrainedModel,
    *,
    ratios: Mapping[str, float],
    metric: str = "lognorm",
    pattern: str | Pattern = "unstructured",
    batches: Batches | None = None,
    sequential: bool = True,
    image_weight: float = 1.0,
    hidden_states_device: str | torch.device = "cpu",
    progress: bool = True,
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
        batches: Calibration batches; needed by all metrics but data-free ones.
        sequential: Each layer is calibrated on the output of the pruned layers before it; False:
            on that of the dense ones ("one-shot").
        image_weight: Weight of an image token in the statistics; a text token weighs 1.
        hidden_states_device: Where hidden states wait between layers.
        progress: Show a progress bar.

    Returns:
        What went, per linear.

    Raises:
        ValueError: If a name, ratio, metric or pattern is invalid, calibration is missing or empty,
            or weights or activations are NaN or infinite (named).
    """
    started = time.perf_counter()
    chosen, parsed = get_metric(metric), parse_pattern(pattern)
    layers_name, _ = decoder_layers(model)
    linears = _named_linears(model, ratios)
    targets = {name: parsed.check(ratios[name], f"ratio of {name!r}") for name in linears}
    _check_batches(chosen, batches)
    _warn_of_experts(model)
    by_layer: dict[int, dict[str, nn.Linear]] = {}
    for name, module in linears.items():
        if targets[name] > 0:
            check_finite(stored_weight(module, name), name)
            by_layer.setdefault(layer_index(name, layers_name), {})[name] = module
    removed = dict.fromkeys(linears, 0)
    with _bar(len(by_layer), f"Pruning ({metric})", progress) as bar:
        for index, statistics in _layer_statistics(
            model,
            by_layer,
            chosen,
            batches,
            sequential=sequential,
            image_weight=image_weight,
            hidden_states_device=hidden_states_device,
            bar=bar,
        ):
            for name, module in by_layer[index].items():
                removed[name] = _prune_linear_(
                    stored_weight(module, name), name, targets[name], chosen, parsed, statistics
                )
            gone = sum(removed[name] for name in by_layer[index])
            size = sum(module.weight.numel() for module in by_layer[index].values())
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
        seconds=time.perf_counter() - started,
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
    _check_batches(chosen, batches)
    _warn_of_experts(model)
    for name, module in linears.items():
        check_finite(stored_weight(module, name), name)
    _, layers = decoder_layers(model)
    steps = len(linears) + (len(batches or ()) if chosen.needs_calibration else 0)
    rankings: dict[str, Ranking] = {}
    with _bar(steps, f"Ranking ({metric})", progress) as bar:
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
            scores = chosen.score(stored_weight(module, name), norms[name])
            rankings[name] = Ranking(scores, low, high, chosen.grouping)
            bar.update()
    return rankings


def _layer_statistics(
    model: PreTrainedModel,
    by_layer: Mapping[int, Mapping[str, nn.Linear]],
    metric: Metric,
    batches: Batches | None,
    *,
    sequential: bool,
    image_weight: float,
    hidden_states_device: str | torch.device,
    bar: Any,
) -> Iterator[tuple[int, InputStatistics | None]]:
    """Yield each layer that has something to prune, with its statistics; prune it meanwhile."""
    if not by_layer:
        return
    if not metric.needs_calibration or batches is None:
        for index in sorted(by_layer):
            yield index, None
        return
    weights = [token_weights(batch, model.config, image_weight) for batch in batches]
    if not any(bool((w > 0).any()) for w in weights):
        raise ValueError(
            "Calibration needs at least one token that is not padding and has a weight above 0; "
            f"the {len(batches)} batches hold none."
        )
    bar.set_postfix_str("dense forward")
    replay = DecoderReplay(model, batches, hidden_states_device)
    last = max(by_layer)
    for index in range(last + 1):
        linears = by_layer.get(index)
        if linears is None:
            replay.run_layer(index, advance=True)
            continue
        with collect_inputs(linears, hessian=metric.updates_weights) as statistics:

            def weigh(batch: int, statistics: InputStatistics = statistics) -> None:
                statistics.forget_inputs()
                statistics.token_weights = weights[batch]

            # One-shot: what the dense layer puts out is what the next layer is given.
            replay.run_layer(index, advance=not sequential, on_batch=weigh)
        yield index, statistics
        if sequential and index < last:
            replay.run_layer(index, advance=True)


def _prune_linear_(
    weight: torch.Tensor,
    name: str,
    ratio: float,
    metric: Metric,
    pattern: Pattern,
    statistics: InputStatistics | None,
) -> int:
    """Prune one weight (out, in) in place; return how many of its entries went."""
    if metric.updates_weights:
        if statistics is None:
            raise ValueError(f"Metric {metric.name!r} needs calibration data.")
        statistic = statistics.statistic(name)
        factor, dead = statistic.factorised(inverse_factor)
        updated, removed = solve(
            weight, factor, dead, removal_count(weight.numel(), ratio), pattern
        )
        check_finite(updated, name)
        weight.copy_(updated)
    else:
        norm = None if statistics is None else statistics.input_norm(name)
        scores = metric.score(weight, norm)
        removed = mask_from_scores(scores, ratio, metric.grouping, pattern)
        del scores
    # Never by multiplication: that leaves -0.0, which the checkpoint format keeps as a value.
    weight.masked_fill_(removed, 0.0)
    return int(removed.sum())


def _named_linears(model: nn.Module, ratios: Mapping[str, float]) -> dict[str, nn.Linear]:
    linears = prunable_linears(model)
    unknown = [name for name in ratios if name not in linears]
    if unknown:
        raise ValueError(
            f"ratios must name prunable linears of the model; {unknown[0]!r} is none. Names look "
            f"like: {', '.join(list(linears)[:4])}. Globs are resolved by resolve_ratios()."
        )
    return {name: module for name, module in linears.items() if name in ratios}


def _check_batches(metric: Metric, batches: Batches | None) -> None:
    if not metric.needs_calibration:
        return
    if batches is None:
        raise ValueError(
            f"Metric {metric.name!r} needs calibration data, got none. Pass calibration batches, a "
            "dataset name or a path, or use metric='magnitude', which needs no data."
        )
    if not len(batches):
        raise ValueError(
            f"Metric {metric.name!r} needs at least one calibration batch, got an empty list."
        )


def _warn_of_experts(model: nn.Module) -> None:
    experts = dense_expert_weights(model)
    if experts:
        logger.warning(
            "%d expert weights (such as %s) are 3-D parameters, not linears: they stay dense and "
            "are not counted.",
            len(experts),
            experts[0],
        )


@contextmanager
def _bar(total: int, description: str, progress: bool) -> Iterator[Any]:
    with tqdm(total=total, desc=description, disable=not progress, leave=True) as bar:
        yield bar
