"""Conversations as data: which layouts are read, and which rows are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_adaptive_sparse.calibration.conversations import first_exchange, kept, text_of
from hf_adaptive_sparse.calibration.hub_datasets import dataset_table
from hf_adaptive_sparse.calibration.pictures import load_images
from hf_adaptive_sparse.calibration.records import DataError, _select, read_records
from tests.calibration.test_records import png

PAIRS = [("what is it?", "a square"), ("which colour?", "red")]


def turns(*pairs: tuple[Any, Any], role: str = "role", said: str = "content") -> list[dict]:
    names = ("user", "assistant") if role == "role" else ("human", "gpt")
    return [
        {role: name, said: text} for pair in pairs for name, text in zip(names, pair, strict=True)
    ]


def parts(text: str, *shown: dict) -> list[dict]:
    return [*shown, {"type": "text", "text": text}]


SHOWN = {"type": "image", "text": None}
LAYOUTS: dict[str, dict[str, Any]] = {
    "messages": {"messages": turns(*PAIRS)},
    "places": {"messages": turns(("<image>\nwhat is it?", "a square"), PAIRS[1])},
    "parts": {
        "messages": turns(
            (parts("what is it?", SHOWN), parts("a square")),
            (parts("which colour?"), parts("red")),
        )
    },
    "llava": {
        "conversations": turns(
            ("<image>\nwhat is it?", "a square"), PAIRS[1], role="from", said="value"
        )
    },
    "cauldron": {"texts": [{"user": q, "assistant": a, "source": "x"} for q, a in PAIRS]},
    "dict of lists": {
        "messages": {
            "role": ["user", "assistant"] * 2,
            "content": [text for pair in PAIRS for text in pair],
        }
    },
}
EXPECTED = [
    ("user", [{"type": "image"}, {"type": "text", "text": "what is it?"}]),
    ("assistant", [{"type": "text", "text": "a square"}]),
    ("user", [{"type": "text", "text": "which colour?"}]),
    ("assistant", [{"type": "text", "text": "red"}]),
]


def read(row: dict[str, Any]) -> list[tuple[str, list]]:
    return [(message["role"], message["content"]) for message in row["messages"]]


def stored(form: str, row: dict[str, Any], folder: Path) -> Any:
    """Two rows as a source that holds them in some form, with relative names of images in files."""
    in_file = {**row, "images": ["a.png"]}
    if form in ("json", "jsonl"):
        path = folder / f"a.{form}"
        lines = [json.dumps(in_file)] * 2
        path.write_text("\n".join(lines) if form == "jsonl" else f"[{','.join(lines)}]")
        return path
    if form == "parquet":
        shown = {**row, "images": [{"bytes": png(), "path": None}]}
        pq.write_table(pa.Table.from_pylist([shown] * 2), folder / "a.parquet")
        return folder / "a.parquet"
    opened = {**row, "images": [Image.open(folder / "a.png")]}
    if form == "list":
        return [opened] * 2
    data = datasets.Dataset.from_list([opened] * 2)
    return data.to_iterable_dataset() if form == "stream" else data


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "list", "dataset", "stream"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_conversation(tmp_path: Path, layout: str, form: str) -> None:
    (tmp_path / "a.png").write_bytes(png())
    records = read_records(stored(form, LAYOUTS[layout], tmp_path))
    assert (records.kind, records.conversations) == ("visual_question", True)
    for row in (*records, *records):
        assert read(row) == EXPECTED
        assert row["question"] == "what is it?"
        assert row["column"] == "images"
        assert [image.size for image in load_images(row["image"])] == [(20, 30)]


@pytest.mark.parametrize("layout", ["messages", "llava", "cauldron", "dict of lists"])
def test_text_alone(layout: str) -> None:
    records = read_records([LAYOUTS[layout]], media=())
    assert (records.kind, records.conversations) == ("text", True)
    (row,) = records
    assert [(role, text_of({"content": content})) for role, content in read(row)][-1] == (
        "assistant",
        "red",
    )


@pytest.mark.parametrize("key", ["image", "url", "path"])
def test_images_inside_a_message(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.png").write_bytes(png())
    shown = {"type": "image", key: "a.png"}
    told = turns((parts("same?", shown, shown), "yes"), (parts("and now?", shown), "no"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": told}))
    records = read_records(tmp_path / "a.jsonl")
    assert records.kind == "visual_question"
    (row,) = records
    assert len(load_images(row["image"])) == 3
    assert len(kept(row, 1)["image"]) == 2
    with pytest.raises(DataError, match=r"text alone; row 0 of .* shows something in 'messages'"):
        list(read_records(tmp_path / "a.jsonl", media=()))


def test_images_inside_a_message_of_a_dataset_stay_encoded() -> None:
    told = turns((parts("what?", {"type": "image", "image": Image.new("RGB", (4, 5))}), "x"))
    told[1]["content"] = parts("x", {"type": "text", "text": "", "image": None})
    data = datasets.Dataset.from_list([{"messages": told}])
    (row,) = _select(dataset_table(data))
    assert set(row["image"][0]) == {"bytes", "path"}
    assert load_images(row["image"])[0].size == (4, 5)


def test_rules_of_a_conversation() -> None:
    def row(*messages: tuple[str, str], images: int = 1) -> dict[str, Any]:
        told = [{"role": role, "content": text} for role, text in messages]
        return {"messages": told, "images": [png()] * images}

    asked, answered = ("user", "a?"), ("assistant", "b")
    usable = [
        row(("system", "be kind"), asked, answered),
        row(("system", ""), ("assistant", "hello"), asked, answered, ("user", "more?")),
        row(("user", "<image>"), answered, ("user", "<image> c?"), answered, images=2),
        row(("user", "<image>"), answered, ("user", "<image> c?"), images=2),
    ]
    roles = [[role for role, _ in read(found)] for found in read_records(usable)]
    assert roles[0] == ["system", "user", "assistant"]
    assert roles[1] == ["user", "assistant"]
    assert [len(found["image"]) for found in read_records(usable)] == [1, 1, 2, 1]


LEFT_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"messages": turns(*PAIRS), "images": []}, "nothing usable in 'images'"),
    "null": ({"messages": None, "images": ["a"]}, "no list of turns"),
    "strings": ({"messages": ["a", "b"], "images": ["a"]}, "no list of turns"),
    "empty": ({"messages": [], "images": ["a"]}, "no answered question"),
    "unanswered": ({"messages": turns(*PAIRS)[:1], "images": ["a"]}, "no answered question"),
    "content None": ({"messages": turns(("a", None)), "images": ["a"]}, "empty turn of the assis"),
    "blank": ({"messages": turns(("a", " \n")), "images": ["a"]}, "empty turn of the assistant"),
    "no question": (
        {"messages": turns(("a", "b"), ("", "c")), "images": ["a"]},
        "turn of the user",
    ),
    "tool": (
        {"messages": [*turns(*PAIRS), {"role": "tool", "content": "3"}], "images": ["a"]},
        "a turn of the role 'tool'",
    ),
    "no role": ({"messages": [{"content": "a"}], "images": ["a"]}, "a turn of the role None"),
    "twice": (
        {"messages": [*turns(*PAIRS), *turns(*PAIRS)[1:]], "images": ["a"]},
        "turns of user and assistant that do not alternate",
    ),
    "more places": (
        {"messages": turns(("<image><image>a", "b")), "images": ["a"]},
        "2 places for 1 images",
    ),
    "late": (
        {"messages": turns(PAIRS[0], ("<image>a", "b")), "images": ["a"]},
        "shows nothing with its first question",
    ),
    "other medium": (
        {"messages": turns((parts("a", {"type": "audio"}), "b")), "images": ["a"]},
        "a part of the type 'audio'",
    ),
    "painter": (
        {"messages": turns(("paint", parts("", SHOWN))), "images": ["a"]},
        "something where the assistant speaks",
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_rows_that_are_left_out(case: str, caplog: pytest.LogCaptureFixture) -> None:
    lacking, reason = LEFT_OUT[case]
    whole = {"messages": turns(*PAIRS), "images": ["a"]}
    found = list(read_records([whole, lacking, whole, lacking]))
    assert [row["place"] for row in found] == [f"row {i} of the list of records" for i in (0, 2)]
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "Rows without all of a conversation are left out: row 1 of the list of records "
    )
    assert reason in record.getMessage()
    with pytest.raises(DataError, match=f"a conversation about images; row 0 of .*{reason}"):
        list(read_records([lacking]))


def test_a_row_with_an_image_is_left_out_of_text() -> None:
    plain, shown = {"messages": turns(*PAIRS)}, {**LAYOUTS["places"], "image": "a.png"}
    for media in (("image",), ()):
        records = read_records([plain, shown], media=media)
        assert records.kind == "text"
        assert [row["place"] for row in records] == ["row 0 of the list of records"]


def test_lone_surrogates_are_named() -> None:
    with pytest.raises(DataError, match=r"row 0 of .*surrogate '\\ud800'"):
        list(read_records([{"messages": turns(("a", "b\ud800"))}]))


def test_which_columns_win() -> None:
    told = {"messages": turns(*PAIRS)}
    asked = {"image": png(), "question": "q?", "answer": "a"}
    assert not read_records([{**told, **asked}]).conversations
    assert not read_records([{**told, "text": "x"}]).conversations
    assert read_records([{**told, "text": "x", "image": png()}]).kind == "visual_question"
    assert not read_records([{**told, "text": "x", "image": png()}], media=()).conversations
    assert read_records([{**told, "prompt": "x"}]).conversations


def test_videos_and_sounds() -> None:
    told = {"conversations": turns(("<video>\nwhat?", "x"), role="from", said="value")}
    (row,) = read_records([{**told, "video": np.zeros((2, 4, 4, 3), np.uint8)}])
    assert read(row)[0] == ("user", [{"type": "video"}, {"type": "text", "text": "what?"}])
    assert row["video"].shape == (2, 4, 4, 3)
    (row,) = read_records([{"messages": turns(("what?", "x")), "audio": "a.wav"}])
    assert read(row)[0][1][0] == {"type": "audio"}
    assert row["audio"] == "a.wav"


def test_the_first_exchange_is_a_question() -> None:
    told = turns(("<image>a?", "b"), ("<image>c?", "d"))
    told.insert(0, {"role": "system", "content": "be brief"})
    (row,) = read_records([{"messages": told, "images": ["1", "2"]}])
    asked = first_exchange(row)
    assert asked == {
        "image": ["1"],
        "question": "a?",
        "answers": ("b",),
        "system": "be brief",
        "column": "images",
        "place": "row 0 of the list of records",
    }
    assert first_exchange(asked) is asked
