"""bfloat16 in 12 bits: every bit pattern comes back, and damage is told."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.packing import upper_bytes
from hf_adaptive_sparse.packing.bitmask import BitmaskError
from hf_adaptive_sparse.packing.upper_bytes import BOOK_WORDS, CODES, check, decode, encode


def halves(values):
    return values.view(torch.int16)


def patterns(*bits):
    return torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@given(st.lists(st.integers(0, 2**16 - 1), max_size=60), st.data())
@settings(max_examples=200, deadline=None)
def test_any_patterns_come_back(bits, data):
    values = patterns(*bits) if bits else torch.empty(0, dtype=torch.bfloat16)
    stored, book = encode(values)
    check(stored, book)
    assert stored.numel() == upper_bytes.stored_bytes(len(bits))
    assert upper_bytes.value_count(stored.numel()) == len(bits)
    assert torch.equal(halves(decode(stored, book)), halves(values))
    start = data.draw(st.integers(0, len(bits)))
    stop = data.draw(st.integers(start, len(bits)))
    part = decode(stored, book, start, stop)
    assert torch.equal(halves(part), halves(values[start:stop]))


def test_all_patterns_at_once_in_chunks_that_end_anywhere(monkeypatch):
    monkeypatch.setattr(upper_bytes, "_CHUNK", 1000)
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    stored, book = encode(values)
    check(stored, book)
    assert torch.equal(halves(decode(stored, book)), halves(values))
    assert torch.equal(halves(decode(stored, book, 999, 3333)), halves(values[999:3333]))
    # Sixteen upper bytes have a code: each of them 256 values.
    assert book.numel() - BOOK_WORDS == (256 - CODES) * 256


def test_the_form_to_the_byte():
    values = patterns(0x3F80, 0xBF01, 0x3F02, 0x0003)
    stored, book = encode(values)
    assert book.view(torch.uint8).tolist() == [0, 0x3F, 0xBF] + [0] * 13
    assert stored.tolist() == [0x80, 0x01, 0x02, 0x03, 0x21, 0x01]


def test_exceptions_are_the_rarest_and_in_order():
    common = [0x3000 + 0x100 * upper for upper in range(15)] * 3
    values = patterns(0x7F81, *common, 0x8000, *common, 0xFF80)
    _, book = encode(values)
    assert book.view(torch.uint8)[:CODES].tolist() == [0, *range(0x30, 0x3F)]
    assert book[BOOK_WORDS:].tolist() == [0x7F81, 46 << 16 | 0x8000, 92 << 16 | 0xFF80]


def test_of_trained_weights_few_are_exceptions():
    values = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    stored, book = encode(values)
    exceptions = book.numel() - BOOK_WORDS
    assert 0 < exceptions < values.numel() * 5e-4
    assert (stored.nbytes + book.nbytes) / values.nbytes < 0.751


def test_sizes_that_no_number_of_values_takes():
    assert [upper_bytes.value_count(size) for size in range(9)] == [
        *(0, None, 1, 2, None, 3, 4, None, 5)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, b: (s, b.int()), "must be int64"),
        (lambda s, b: (s, b[:1]), "with n >= 2"),
        (lambda s, b: (s, b[None]), "must be int64"),
        (lambda s, b: (s.char(), b), "must be uint8"),
        (lambda s, b: (s[:-2], b), r"\(n \+ ceil\(n / 2\),\)"),
        (lambda s, b: (s, b + 1), "code 0 of a codebook"),
        (lambda s, b: (s, b.flip(0)), "code 0|ascending"),
        (lambda s, b: (s, torch.cat([b, b[-1:]])), "in ascending order"),
        (lambda s, b: (s, torch.cat([b, torch.tensor([1000 << 16])])), "each one of 1000 values"),
        (lambda s, b: (s, torch.cat([b[:2], torch.tensor([-1]), b[2:]])), "each one of"),
    ],
)
def test_damage_is_told(change, message):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[3], values[900] = 1e-30, 1e-31
    with pytest.raises(BitmaskError, match=message):
        check(*change(*encode(values)))


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"bfloat16 ones, got torch.float16"):
        encode(torch.ones(3, dtype=torch.float16))
