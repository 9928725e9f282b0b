from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_adaptive_sparse.calibration.hub_datasets import hub_table
from hf_adaptive_sparse.calibration.media import Medium
from hf_adaptive_sparse.calibration.pictures import load_images
from hf_adaptive_sparse.calibration.records import (
    DataError,
    Records,
    _select,
    load_image,
    read_records,
)

TEXTS = ["first line", "second line", ""]


def encoded(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def png(color: str = "red", size: tuple[int, int] = (20, 30), mode: str = "RGB") -> bytes:
    return encoded(Image.new(mode, size, color))


def write_text(path: Path) -> Path:
    rows = [{"text": text, "other": 1} for text in TEXTS]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(TEXTS[:2]) + "\n\n")
    return path


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "txt"])
def test_text_of_every_format(tmp_path: Path, suffix: str) -> None:
    records = read_records(write_text(tmp_path / f"data.{suffix}"))
    assert records.kind == "text"
    for _ in range(2):  # records can be read again
        assert [row["text"].rstrip("\n") for row in records] == TEXTS


def test_json_forms(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [{"text": "x"}]}))
    assert [row["text"] for row in read_records(path)] == ["x"]
    path.write_text('{"text": "x"}\n{"text": "y"}\n')
    assert [row["text"] for row in read_records(path)] == ["x", "y"]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_rows_after_the_first_say_what_it_lacks(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text('{"id": 1}\n{"text": "x"}\n')
    assert [row["text"] for row in read_records(path)] == ["x"]


@pytest.mark.parametrize("form", ["jsonl", "json", "list"])
def test_the_first_row_decides_what_is_read_where_it_can(tmp_path: Path, form: str) -> None:
    asked = {"image": "a.png", "question": "q", "answer": "a"}
    rows = [{"text": "x"}, asked, {"text": "y"}]
    path = tmp_path / f"a.{form}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def records(*media: Medium) -> Records:
        return read_records(rows if form == "list" else path, media=media)

    assert [row["text"] for row in records("image")] == ["x", "y"]
    rows[:] = [asked, {"text": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert records("image").kind == "visual_question"
    assert [row["text"] for row in records()] == ["x"]  # of no use to a model without images


@pytest.mark.parametrize(
    ("suffix", "content"),
    [("txt", "x"), ("jsonl", '{"text": "x"}'), ("json", '[{"text": "x"}]')],
)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, suffix: str, content: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text(content, encoding="utf-8-sig")
    assert [row["text"] for row in read_records(path)] == ["x"]


def test_folder_prefers_files_of_the_split(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "validation-0"):
        table = pa.table({"text": [name]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert [r["text"] for r in read_records(tmp_path, "train")] == ["train-0", "train-1"]
    assert [r["text"] for r in read_records(str(tmp_path), "validation")] == ["validation-0"]
    assert len(list(read_records(tmp_path, "test"))) == 3


def test_folder_prefers_folders_of_the_split(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        (tmp_path / "default" / name).mkdir(parents=True)
        table = pa.table({"text": [name]})
        pq.write_table(table, tmp_path / f"default/{name}/0000.parquet")
    assert [r["text"] for r in read_records(tmp_path, "validation")] == ["validation"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"answer": "yes"}, ("yes",)),
        ({"answer": ["yes", "no"]}, ("yes", "no")),
        ({"answers": ["a"] * 10, "multiple_choice_answer": "b"}, ("a",) * 10),
        ({"answers": [{"answer": "a", "answer_id": 1}, {"answer": "b"}]}, ("a", "b")),
        ({"answers": {"answer": ["a", "b"]}}, ("a", "b")),
        ({"multiple_choice_answer": "b"}, ("b",)),
        ({"answer": 3}, ("3",)),
    ],
)
def test_answer_columns(answer: dict, expected: tuple[str, ...]) -> None:
    records = read_records([{"image": png(), "question": "what?", **answer}])
    assert records.kind == "visual_question"
    assert next(iter(records))["answers"] == expected


def test_images_win_where_the_model_takes_them() -> None:
    rows = [{"image": png(), "question": "q?", "answer": "a", "text": "words"}]
    assert read_records(rows).kind == "visual_question"
    assert read_records(rows, media=()).kind == "text"


def test_images_for_a_model_that_takes_none() -> None:
    rows = [{"image": png(), "question": "q?", "answer": "a"}]
    with pytest.raises(DataError, match="images, but the model takes none"):
        read_records(rows, media=())


def test_image_forms(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(png())
    path = tmp_path / "data.jsonl"
    path.write_text('{"image": "pictures/a.png", "question": "q?", "answer": "a"}\n')
    opened = [load_image(next(iter(read_records(path)))["image"])]
    table = pa.Table.from_pylist(
        [
            {"image": {"bytes": png(), "path": None}, "question": "q", "answer": "a"},
            {"image": {"bytes": None, "path": "pictures/a.png"}, "question": "q", "answer": "a"},
        ]
    )
    pq.write_table(table, tmp_path / "data.parquet")
    opened += [load_image(row["image"]) for row in read_records(tmp_path / "data.parquet")]
    opened += [load_image(Image.new("L", (20, 30))), load_image(png(mode="RGBA"))]
    assert [(image.size, image.mode) for image in opened] == [((20, 30), "RGB")] * 5


@pytest.mark.parametrize("image", [b"not an image", "missing.png", {"bytes": None, "path": None}])
def test_bad_images(image: object) -> None:
    with pytest.raises(DataError, match=r"image"):
        load_image(image)


def test_a_png_that_breaks_while_it_is_decoded() -> None:
    content = bytearray(encoded(Image.effect_noise((64, 64), 50)))
    length = content.index(b"IDAT") - 4  # the next chunk is looked for amid the pixels
    content[length : length + 4] = struct.pack(">I", 500)
    with pytest.raises(DataError, match="cannot be opened: broken PNG file"):
        load_image(bytes(content))


def test_16_bits_are_scaled_not_clipped() -> None:
    grey = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    opened = np.asarray(load_image(encoded(Image.fromarray(grey))))
    assert (opened == (grey >> 8)[..., None]).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_of_an_unknown_range_are_refused(dtype: type) -> None:
    with pytest.raises(DataError, match=r"8 or 16 bits per channel; mode '[IF]' has 32"):
        load_image(Image.fromarray(np.zeros((4, 4), dtype)))


def test_images_are_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    assert load_image(encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)).size == (20, 40)


def test_errors_of_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_records(tmp_path / "missing.parquet")
    with pytest.raises(DataError, match="does not exist"):
        read_records("missing.jsonl")
    with pytest.raises(DataError, match="does not exist"):
        read_records(r"C:\missing\texts")
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(DataError, match=r"must be \.parquet"):
        read_records(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_bytes(b"broken")
    with pytest.raises(DataError, match="not a readable parquet"):
        read_records(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{oops\n')
    with pytest.raises(DataError, match=r"Line 2 of .* is not JSON"):
        list(read_records(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="must be a JSON object; row 1"):
        read_records(tmp_path / "b.jsonl")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        list(read_records(tmp_path / "a.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds none\. Name a file in it, or .*to_parquet"):
        read_records(tmp_path / "empty")
    (tmp_path / "a.json").write_text("3")
    with pytest.raises(DataError, match="list of objects"):
        read_records(tmp_path / "a.json")


@pytest.mark.parametrize(
    "missing", ["data.csv", "data/train.TSV", "train.jsonl.gz", Path("data"), Path("data/part")]
)
def test_a_missing_file_is_not_taken_for_a_dataset_of_the_hub(missing: str | Path) -> None:
    with pytest.raises(DataError, match=r"does not exist. Give a local \.parquet"):
        read_records(missing)


def test_a_json_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.json").write_text("[]")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(DataError, match=r"a\.json is not readable .*Permission denied"):
        read_records(tmp_path / "a.json")


def test_unusable_columns_are_listed() -> None:
    with pytest.raises(
        DataError, match=r"'text', .*'messages', .* or .*'answer'.* has the columns title, body"
    ):
        read_records([{"title": "x", "body": "y"}])
    with pytest.raises(DataError, match=r"must have rows; the list of records has none"):
        read_records([])
    with pytest.raises(DataError, match="must hold dicts"):
        read_records(["text"])  # type: ignore[list-item]


def test_bad_rows_are_named() -> None:
    with pytest.raises(DataError, match=r"row 1 of .* holds int"):
        list(read_records([{"text": "a"}, {"text": 3}]))


def test_rows_that_lack_a_part_of_a_question_are_left_out(caplog) -> None:
    whole = {"image": png(), "question": "q", "answer": "yes"}
    lacking = [
        whole | change
        for change in ({"image": None}, {"question": None}, {"answer": None}, {"answer": " "})
    ]
    read = list(read_records([lacking[0], whole, *lacking, whole]))
    assert [row["place"] for row in read] == [f"row {i} of the list of records" for i in (1, 6)]
    assert [record.getMessage() for record in caplog.records] == [
        "Rows without all of a question are left out: row 0 of the list of records has nothing "
        "usable in 'image'."
    ]
    for rows in (lacking, lacking * 300 + [whole]):
        with pytest.raises(DataError, match=r"row 0 of .* nothing usable in 'image', and no other"):
            list(read_records(rows))


def test_several_images_of_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    path = tmp_path / "a.jsonl"
    asked = {"images": ["a.png", "a.png"], "question": "q", "answer": "a"}
    path.write_text(json.dumps(asked) + "\n" + json.dumps(asked | {"images": []}))
    (row,) = read_records(path)
    assert [image.size for image in load_images(row["image"])] == [(20, 30), (20, 30)]


def test_lone_surrogates_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b \\ud800"}\n')
    message = r"row 1 of .*a\.jsonl has the lone surrogate '\\ud800'"
    with pytest.raises(DataError, match=message):
        list(read_records(path))
    path.write_text('{"image": "", "question": "q", "answer": "\\ude00"}\n')
    with pytest.raises(DataError, match=r"row 0 of .*surrogate '\\ude00'"):
        list(read_records(path))


def test_null_text_is_skipped() -> None:
    assert [r["text"] for r in read_records([{"text": None}, {"text": "a"}])] == ["a"]


class TestHub:
    def test_unreachable_hub_is_one_clear_error(self) -> None:
        message = r"'{0}' cannot be read .* local file or folder: there is none called '{0}'"
        for name in ("nobody/nothing", "nobody/nothing-v1.5"):
            with pytest.raises(DataError, match=message.format(name)):
                read_records(name)

    def test_default_is_wikitext(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def refuse(*args: object) -> None:
            asked.append(args)
            raise ConnectionError("no route\nto host")

        monkeypatch.setattr("hf_adaptive_sparse.calibration.hub_datasets._open_hub_dataset", refuse)
        with pytest.raises(DataError, match=r"ConnectionError: no route\)"):
            read_records(None, "validation")
        assert asked[0][:3] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation")

    def test_a_stream_that_breaks_off_at_its_first_row_is_one_clear_error(
        self, monkeypatch
    ) -> None:
        class Broken:
            column_names = features = None

            def __iter__(self):
                raise ConnectionError("reset by peer")

        monkeypatch.setattr(
            "hf_adaptive_sparse.calibration.hub_datasets._open_hub_dataset", lambda *_: Broken()
        )
        with pytest.raises(DataError, match=r"'a/b' cannot be read .*reset by peer.*local file"):
            read_records("a/b")

    def test_bad_name(self) -> None:
        with pytest.raises(DataError, match="name:config:split"):
            read_records("a:b:c:d")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_rows_of_a_dataset(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
    ) -> None:
        """The real `datasets` library, reading a dataset folder instead of the Hub."""
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
        if not streaming:
            monkeypatch.setattr(
                "hf_adaptive_sparse.calibration.hub_datasets._is_large", lambda _: False
            )
        data = tmp_path / "things" / "data"
        data.mkdir(parents=True)
        pq.write_table(pa.table({"text": TEXTS, "n": [1, 2, 3]}), data / "train-0.parquet")
        monkeypatch.chdir(tmp_path)
        table = hub_table("things", "train", None, None)
        assert [r["text"] for r in _select(table)] == TEXTS
        assert next(iter(table.scan(["text"]))).keys() == {"text"}
        with pytest.raises(DataError, match=r"split 'validation'|cannot be read"):
            hub_table("things", "validation", None, None)
