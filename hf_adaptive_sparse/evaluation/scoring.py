"""What a forward predicts at the tokens that count, and the figures that are read off it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import cache_argument, media_token_ids
from hf_adaptive_sparse.calibration.questions import IGNORED
from hf_adaptive_sparse.calibration.sequence_pairs import model_pairs
from hf_adaptive_sparse.calibration.tables import DataError
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice, evaluating, new_cache, to_model

CHUNK_LOGITS = 1 << 24
"""Logits converted to float32 at once: 64 MiB of them."""


def perplexity_of(loss: float) -> float:
    """Return ``exp`` of a mean negative log-likelihood in nats, infinite where it overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Predictions:
    """The logits of a batch and what they had to predict.

    Attributes:
        logits: ``(batch, predicted, vocabulary)``, the model's dtype.
        targets: ``(batch, predicted)``, int64; `IGNORED` where nothing is scored.
    """

    logits: torch.Tensor
    targets: torch.Tensor

    @property
    def count(self) -> int:
        """Tokens that are scored."""
        return int((self.targets != IGNORED).sum())

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield logits ``(tokens, vocabulary)`` in float32 and targets ``(tokens,)`` that count."""
        scored = (self.targets != IGNORED).nonzero()
        rows = max(1, CHUNK_LOGITS // self.logits.shape[-1])
        for chunk in scored.split(rows):
            position = (chunk[:, 0], chunk[:, 1])
            yield self.logits[position].float(), self.targets[position]

    def sum_nll(self) -> float:
        """Return the summed negative log-likelihood in nats; float32 terms, a float64 sum."""
        total = 0.0
        for logits, targets in self.chunks():
            losses = functional.cross_entropy(logits, targets, reduction="none")
            total += float(losses.double().sum())
        return total

    def wrong_rows(self) -> tuple[int, int]:
        """Count the rows where greedy decoding would miss a scored token, and the rows scored.

        A row whose every scored token has the highest logit, given the tokens before it, is one
        that greedy generation reproduces.
        """
        scored = self.targets != IGNORED
        missed = (self.logits.argmax(-1) != self.targets) & scored
        return int(missed.any(1).sum()), int(scored.any(1).sum())


def predict(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], kv_cache: KVCacheChoice = None
) -> Predictions | None:
    """Run one batch through the model, in evaluation mode and without gradients.

    Args:
        model: A model with a language head.
        batch: Inputs of the forward; see `perplexity`.
        kv_cache: As for `perplexity`.

    Returns:
        What it predicts, ``None`` where no token of the batch is scored.

    Raises:
        ValueError: If the batch has neither labels nor input_ids.
        DataError: If a label is no token that the model predicts.
    """
    inputs = to_model(model, batch)
    if model.config.is_encoder_decoder:
        pairs = model_pairs(inputs, model)
        inputs, targets = pairs.inputs, pairs.targets
    else:
        targets = scored_targets(inputs, media_token_ids(model.config))
        inputs.pop("labels", None)
    if not bool((targets != IGNORED).any()):
        return None
    with evaluating(model):
        cache = new_cache(model, kv_cache)
        inputs[cache_argument(model)] = cache
        logits = model(**inputs, use_cache=cache is not None).logits
    _check_targets(targets, logits.shape[-1])
    # A decoder alone predicts at each position the next token; of the last one nothing is known.
    return Predictions(logits[:, : targets.shape[1]], targets.to(logits.device, torch.int64))


def _check_targets(targets: torch.Tensor, vocabulary: int) -> None:
    """Refuse targets beyond the logits, on which a GPU would fail for good."""
    scored = targets[targets != IGNORED]
    outside = scored[(scored < 0) | (scored >= vocabulary)]
    if outside.numel():
        raise DataError(
            f"labels must be tokens that the model predicts, 0 to {vocabulary - 1}, or {IGNORED} "
            f"where none is scored; got {int(outside[0])}. Tokenizer and model must belong "
            "together: load both from the same repo."
        )


def scored_targets(inputs: Mapping[str, torch.Tensor], media_tokens: Sequence[int]) -> torch.Tensor:
    """Return the token each position but the last has to predict, (batch, seq - 1) int64.

    Raises:
        ValueError: If there are neither labels nor input_ids.
    """
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
    if mask is not None:
        # The first real token after left padding has nothing before it to be predicted from.
        targets[(mask[:, 1:] == 0) | (mask[:, :-1] == 0)] = IGNORED
    if ids is not None:
        media = torch.tensor(media_tokens, dtype=ids.dtype, device=ids.device)
        targets[torch.isin(ids[:, 1:], media)] = IGNORED
    return targets
