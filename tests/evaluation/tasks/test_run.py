"""Running benchmarks: batches, resuming, bad data."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hf_adaptive_sparse.calibration.records import DataError
from hf_adaptive_sparse.evaluation.answering import generate_answers
from hf_adaptive_sparse.evaluation.perplexity import perplexity
from hf_adaptive_sparse.evaluation.tasks.outcomes import OutcomesError
from hf_adaptive_sparse.evaluation.tasks.run import run_task
from hf_adaptive_sparse.evaluation.tasks.task import Setting
from hf_adaptive_sparse.profiles import KVCacheConfig
from tests.processors import CHAT_TEMPLATE, make_llava_processor, make_tokenizer


def picture(index: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (40 * index, 0, 255 - 40 * index))


def questions(count: int = 5) -> list[dict[str, Any]]:
    return [
        {
            "question_id": 100 + i,
            "image": picture(i),
            "question": "what is it" + ", please" * i + "?",
            "answers": [{"answer": "yes", "answer_id": n} for n in range(10)],
        }
        for i in range(count)
    ]


def choices(count: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "image": picture(i) if i % 2 else None,
            "question": "which?",
            "choices": ["up", "down"],
            "answer": i % 2,
            "hint": "it rains" if i == 0 else "",
        }
        for i in range(count)
    ]


class Interrupted(Exception):
    pass


def test_a_stopped_run_goes_on_where_it_was(tiny_llava, tmp_path: Path, monkeypatch) -> None:
    processor = make_llava_processor()
    whole = run_task("vqav2", tiny_llava, processor, questions(), batch_size=2)
    asked: list[int] = []
    generate = generate_answers

    def counting(model: Any, processor: Any, rows: Any, **settings: Any) -> Any:
        if len(asked) == 1:
            raise Interrupted
        asked.append(len(rows))
        return generate(model, processor, rows, **settings)

    target = "hf_adaptive_sparse.evaluation.tasks.generated.generate_answers"
    monkeypatch.setattr(target, counting)
    with pytest.raises(Interrupted):
        run_task("vqav2", tiny_llava, processor, questions(), batch_size=2, results=tmp_path)
    monkeypatch.setattr(target, generate)
    path = tmp_path / "vqav2.jsonl"
    with path.open("a") as file:
        file.write('{"key": "2:102", "outc')  # torn by a kill
    done: list[int] = []
    monkeypatch.setattr(
        target, lambda m, p, rows, **s: done.append(len(rows)) or generate(m, p, rows, **s)
    )
    resumed = run_task("vqav2", tiny_llava, processor, questions(), batch_size=2, results=tmp_path)
    assert done == [2, 1]
    assert (resumed.value, resumed.count) == (whole.value, 5)
    assert resumed.details == whole.details
    keys = [json.loads(line).get("key") for line in path.read_text().splitlines()]
    assert keys == [None, "0:100", "1:101", "2:102", "3:103", "4:104"]
    run_task("vqav2", tiny_llava, processor, questions(), results=tmp_path)
    assert done == [2, 1]


def test_results_of_another_run_are_refused(tiny_llava, tmp_path: Path) -> None:
    processor = make_llava_processor()
    run_task("vqav2", tiny_llava, processor, questions(1), results=tmp_path)
    other = Setting(kv_cache=KVCacheConfig(bits=4))
    with pytest.raises(OutcomesError, match=r"another run: its setting is .*'kv_cache': None"):
        run_task("vqav2", tiny_llava, processor, questions(1), results=tmp_path, setting=other)
    with pytest.raises(OutcomesError, match=r"its model is '', now 'other'"):
        run_task("vqav2", tiny_llava, processor, questions(1), results=tmp_path, model_name="other")
    with pytest.raises(OutcomesError, match=r"another run: its weights is"):
        half = copy.deepcopy(tiny_llava).bfloat16()
        run_task("vqav2", half, processor, questions(1), results=tmp_path)
    path = tmp_path / "vqav2.jsonl"
    path.write_text(path.read_text() + "nonsense\n")
    with pytest.raises(OutcomesError, match=r"Line 3 of .* is damaged"):
        run_task("vqav2", tiny_llava, processor, questions(1), results=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "what?", "answer": "yes"}', "holds no outcomes"),
        ('{"question": "a"}\n{"question": "b"}', "another run: its content is None"),
        ('{"question": "a"}\n{"question": "b"}\n', "another run: its content is None"),
        ("a note\nof mine", "Line 1 of .* is damaged"),
    ],
)
def test_a_file_of_no_run_stays_as_it_is(
    tiny_llava, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "vqav2.jsonl"
    path.write_text(text)
    with pytest.raises(OutcomesError, match=message):
        run_task("vqav2", tiny_llava, make_llava_processor(), questions(1), results=tmp_path)
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_outcomes_of_other_data_are_refused(tiny_llama, tmp_path: Path) -> None:
    def run(data: Any, results: Path) -> None:
        setting = Setting(sequence_length=16)
        run_task("wikitext2", tiny_llama, make_tokenizer(), data, setting=setting, results=results)

    rows = [{"text": "the cat sat on the mat. " * 3} for _ in range(6)]
    other = [{"text": "the dog sat on the mat. " * 3} for _ in range(6)]
    run(rows, tmp_path / "rows")
    run(iter(rows), tmp_path / "rows")
    run(datasets.Dataset.from_list(rows), tmp_path / "rows")
    for different in (other, datasets.Dataset.from_list(other)):
        with pytest.raises(OutcomesError, match="another run: its content is"):
            run(different, tmp_path / "rows")
    file = tmp_path / "text.jsonl"
    for lines in (rows, other):
        file.write_text("".join(f"{json.dumps(row)}\n" for row in lines))
        if lines is rows:
            run(file, tmp_path / "file")
    with pytest.raises(OutcomesError, match="another run: its content is"):
        run(file, tmp_path / "file")


def test_batch_size_changes_no_figure(tiny_llava) -> None:
    processor = make_llava_processor(chat_template=CHAT_TEMPLATE)
    for layer in tiny_llava.model.language_model.layers:  # so that the answers differ
        layer.self_attn.v_proj.weight.data *= 40
    for task, data in (("textvqa", questions()), ("scienceqa", choices())):
        results = [
            run_task(task, tiny_llava, processor, data, batch_size=size) for size in (1, 2, 8)
        ]
        assert len({(r.value, r.count, str(r.details)) for r in results}) == 1


def test_scienceqa_asks_with_and_without_images(tiny_llava, monkeypatch) -> None:
    processor = make_llava_processor(chat_template=CHAT_TEMPLATE)
    seen: list[tuple[bool, str]] = []
    real = tiny_llava.generate

    def watching(input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        text = processor.tokenizer.decode(input_ids[0], skip_special_tokens=True)
        seen.append((inputs.get("pixel_values") is not None, text))
        return real(input_ids=input_ids, **inputs)

    monkeypatch.setattr(tiny_llava, "generate", watching)
    result = run_task("scienceqa", tiny_llava, processor, choices(4), batch_size=2)
    assert [images for images, _ in seen] == [True, False] or [False, True]
    assert result.count == 4
    text = next(text for images, text in seen if not images)
    assert "Context: it rains\nwhich?\nA. up\nB. down\nAnswer with the option's letter" in text


def test_wikitext2_is_the_perplexity_of_the_windows(tiny_llama) -> None:
    tokenizer = make_tokenizer()
    lines = [{"text": "the cat sat on the mat. " * 3} for _ in range(6)]
    setting = Setting(sequence_length=64)
    result = run_task("wikitext2", tiny_llama, tokenizer, lines, setting=setting)
    ids = torch.tensor(
        tokenizer("\n".join(row["text"] for row in lines), add_special_tokens=False)["input_ids"]
    )
    windows = [{"input_ids": w.unsqueeze(0)} for w in ids[: len(ids) // 64 * 64].split(64)]
    assert result.count == len(windows) > 2
    assert result.value == pytest.approx(perplexity(tiny_llama, windows))
    assert result.standard_error is not None
    first = run_task("wikitext2", tiny_llama, tokenizer, lines, setting=setting, num_samples=1)
    assert first.count == 1
    assert first.value == pytest.approx(perplexity(tiny_llama, windows[:1]))


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("vqav2", {"image": None}, "must have the column 'image'; row 0"),
        ("vqav2", {"question": 3}, "must have the column 'question'; row 0"),
        ("textvqa", {"answers": []}, "at least one answer; row 0 .* validation split"),
        ("scienceqa", {"choices": [], "answer": 0}, "1 to 26 choices"),
        ("scienceqa", {"choices": ["x"], "answer": 1}, "has 1 choices and the answer 1"),
    ],
)
def test_bad_rows_are_named(tiny_llava, task: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run_task(task, tiny_llava, make_llava_processor(), [{**questions(1)[0], **row}])


def test_what_does_not_fit_is_refused(tiny_llama, tiny_llava, tmp_path: Path) -> None:
    processor = make_llava_processor()
    empty = tmp_path / "empty.parquet"
    columns = {name: pa.array([], pa.string()) for name in ("image", "question", "answers")}
    pq.write_table(pa.table(columns), empty)
    with pytest.raises(ValueError, match="LlamaForCausalLM takes none"):
        run_task("vqav2", tiny_llama, processor, questions(1))
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got 0"):
        run_task("vqav2", tiny_llava, processor, questions(1), batch_size=0)
    with pytest.raises(DataError, match=r"needs the columns image, question, answers; .* lacks"):
        run_task("vqav2", tiny_llava, processor, [{"text": "x"}])
    with pytest.raises(DataError, match="nothing to evaluate"):
        run_task("vqav2", tiny_llava, processor, empty)


def test_questions_that_the_model_cannot_read_are_named(tiny_llava) -> None:
    def asked(question: str) -> list[dict[str, Any]]:
        return [*questions(1), questions(1)[0] | {"question": question}]

    processor = make_llava_processor()
    limit = tiny_llava.config.text_config.max_position_embeddings
    with pytest.raises(DataError, match=rf"context of {limit} tokens; .*row 1 of the list"):
        run_task("vqav2", tiny_llava, processor, asked("what " * limit))
    with pytest.raises(DataError, match=r"row 1 of the list of records has the lone surrogate"):
        run_task("textvqa", tiny_llava, processor, asked("what \ud800"))
    options = [choices(1)[0] | {"choices": ["up", "\ud800"]}]
    with pytest.raises(DataError, match=r"row 0 of .* has the lone surrogate"):
        run_task("scienceqa", tiny_llava, processor, options)


def test_a_broken_picture_is_named(tiny_llava) -> None:
    data = [*questions(1), questions(1)[0] | {"image": b"no picture"}]
    with pytest.raises(DataError, match=r"Column 'image' of row 1 of the list of records"):
        run_task("vqav2", tiny_llava, make_llava_processor(), data)


def test_rows_without_text_are_skipped(tiny_llama) -> None:
    text = {"text": "the cat sat on the mat. " * 3}
    setting = Setting(sequence_length=16)
    results = [
        run_task("wikitext2", tiny_llama, make_tokenizer(), data, setting=setting)
        for data in ([text, text], [text, {"text": None}, text])
    ]
    assert results[0].value == results[1].value
    with pytest.raises(DataError, match=r"row 0 of .* has the lone surrogate"):
        run_task("wikitext2", tiny_llama, make_tokenizer(), [{"text": "\ud800"}])
