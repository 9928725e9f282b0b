from __future__ import annotations

import json
from typing import ClassVar

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessor,
    Florence2Processor,
    LlavaProcessor,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
)

from hf_adaptive_sparse.calibration.media import Media
from hf_adaptive_sparse.calibration.processors import load_processor
from hf_adaptive_sparse.calibration.questions import (
    encode_questions,
    format_question,
    most_frequent,
    padding,
    question_batch,
    row_prompt,
)
from hf_adaptive_sparse.calibration.records import DataError
from hf_adaptive_sparse.evaluation.answering import generate_answers
from hf_adaptive_sparse.evaluation.perplexity import perplexity
from tests.processors import CHAT_TEMPLATE, make_llava_processor, make_tokenizer


def rows(*answers: str) -> list[dict[str, object]]:
    image = Image.new("RGB", (20, 30), "red")
    return [
        {"image": image, "question": f"what{' now' * i}?", "answers": (answer,)}
        for i, answer in enumerate(answers)
    ]


def test_plain_prompt() -> None:
    assert format_question(make_llava_processor(), "red?") == "<s><image>\nQ: red? A:"
    # The tokenizer puts bos itself.
    assert format_question(make_llava_processor(adds_bos=True), "red?") == "<image>\nQ: red? A:"


def test_chat_template() -> None:
    processor = make_llava_processor(chat_template=CHAT_TEMPLATE)
    assert format_question(processor, "red?") == "USER: <image>\nred? ASSISTANT:"
    short = format_question(processor, "red?", "{question} In one word.")
    assert short == "USER: <image>\nred? In one word. ASSISTANT:"


def test_prompt_around_the_question() -> None:
    processor = make_llava_processor()
    assert format_question(processor, "{a}?", " {question}:") == "<s><image> {a}?:"
    with pytest.raises(ValueError, match=r"must contain \{question\}, got 'Q:'"):
        format_question(processor, "red?", "Q:")


def test_a_question_cannot_ask_for_a_second_image() -> None:
    assert format_question(make_llava_processor(), "<image>red?").count("<image>") == 1


@pytest.mark.parametrize(
    "options", [{}, {"adds_bos": True}, {"chat_template": CHAT_TEMPLATE}, {"pad": False}]
)
def test_labels_are_the_answers(options: dict) -> None:
    processor = make_llava_processor(**options)
    answers = ("no", "a red square")
    batch = question_batch(processor, rows(*answers))
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "labels"}
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert ((batch["input_ids"] == 4).sum(1) == 4).all()
    bos = 0 if options.get("chat_template") else 1
    assert ((batch["input_ids"] == 1).sum(1) == bos).all()
    for ids, labels, mask, answer in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], answers, strict=True
    ):
        scored = labels != -100
        assert processor.tokenizer.decode(ids[scored]) == f" {answer}"
        assert torch.equal(ids[scored], labels[scored])
        length = int(mask.sum())
        assert mask[:length].all()  # padded on the right
        assert ids[length - 1] == 2  # which ends in eos
        assert labels[length - 1] == -100


def test_labels_are_the_answers_where_a_processor_pads_on_the_left() -> None:
    class PadsLeft(LlavaProcessor):  # as InternVL's processor, whatever its tokenizer is set to
        text_kwargs: ClassVar[dict[str, str]] = {"padding_side": "left"}

    processor = make_llava_processor()
    processor.__class__ = PadsLeft
    batch = question_batch(processor, rows("no", "a red square"))
    for ids, labels, answer in zip(
        batch["input_ids"], batch["labels"], ("no", "a red square"), strict=True
    ):
        assert processor.tokenizer.decode(ids[labels != -100]) == f" {answer}"
    assert batch["attention_mask"][:, 0].all()


def test_labels_are_the_answers_where_a_tokenizer_adds_an_end_of_its_own() -> None:
    processor = make_llava_processor(adds_bos=True)
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    batch = question_batch(processor, rows("two dogs"))
    assert batch["input_ids"][0, -2:].tolist() == [2, 2]
    scored = batch["labels"][0]
    assert processor.tokenizer.decode(scored[scored != -100]).strip() == "two dogs"


def test_labels_are_the_answers_where_a_processor_places_the_image_itself() -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    tokenizer.image_token, tokenizer.image_token_id = "<image>", 4
    images = CLIPImageProcessor(size={"height": 16, "width": 16}, crop_size=16)
    images.image_seq_length = 3
    batch = question_batch(Florence2Processor(images, tokenizer), rows("no", "a red square"))
    assert ((batch["input_ids"] == 4).sum(1) == 3).all()
    for labels, answer in zip(batch["labels"], ("no", "a red square"), strict=True):
        assert tokenizer.decode(labels[labels != -100]) == f" {answer}"


def make_paligemma_processor() -> PaliGemmaProcessor:
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    tokenizer = make_tokenizer()
    tokenizer.image_token, tokenizer.image_token_id = "<image>", 4
    return PaliGemmaProcessor(images, tokenizer)


def test_answers_are_apart_from_prompts_that_are_read_in_both_directions() -> None:
    processor = make_paligemma_processor()
    prompt = format_question(processor, "what?")
    assert prompt == "<image>\nQ: what? A:"
    asked = encode_questions(processor, [prompt], Media.of(rows("no")), "left")
    batch = question_batch(processor, rows("no", "a red square"))
    read = processor.tokenizer.decode(asked["input_ids"][0])
    assert read == "<image>" * 4 + "<s>\nQ: what? A:\n"
    assert processor.tokenizer.decode(batch["input_ids"][0]).startswith(f"{read}no</s>")
    for row, answer in enumerate(("no", "a red square")):
        labels, later = batch["labels"][row], batch["token_type_ids"][row] == 1
        assert processor.tokenizer.decode(labels[labels != -100]) == answer
        assert processor.tokenizer.decode(batch["input_ids"][row][later]) == f"{answer}</s>"


@pytest.mark.parametrize(
    ("template", "prompt"),
    [(None, "<s><image><image>\nQ: what? A:"), (CHAT_TEMPLATE, "USER: <image>\n<image>\nwhat? ")],
)
def test_several_images_of_one_question(tiny_llava, template, prompt) -> None:
    processor = make_llava_processor(chat_template=template)
    asked = rows("two", "one")
    asked[0]["image"] = [asked[0]["image"], Image.new("RGB", (9, 9), "blue")]
    assert row_prompt(processor, asked[0]).startswith(prompt)
    batch = question_batch(processor, asked)
    assert (batch["input_ids"] == 4).sum(1).tolist() == [8, 4]
    assert len(batch["pixel_values"]) == 3
    together = perplexity(tiny_llava, [batch])
    assert together == pytest.approx(
        perplexity(tiny_llava, [question_batch(processor, [row]) for row in asked]), rel=1e-4
    )
    answers = generate_answers(tiny_llava, processor, asked, max_new_tokens=3)
    assert answers == [
        answer
        for row in asked
        for answer in generate_answers(tiny_llava, processor, [row], max_new_tokens=3)
    ]


def test_no_blank_behind_a_prompt_that_ends_in_white_space() -> None:
    processor = make_llava_processor()
    batch = question_batch(processor, rows("no"), "\n{question}\n")
    assert processor.tokenizer.decode(batch["input_ids"][0]).endswith("what?\nno</s>")


@pytest.mark.parametrize("medium", ["image", None])
def test_a_template_of_text_alone_is_given_text(medium) -> None:
    template = "{% for m in messages %}U: {{ m['content'] }} {% endfor %}A:"
    processor = make_llava_processor(chat_template=template)
    shown = "<image>" if medium else ""
    assert format_question(processor, "red?", medium=medium) == f"U: {shown}red? A:"


@pytest.mark.parametrize("medium", ["image", None])
def test_a_template_that_leaves_lists_out_without_a_word_is_given_text(medium) -> None:
    said = "{{ m['content'] if m['content'] is string else '' }}"
    template = f"{{% for m in messages %}}think: {said}{{% endfor %}} A:"
    processor = make_llava_processor(chat_template=template)
    shown = "<image>" if medium else ""
    assert format_question(processor, "hi", medium=medium) == f"think: {shown}hi A:"


@pytest.mark.parametrize("medium", ["image", None])
def test_a_template_that_takes_no_question_is_refused(medium) -> None:
    processor = make_llava_processor(chat_template="{{ raise_exception('No system message.') }}")
    message = r"chat template of LlavaProcessor .* \(No system message\.\)\. .*chat_template"
    with pytest.raises(ValueError, match=message):
        format_question(processor, "red?", medium=medium)


def test_left_padding_and_restored_tokenizer() -> None:
    processor = make_llava_processor(pad=False)
    before = processor.tokenizer.padding_side
    prompts = [format_question(processor, r["question"]) for r in rows("a", "b")]
    batch = encode_questions(processor, prompts, Media.of(rows("a", "b")), "left")
    assert batch["attention_mask"][0, 0] == 0
    assert batch["attention_mask"][:, -1].all()
    assert processor.tokenizer.padding_side == before
    assert processor.tokenizer.pad_token is None


def test_padding_is_restored_after_an_error() -> None:
    tokenizer = make_tokenizer(pad=False)
    with pytest.raises(RuntimeError), padding(tokenizer, "left"):
        assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "</s>")
        raise RuntimeError
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither"), padding(tokenizer, "left"):
        pass


@pytest.mark.parametrize("answer", ["", " \n", "<image>"])
@pytest.mark.parametrize("prompt", [None, "{question} "])
def test_empty_answer(answer: str, prompt: str | None) -> None:
    asked = {**rows(answer)[0], "column": "image", "place": "row 3 of x.jsonl"}
    with pytest.raises(DataError, match=r"to 'what\?' \(row 3 of x.jsonl\) has none"):
        question_batch(make_llava_processor(), [asked], prompt)


def test_an_answer_cannot_ask_for_a_second_image() -> None:
    batch = question_batch(make_llava_processor(), rows("<image> red"))
    assert torch.equal(
        batch["labels"], question_batch(make_llava_processor(), rows("red"))["labels"]
    )


def test_most_frequent_answer() -> None:
    assert most_frequent(["a", "b", "b", "c"]) == "b"
    assert most_frequent(["b", "a"]) == "b"


def test_load_processor(tmp_path) -> None:
    make_llava_processor().save_pretrained(tmp_path / "vision")
    make_tokenizer().save_pretrained(tmp_path / "text")
    assert load_processor(tmp_path / "vision").image_processor is not None
    assert load_processor(str(tmp_path / "text"))("a")["input_ids"] == [7]
    with pytest.raises((OSError, ValueError)):
        load_processor(str(tmp_path / "missing"))


@pytest.mark.parametrize("damage", ["{", "[]", "{}"])
def test_a_damaged_processor_is_not_left_out(tmp_path, damage: str) -> None:
    make_llava_processor().save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(damage)
    with pytest.raises(
        ValueError, match=r"has a processor_config\.json, cannot be loaded \(.+\)\."
    ):
        load_processor(tmp_path)


@pytest.mark.parametrize("make", [make_tokenizer, make_llava_processor])
@pytest.mark.parametrize(
    ("file", "damage"),
    [("tokenizer_config.json", '{"eos_token": 3}'), ("tokenizer.json", '{"model": 3}')],
)
def test_a_damaged_tokenizer_is_a_value_error(tmp_path, make, file: str, damage: str) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / file).write_text(damage)
    with pytest.raises(ValueError, match=r"The tokenizer of .+ cannot be loaded \(.+\)\."):
        load_processor(tmp_path)


def test_a_tokenizer_alone_is_loaded_without_a_word(tmp_path, caplog) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert load_processor(tmp_path)("a")["input_ids"] == [7]
    assert not caplog.text


def test_a_processor_with_code_of_its_own_is_left_out_with_a_warning(tmp_path, caplog) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    code = {"auto_map": {"AutoProcessor": "code.Processor"}}
    (tmp_path / "processor_config.json").write_text(json.dumps(code))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_processor(tmp_path)("a")["input_ids"] == [7]
    assert "needs code of its own, which is never run; only its tokenizer" in caplog.text


def test_load_processor_from_a_cache_of_the_callers(tmp_path) -> None:
    repo, commit = tmp_path / "models--user--tiny", "a" * 40
    make_llava_processor().save_pretrained(repo / "snapshots" / commit)
    (repo / "snapshots" / commit / "config.json").write_text('{"model_type": "llava"}')
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    processor = load_processor("user/tiny", cache_dir=tmp_path, local_files_only=True)
    assert processor.image_processor is not None
