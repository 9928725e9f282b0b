from __future__ import annotations

import pytest
import torch

from hf_adaptive_sparse.calibration.records import DataError, read_records
from hf_adaptive_sparse.calibration.text_windows import encode, read_windows, window_length
from tests.conftest import llama_config
from tests.processors import make_llava_processor, make_tokenizer

LINES = [f"line {i} of the text, with words." for i in range(400)]
ROWS = [{"text": line} for line in LINES]


def test_windows_are_consecutive_pieces_of_the_joined_text() -> None:
    tokenizer = make_tokenizer()
    whole = encode(tokenizer, "\n".join(LINES))
    windows = read_windows(read_records(ROWS), tokenizer, length=100, count=None)
    assert len(windows) == len(whole) // 100
    assert torch.equal(torch.cat(windows), whole[: len(windows) * 100])


@pytest.mark.parametrize("count", [1, 3, 40])
def test_first_windows_equal_those_of_the_whole_text(count: int) -> None:
    tokenizer = make_tokenizer()
    every = read_windows(read_records(ROWS), tokenizer, length=100, count=None)
    few = read_windows(read_records(ROWS), tokenizer, length=100, count=count)
    assert len(few) == count
    assert all(torch.equal(a, b) for a, b in zip(few, every, strict=False))


def test_only_as_much_text_is_read_as_is_needed() -> None:
    taken = []

    def rows():
        for i in range(1_000_000):
            taken.append(i)
            yield {"text": "some words in a line"}

    records = read_records(ROWS)
    object.__setattr__(records, "rows", rows)
    assert len(read_windows(records, make_tokenizer(), length=64, count=4)) == 4
    assert len(taken) < 1000


def test_own_newlines_of_the_rows_are_not_doubled() -> None:
    tokenizer = make_tokenizer()
    with_newlines = read_records([{"text": line + "\n"} for line in LINES])
    a = read_windows(with_newlines, tokenizer, length=64, count=5)
    b = read_windows(read_records(ROWS), tokenizer, length=64, count=5)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_no_special_tokens_and_no_image_tokens() -> None:
    rows = [{"text": "an <image> tag in a line of text"}] * 50
    tokenizer = make_llava_processor(adds_bos=True)
    windows = torch.cat(
        read_windows(read_records(rows), tokenizer, length=16, count=20, left_out=(4,))
    )
    assert not (windows == 4).any()
    assert not (windows == 1).any()


def test_too_little_text_says_how_many_tokens_there_were() -> None:
    with pytest.raises(DataError, match=r"one window of 64 tokens .* gives 5 tokens"):
        read_windows(read_records([{"text": "hello"}]), make_tokenizer(), length=64, count=None)
    with pytest.raises(DataError, match="gives 0 tokens"):
        read_windows(read_records([{"text": ""}]), make_tokenizer(), length=64, count=2)


def test_window_length() -> None:
    assert window_length(None, llama_config()) == 512
    assert window_length(None, llama_config(max_position_embeddings=8192)) == 2048
    assert window_length(2, llama_config()) == 2
    for length in (1, 0, 513):
        with pytest.raises(ValueError, match=rf"between 2 and .* 512 tokens, got {length}"):
            window_length(length, llama_config())
