"""Measures a saved demo model on held-out data: perplexity of prose, answers about pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from hf_adaptive_sparse.demo.build import PROMPT
from hf_adaptive_sparse.demo.scenes import (
    EVALUATION_SEED,
    VisualQuestion,
    make_text,
    make_visual_questions,
)


@torch.inference_mode()
def text_perplexity(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, windows: int
) -> float:
    """Score held-out text in consecutive windows of 512 tokens; the last, short one is dropped."""
    ids = tokenizer("\n".join(make_text(windows * 15, EVALUATION_SEED))).input_ids
    rows = torch.tensor(ids[: windows * 512]).reshape(-1, 512)
    losses = [model(input_ids=part, labels=part).loss.item() for part in rows.split(1)]
    return math.exp(sum(losses) / len(losses))


@torch.inference_mode()
def answer_questions(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    rows: list[VisualQuestion],
    batch_size: int = 64,
) -> list[str]:
    """Answer by greedy generation, in left-padded batches; white space at the ends is dropped."""
    answers: list[str] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        inputs = processor(
            images=[row["image"] for row in part],
            text=[PROMPT.format(question=row["question"]) for row in part],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(new, skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    return answers


def measure(directory: Path, questions: int, windows: int) -> dict[str, Any]:
    """Load the saved folder and measure it on held-out data, as anyone would get it."""
    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    rows = make_visual_questions(questions, EVALUATION_SEED)
    answers = answer_questions(model, processor, rows)
    right = sum(answer == row["answer"] for answer, row in zip(answers, rows, strict=True))
    layers = model.model.language_model.layers
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "decoder_layer_parameters": sum(weight.numel() for weight in layers.parameters()),
        "held_out_questions": questions,
        "held_out_accuracy": right / questions,
        "held_out_text_tokens": windows * 512,
        "held_out_perplexity": text_perplexity(model, processor.tokenizer, windows),
    }
