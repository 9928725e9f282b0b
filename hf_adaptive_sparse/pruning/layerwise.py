"""Calibration of one decoder layer after the other, while the layers before it are pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import Prunable
from hf_adaptive_sparse.calibration.activations import (
    InputStatistics,
    collect_inputs,
    token_weights,
)
from hf_adaptive_sparse.calibration.replay import DecoderReplay
from hf_adaptive_sparse.experts import ExpertStack
from hf_adaptive_sparse.pruning.experts import check_hessians
from hf_adaptive_sparse.pruning.method import PruningMethod
from hf_adaptive_sparse.pruning.preparation import Batches
from hf_adaptive_sparse.pruning.residence import EVERYWHERE, LayerResidence


def layer_statistics(
    model: PreTrainedModel,
    by_layer: Mapping[int, Mapping[str, Prunable]],
    method: PruningMethod,
    batches: Batches | None,
    *,
    sequential: bool,
    image_weight: float,
    hidden_states_device: str | torch.device,
    bar: Any,
    residence: LayerResidence,
) -> Iterator[tuple[int, InputStatistics | None]]:
    """Yield each layer that has something to prune, with its statistics; prune it meanwhile.

    A layer is in memory, as ``residence`` sees to, while it is yielded and while it runs.
    """
    if not by_layer:
        return
    if not method.needs_calibration or batches is None:
        for index in sorted(by_layer):
            with residence.resident(index):
                yield index, None
        return
    weights = [token_weights(batch, model.config, image_weight) for batch in batches]
    if not any(bool((w > 0).any()) for w in weights):
        raise ValueError(
            "Calibration needs at least one token that is not padding and has a weight above 0; "
            f"the {len(batches)} batches hold none."
        )
    if method.needs_hessian:
        for members in by_layer.values():
            check_hessians(w for w in members.values() if isinstance(w, ExpertStack))
    bar.set_postfix_str("dense forward")
    with residence.resident(0):
        replay = DecoderReplay(
            model, batches, hidden_states_device, stand_ins=residence is not EVERYWHERE
        )
    last = max(by_layer)
    for index in range(last + 1):
        with residence.resident(index):
            found = by_layer.get(index)
            if found is None:
                replay.run_layer(index, advance=True)
                continue
            with collect_inputs(found, hessian=method.needs_hessian) as statistics:

                def weigh(batch: int, statistics: InputStatistics = statistics) -> None:
                    statistics.forget_inputs()
                    statistics.token_weights = weights[batch]

                # One-shot: what the dense layer puts out is what the next layer is given.
                replay.run_layer(index, advance=not sequential, on_batch=weigh)
            yield index, statistics
            if sequential and index < last:
                replay.run_layer(index, advance=True)
