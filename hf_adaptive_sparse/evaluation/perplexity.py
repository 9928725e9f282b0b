"""Perplexity, weighted by tokens, seen through the KV cache that a model will run with.

``exp(sum of -log p(token) / number of tokens)`` over all scored tokens of all batches, so that
batch size and padding change nothing. One forward per batch: the adaptive cache hands the forward
what it stores, so the quantisation of keys and values enters the figure. In that forward every
full block is read quantised, also by the queries beside it; generation reads the newest tokens
unquantised until their block is full, so the figure errs on the side of caution.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping

import torch
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import cache_argument, image_token_id
from hf_adaptive_sparse.evaluation.forward import (
    KVCacheChoice,
    NonFiniteError,
    evaluating,
    new_cache,
    to_model,
)

IGNORED = -100
"""Label of a token that is not scored."""

CHUNK_LOGITS = 1 << 24
"""Logits converted to float32 at once: 64 MiB of them."""


def perplexity(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    kv_cache: KVCacheChoice = None,
    *,
    progress: bool = False,
) -> float:
    """Return the perplexity of the model on the batches.

    Args:
        model: A model with a language head. Its mode (train, eval) is restored.
        batches: Inputs of the forward, each with ``input_ids`` (batch, seq) int64. Scored are the
            ``labels`` where a batch has them, else every token that has one before it; never
            padding and never image tokens.
        kv_cache: ``None``: quantise keys and values as the model's own config says, if it does.
            ``False``: do not. A `KVCacheConfig`: as this one says.
        progress: Show a progress bar.

    Raises:
        ValueError: If there are no batches, or no token in them is scored.
        TypeError: If ``batches`` is a name, a path or a single batch.
        NonFiniteError: If the loss of a batch is NaN or infinite.
    """
    if isinstance(batches, str | bytes | os.PathLike | Mapping):
        raise TypeError(
            "batches must be an iterable of batches, each a dict of tensors, got "
            f"{type(batches).__name__}. Make them from a name or a path with load_batches()."
        )
    total, count, seen = 0.0, 0, 0
    bar = tqdm(batches, desc="Perplexity", unit="batch", disable=not progress)
    for index, batch in enumerate(bar):
        seen += 1
        loss, tokens = negative_log_likelihood(model, batch, kv_cache)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"The loss must be finite; batch {index} gives {loss}: the model computes NaN or "
                "infinite logits. Look for such values in its weights, or evaluate in a wider "
                "dtype."
            )
        total += loss
        count += tokens
    if seen == 0:
        raise ValueError("Perplexity needs at least one batch; there are none.")
    if count == 0:
        raise ValueError(
            "Perplexity needs at least one scored token; all are padding, image tokens, labelled "
            f"{IGNORED}, or first in their row."
        )
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf


def negative_log_likelihood(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], kv_cache: KVCacheChoice = None
) -> tuple[float, int]:
    """Score one batch.

    Args:
        model: A model with a language head.
        batch: As for `perplexity`.
        kv_cache: As for `perplexity`.

    Returns:
        The sum of the negative log-likelihoods in nats, computed in float32 and summed in
        float64 (NaN or infinite if the logits are), and the number of tokens scored.

    Raises:
        ValueError: If the batch has neither labels nor input_ids.
    """
    inputs = to_model(model, batch)
    targets = _targets(inputs, image_token_id(model.config))
    inputs.pop("labels", None)
    if not bool((targets != IGNORED).any()):
        return 0.0, 0
    with evaluating(model):
        cache = new_cache(model, kv_cache)
        inputs[cache_argument(model)] = cache
        logits = model(**inputs, use_cache=cache is not None).logits
        # Each position predicts the next token: the last one predicts nothing that is known.
        return _sum_nll(logits[:, :-1], targets.to(logits.device))


def _targets(inputs: Mapping[str, torch.Tensor], image_token: int | None) -> torch.Tensor:
    """Return the token each position but the last has to predict, (batch, seq - 1) int64."""
    ids, labels = inputs.get("input_ids"), inputs.get("labels")
    if labels is None:
        if ids is None:
            raise ValueError(
                "A batch must have input_ids or labels to be scored; it has "
                f"{', '.join(inputs) or 'nothing'}."
            )
        labels = ids.clone()
    targets = labels[:, 1:].clone()
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        # The first real token after left padding has nothing before it to be predicted from.
        targets[(mask[:, 1:] == 0) | (mask[:, :-1] == 0)] = IGNORED
    if ids is not None and image_token is not None:
        targets[ids[:, 1:] == image_token] = IGNORED
    return targets


def _sum_nll(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, int]:
    """Sum the losses of (batch, seq, vocabulary) logits, in chunks of the scored positions."""
    scored = (targets != IGNORED).nonzero()
    rows = max(1, CHUNK_LOGITS // logits.shape[-1])
    total = 0.0
    for chunk in scored.split(rows):
        position = (chunk[:, 0], chunk[:, 1])
        losses = functional.cross_entropy(
            logits[position].float(), targets[position], reduction="none"
        )
        total += float(losses.double().sum())
    return total, len(scored)
