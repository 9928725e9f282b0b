"""A tiny dense LLaVA on disk, with its processor, and text and questions to compress it with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import LlavaForConditionalGeneration

from tests.processors import make_llava_processor


@pytest.fixture
def llava_folder(tiny_llava: LlavaForConditionalGeneration, tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    tiny_llava.save_pretrained(folder)
    make_llava_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: the fox sees dog {i * 7}.\n" for i in range(120)))
    return path


@pytest.fixture
def question_file(tmp_path: Path) -> Path:
    rows = []
    for index, colour in enumerate(("red", "green", "blue", "red")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{index}.png")
        rows.append({"image": f"{index}.png", "question": "what colour?", "answer": colour})
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
