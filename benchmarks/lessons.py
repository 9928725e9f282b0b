"""Something to see or hear with what is asked and told about it, as training and as data."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.io import wavfile

from hf_adaptive_sparse.calibration.data import Batch
from hf_adaptive_sparse.calibration.media import Media, Medium, placeholder
from hf_adaptive_sparse.calibration.questions import IGNORED, PLAIN_PROMPT, encode_questions


@dataclass(frozen=True)
class Lesson:
    """One clip, picture or sound.

    Attributes:
        medium: Which of them.
        value: As the library's readers take it.
        questions: Questions with their answers.
        told: Descriptions, each the words of one thing; the first word says which.
    """

    medium: Medium
    value: Any
    questions: Sequence[tuple[str, str]]
    told: Sequence[Sequence[str]]


MakeLesson = Callable[[random.Random, int], Lesson]


def lesson_batch(processor: Any, lessons: Sequence[Lesson]) -> Batch:
    """Pack each lesson into one sequence: what is shown, questions, then descriptions.

    As the demo model's `visual_batch`, for any medium: only answers, and the words of a description
    behind its first, carry a loss.

    Returns:
        The model's inputs, with `labels`; padded on the right.
    """
    tokenizer, medium = processor.tokenizer, lessons[0].medium
    shown = Media(medium, [lesson.value for lesson in lessons])
    start = f"{tokenizer.bos_token}{placeholder(processor, medium)}"
    batch = encode_questions(processor, [start] * len(lessons), shown, "right")
    sequences, labels = [], []
    for lesson, before in zip(lessons, batch["input_ids"].tolist(), strict=True):
        pieces = []
        for question, answer in lesson.questions:
            pieces.append((PLAIN_PROMPT.format(question=question), False))
            pieces.append((f" {answer}{tokenizer.eos_token}", True))
        pieces.append(("\n", False))
        for first, *others in lesson.told:
            told = "".join(f" {word}" for word in others)
            pieces += [(f" {first}", False), (told, True), (",", False)]
        ids, targets = list(before), [IGNORED] * len(before)
        for text, trained in pieces:
            piece = tokenizer(text).input_ids
            ids += piece
            targets += piece if trained else [IGNORED] * len(piece)
        sequences.append(ids)
        labels.append(targets)
    width, pad = max(map(len, sequences)), tokenizer.pad_token_id
    return {
        **batch,
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids in sequences]),
        "attention_mask": torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in sequences]),
        "labels": torch.tensor([t + [IGNORED] * (width - len(t)) for t in labels]),
    }


def write_questions(path: Path, make: MakeLesson, count: int, seed: int) -> Path:
    """Write parquet with one question per clip, picture or sound, as the library reads it."""
    rng = random.Random(f"questions-{seed}")
    rows = []
    for _ in range(count):
        lesson = make(rng, 1)
        ((question, answer),) = lesson.questions
        column, value = _stored(lesson)
        rows.append({column: value, "question": question, "answer": answer})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def _stored(lesson: Lesson) -> tuple[str, Any]:
    if lesson.medium == "audio":
        out = io.BytesIO()
        wavfile.write(out, lesson.value["sampling_rate"], lesson.value["array"])
        return "audio", {"bytes": out.getvalue(), "path": None}
    if lesson.medium == "video":
        return "frames", [_png(frame) for frame in lesson.value]
    return "image", _png(lesson.value)


def _png(image: Any) -> dict[str, Any]:
    out = io.BytesIO()
    image.save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}
