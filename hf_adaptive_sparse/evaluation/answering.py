"""Answers of a model to questions about images, videos and sounds.

An answer is what the model generates greedily up to its end of sequence, cut at the first newline
(behind it, a model writes its next question).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from hf_adaptive_sparse.architecture import cache_argument, context_length
from hf_adaptive_sparse.calibration.media import Media
from hf_adaptive_sparse.calibration.questions import check_fits, encode_questions, row_prompt
from hf_adaptive_sparse.evaluation.forward import (
    KVCacheChoice,
    evaluating,
    new_cache,
    plain_cache,
    to_model,
)
from hf_adaptive_sparse.kvcache.carrying import carried_profile

_OF_THE_MODEL = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
)
"""What of a generation config says which tokens mean what, not how to choose among them."""


@dataclass(frozen=True)
class GeneratedAnswer:
    """One generated answer.

    Attributes:
        text: The answer, cut at its first newline.
        ids: Its tokens up to the end of sequence.
        ended: Whether the model ended it.
    """

    text: str
    ids: tuple[int, ...]
    ended: bool


def generate_answers(
    model: PreTrainedModel,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    kv_cache: KVCacheChoice = None,
    max_new_tokens: int = 10,
    prompt: str | None = None,
) -> list[GeneratedAnswer]:
    """Generate an answer to each question, greedily, as one left-padded batch.

    Args:
        model: A model that takes images, videos or sounds.
        processor: Its processor.
        rows: Rows with ``question`` and ``image``, ``video`` or ``audio``; all with the same, or
            all with ``None``.
        kv_cache: ``None``: the model's own KV profile, if any; ``False``: none; a `KVCacheConfig`:
            that one.
        max_new_tokens: Tokens per answer at most.
        prompt: See `format_question`.

    Raises:
        DataError: If a question and an answer of ``max_new_tokens`` do not fit into the model's
            context, or something cannot be opened.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    prompts = [row_prompt(processor, row, prompt) for row in rows]
    encoded = encode_questions(processor, prompts, Media.of(rows), "left")
    # An encoder reads the question by itself.
    said = 0 if model.config.is_encoder_decoder else max_new_tokens
    context = context_length(model)
    for row, read in zip(rows, encoded["attention_mask"].sum(1).tolist(), strict=True):
        check_fits(row, read, context, said)
    inputs = to_model(model, encoded)
    settings = _greedy(model, tokenizer, max_new_tokens)
    with evaluating(model), _generating_by(model, settings):
        cache = new_cache(model, kv_cache)
        if cache is None and carried_profile(model.config) is not None:
            # Without a cache of ours, generate() would make one from the config's profile.
            cache = plain_cache(model)
        inputs[cache_argument(model)] = cache
        output = model.generate(**inputs, generation_config=settings)
    ends = settings.eos_token_id
    stops = set(ends) if isinstance(ends, Sequence) else {ends}
    # A decoder alone repeats the prompt; one with an encoder begins with its start token.
    begin = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    answers = []
    for tokens in output[:, begin:].tolist():
        length = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
        ids = tuple(tokens[:length])
        lines = tokenizer.decode(list(ids), skip_special_tokens=True).strip().splitlines()
        text = lines[0].strip() if lines else ""
        answers.append(GeneratedAnswer(text, ids, ended=length < len(tokens)))
    return answers


def _greedy(model: PreTrainedModel, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Return a config that takes the likeliest token each time, of those the model may say."""
    own = model.generation_config
    config = copy.deepcopy(own) if own is not None else GenerationConfig()
    for name, default in vars(GenerationConfig()).items():
        if not name.startswith("_") and name not in _OF_THE_MODEL:
            setattr(config, name, default)
    config.do_sample = False
    config.num_beams = 1
    config.max_new_tokens = max_new_tokens
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        pad = tokenizer.pad_token_id
        config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    return config


@contextmanager
def _generating_by(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Put a generation config in the place of the model's own, and of those of its parts.

    What a config leaves open, ``generate()`` takes from there.
    """
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    before = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = config
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            owner.generation_config = own
