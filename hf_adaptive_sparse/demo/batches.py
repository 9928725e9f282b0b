"""Training batches: windows of prose, captions, and questions about pictures.

Each chunk of training data has its own seed below `HELD_OUT_SEEDS`, so training never meets what
the model is measured on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from hf_adaptive_sparse.demo.build import PATCH_SIZE, PROMPT
from hf_adaptive_sparse.demo.pictures import IMAGE_SIZE, Scene, draw_scene
from hf_adaptive_sparse.demo.scenes import (
    HELD_OUT_SEEDS,
    ask,
    describe,
    make_text,
    make_visual_questions,
)

WINDOW_LENGTHS = (128, 128, 256, 128, 128, 512, 128, 1024)
"""Lengths of the text windows that training steps take in turn, so that all of them are learnt."""
IGNORED_LABEL = -100
_QUESTION = PROMPT.removeprefix("<s><image>")
_IMAGE_TOKENS = "<image>" * (IMAGE_SIZE // PATCH_SIZE) ** 2
_SEEDS_PER_RUN = 10_000_000
_TOKENIZER_CHUNK = 0


def training_seed(seed: int, chunk: int) -> int:
    """Give each chunk of training data its own seed, below every held-out one.

    Raises:
        ValueError: `seed` or `chunk` is out of range.
    """
    runs = HELD_OUT_SEEDS // _SEEDS_PER_RUN
    if not 0 <= seed < runs:
        raise ValueError(f"seed must be from 0 to {runs - 1}, got {seed}")
    if not 0 <= chunk < _SEEDS_PER_RUN:
        raise ValueError(f"chunk must be from 0 to {_SEEDS_PER_RUN - 1}, got {chunk}")
    return seed * _SEEDS_PER_RUN + chunk


def tokenizer_corpus(seed: int) -> list[str]:
    """Text to learn the vocabulary from: paragraphs, and questions with their answers."""
    chunk_seed = training_seed(seed, _TOKENIZER_CHUNK)
    questions = make_visual_questions(4000, chunk_seed)
    asked = [f"Q: {row['question']} A: {row['answer']}" for row in questions]
    return make_text(4000, chunk_seed) + asked


def text_batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, tokens_per_batch: int
) -> Iterator[torch.Tensor]:
    """Yield batches of consecutive windows without end, never the same text twice.

    Yields:
        Token ids, int64 `(tokens_per_batch // length, length)`, `length` from WINDOW_LENGTHS.
    """
    chunk = _TOKENIZER_CHUNK + 1
    pending: list[int] = []
    step = 0
    while True:
        length = WINDOW_LENGTHS[step % len(WINDOW_LENGTHS)]
        rows = max(1, tokens_per_batch // length)
        while len(pending) < rows * length:
            lines = make_text(100, training_seed(seed, chunk))
            pending += tokenizer("\n".join(lines) + "\n").input_ids
            chunk += 1
        yield torch.tensor(pending[: rows * length]).reshape(rows, length)
        pending = pending[rows * length :]
        step += 1


def visual_batch(
    processor: LlavaProcessor, scenes: Sequence[Scene], rng: random.Random, questions: int
) -> dict[str, torch.Tensor]:
    """Pack questions about each picture, then captions of its shapes, into one sequence.

    The first question stands exactly where generation will meet it; sharing the picture among
    several is what makes training on one core affordable. A caption, " circle red left top,",
    tells from one word what else is true of the same shape: the same look-up that a question
    needs, one step shorter. Without captions beside them the questions are not learnt in the
    steps there are. Only answers, and the words of a caption after its first, carry a loss.

    Returns:
        `input_ids`, `attention_mask`, `labels`: int64 `(scenes, tokens)`; `pixel_values`:
        float32 `(scenes, 3, height, width)`.
    """
    tokenizer = processor.tokenizer
    images = [draw_scene(scene) for scene in scenes]
    pixel_values = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    sequences: list[list[int]] = []
    labels: list[list[int]] = []
    for scene in scenes:
        pieces = [(f"<s>{_IMAGE_TOKENS}", False)]
        for question, answer in (ask(scene, rng) for _ in range(questions)):
            pieces += [(_QUESTION.format(question=question), False), (f" {answer}</s>", True)]
        pieces.append(("\n", False))
        for first, *others in describe(scene, rng):
            told = "".join(f" {word}" for word in others)
            pieces += [(f" {first}", False), (told, True), (",", False)]
        ids: list[int] = []
        targets: list[int] = []
        for text, trained in pieces:
            piece = tokenizer(text).input_ids
            ids += piece
            targets += piece if trained else [IGNORED_LABEL] * len(piece)
        sequences.append(ids)
        labels.append(targets)
    width = max(map(len, sequences))
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids in sequences]),
        "attention_mask": torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in sequences]),
        "labels": torch.tensor([t + [IGNORED_LABEL] * (width - len(t)) for t in labels]),
        "pixel_values": pixel_values,
    }


def answer_positions(labels: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Find the answers among the labels of `visual_batch`: what stands just before `</s>`.

    Args:
        labels: int64 `(scenes, tokens)`.
        eos_token_id: The token that ends an answer.

    Returns:
        bool `(scenes, tokens - 1)`: True where `labels[:, 1:]` is an answer.
    """
    found = torch.zeros_like(labels[:, 1:], dtype=torch.bool)
    found[:, :-1] = labels[:, 2:] == eos_token_id
    return found
