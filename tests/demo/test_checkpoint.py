"""The bundled model: small enough, loads through the Auto classes, answers held-out questions."""

import json
import random
from pathlib import Path

import pytest
import torch
import transformers

from hf_adaptive_sparse.demo import batches, build, grounding, measure, pictures, scenes, train
from hf_adaptive_sparse.demo.schedule import learning_rate

CHECKPOINT = Path(train.__file__).parent / "checkpoint"
TEST_SEED = scenes.HELD_OUT_SEEDS + 987_654_321
"""Neither training nor the demo's calibration and evaluation splits use it."""


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()


@pytest.fixture(scope="module")
def processor():
    return transformers.AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def questions():
    return scenes.make_visual_questions(192, TEST_SEED)


def test_folder_is_at_most_eight_megabytes_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()}
    assert sum(files.values()) <= 8_000_000
    needed = {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_report.json",
    }
    assert needed <= set(files)


def test_architecture_is_llava_in_bfloat16_with_eight_decoder_layers(model) -> None:
    assert isinstance(model, transformers.LlavaForConditionalGeneration)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    layers = model.model.language_model.layers
    assert len(layers) == 8
    assert model.config.text_config.max_position_embeddings >= 1024
    decoder = sum(weight.numel() for weight in layers.parameters())
    assert decoder > 0.75 * sum(weight.numel() for weight in model.parameters())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_tokenizer_adds_no_special_tokens_and_round_trips(processor) -> None:
    tokenizer = processor.tokenizer
    line = scenes.make_text(1, TEST_SEED)[0]
    ids = tokenizer(line).input_ids
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == line
    assert tokenizer("<s>").input_ids == [tokenizer.bos_token_id]
    odd = "naïve — 漢字 🙂"
    assert tokenizer.decode(tokenizer(odd).input_ids) == odd
    assert tokenizer.chat_template is None
    assert getattr(processor, "chat_template", None) is None


def test_answers_nine_in_ten_held_out_questions(model, processor, questions) -> None:
    answers = measure.answer_questions(model, processor, questions)
    right = [answer == row["answer"] for answer, row in zip(answers, questions, strict=True)]
    assert sum(right) / len(right) >= 0.9


def test_answers_come_from_the_picture(model, processor, questions) -> None:
    # The same questions over each other's pictures: language alone must not be enough.
    images = [row["image"] for row in questions]
    shuffled: list[scenes.VisualQuestion] = [
        {"image": image, "question": row["question"], "answer": row["answer"]}
        for image, row in zip(images[1:] + images[:1], questions, strict=True)
    ]
    answers = measure.answer_questions(model, processor, shuffled)
    right = [answer == row["answer"] for answer, row in zip(answers, questions, strict=True)]
    assert sum(right) / len(right) < 0.7


def test_left_padding_does_not_change_answers(model, processor, questions) -> None:
    rows = questions[:24]
    assert len({len(processor.tokenizer(row["question"]).input_ids) for row in rows}) > 1
    together = measure.answer_questions(model.float(), processor, rows)
    alone = measure.answer_questions(model, processor, rows, batch_size=1)
    model.to(torch.bfloat16)
    assert together == alone


def test_perplexity_is_far_from_chance_at_short_and_full_context(model, processor) -> None:
    ids = processor.tokenizer("\n".join(scenes.make_text(60, TEST_SEED))).input_ids
    for length in (128, 1024):
        rows = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)[:8]
        with torch.inference_mode():
            loss = model(input_ids=rows, labels=rows).loss.item()
        assert 2 < torch.tensor(loss).exp() < 20


def test_report_and_readme_say_how_the_model_was_made() -> None:
    report = json.loads((CHECKPOINT / "training_report.json").read_text())
    assert report["held_out_accuracy"] >= 0.9
    readme = (CHECKPOINT / "README.md").read_text()
    assert "python -m hf_adaptive_sparse.demo.train" in readme
    for name, value in report["options"].items():
        assert f"--{name.replace('_', '-')} {value}" in readme


def test_the_training_script_runs_and_leaves_a_loadable_folder(tmp_path) -> None:
    flags = {"steps": 2, "vision-steps": 2, "caption-steps": 2, "images": 2, "log-every": 1}
    options = [f"--{name}={value}" for name, value in flags.items()]
    assert train.main(["--output", str(tmp_path), *options]) == 0
    report = json.loads((tmp_path / "training_report.json").read_text())
    assert report["options"]["steps"] == 2
    assert transformers.AutoProcessor.from_pretrained(tmp_path) is not None


def scenes_for_training(count: int) -> tuple[list[pictures.Scene], random.Random]:
    rng = random.Random(3)
    return [pictures.make_scene(rng) for _ in range(count)], rng


def test_a_training_sequence_begins_as_generation_will(processor) -> None:
    drawn, rng = scenes_for_training(3)
    state = rng.getstate()
    batch = batches.visual_batch(processor, drawn, rng, questions=2)
    assert batch["pixel_values"].shape == (3, 3, 48, 48)
    rng.setstate(state)
    question, answer = scenes.ask(drawn[0], rng)
    prompt = build.PROMPT.format(question=question)
    expected = processor(images=pictures.draw_scene(drawn[0]), text=prompt, return_tensors="pt")
    length = expected["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][0, :length], expected["input_ids"][0])
    assert torch.equal(batch["pixel_values"][0], expected["pixel_values"][0])
    assert processor.tokenizer.decode(batch["input_ids"][0, length]) == f" {answer}"
    assert set(batch["labels"][0, :length].tolist()) == {batches.IGNORED_LABEL}


def test_only_answers_and_told_words_are_trained_on(processor) -> None:
    drawn, rng = scenes_for_training(5)
    batch = batches.visual_batch(processor, drawn, rng, questions=2)
    asked = batch["labels"] != batches.IGNORED_LABEL
    assert torch.equal(batch["labels"][asked], batch["input_ids"][asked])
    eos = processor.tokenizer.eos_token_id
    assert int((batch["labels"] == eos).sum()) == 10
    answers = batch["labels"][:, 1:][batches.answer_positions(batch["labels"], eos)]
    assert len(answers) == 10
    assert all(processor.tokenizer.decode(token).strip().isalpha() for token in answers)
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert set(batch["input_ids"][padding].tolist()) == {processor.tokenizer.pad_token_id}
    assert not asked[padding].any()


def test_captions_alone_tell_three_words_for_each(processor) -> None:
    drawn, rng = scenes_for_training(4)
    batch = batches.visual_batch(processor, drawn, rng, questions=0)
    asked = batch["labels"] != batches.IGNORED_LABEL
    told = processor.tokenizer.decode(batch["labels"][asked]).split()
    assert len(told) > 0
    assert set(told[1::3]) <= set(pictures.COLUMNS)
    assert set(told[2::3]) <= set(pictures.ROWS)


def test_attention_starts_as_likeness(processor) -> None:
    untrained = build.build_model(processor.tokenizer)
    attention = untrained.model.language_model.layers[3].self_attn
    queries = attention.q_proj.weight.reshape(2, 2, 64, 128)
    keys = attention.k_proj.weight.reshape(2, 1, 64, 128)
    assert torch.equal(queries, keys.expand_as(queries))


def test_patches_name_the_shape_in_their_quarter() -> None:
    shape = pictures.Shape("blue", "cross", 1, 0, 36, 12, 9, pictures.COLOURS["blue"])
    labels = grounding.patch_labels(pictures.Scene((shape,), ground=(0, 0, 0))).reshape(6, 6, 4)
    blue, cross = 1 + list(pictures.COLOURS).index("blue"), 1 + pictures.KINDS.index("cross")
    assert labels[:3, 3:, :2].flatten(0, 1).unique(dim=0).tolist() == [[blue, cross]]
    assert labels[3:, :, :2].unique().tolist() == [0]
    assert labels[:3, :3, :2].unique().tolist() == [0]
    assert labels[::3, ::3, 2:].tolist() == [[[0, 0], [1, 0]], [[0, 1], [1, 1]]]


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.02, abs=1e-4)
