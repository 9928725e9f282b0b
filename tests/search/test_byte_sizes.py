from __future__ import annotations

import pytest

from hf_adaptive_sparse.search.byte_sizes import exact_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (123, 123),
        ("123", 123),
        ("6GiB", 6 * 2**30),
        ("6 gib", 6 * 2**30),
        ("4.5GB", 4_500_000_000),
        ("0.1MiB", 104_857),
        ("800MB", 800_000_000),
        ("2TB", 2 * 10**12),
        ("1KiB", 1024),
        ("7kB", 7000),
        ("9 B", 9),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(text, expected):
    assert parse_bytes(text, "size") == expected


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "6G", "6 gigabytes", "-1GB", "0", 0, -5, 1.5, "1.5", True, None, "0.1B", "1e9"],
)
def test_anything_else_is_refused_with_the_rule(text):
    with pytest.raises(ValueError, match=r"size must be .*KiB, MiB, GiB .*such as 6GiB; got"):
        parse_bytes(text, "size")


def test_messages_give_the_exact_number_and_a_readable_one():
    assert exact_bytes(6 * 2**30) == "6,442,450,944 bytes (6 GiB)"
    assert exact_bytes(1000) == "1,000 bytes"
