"""The in-memory form of a sparse weight: exactness, sizes, the bound of quantisation, bad input."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.kernels import sparse_linear
from hf_adaptive_sparse.packing import bitmask, offsets, weight_codes
from hf_adaptive_sparse.packing.bitmask import BitmaskError
from hf_adaptive_sparse.packing.offsets import offset_dtype
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight, size_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = [(16, None), (8, None), (8, 32), (4, None), (4, 128)]
INTEGERS = {2: torch.int16, 4: torch.int32}


def make_weight(rows, columns, density=0.5, dtype=torch.float32, seed=0):
    """Random rows, of which the first is empty and the last full where there are enough."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < density
    if rows > 2:
        mask[0], mask[-1] = False, True
    return weight.masked_fill(~mask, 0.0).to(dtype)  # a product would leave -0.0


def same_bits(a, b):
    return torch.equal(a.view(INTEGERS[a.element_size()]), b.view(INTEGERS[b.element_size()]))


@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 150),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_values_survive_bit_for_bit(rows, columns, density, dtype, seed):
    weight = make_weight(rows, columns, density, dtype, seed)
    sparse = SparseWeight.from_dense(weight)
    assert same_bits(sparse.to_dense(), weight)
    assert sparse.shape == (rows, columns)
    assert sparse.dtype == dtype
    assert (sparse.bits, sparse.value_bits) == (16, 8 * dtype.itemsize)
    kept = (weight != 0).sum(dim=1)
    assert sparse.row_offsets.tolist() == [0, *kept.cumsum(0).tolist()]


def test_negative_zero_and_nan_are_kept():
    weight = torch.tensor([[-0.0, 0.0, torch.nan, 1.0]])
    sparse = SparseWeight.from_dense(weight)
    assert sparse.nnz == 3
    assert same_bits(sparse.to_dense(), weight)


@given(
    rows=st.integers(0, 6),
    columns=st.integers(0, 150),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from([8, 4]),
    group_size=st.sampled_from([None, 32, 64, 96]),
    magnitude=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_quantised_weights_stay_within_half_a_scale(
    rows, columns, density, dtype, bits, group_size, magnitude, seed
):
    weight = make_weight(rows, columns, density, dtype, seed) * magnitude
    sparse = SparseWeight.from_dense(weight, bits, group_size)
    assert sparse.bits == bits
    assert sparse.dtype == sparse.scales.dtype == dtype
    width = group_size or max(columns, 1)
    scales = sparse.scales.float().repeat_interleave(width, dim=1)[:, :columns]
    found = sparse.to_dense(torch.float32)
    assert (found[weight == 0] == 0).all()
    # Division and product in float32 round, by far less than what is allowed here.
    limit = weight_codes.code_limit(bits)
    assert ((found - weight.float()).abs() <= scales / limit * 0.50001).all()
    assert sparse.scales.float().sum() <= weight.float().abs().sum() * 1.0001
    if columns:  # the largest weight of a group keeps its value
        assert torch.equal(sparse.to_dense().abs().amax(dim=1), weight.abs().amax(dim=1))
    assert same_bits(sparse.to_dense(), found.to(dtype))
    again = SparseWeight.from_dense(sparse.to_dense(), bits, group_size)
    assert same_bits(again.to_dense(), sparse.to_dense())


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 31, 33, 64, 100, 257])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), CODES)
def test_the_size_formula(columns, dtype, bits, group_size):
    sparse = SparseWeight.from_dense(make_weight(5, columns, dtype=dtype), bits, group_size)
    groups = 0 if bits == 16 else weight_codes.group_count(columns, group_size)
    expected = size_bytes(5, columns, sparse.nnz, sparse.bits, groups, dtype.itemsize)
    assert sparse.nbytes == expected
    assert sum(part.nbytes for part in sparse.tensors().values()) == expected - 6 * 4


@pytest.mark.parametrize(("bits", "share"), [(16, 0.5625), (12, 0.4375), (8, 0.3125), (4, 0.1875)])
def test_half_of_a_16_bit_weight(bits, share):
    weight = torch.zeros(64, 4096, dtype=torch.bfloat16)
    weight[:, ::2] = 1
    coded = bits in weight_codes.CODE_BITS
    sparse = SparseWeight.from_dense(weight, bits, 128 if coded else None)
    scales = 1 / 128 if coded else 0
    assert sparse.nbytes / weight.nbytes == pytest.approx(share + scales, abs=1e-3)


def test_12_bits_in_memory():
    weight = make_weight(9, 150, dtype=torch.bfloat16)
    weight[8, :60], weight[2, 149] = 2.0 ** -torch.arange(60), torch.nan  # thirty upper bytes
    sparse = SparseWeight.from_dense(weight, 12)
    assert (sparse.bits, sparse.dtype, sparse.scales) == (12, torch.bfloat16, None)
    exceptions = sparse.codebook.numel() - 2
    assert exceptions > 20
    expected = size_bytes(9, 150, sparse.nnz, 12) + 8 * exceptions
    assert sparse.nbytes == expected
    assert sum(part.nbytes for part in sparse.tensors().values()) == expected - 10 * 4
    assert same_bits(sparse.to_dense(), weight)
    again = SparseWeight.from_tensors(150, **sparse.tensors())
    assert same_bits(again.to_dense(), weight)
    assert same_bits(sparse.part(2, 9).to_dense(), weight[2:9])
    assert same_bits(pickle.loads(pickle.dumps(sparse)).to_dense(), weight)
    plain = sparse.plain()
    assert (plain.bits, plain.codebook, plain.plain()) == (16, None, plain)
    assert same_bits(plain.to_dense(), weight)
    assert sparse.to("meta").codebook.is_meta
    with pytest.raises(BitmaskError, match=r"bits have no scales|12 bits have no scales"):
        SparseWeight.from_dense(weight, 12, 64)
    with pytest.raises(ValueError, match=r"12 bits are bfloat16 ones, got torch.float16"):
        SparseWeight.from_dense(weight.half(), 12)
    parts = sparse.tensors()
    with pytest.raises(BitmaskError, match="bytes, three for two values"):
        SparseWeight.from_tensors(150, **parts | {"values": parts["values"][:-3].clone()})


def test_offsets_turn_to_int64_where_int32_ends():
    assert offset_dtype(0) == torch.int32
    assert offset_dtype(2**31 - 1) == torch.int32
    assert offset_dtype(2**31) == torch.int64
    rows, columns = 2**17, 2**15
    narrow = size_bytes(rows, columns, 2**31 - 2, 16)
    assert size_bytes(rows, columns, 2**31, 16) - narrow == 4 + 4 * (rows + 1)


def test_int64_offsets_serve_as_well(monkeypatch):
    monkeypatch.setattr(offsets, "offset_dtype", lambda nnz: torch.int64)
    weight = make_weight(5, 70)
    for bits in (16, 8, 4):
        sparse = SparseWeight.from_dense(weight, bits)
        assert sparse.row_offsets.dtype == torch.int64
        assert sparse.to_dense().shape == weight.shape


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_work_in_chunks_changes_nothing(monkeypatch, bits, rows_at_once):
    weight = make_weight(8, 45)
    whole = SparseWeight.from_dense(weight, bits)
    monkeypatch.setattr(bitmask, "_CHUNK_ELEMENTS", 45 * rows_at_once)
    pieces = SparseWeight.from_dense(weight, bits)
    for name, part in whole.tensors().items():
        assert torch.equal(part, pieces.tensors()[name])
    assert torch.equal(whole.to_dense(), pieces.to_dense())


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_rows_by_themselves(bits):
    sparse = SparseWeight.from_dense(make_weight(9, 37), bits)
    dense = sparse.to_dense(torch.float32)
    for start in range(9):
        for stop in range(start, 10):
            assert torch.equal(sparse.dense_rows(start, stop), dense[start:stop])
            assert torch.equal(sparse.part(start, stop).to_dense(), sparse.to_dense()[start:stop])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_wider_than_the_weight_takes_no_more_memory_than_a_row(bits):
    weight = make_weight(5, 70)
    wide = SparseWeight.from_dense(weight, bits, weight_codes.MAX_GROUP_SIZE)
    row = SparseWeight.from_dense(weight, bits)
    assert torch.equal(wide.scales, row.scales)
    assert torch.equal(wide.to_dense(), row.to_dense())
    x = torch.randn(3, 70, dtype=weight.dtype)
    product = sparse_linear.linear(x, wide)
    torch.testing.assert_close(product, x @ row.to_dense().T, rtol=0, atol=5e-3)


def test_a_group_size_that_no_kernel_can_be_told_is_refused():
    with pytest.raises(ValueError, match=r"at most 2147483616, .* got 18446744073709551648"):
        SparseWeight.from_dense(make_weight(5, 70), 8, 2**64 + 32)


@pytest.mark.parametrize(("bits", "group_size"), CODES)
def test_tensors_come_back_through_from_tensors(bits, group_size):
    sparse = SparseWeight.from_dense(make_weight(5, 70), bits, group_size)
    again = SparseWeight.from_tensors(70, **sparse.tensors(), group_size=group_size)
    assert again.shape == sparse.shape
    assert torch.equal(again.row_offsets, sparse.row_offsets)
    assert torch.equal(again.to_dense(), sparse.to_dense())
    for copied in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), sparse.to("cpu")):
        assert torch.equal(copied.to_dense(), sparse.to_dense())


@pytest.mark.parametrize(("bits", "group_size"), CODES)
def test_strided_tensors_are_made_contiguous_for_the_kernels(bits, group_size):
    sparse = SparseWeight.from_dense(make_weight(5, 70), bits, group_size)
    strided = {k: torch.stack([t, t], dim=-1)[..., 0] for k, t in sparse.tensors().items()}
    again = SparseWeight.from_tensors(70, **strided, group_size=group_size)
    assert all(part.is_contiguous() for part in again.tensors().values())
    assert torch.equal(again.to_dense(), sparse.to_dense())


@pytest.mark.parametrize(("bits", "group_size"), CODES)
def test_a_weight_moves_as_a_whole(bits, group_size):
    sparse = SparseWeight.from_dense(make_weight(5, 70), bits, group_size)
    moved = sparse.to("meta")
    assert (moved.shape, moved.group_size) == (sparse.shape, group_size)
    assert (moved.bits, moved.dtype, moved.nbytes) == (sparse.bits, sparse.dtype, sparse.nbytes)
    assert all(part.is_meta for part in (*moved.tensors().values(), moved.row_offsets))


def parts(bits=8, group_size=None):
    sparse = SparseWeight.from_dense(make_weight(5, 70), bits, group_size)
    return sparse.tensors() | {"group_size": group_size}


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_wrong_number_of_values_is_refused(bits):
    given_parts = parts(bits)
    given_parts["values"] = given_parts["values"][:-1]
    with pytest.raises(BitmaskError, match=r"keeps \d+ weights but \d+ .* must agree"):
        SparseWeight.from_tensors(70, **given_parts)


def test_a_flipped_bit_of_the_mask_is_refused():
    given_parts = parts()
    given_parts["bitmask"][2, 3] ^= 1
    with pytest.raises(BitmaskError, match="must agree"):
        SparseWeight.from_tensors(70, **given_parts)


def test_a_bit_after_the_last_column_is_refused():
    given_parts = parts()
    given_parts["bitmask"][2, -1] |= 0x80
    with pytest.raises(BitmaskError):
        SparseWeight.from_tensors(70, **given_parts)


@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -1.0])
def test_damaged_scales_are_refused(damage):
    given_parts = parts()
    given_parts["scales"][3] = damage
    with pytest.raises(BitmaskError, match="finite and >= 0"):
        SparseWeight.from_tensors(70, **given_parts)


def test_other_bad_parts_are_refused():
    good = parts(8, 32)
    for change, message in (
        ({"scales": None}, "need scales .* got none"),
        ({"scales": good["scales"][:, :1]}, r"need scales \(5, 3\)"),
        ({"scales": good["scales"].double()}, "float64"),
        ({"group_size": 33}, "multiple of 32"),
        ({"group_size": 64}, r"need scales \(5, 2\)"),
        ({"values": good["values"].to(torch.int16)}, "values must be"),
        ({"values": good["values"][None]}, "values must be"),
        ({"bitmask": good["bitmask"][:, :1]}, "must be uint8"),
        ({"values": torch.empty_like(good["values"], device="meta")}, "share a device"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseWeight.from_tensors(70, **(good | change))
    with pytest.raises(BitmaskError, match="have no scales"):
        SparseWeight.from_tensors(70, **(parts(16) | {"scales": good["scales"]}))


def test_bad_weights_are_refused():
    weight = make_weight(3, 8)
    for call, message in (
        (lambda: SparseWeight.from_dense(weight, 6), "8 or 4 bits, got 6"),
        (lambda: SparseWeight.from_dense(weight, 8, 0), "multiple of 32"),
        (lambda: SparseWeight.from_dense(weight, 16, 64), "needs values of 8 or 4 bits"),
        (lambda: SparseWeight.from_dense(weight[0]), "made from"),
        (lambda: SparseWeight.from_dense(weight.double()), "float64"),
        (lambda: SparseWeight.from_dense(weight / 0, 8), "finite"),
        (lambda: weight_codes.encode(weight.double(), 8, None), "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("dtype", weight_codes.SCALE_DTYPES)
def test_scales_are_finite_and_not_negative(dtype):
    largest = torch.finfo(dtype).max
    good = torch.tensor([[0.0, 1.0, largest], [-0.0, 0.5, torch.finfo(dtype).tiny]], dtype=dtype)
    assert weight_codes.are_scales(good)
    assert weight_codes.are_scales(good[:, ::2])
    assert weight_codes.are_scales(good[:0])
    for bad in (math.nan, -math.nan, math.inf, -math.inf, -1.0, -torch.finfo(dtype).tiny):
        scales = good.clone()
        scales[1, 2] = bad
        assert not weight_codes.are_scales(scales), bad
