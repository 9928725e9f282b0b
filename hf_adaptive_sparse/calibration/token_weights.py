"""Weights of the tokens of a calibration batch in the statistics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PretrainedConfig

from hf_adaptive_sparse.architecture import media_token_ids
from hf_adaptive_sparse.calibration.questions import IGNORED
from hf_adaptive_sparse.calibration.sequence_pairs import sequence_pairs


def token_weights(
    batch: Mapping[str, torch.Tensor], config: PretrainedConfig, image_weight: float = 1.0
) -> torch.Tensor:
    """Return how much each token counts that the decoder reads.

    Args:
        batch: Inputs of the model's forward, with ``input_ids`` ``(batch, seq)`` or
            ``inputs_embeds`` ``(batch, seq, hidden)``, and perhaps ``attention_mask``
            ``(batch, seq)``.
        config: Config of the model, which names the tokens of images, videos and sounds.
        image_weight: Weight of such a token.

    Returns:
        ``(batch, seq)``, float32: 0 for padding, ``image_weight`` for tokens of images,
        videos and sounds, 1 for text. Of an encoder-decoder ``(batch, predicted)``: 1 where a
        token is predicted, else 0.

    Raises:
        ValueError: If the batch has neither ids nor embeddings, or a mask of another shape.
    """
    if config.is_encoder_decoder:
        return (sequence_pairs(batch, config).targets != IGNORED).float()
    return _read_weights(batch, config, image_weight)


def encoder_weights(
    batch: Mapping[str, torch.Tensor], config: PretrainedConfig, image_weight: float = 1.0
) -> torch.Tensor | None:
    """Return how much each token counts that the encoder of an encoder-decoder reads.

    Their number per row is never that of `token_weights` (`sequence_pairs`): it tells which of the
    two a linear of the decoder is given.

    Args:
        batch: As for `token_weights`.
        config: Config of the model.
        image_weight: Weight of a token of an image, video or sound.

    Returns:
        ``(batch, seq)``, float32: 0 for padding and for what the decoder has to predict. ``None``
        of other models, and where the encoder reads no tokens.

    Raises:
        ValueError: As for `token_weights`.
    """
    if not config.is_encoder_decoder:
        return None
    read = sequence_pairs(batch, config).inputs
    if read.get("input_ids") is None and read.get("inputs_embeds") is None:
        return None
    return _read_weights(read, config, image_weight)


def _read_weights(
    batch: Mapping[str, torch.Tensor], config: PretrainedConfig, image_weight: float
) -> torch.Tensor:
    """Return the weights of tokens by what they are and by their mask."""
    ids, embeds = batch.get("input_ids"), batch.get("inputs_embeds")
    if ids is not None:
        shape, device = ids.shape, ids.device
    elif embeds is not None:
        shape, device = embeds.shape[:2], embeds.device
    else:
        raise ValueError(
            "A calibration batch must hold input_ids (batch, seq) or inputs_embeds; it has "
            f"{', '.join(sorted(batch)) or 'nothing'}."
        )
    weights = torch.ones(shape, dtype=torch.float32, device=device)
    if ids is not None:
        media = torch.tensor(media_token_ids(config), dtype=ids.dtype, device=ids.device)
        weights.masked_fill_(torch.isin(ids, media), image_weight)
    mask = batch.get("attention_mask")
    if mask is not None:
        if mask.shape != shape:
            raise ValueError(
                f"attention_mask must have the shape of the tokens, {tuple(shape)}, so that "
                f"padding can be left out; got {tuple(mask.shape)}."
            )
        weights.masked_fill_(mask.to(device) == 0, 0.0)
    return weights
