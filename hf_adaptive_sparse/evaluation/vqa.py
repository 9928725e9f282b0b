"""Questions about images, videos and sounds, with the model's answers scored as VQA does.

Some models were never taught to end an answer: what they write behind it means nothing, and they
are scored by ``match="prefix"`` instead.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.conversations import first_exchange
from hf_adaptive_sparse.calibration.media import accepted_media, require_processor
from hf_adaptive_sparse.calibration.questions import answer_ids, format_answer, row_prompt
from hf_adaptive_sparse.calibration.records import DataError, Records, Row, read_records
from hf_adaptive_sparse.evaluation.answering import GeneratedAnswer, generate_answers
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice
from hf_adaptive_sparse.evaluation.vqa_answers import mean_agreement, normalize_answer
from hf_adaptive_sparse.profiles import check_count

Match = Literal["whole", "prefix"]


@dataclass(frozen=True)
class VQAResult:
    """Accuracy on visual questions.

    Attributes:
        accuracy: Mean accuracy over the questions, in [0, 1].
        count: Number of questions.
        seconds: Time taken, reading of the data included.
        match: How answers were compared, ``"whole"`` or ``"prefix"``. Figures of the same model
            compare only if this is the same.
        ended_ratio: Fraction of the answers that the model ended itself.
        predictions: The generated answers in order, if they were asked for.
    """

    accuracy: float
    count: int
    seconds: float
    match: Match
    ended_ratio: float
    predictions: tuple[str, ...] | None = None


def vqa_accuracy(
    model: PreTrainedModel,
    processor: Any,
    records: Records | str | os.PathLike[str] | Iterable[Row],
    *,
    kv_cache: KVCacheChoice = None,
    batch_size: int = 32,
    max_new_tokens: int = 10,
    num_samples: int | None = None,
    split: str = "validation",
    prompt: str | None = None,
    match: Match | Literal["auto"] = "auto",
    keep_predictions: bool = False,
    progress: bool = False,
) -> VQAResult:
    """Ask the model the questions and compare its answers with the human ones.

    Args:
        model: A model that takes images, videos or sounds.
        processor: Its processor.
        records: Questions about them: records, or a source as `read_records` takes it. Of a
            conversation the first question is asked.
        kv_cache: ``None``: the model's own KV profile, if any; ``False``: none; a `KVCacheConfig`:
            that one.
        batch_size: Questions generated for together, padded on the left.
        max_new_tokens: Tokens per answer at most.
        num_samples: Only the first so many questions; ``None`` for all.
        split: Split of a Hub dataset that names none itself.
        prompt: Text around ``{question}``; see `format_question`.
        match: ``"whole"``: the whole generated answer must match. ``"prefix"``: each human answer
            is compared with as many generated tokens as it has itself. ``"auto"``: whole, but
            prefix where the model ended none of its answers. Take the ``match`` of the dense
            model's result for the compressed one, so that the two compare.
        keep_predictions: Return the answers too.
        progress: Show a progress bar.

    Raises:
        DataError: If the data hold no questions, or one that does not fit into the model's context.
        ValueError: If the model or the processor does not take what they are about, or an argument
            is invalid.
    """
    if match not in ("whole", "prefix", "auto"):
        raise ValueError(f"match must be 'whole', 'prefix' or 'auto', got {match!r}.")
    limits = (("batch_size", batch_size), ("max_new_tokens", max_new_tokens))
    for name, value in (*limits, ("num_samples", num_samples)):
        if value is not None:
            check_count(value, name)
    media = accepted_media(model.config)
    if not media:
        raise ValueError(
            "Questions need a model that takes images, videos or sounds; "
            f"{type(model).__name__} takes none."
        )
    started = time.perf_counter()
    if not isinstance(records, Records):
        records = read_records(records, split, media=media)
    if records.medium is None:
        raise DataError(
            "Questions need the columns 'image' (or 'video', 'frames', 'audio'), 'question' and "
            f"'answer' (or 'answers'); {records.name} has text."
        )
    require_processor(processor, records.medium, records.name)
    scores: dict[Match, float] = {"whole": 0.0, "prefix": 0.0}
    answers: list[GeneratedAnswer] = []
    rows = map(first_exchange, itertools.islice(records, num_samples))
    with tqdm(desc="Questions", unit="question", disable=not progress) as bar:
        while chunk := list(itertools.islice(rows, batch_size)):
            # A prefix is compared with no more tokens than the longest answer has.
            needed = max_new_tokens
            if match == "prefix":
                needed = min(needed, _longest_answer(processor, chunk, prompt))
            generated = generate_answers(
                model,
                processor,
                chunk,
                kv_cache=kv_cache,
                max_new_tokens=needed,
                prompt=prompt,
            )
            for answer, row in zip(generated, chunk, strict=True):
                scores["whole"] += _whole_accuracy(answer, row["answers"])
                scores["prefix"] += _prefix_accuracy(answer, row, processor, prompt)
            answers += generated
            bar.update(len(chunk))
    if not answers:
        raise DataError(f"{records.name} holds no questions.")
    ended = sum(answer.ended for answer in answers)
    if match == "auto":
        match = "whole" if ended else "prefix"
    return VQAResult(
        accuracy=scores[match] / len(answers),
        count=len(answers),
        seconds=time.perf_counter() - started,
        match=match,
        ended_ratio=ended / len(answers),
        predictions=tuple(answer.text for answer in answers) if keep_predictions else None,
    )


def _whole_accuracy(generated: GeneratedAnswer, answers: Sequence[str]) -> float:
    predicted = normalize_answer(generated.text)
    return mean_agreement([normalize_answer(answer) == predicted for answer in answers])


def _prefix_accuracy(
    generated: GeneratedAnswer, row: Mapping[str, Any], processor: Any, prompt: str | None
) -> float:
    tokenizer = getattr(processor, "tokenizer", processor)
    matches = []
    for answer, count in zip(row["answers"], _answer_lengths(processor, row, prompt), strict=True):
        start = tokenizer.decode(list(generated.ids[:count]), skip_special_tokens=True)
        matches.append(normalize_answer(start) == normalize_answer(answer))
    return mean_agreement(matches)


def _answer_lengths(processor: Any, row: Mapping[str, Any], prompt: str | None) -> list[int]:
    """Return the tokens of each human answer behind the prompt."""
    text = row_prompt(processor, row, prompt)
    counted = {
        answer: len(answer_ids(processor, text, format_answer(processor, text, answer)))
        for answer in set(row["answers"])
    }
    return [counted[answer] for answer in row["answers"]]


def _longest_answer(processor: Any, rows: Sequence[Row], prompt: str | None) -> int:
    return max(1, *(n for row in rows for n in _answer_lengths(processor, row, prompt)))
