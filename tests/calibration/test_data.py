from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hf_adaptive_sparse.calibration import records
from hf_adaptive_sparse.calibration.data import DataError, load_batches
from hf_adaptive_sparse.calibration.local_files import local_table
from hf_adaptive_sparse.calibration.processors import load_processor
from tests.calibration.test_records import png
from tests.conftest import llama_config
from tests.processors import make_llava_processor, make_tokenizer


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"this is line {i} of the text" for i in range(300)))
    return path


@pytest.fixture
def question_file(tmp_path: Path) -> Path:
    rows = [
        {"image": {"bytes": png(), "path": None}, "question": f"is it {i}?", "answer": f"no {i}"}
        for i in range(30)
    ]
    path = tmp_path / "questions.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_text_batches(text_file: Path) -> None:
    batches = load_batches(
        text_file,
        make_tokenizer(),
        config=llama_config(),
        num_samples=7,
        sequence_length=50,
        batch_size=3,
    )
    assert [tuple(b["input_ids"].shape) for b in batches] == [(3, 50), (3, 50), (1, 50)]
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask"}
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
        assert batch["attention_mask"].all()


def windows(path: Path, **settings: object) -> list[list[int]]:
    options: dict = {"num_samples": 5, "sequence_length": 50} | settings
    batches = load_batches(path, make_tokenizer(), config=llama_config(), **options)
    return [row.tolist() for batch in batches for row in batch["input_ids"]]


def test_calibration_varies_with_the_seed_and_evaluation_does_not(text_file: Path) -> None:
    assert windows(text_file, seed=1) == windows(text_file, seed=1)
    assert windows(text_file, seed=1) != windows(text_file, seed=2)
    first = windows(text_file, split="validation", seed=1)
    assert first == windows(text_file, split="validation", seed=2)
    assert first == windows(text_file, num_samples=None, split="validation")[:5]
    assert first == windows(text_file, shuffle=False)
    pool = windows(text_file, num_samples=20, shuffle=False)
    assert all(window in pool for window in windows(text_file, seed=1))


def test_the_split_that_is_asked_for_decides_and_not_the_one_that_a_source_names(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "hub_table", lambda *_: local_table(text_file, "train"))
    first = windows(text_file, shuffle=False)
    assert windows("corpus:en:validation") != first
    assert windows("corpus:en:train", split="validation") == first


def test_fewer_samples_than_asked_for(text_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert 10 < len(windows(text_file, num_samples=10_000)) < 10_000
    assert "of 10000 samples" in caplog.text


def test_default_length_is_the_context(text_file: Path) -> None:
    assert len(windows(text_file, sequence_length=None)[0]) == 512


def test_questions(question_file: Path, tiny_llava) -> None:
    batches = load_batches(
        question_file, make_llava_processor(), config=tiny_llava.config, num_samples=5, batch_size=2
    )
    assert [len(b["labels"]) for b in batches] == [2, 2, 1]
    for batch in batches:
        assert torch.isfinite(tiny_llava(**batch).loss)


def same_batches(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("form", ["map", "stream", "torch", "transformed"])
def test_a_dataset_in_memory_gives_what_its_file_gives(
    question_file: Path, text_file: Path, tiny_llava, form: str
) -> None:
    def batches(source: object) -> list[dict[str, torch.Tensor]]:
        return load_batches(
            source,  # type: ignore[arg-type]
            make_llava_processor(),
            config=tiny_llava.config,
            num_samples=4,
            sequence_length=20,
            seed=3,
        )

    questions = pq.read_table(question_file).to_pylist()
    texts = [{"text": line} for line in text_file.read_text().splitlines()]
    for rows, file in ((questions, question_file), (texts, text_file)):
        data = datasets.Dataset.from_list(rows)
        if rows is questions:
            data = data.cast_column("image", datasets.Image())
        data = {
            "map": lambda d: d,
            "stream": lambda d: d.to_iterable_dataset(),
            "torch": lambda d: d.with_format("torch"),
            "transformed": lambda d: d.with_transform(lambda batch: batch),
        }[form](data)
        assert same_batches(batches(data), batches(file))


def test_a_dataset_of_several_splits_is_refused() -> None:
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "x"}])})
    with pytest.raises(DataError, match=r"one split; got the splits train\. .*dataset\['train'\]"):
        load_batches(splits, make_tokenizer(), config=llama_config())


def test_images_and_text_models(question_file: Path, text_file: Path, tiny_llava) -> None:
    with pytest.raises(ValueError, match="about images, but the model takes none"):
        load_batches(question_file, make_llava_processor(), config=llama_config())
    with pytest.raises(ValueError, match=r"image processor; \w+ has none"):
        load_batches(question_file, make_tokenizer(), config=tiny_llava.config)
    text = load_batches(
        text_file, make_tokenizer(), config=tiny_llava.config, num_samples=1, sequence_length=9
    )
    assert torch.isfinite(tiny_llava(**text[0]).logits).all()


@pytest.mark.parametrize(
    "setting",
    [
        {"num_samples": 0},
        {"batch_size": 0},
        {"num_samples": True},
        {"num_samples": 2.5},
        {"num_samples": "2"},
        {"batch_size": None},
    ],
)
def test_bad_sizes(text_file: Path, setting: dict) -> None:
    with pytest.raises(ValueError, match=r"must be a whole number >= 1.*, got "):
        load_batches(text_file, make_tokenizer(), config=llama_config(), **setting)


def test_no_questions(tmp_path: Path, tiny_llava) -> None:
    schema = pa.schema([("image", pa.binary()), ("question", pa.string()), ("answer", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds no questions"):
        load_batches(tmp_path / "a.parquet", make_llava_processor(), config=tiny_llava.config)


def test_a_question_beyond_the_context_is_named(tmp_path: Path, tiny_llava) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"image": "a.png", "question": q, "answer": "b"} for q in ("what?", "what " * 600)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = r"context of 512 tokens; 'what what .*' \(row 1 of .*a\.jsonl\) takes \d{3,4}\. "
    with pytest.raises(DataError, match=message):
        load_batches(path, make_llava_processor(), config=tiny_llava.config, batch_size=2)


FED = dict.fromkeys(["decoder_input_ids", "labels"], torch.ones(1, 3, dtype=torch.int64))
"""What the decoder of an encoder-decoder is given."""


IDS = torch.ones(1, 2, dtype=torch.int64)


class TestReadyBatches:
    config = llama_config()

    def check(self, batches: object) -> list[dict[str, torch.Tensor]]:
        return load_batches(batches, None, config=self.config)  # type: ignore[arg-type]

    def test_are_returned(self, text_batches) -> None:
        checked = self.check(text_batches)
        assert all(a["input_ids"] is b["input_ids"] for a, b in zip(checked, text_batches))  # noqa: B905
        assert len(self.check([{"inputs_embeds": torch.ones(1, 2, 3)}])) == 1
        assert len(self.check([{**FED, "input_ids": IDS}])) == 1
        assert len(self.check([{**FED, "input_features": torch.ones(1, 8, 9)}])) == 1

    @pytest.mark.parametrize(
        ("batches", "error", "message"),
        [
            ([], DataError, "list is empty"),
            ([torch.ones(2, 2)], TypeError, "batch 0 is Tensor"),
            ([{"input_ids": [[1, 2]]}], TypeError, "'input_ids' of batch 0 is list"),
            ([{"labels": IDS}], DataError, "batch 0 holds labels"),
            ([{"input_ids": torch.ones(2)}], DataError, r"batch 0 has \(2,\)"),
            ([{"input_ids": torch.ones(1, 0)}], DataError, r"batch 0 has \(1, 0\)"),
            ([{"input_ids": torch.ones(1, 2)}], DataError, "batch 0 has torch.float32"),
            (
                [{"input_ids": IDS, "labels": IDS[:, :1]}],
                DataError,
                r"labels must have the shape \(1, 2\)",
            ),
            (
                [{"input_ids": IDS, "labels": IDS.float()}],
                DataError,
                "labels must be whole numbers .*; batch 0 has torch.float32",
            ),
            ([{**FED, "input_ids": torch.ones(2)}], DataError, r"batch 0 has \(2,\)"),
            ([{**FED, "input_ids": torch.ones(1, 0)}], DataError, r"batch 0 has \(1, 0\)"),
            (
                [{**FED, "input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 3)}],
                DataError,
                r"attention_mask must have the shape \(1, 2\)",
            ),
        ],
    )
    def test_errors(self, batches: list, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            self.check(batches)


@pytest.mark.shared_data
def test_prefix_equals_whole_text_on_wikitext(shared_dir: Path) -> None:
    """Byte-level BPE: cutting a corpus short changes none of the windows that are used."""
    processor = load_processor(shared_dir / "models/tiny-llava")
    settings: dict = {
        "config": llama_config(),
        "sequence_length": 512,
        "split": "validation",
        "batch_size": 1,
    }
    path = shared_dir / "data/wikitext2/evaluation.parquet"
    whole = load_batches(path, processor, num_samples=None, **settings)
    for count in (1, 20, 100):
        few = load_batches(path, processor, num_samples=count, **settings)
        assert len(few) == count
        assert all(
            torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(few, whole, strict=False)
        )
