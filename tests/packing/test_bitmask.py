from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.packing import bitmask as bitmask_module
from hf_adaptive_sparse.packing.bitmask import (
    BitmaskError,
    check_bitmask,
    compress,
    compressed_size_bytes,
    decompress,
    pack_mask,
    popcount,
    row_popcounts,
    unpack_mask,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_INTEGERS[tensor.element_size()])


def test_column_j_is_bit_j_mod_8_of_byte_j_div_8() -> None:
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0, 0] = mask[0, 3] = mask[0, 8] = mask[1, 7] = mask[1, 10] = True
    packed = pack_mask(mask)
    assert packed.tolist() == [[0b00001001, 0b00000001], [0b10000000, 0b00000100]]
    assert torch.equal(unpack_mask(packed, 11), mask)
    assert row_popcounts(packed).tolist() == [3, 2]
    assert popcount(packed) == 5


@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 35),
    seed=st.integers(0, 10_000),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=150, deadline=None)
def test_any_bit_pattern_survives(
    rows: int, columns: int, seed: int, density: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = dtype.itemsize
    raw = torch.randint(0, 256, (rows, columns * width), generator=generator, dtype=torch.uint8)
    weight = raw.view(dtype).view(rows, columns) if raw.numel() else torch.zeros(rows, columns)
    weight = weight.clone().to(dtype) if weight.dtype != dtype else weight.clone()
    gone = torch.rand(rows, columns, generator=generator) >= density
    bits(weight)[gone] = 0
    values, bitmask = compress(weight)
    nnz = int((bits(weight) != 0).sum())
    assert values.shape == (nnz,)
    assert values.dtype == dtype
    assert bitmask.dtype == torch.uint8
    assert values.nbytes + bitmask.nbytes == compressed_size_bytes(rows, columns, nnz, width)
    restored = decompress(values, bitmask, columns)
    assert restored.dtype == dtype
    assert torch.equal(bits(restored), bits(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_negative_zero_and_nan_are_kept_and_zero_is_not(dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.0, -0.0, float("nan"), float("inf"), 1.0]], dtype=dtype)
    values, bitmask = compress(weight)
    assert bitmask.tolist() == [[0b11110]]
    assert torch.equal(bits(decompress(values, bitmask, 5)), bits(weight))


def test_values_are_in_row_order_and_the_input_is_not_changed() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 4.0]])
    before = weight.clone()
    values, _ = compress(weight.t().contiguous().t())
    assert values.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert torch.equal(weight, before)


def test_what_is_made_on_the_way_is_smaller_than_the_values(monkeypatch) -> None:
    monkeypatch.setattr(bitmask_module, "_CHUNK_ELEMENTS", 1 << 12)
    weight = torch.ones(256, 256, dtype=torch.bfloat16)
    weight[:, ::2] = 0
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        values, _ = compress(weight)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest == values.nbytes


def test_half_of_a_16_bit_weight_takes_9_sixteenths() -> None:
    assert compressed_size_bytes(64, 128, 64 * 64, 2) / (64 * 128 * 2) == 0.5625
    assert compressed_size_bytes(3, 9, 5, 4) == 5 * 4 + 3 * 2


def test_a_parameter_is_compressed_without_its_graph() -> None:
    values, _ = compress(torch.nn.Parameter(torch.ones(2, 3)))
    assert not values.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_mask(torch.ones(2, 3)), r"bool of shape \(rows, columns\), got float32"),
        (lambda: pack_mask(torch.ones(3, dtype=torch.bool)), r"got bool \(3,\)"),
        (lambda: compress(torch.ones(3)), r"\(out, in\), got float32 \(3,\)"),
        (lambda: compress(torch.ones(2, 2, dtype=torch.complex64)), "real dtype"),
        (lambda: row_popcounts(torch.ones(2, 2)), "uint8"),
        (lambda: row_popcounts(torch.ones(2, dtype=torch.uint8)), r"\(rows, bytes\)"),
        (lambda: unpack_mask(torch.zeros(2, 2, dtype=torch.uint8), 17), r"uint8 \(out, 3\)"),
        (lambda: unpack_mask(torch.zeros(2, 2, dtype=torch.int16), 16), "got int16"),
        (lambda: check_bitmask(torch.zeros(2, 0, dtype=torch.uint8), -1), "columns must be >= 0"),
        (lambda: check_bitmask(torch.full((1, 1), 8, dtype=torch.uint8), 3), "after the last"),
        (
            lambda: decompress(torch.ones(2, 1), torch.full((1, 1), 3, dtype=torch.uint8), 3),
            r"\(nnz,\)",
        ),
        (
            lambda: decompress(torch.ones(3), torch.full((1, 1), 3, dtype=torch.uint8), 3),
            "keeps 2 weights but 3 values",
        ),
    ],
)
def test_wrong_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(BitmaskError, match=message):
        call()  # type: ignore[operator]
