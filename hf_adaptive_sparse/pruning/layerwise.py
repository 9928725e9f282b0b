"""Calibration of one decoder layer after the other, while the layers before it are pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import Prunable
from hf_adaptive_sparse.calibration.activations import InputStatistics, collect_inputs
from hf_adaptive_sparse.calibration.replay import DecoderReplay
from hf_adaptive_sparse.calibration.token_weights import encoder_weights, token_weights
from hf_adaptive_sparse.experts import ExpertStack
from hf_adaptive_sparse.pruning.experts import expert_passes
from hf_adaptive_sparse.pruning.method import PruningMethod
from hf_adaptive_sparse.pruning.preparation import Batches
from hf_adaptive_sparse.pruning.residence import EVERYWHERE, LayerResidence


@dataclass(frozen=True)
class Turn:
    """What is pruned at once: a layer, or a part of one whose Hessians would not fit together.

    Attributes:
        index: The layer.
        weights: Name -> weight.
        experts: Of stacks among them, the experts whose turn it is; ``None``: all.
        last: Whether the layer is done with it.
        statistics: Statistics of their inputs; ``None`` where the method needs none.
    """

    index: int
    weights: Mapping[str, Prunable]
    experts: range | None = None
    last: bool = True
    statistics: InputStatistics | None = None


def _turns(index: int, weights: Mapping[str, Prunable], method: PruningMethod) -> list[Turn]:
    """Return the turns of a layer: experts first, whose inputs no other expert's weights change."""
    stacks = {n: w for n, w in weights.items() if isinstance(w, ExpertStack)}
    passes = expert_passes(stacks.values()) if method.needs_hessian else []
    if len(passes) < 2:
        return [Turn(index, weights)]
    others = {name: weight for name, weight in weights.items() if name not in stacks}
    turns = [Turn(index, stacks, experts, last=False) for experts in passes]
    return [*turns, Turn(index, others)] if others else [*turns[:-1], replace(turns[-1], last=True)]


def layer_statistics(
    model: PreTrainedModel,
    by_layer: Mapping[int, Mapping[str, Prunable]],
    method: PruningMethod,
    batches: Batches | None,
    *,
    sequential: bool,
    image_weight: float,
    bar: Any,
    residence: LayerResidence,
) -> Iterator[Turn]:
    """Yield each layer that has something to prune, with its statistics; the caller prunes it.

    A layer is in memory, as ``residence`` sees to, while it is yielded and while it runs.

    Raises:
        ValueError: If no token counts, or one-shot calibration would have to hold more Hessians of
            experts than are held at once.
    """
    if not by_layer:
        return
    if not method.needs_calibration or batches is None:
        for index in sorted(by_layer):
            with residence.resident(index):
                yield Turn(index, by_layer[index])
        return
    weights = [token_weights(batch, model.config, image_weight) for batch in batches]
    if not any(bool((w > 0).any()) for w in weights):
        raise ValueError(
            "Calibration needs at least one token that is not padding and has a weight above 0; "
            f"the {len(batches)} batches hold none."
        )
    read = [encoder_weights(batch, model.config, image_weight) for batch in batches]
    turns = {index: _turns(index, found, method) for index, found in by_layer.items()}
    if not sequential and any(len(each) > 1 for each in turns.values()):
        raise ValueError(
            f"{method} by one-shot calibration holds the Hessians of a layer's experts together, "
            "which are too large. Use sequential calibration, a metric without a weight update, "
            "such as 'lognorm', or leave the experts dense: modules_to_not_convert=['*.experts.*']."
        )
    bar.set_postfix_str("dense forward")
    with residence.resident(0):
        replay = DecoderReplay(model, batches, stand_ins=residence is not EVERYWHERE)
    last = max(by_layer)
    for index in range(last + 1):
        with residence.resident(index):
            if index not in turns:
                replay.run_layer(index, advance=True)
                continue
            for turn in turns[index]:
                with collect_inputs(
                    turn.weights, hessian=method.needs_hessian, experts=turn.experts
                ) as statistics:

                    def weigh(batch: int, statistics: InputStatistics = statistics) -> None:
                        statistics.forget_inputs()
                        statistics.token_weights = weights[batch]
                        statistics.encoder_weights = read[batch]

                    # One-shot: what the dense layer puts out is what the next layer is given.
                    replay.run_layer(index, advance=not sequential, on_batch=weigh)
                yield replace(turn, statistics=statistics)
            if sequential and index < last:
                replay.run_layer(index, advance=True)
