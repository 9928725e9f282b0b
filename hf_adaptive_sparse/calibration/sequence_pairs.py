"""Batches as an encoder-decoder takes them: the encoder reads a part, the rest is predicted.

Batches are laid out for models that go on with what they read: prompt and answer are one row of
``input_ids``. An encoder that was shown the answer would leave the decoder nothing to predict, and
a decoder that is given nothing runs on its start token alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from hf_adaptive_sparse.architecture import media_token_ids
from hf_adaptive_sparse.calibration.questions import IGNORED


@dataclass(frozen=True)
class SequencePairs:
    """A batch in two parts.

    Attributes:
        inputs: Arguments of the forward: those of the batch with what is predicted masked out, and
            ``decoder_input_ids`` ``(batch, predicted)`` int64. There are never as many as
            ``input_ids`` in a row: a sequence's length tells which of the two parts it is of.
        targets: ``(batch, predicted)`` int64: the token that the decoder has to predict at each of
            its positions, `IGNORED` where there is none.
    """

    inputs: dict[str, Any]
    targets: torch.Tensor


def sequence_pairs(batch: Mapping[str, torch.Tensor], config: PretrainedConfig) -> SequencePairs:
    """Divide a batch in what an encoder reads and what the decoder has to predict.

    A batch with ``decoder_input_ids`` (see `with_decoder_inputs`) is divided already: its encoder
    reads all that is no padding, and its labels are predicted.

    Of a row of another batch everything before the first labelled token is read, and the labelled
    tokens are predicted. Without labels, or where nothing would be left to read, the first half of
    the row's text is read and the second half predicted. Tokens of images, videos and sounds are
    always read: the encoder puts features in their places.

    Args:
        batch: Arguments of the forward, checked by `ready_batch`: with ``input_ids``
            ``(batch, seq)``, and perhaps ``attention_mask`` and ``labels`` of that shape; or with
            ``decoder_input_ids`` and ``labels`` ``(batch, predicted)``, and perhaps
            ``decoder_attention_mask`` of that shape.
        config: Config of the model.

    Raises:
        ValueError: If the batch has neither input_ids nor decoder_input_ids, if there are no labels
            to decoder_input_ids, or if what comes with these has another shape.
    """
    given = batch.get("decoder_input_ids") is not None
    pairs = _given(batch) if given else _divided(batch, config)
    return _of_another_length(pairs, _special_tokens(config)[0])


def with_decoder_inputs(
    batch: Mapping[str, torch.Tensor], config: PretrainedConfig
) -> dict[str, torch.Tensor]:
    """Return a batch with what the decoder of an encoder-decoder reads, if its labels tell.

    Labels that do not repeat ``input_ids`` where they are scored are those of the decoder, as in
    transformers, which then derives ``decoder_input_ids``: the labels behind a start token.

    Args:
        batch: Arguments of the forward, perhaps with ``labels`` ``(batch, predicted)``.
        config: Config of the model.
    """
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if not config.is_encoder_decoder or labels is None or "decoder_input_ids" in batch:
        return dict(batch)
    if ids is not None and ids.shape == labels.shape:
        scored = labels != IGNORED
        if torch.equal(labels[scored], ids.to(labels.device)[scored].to(labels.dtype)):
            return dict(batch)
    return {**batch, "decoder_input_ids": _behind_start(labels, config)}


def model_pairs(batch: Mapping[str, torch.Tensor], model: PreTrainedModel) -> SequencePairs:
    """Return the `sequence_pairs` of a batch for an encoder-decoder.

    Raises:
        ValueError: As for `sequence_pairs`; or if the encoder reads features instead of tokens
            (Whisper), and the batch has neither decoder_input_ids nor labels.
    """
    if model.main_input_name != "input_ids" and batch.get("decoder_input_ids") is None:
        raise ValueError(
            f"The encoder of {type(model).__name__} reads no tokens, so a batch must have "
            f"{model.main_input_name} and labels; this one has {', '.join(batch) or 'nothing'}. "
            "Give a list of such batches instead of a dataset."
        )
    return sequence_pairs(batch, model.config)


def _given(batch: Mapping[str, torch.Tensor]) -> SequencePairs:
    """Return the parts of a batch with ``decoder_input_ids``."""
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            "A batch with decoder_input_ids must have labels, the token to predict at each of "
            "them; this one has none. Add labels, or leave out decoder_input_ids: then input_ids "
            "are divided in what is read and what is predicted."
        )
    for name in ("labels", "decoder_attention_mask"):
        tensor, wanted = batch.get(name), tuple(batch["decoder_input_ids"].shape)
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise ValueError(
                f"{name} must have the shape of decoder_input_ids, {wanted}; got "
                f"{tuple(tensor.shape)}. Pad them to one length."
            )
    mask = batch.get("decoder_attention_mask")
    if mask is not None:
        labels = labels.masked_fill(mask.to(labels.device) == 0, IGNORED)
    return SequencePairs({k: v for k, v in batch.items() if k != "labels"}, labels)


def _divided(batch: Mapping[str, torch.Tensor], config: PretrainedConfig) -> SequencePairs:
    """Divide the ``input_ids`` of a batch."""
    ids = batch.get("input_ids")
    if ids is None:
        raise ValueError(
            "A batch for an encoder-decoder must have input_ids, which are divided in what it "
            f"reads and what it predicts; this one has {', '.join(batch) or 'nothing'}."
        )
    if batch.get("decoder_attention_mask") is not None:
        raise ValueError(
            "decoder_attention_mask must come with the decoder_input_ids it belongs to; this batch "
            "has none. Add them and their labels, or leave it out."
        )
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device) != 0
    features = torch.tensor(media_token_ids(config), dtype=ids.dtype, device=ids.device)
    media = real & torch.isin(ids, features)
    text = real & ~media
    order = text.cumsum(1)
    half = text & (order <= order[:, -1:] // 2)
    labels = batch.get("labels")
    wanted = real if labels is None else real & (labels.to(ids.device) != IGNORED)
    before = real & (wanted.cumsum(1) == 0)
    read = torch.where(before.any(1, keepdim=True), before, half) | media
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    inputs["attention_mask"] = read.to(ids.dtype if mask is None else mask.dtype)
    targets = _to_the_left(ids, wanted & ~read)
    inputs["decoder_input_ids"] = _behind_start(targets, config)
    return SequencePairs(inputs, targets)


def _behind_start(targets: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Return what the decoder reads to predict ``targets`` ``(batch, predicted)``."""
    padding, start = _special_tokens(config)
    shifted = torch.cat([torch.full_like(targets[:, :1], start), targets[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, padding)


def _of_another_length(pairs: SequencePairs, padding: int) -> SequencePairs:
    """Return the pairs with a position more or less, if both parts have one length.

    The last position of the decoder goes where nothing is predicted there; else one of padding
    comes behind it. What is predicted stays the same.
    """
    inputs, targets = dict(pairs.inputs), pairs.targets
    ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if ids is None or ids.shape[1] != targets.shape[1]:
        return pairs
    spare = targets.shape[1] > 1 and bool((targets[:, -1] == IGNORED).all())
    added = -1 if spare else 1

    def changed(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return functional.pad(tensor, (0, added), value=value)

    inputs["decoder_input_ids"] = changed(inputs["decoder_input_ids"], padding)
    if inputs.get("decoder_attention_mask") is not None:
        inputs["decoder_attention_mask"] = changed(inputs["decoder_attention_mask"], 0)
    return SequencePairs(inputs, changed(targets, IGNORED))


def _to_the_left(ids: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the chosen tokens of each row without gaps, `IGNORED` behind them; one at least."""
    width = max(1, int(chosen.sum(1).max()))
    moved = torch.full_like(ids[:, :width], IGNORED)
    rows, columns = chosen.nonzero(as_tuple=True)
    moved[rows, chosen.cumsum(1)[rows, columns] - 1] = ids[rows, columns]
    return moved


def _special_tokens(config: PretrainedConfig) -> tuple[int, int]:
    """Return the ids of padding and of the decoder's start."""

    def first(*names: str) -> int:
        for name in names:
            for part in (config, config.get_text_config(decoder=True), config.get_text_config()):
                value = getattr(part, name, None)
                if isinstance(value, int):
                    return value
        return 0

    padding = first("pad_token_id", "eos_token_id")
    return padding, first("decoder_start_token_id", "bos_token_id", "pad_token_id")
