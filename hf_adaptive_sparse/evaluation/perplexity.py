"""Perplexity, weighted by tokens, computed with the KV cache that the model will run with.

``exp(sum of -log p(token) / number of tokens)`` over all scored tokens of all batches, so that
batch size and padding change nothing. One forward per batch: the adaptive cache hands the forward
what it stores, so the quantisation of keys and values enters the figure. In that forward every
full block is read quantised, also by the queries beside it; generation reads the newest tokens
unquantised until their block is full, so the figure errs on the side of caution.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.data import ready_batch
from hf_adaptive_sparse.calibration.questions import IGNORED
from hf_adaptive_sparse.errors import NonFiniteError
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice, resolve_kv_cache
from hf_adaptive_sparse.evaluation.scoring import perplexity_of, predict
from hf_adaptive_sparse.evaluation.windows import unfilled_block, window_tokens

logger = logging.getLogger(__name__)


def perplexity(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    kv_cache: KVCacheChoice = None,
    *,
    progress: bool = False,
) -> float:
    """Return the perplexity of the model on the batches.

    Windows that are all too short for the KV cache to quantise anything are remarked on in the log.

    Args:
        model: A model with a language head. Its mode (train, eval) is restored.
        batches: Inputs of the forward, each with ``input_ids`` (batch, seq) int64, and an
            ``attention_mask`` of that shape where there is padding. Scored are the
            ``labels`` where a batch has them, else every token that has one before it; never
            padding and never tokens of images, videos or sounds. An encoder-decoder reads what
            comes before them, see `sequence_pairs`, or all of ``input_ids`` where labels do not
            repeat them.
        kv_cache: ``None``: quantise keys and values as the model's own config says, if it does.
            ``False``: do not. A `KVCacheConfig`: as this one says.
        progress: Show a progress bar.

    Raises:
        ValueError: If there are no batches, or no token in them is scored.
        DataError: If a batch is empty, of mismatched shapes, or of ids beyond the vocabulary.
        TypeError: If ``batches`` is a name, a path or a single batch, or one of them is not a dict
            of tensors.
        NonFiniteError: If keys, values or the loss of a batch are NaN or infinite.
    """
    if batches is None or isinstance(batches, str | bytes | os.PathLike | Mapping):
        raise TypeError(
            "batches must be an iterable of batches, each a dict of tensors, got "
            f"{type(batches).__name__}. Make them from a name or a path with load_batches()."
        )
    total, count, seen, longest = 0.0, 0, 0, 0
    bar = tqdm(batches, desc="Perplexity", unit="batch", disable=not progress)
    for index, batch in enumerate(bar):
        batch = ready_batch(batch, index, model.config)
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
        longest = max(longest, window_tokens(batch))
    if seen == 0:
        raise ValueError("Perplexity needs at least one batch; there are none.")
    if count == 0:
        raise ValueError(
            "Perplexity needs at least one scored token; all are padding, image tokens, labelled "
            f"{IGNORED}, or first in their row."
        )
    config = resolve_kv_cache(model.config, kv_cache)
    remark = None if config is None else unfilled_block(longest, config)
    if remark is not None:
        logger.warning(remark)
    return perplexity_of(total / count)


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
    predictions = predict(model, batch, kv_cache)
    if predictions is None:
        return 0.0, 0
    return predictions.sum_nll(), predictions.count
