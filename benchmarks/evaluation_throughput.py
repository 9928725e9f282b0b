"""How fast a benchmark runs, against a plain batched ``generate()`` loop on the same questions.

The loop reads the same rows, encodes the same prompts in the same batches, generates as many tokens
and decodes them, and does nothing else: no scoring, no log that a stopped run goes on from. Both
take turns; the figure is the ratio of the median times.

    python benchmarks/evaluation_throughput.py [--questions 256] [--batch-size 16] [--rounds 5]
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from environment import shared, write_result
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_adaptive_sparse.calibration.questions import format_question
from hf_adaptive_sparse.calibration.records import read_records
from hf_adaptive_sparse.evaluation.tasks.run import run_task
from hf_adaptive_sparse.evaluation.tasks.task import Setting

TARGET = 0.9
NEW_TOKENS = 8


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Yield questions in the columns of VQAv2."""
    records = read_records(shared("data/easy-vqa/evaluation.parquet"), "validation")
    for number, row in zip(range(count), records, strict=False):
        yield {
            "image": Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"),
            "question": row["question"],
            "answers": list(row["answers"]) * 10,
            "question_id": number,
        }


def plain_loop(model: Any, processor: Any, questions: list[dict[str, Any]], size: int) -> int:
    """Answer the questions without this package; return the number of answers."""
    tokenizer, answers = processor.tokenizer, 0
    for first in range(0, len(questions), size):
        chunk = questions[first : first + size]
        inputs = processor(
            text=[format_question(processor, row["question"]) for row in chunk],
            images=[row["image"] for row in chunk],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += len(tokenizer.batch_decode(new, skip_special_tokens=True))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    source = shared("models/tiny-llava")
    model = AutoModelForImageTextToText.from_pretrained(source, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(source)
    questions = list(rows(options.questions))
    seconds: dict[str, list[float]] = {"plain loop": [], "evaluate": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds + 1):  # the first warms up
            started = time.perf_counter()
            plain_loop(model, processor, questions, options.batch_size)
            between = time.perf_counter()
            result = run_task(
                "vqav2",
                model,
                processor,
                questions,
                setting=Setting(kv_cache=False, max_new_tokens=NEW_TOKENS),
                batch_size=options.batch_size,
                results=Path(folder) / str(turn),
            )
            ended = time.perf_counter()
            if turn:
                seconds["plain loop"].append(between - started)
                seconds["evaluate"].append(ended - between)
    medians = {name: statistics.median(series) for name, series in seconds.items()}
    rates = {name: result.count / median for name, median in medians.items()}
    ratio = medians["plain loop"] / medians["evaluate"]
    document = {
        "settings": vars(options) | {"new_tokens": NEW_TOKENS, "model": source.name},
        "seconds": seconds,
        "questions_per_second": rates,
        "ratio": ratio,
        "target": TARGET,
    }
    lines = [
        "# Evaluation throughput",
        "",
        f"{options.questions} questions of easy-VQA, {NEW_TOKENS} tokens each, batches of "
        f"{options.batch_size}, {source.name}; medians of {options.rounds} rounds in turns.",
        "",
        "| | questions per second |",
        "| --- | ---: |",
        *(f"| {n} | {r:.1f} |" for n, r in rates.items()),
        "",
        f"Ratio {ratio:.3f} (wanted: at least {TARGET}).",
    ]
    write_result("evaluation_throughput", document, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
