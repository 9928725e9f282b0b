"""What batches are made of conversations: every answer labelled, nothing else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import (
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedModel,
)

from hf_adaptive_sparse.calibration.conversation_batches import conversation_batch
from hf_adaptive_sparse.calibration.conversation_texts import line_of_conversation, told
from hf_adaptive_sparse.calibration.data import load_batches
from hf_adaptive_sparse.calibration.questions import question_batch
from hf_adaptive_sparse.calibration.records import DataError, Row, read_records
from hf_adaptive_sparse.compressor.data_source import DataSource
from hf_adaptive_sparse.compressor.measuring import Measuring
from hf_adaptive_sparse.compressor.search_plan import Loaded
from hf_adaptive_sparse.evaluation.perplexity import perplexity
from hf_adaptive_sparse.evaluation.vqa import vqa_accuracy
from tests.calibration.test_conversations import turns
from tests.calibration.test_media import frames, tone, wav
from tests.calibration.test_questions import make_paligemma_processor
from tests.calibration.test_records import png
from tests.conftest import llama_config
from tests.processors import (
    make_audio_processor,
    make_llava_processor,
    make_tokenizer,
    make_video_processor,
)

QWEN2_VL = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "=system\nYou are helpful.=\n{% endif %}={{ m.role }}\n{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for c in m.content %}{% if c.type == 'image' %}<image>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}=\n{% endfor %}"
    "{% if add_generation_prompt %}=assistant\n{% endif %}"
)
LLAVA = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('No system.') }}{% endif %}"
    "{% if (m.role == 'user') == (loop.index0 % 2 == 1) %}{{ raise_exception('Turns') }}{% endif %}"
    "<{{ 'model' if m.role == 'assistant' else m.role }}>\n{{ m.content | trim }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<model>\n{% endif %}"
)
PIXTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}=INST="
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% else %}<image>{% endif %}"
    "{% endfor %}=END={% elif m.role == 'system' %}{{ '=S=' + m.content }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
SILENT = PIXTRAL.replace("{{ m.content +", "{{ (m.content if m.content is string else '') +")
QWEN3 = (
    "{% for m in messages %}{% set said = m.content if m.content is string else '' %}"
    "={{ m.role }}\n{% if m.role == 'assistant' %}{% set thought = '' %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ said }}{% endif %}=\n{% endfor %}"
    "{% if add_generation_prompt %}=assistant\n<think>\n{% endif %}"
)
TEMPLATES = {
    **{"none": None, "qwen2-vl": QWEN2_VL, "llava": LLAVA, "gemma": GEMMA},
    **{"pixtral": PIXTRAL, "silent": SILENT, "qwen3": QWEN3},
}

SYSTEM = {"role": "system", "content": "be brief"}
TOLD: list[list[dict[str, Any]]] = [
    turns(("<image>\nwhat?", "no")),
    turns(("is it red?\n<image>", "no"), ("no?", "it is blue, no."), ("a", "assistant")),
    [SYSTEM, *turns(("<image>what is left?", "two dogs"), ("<image>\nand here?", "two dogs"))],
    [SYSTEM, *turns(("<image><image>\nsame?", "no"), ("no", "no"), ("<image>", "no"), ("b", "c"))],
]


def rows(*conversations: list[dict[str, Any]]) -> list[Row]:
    shown = [json.dumps(messages).count("<image>") for messages in conversations]
    return list(
        read_records(
            [
                {"messages": messages, "images": [png(size=(16, 16))] * count}
                for messages, count in zip(conversations, shown, strict=True)
            ]
        )
    )


def labelled(processor: Any, batch: dict[str, torch.Tensor]) -> list[list[str]]:
    """The texts of each row's runs of labels."""
    found = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        scored = (labels != -100).tolist()
        assert torch.equal(ids[scored], labels[scored])
        runs = itertools.groupby(range(len(ids)), key=scored.__getitem__)
        found.append([processor.decode(ids[list(run)]).strip() for is_on, run in runs if is_on])
    return found


def answers(messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "assistant"]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_are_all_answers(template: str, adds_bos: bool) -> None:
    processor = make_llava_processor(chat_template=TEMPLATES[template], adds_bos=adds_bos)
    batch = conversation_batch(processor, rows(*TOLD))
    assert labelled(processor, batch) == [answers(messages) for messages in TOLD]
    assert (batch["input_ids"] == 4).sum(1).tolist() == [4, 4, 8, 12]
    assert len(batch["pixel_values"]) == 7
    assert (batch["input_ids"] == 1).any(1).all() == (
        adds_bos or template in ("none", "gemma", "pixtral", "silent")
    )
    starts = batch["input_ids"][:, :2] == 1
    assert (starts.sum(1) <= 1).all()
    for index, row in enumerate(rows(*TOLD)):
        alone = conversation_batch(processor, [row])
        length = alone["labels"].shape[1]
        assert torch.equal(alone["labels"][0], batch["labels"][index, :length])
        assert torch.equal(alone["input_ids"][0], batch["input_ids"][index, :length])
        assert not batch["attention_mask"][index, length:].any()


@pytest.mark.parametrize("template", [None, QWEN2_VL])
def test_labels_are_all_answers_where_an_image_becomes_several_rows(template: str | None) -> None:
    tokenizer = make_tokenizer()
    grid = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokenizer.add_tokens(["<fake_token_around_image>", "<global-img>", *grid], special_tokens=True)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=3, chat_template=template)
    batch = conversation_batch(processor, rows(*TOLD))
    assert labelled(processor, batch) == [answers(messages) for messages in TOLD]
    assert (batch["input_ids"] == 4).sum(1).tolist() == [15, 15, 30, 45]


def test_labels_are_the_answers_where_a_processor_pads_on_the_left() -> None:
    class PadsLeft(LlavaProcessor):
        text_kwargs: ClassVar[dict[str, str]] = {"padding_side": "left"}

    processor = make_llava_processor(chat_template=LLAVA)
    processor.tokenizer.padding_side = "left"
    processor.__class__ = PadsLeft
    batch = conversation_batch(processor, rows(*TOLD))
    assert labelled(processor, batch) == [answers(messages) for messages in TOLD]
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize("template", TEMPLATES)
def test_one_exchange_is_asked_as_a_question_is(template: str) -> None:
    processor = make_llava_processor(chat_template=TEMPLATES[template])
    (row,) = rows(TOLD[0])
    asked = question_batch(processor, [{**row, "messages": None, "answers": ("no",)}])
    batch = conversation_batch(processor, [row])
    same = 20 if template == "qwen3" else int((asked["labels"][0] != -100).nonzero()[0])
    assert torch.equal(batch["input_ids"][0, :same], asked["input_ids"][0, :same])


def test_plain_form() -> None:
    (row,) = rows(TOLD[2])
    text, _ = told(make_llava_processor(), row)
    assert text == (
        "<s><image>\nbe brief\nQ: what is left? A: two dogs</s>"
        "<image>\nQ: and here? A: two dogs</s>"
    )


def test_answers_that_a_template_changes_are_not_scored() -> None:
    processor = make_llava_processor(chat_template=QWEN3)
    thought = ["<think>\nhm\n</think>\n\nyes", "<think>\nso\n</think>\n\nno"]
    messages = turns(("<image>a?", thought[0]), ("b?", "it is"), ("c?", thought[1]))
    batch = conversation_batch(processor, rows(messages))
    read = processor.tokenizer.decode(batch["input_ids"][0])
    assert "hm" not in read
    scored = processor.tokenizer(thought[1], add_special_tokens=False)["input_ids"]
    labels = batch["labels"][0]
    assert labels[labels != -100].tolist() == [
        *processor.tokenizer("it is", add_special_tokens=False)["input_ids"],
        *scored,
    ]


@pytest.mark.parametrize("template", ["one", "without answers"])
def test_a_template_that_drops_turns_leaves_the_first_question(template: str) -> None:
    said = "{% for c in messages[-1].content %}{{ '<image>' if c.type == 'image' else c.text }}"
    templates = {
        "one": f"{said}{{% endfor %}}A:",
        "without answers": "{% for m in messages if m.role == 'user' %}"
        "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
        "{% endfor %}A:",
    }
    processor = make_llava_processor(chat_template=templates[template])
    batch = conversation_batch(processor, rows(turns(("<image>a?", "yes"), ("b?", "no"))))
    assert labelled(processor, batch) == [["yes"]]


def test_a_processor_of_prompt_and_suffix_takes_the_first_question() -> None:
    processor = make_paligemma_processor()
    batch = conversation_batch(processor, rows(TOLD[1], TOLD[2]))
    assert labelled(processor, batch) == [["no"], ["two dogs"]]
    assert (batch["input_ids"] == 4).sum(1).tolist() == [4, 4]
    assert "\nbe brief\nQ: what is left?" in processor.tokenizer.decode(batch["input_ids"][1])


@pytest.mark.parametrize("template", ["none", "qwen2-vl", "llava"])
def test_exchanges_beyond_the_context_are_left_out_whole(template: str) -> None:
    processor = make_llava_processor(chat_template=TEMPLATES[template])
    both = rows(TOLD[1], TOLD[3])
    whole = conversation_batch(processor, both)
    lengths = whole["attention_mask"].sum(1).tolist()
    assert torch.equal(
        conversation_batch(processor, both, context=max(lengths))["labels"], whole["labels"]
    )
    cut = conversation_batch(processor, both, context=min(lengths) - 1)
    assert cut["input_ids"].shape[1] < min(lengths)
    kept = [len(found) for found in labelled(processor, cut)]
    assert all(0 < some < len(answers(messages)) for some, messages in zip(kept, TOLD[1::2]))  # noqa: B905
    images = [3 if count > 2 else 2 for count in kept[1:]]
    assert len(cut["pixel_values"]) == 1 + images[0]
    assert labelled(processor, cut) == [
        answers(messages)[:count] for messages, count in zip(TOLD[1::2], kept, strict=True)
    ]
    with pytest.raises(DataError, match=r"context of 20 tokens; 'is it red\?' \(row 0 of"):
        conversation_batch(processor, both, context=20)


def test_placeholders_in_what_is_said_ask_for_no_image() -> None:
    processor = make_llava_processor(chat_template=QWEN2_VL)
    said = [{"type": "image"}, {"type": "text", "text": "a <image> b"}]
    data = [{"messages": turns((said, "yes")), "images": [png()]}]
    batch = conversation_batch(processor, list(read_records(data)))
    assert (batch["input_ids"] == 4).sum() == 4


SAID = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% else %}<{{ c.type }}>{% endif %}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("template", ["", SAID])
def test_conversations_about_videos_and_sounds(template: str) -> None:
    heard = make_audio_processor(template)
    data = [
        {"messages": turns(("<audio>what?", f"a {i}"), ("more?", "no")), "audio": wav(tone())}
        for i in range(2)
    ]
    batch = conversation_batch(heard, list(read_records(data)))
    assert labelled(heard, batch) == [["a 0", "no"], ["a 1", "no"]]
    seen = make_video_processor()
    seen.chat_template = template or None
    clips = [{"messages": turns(("what?", "a"), ("and?", "b")), "frames": frames()}] * 2
    batch = conversation_batch(seen, list(read_records(clips)))
    assert labelled(seen, batch) == [["a", "b"]] * 2
    assert "pixel_values_videos" in batch


@pytest.fixture
def conversation_file(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(png())
    data = [
        {"image": "a.png", "conversations": turns(*pairs, role="from", said="value")}
        for pairs in [[("<image>\nwhat?", f"a{i}"), ("more?", "x")] for i in range(6)]
    ]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(data))
    return path


def test_batches_of_a_model(conversation_file: Path, tiny_llava: PreTrainedModel) -> None:
    processor = make_llava_processor(chat_template=LLAVA)
    batches = load_batches(
        conversation_file,
        processor,
        config=tiny_llava.config,
        num_samples=4,
        batch_size=3,
        shuffle=False,
    )
    found = [row for batch in batches for row in labelled(processor, batch)]
    assert found == [[f"a{i}", "x"] for i in range(4)]
    assert perplexity(tiny_llava, batches) > 1
    tiny_llava.config.is_encoder_decoder = True
    try:
        (batch,) = load_batches(
            conversation_file, processor, config=tiny_llava.config, num_samples=1, shuffle=False
        )
    finally:
        tiny_llava.config.is_encoder_decoder = False
    assert labelled(processor, batch) == [["a0"]]


def test_the_first_question_is_answered(
    conversation_file: Path, tiny_llava: PreTrainedModel
) -> None:
    processor = make_llava_processor(chat_template=LLAVA)
    asked = [{"image": png(), "question": "what?", "answer": f"a{i}"} for i in range(6)]
    settings: dict[str, Any] = {"keep_predictions": True, "batch_size": 4}
    expected = vqa_accuracy(tiny_llava, processor, asked, **settings)
    result = vqa_accuracy(tiny_llava, processor, conversation_file, **settings)
    assert (result.count, result.predictions) == (6, expected.predictions)
    with pytest.raises(DataError, match="has text"):
        vqa_accuracy(tiny_llava, processor, [{"messages": turns(("a", "b"))}])


def test_conversations_are_answered_only_where_they_are_the_questions(
    conversation_file: Path, tiny_llava: PreTrainedModel
) -> None:
    processor = make_llava_processor(chat_template=LLAVA)
    data = DataSource(conversation_file, num_samples=2)
    batches = data.batches(processor, tiny_llava.config, "validation")
    loaded = Loaded(tiny_llava, processor, None, batches, batches)
    for questions, count in ((None, 0), (data, 2)):
        row = Measuring(loaded, data, questions, progress=False)("dense", tiny_llava, 0.0, 1)
        assert row.questions == count


CHATML = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"


@pytest.mark.parametrize("owner", ["tokenizer", "processor", "its tokenizer", "neither"])
def test_conversations_of_text_are_lines_in_the_chat_template(owner: str) -> None:
    processor: Any = make_tokenizer(adds_bos=True)
    if owner != "tokenizer":
        processor = make_llava_processor(adds_bos=True)
    if owner != "neither":
        (processor.tokenizer if owner == "its tokenizer" else processor).chat_template = CHATML
    data = [{"messages": [SYSTEM, *turns(("hi?", "yes"), ("ok?", "no"))]}] * 3
    line = (
        "be brief\nQ: hi? A: yes\nQ: ok? A: no"
        if owner == "neither"
        else "<s>system\nbe brief</s>\n<s>user\nhi?</s>\n<s>assistant\nyes</s>\n"
        "<s>user\nok?</s>\n<s>assistant\nno</s>"
    )
    (row, *_) = read_records(data)
    assert line_of_conversation(processor, row).strip() == line
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = tokenizer("\n".join([line] * 3), add_special_tokens=False)["input_ids"]
    batches = load_batches(
        _dataset(data), processor, config=llama_config(), sequence_length=20, shuffle=False
    )
    read = torch.cat([batch["input_ids"][0] for batch in batches]).tolist()
    assert read == ids[: len(read)]
    assert len(ids) - len(read) < 20


def test_a_template_that_leaves_lists_out_gets_text() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = QWEN3
    (row,) = read_records([{"messages": turns(("hi", "a"))}])  # "hi" is in "<think>", too
    line = line_of_conversation(tokenizer, row)
    assert line == "=user\nhi=\n=assistant\n<think>\n\n</think>\n\na=\n"


def _dataset(data: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(data)
