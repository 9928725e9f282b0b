"""Forwards of a model that calibration makes: their device, evaluation mode, and early end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.sequence_pairs import model_pairs
from hf_adaptive_sparse.calibration.token_ids import check_token_ids


class _StopForward(Exception):
    """Ends a forward after the last decoder layer: the output head is not needed."""


def run_decoder(
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    stop_after: nn.ModuleList,
) -> None:
    """Run a batch through the model without gradients, up to its last decoder layer.

    Args:
        model: The model.
        batch: Inputs of its forward; ``labels`` are ignored, but for what an encoder-decoder is
            not to read (`model_pairs`).
        stop_after: The decoder layers.

    Raises:
        DataError: If ids lie beyond the model's vocabulary.
    """

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _StopForward

    device = execution_device(model.get_input_embeddings())
    if model.config.is_encoder_decoder:
        batch = model_pairs(batch, model).inputs
    check_token_ids(batch, model)
    inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
    handle = stop_after[-1].register_forward_hook(stop)
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    except _StopForward:
        pass
    finally:
        handle.remove()


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module and all below it into evaluation mode; restore each one's own mode after."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


def execution_device(module: nn.Module) -> torch.device:
    """Return the device a module computes on, also where `accelerate` keeps it elsewhere."""
    for child in module.modules():
        hook = getattr(child, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is not None and any(True for _ in child.parameters()):
            return torch.device(device if not isinstance(device, int) else f"cuda:{device}")
    for parameter in module.parameters():
        return parameter.device
    return torch.device("cpu")
