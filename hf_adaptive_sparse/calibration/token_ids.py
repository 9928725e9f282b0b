"""Whether a model has an embedding for each token of a batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import media_token_ids
from hf_adaptive_sparse.calibration.tables import DataError


def check_token_ids(batch: Mapping[str, torch.Tensor], model: PreTrainedModel) -> None:
    """Refuse ids beyond the model's vocabulary, on which a GPU would fail for good.

    Args:
        batch: Arguments of the forward. Ids that stand for features of images, videos and sounds
            may lie outside: the model replaces them.
        model: The model.

    Raises:
        DataError: If there are any.
    """
    for name in ("input_ids", "decoder_input_ids"):
        ids = batch.get(name)
        if ids is None or not (size := _vocabulary(model, name)):
            continue
        outside = ids[(ids < 0) | (ids >= size)].unique().tolist()
        if not set(outside) <= set(media_token_ids(model)):
            raise DataError(
                f"{name} must lie within the model's vocabulary of {size} tokens, 0 to {size - 1}; "
                f"the largest is {int(ids.max())}, the smallest {int(ids.min())}. Tokenizer and "
                "model must belong together: load both from the same repo."
            )


def _vocabulary(model: PreTrainedModel, name: str) -> int:
    """Return for how many ids of one kind there are embeddings; 0 if that cannot be told.

    A decoder may have a vocabulary of its own (Marian, FSMT).
    """
    part = model.get_decoder() if name == "decoder_input_ids" else model
    embeddings = getattr(part, "get_input_embeddings", None)
    if embeddings is None:
        return 0
    # All tables count: a model may keep its added tokens in one of their own.
    return sum(p.shape[0] for p in embeddings().parameters() if p.ndim == 2)
