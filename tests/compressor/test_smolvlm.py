"""SmolVLM through the whole job: a processor that splits images, from questions to answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.image_utils import load_image

import hf_adaptive_sparse as has
from hf_adaptive_sparse.compressor import DataSource, ModelSource
from hf_adaptive_sparse.compressor.pruned_folder import prune_to_folder
from hf_adaptive_sparse.evaluation.vqa import vqa_accuracy
from tests.families.tiny_models import tiny_model
from tests.processors import make_tokenizer

pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
pytest.importorskip("torchvision", reason="SmolVLM's video processor needs torchvision")

TILE = 32
TEMPLATE = (
    "<s>{% for message in messages %}User:{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SIZES = {"wide": (64, 20), "square": (64, 64), "small": (30, 30), "tall": (9, 64)}


def make_processor() -> SmolVLMProcessor:
    """Up to 2 x 2 tiles of 32 x 32 and the image as a whole, 4 tokens each."""
    from transformers import SmolVLMImageProcessor, SmolVLMVideoProcessor

    settings = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
    tokenizer = make_tokenizer()
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    marks = ["<fake_token_around_image>", "<global-img>", "<video>", *tiles]
    tokenizer.add_tokens(marks, special_tokens=True)
    return SmolVLMProcessor(
        SmolVLMImageProcessor(**settings),
        tokenizer,
        SmolVLMVideoProcessor(**settings),
        image_seq_len=4,
        chat_template=TEMPLATE,
    )


def test_smolvlm_from_questions_to_answers(tmp_path: Path) -> None:
    rows = []
    for name, (width, height) in SIZES.items():
        pixels = np.random.default_rng(len(name)).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        rows.append({"image": f"{name}.png", "question": f"{name}?", "answer": name})
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)))
    dense = tmp_path / "dense"
    make_processor().save_pretrained(dense)
    changes = {"image_token_id": 4, "scale_factor": 2}  # <image> of `make_tokenizer`
    tiny_model("smolvlm", changes).save_pretrained(dense)

    config = has.SparsityConfig(kv_cache=has.KVCacheConfig(bits=8, group_size=8, residual_length=8))
    data = DataSource(questions, batch_size=2)
    out = tmp_path / "out"
    prune_to_folder(ModelSource(dense), out, config, calibration=data, progress=False)

    model = AutoModelForImageTextToText.from_pretrained(out).eval()
    processor = AutoProcessor.from_pretrained(out)
    assert isinstance(model, SmolVLMForConditionalGeneration)
    assert isinstance(processor, SmolVLMProcessor)
    assert has.sparsity_report(model).mean_sparsity == pytest.approx(0.5, abs=1e-3)
    batches = data.batches(processor, model.config, "validation")
    tiles = [(batch["pixel_values"].flatten(2) != 0).any(2).sum(1).tolist() for batch in batches]
    assert tiles == [[3, 5], [5, 3]]  # padded to the most of each batch

    nll, count = 0.0, 0
    for row in rows:
        shown = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": shown}], add_generation_prompt=True
        )
        inputs = processor(
            text=f"{prompt} {row['answer']}</s>",
            images=load_image(str(tmp_path / row["image"])),
            return_tensors="pt",
            add_special_tokens=False,
        )
        answer = slice(-len(row["answer"]) - 2, -1)  # a token per character, and a blank
        with torch.no_grad():
            logits = model(**inputs).logits[0, answer.start - 1 : answer.stop - 1]
        targets = inputs["input_ids"][0][answer]
        nll += float(functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    plain = has.perplexity(model, batches, kv_cache=False)
    assert plain == pytest.approx(np.exp(nll / count), rel=1e-5)
    assert has.perplexity(model, batches) != plain  # through the 8-bit cache

    together, apart = (
        vqa_accuracy(model, processor, questions, batch_size=size, keep_predictions=True)
        for size in (4, 1)
    )
    assert together.predictions == apart.predictions
    output = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    cache = output.get("cache", output.get("past_key_values"))
    assert isinstance(cache, has.AdaptiveQuantizedCache)
