"""Products of many tokens on the matrix unit against those of decompressed weights."""

import itertools

import pytest
import torch
from torch.nn import functional

from hf_adaptive_sparse.kernels import (
    library,
    scratch,
    sparse_linear,
    sparse_many,
    sparse_native,
    sparse_tiles,
)
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from tests.kernels.threads import differing

FORMATS = [(16, None), (12, None), (8, None), (8, 128), (4, 96), (4, None)]
HAS_UNIT = "amx" in library.available_paths()
needs_unit = pytest.mark.skipif(not HAS_UNIT, reason="this machine has no matrix unit (AMX)")


@pytest.fixture
def unit(monkeypatch):
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "amx")


def make_dense(rows, columns, dtype=torch.bfloat16, seed=0):
    """Random rows, half of each kept; the first is empty and the last full."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    gone = torch.rand(rows, columns, generator=generator) < 0.5
    gone[0], gone[-1] = True, False
    return weight.masked_fill_(gone, 0.0).to(dtype)


def make_x(tokens, columns, seed=1):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def check(x, weight, bias=None):
    """Weights are what decompression says; errors come from sums in float32 and from the output."""
    dense = weight.to_dense().float()
    expected = functional.linear(x.float(), dense, None if bias is None else bias.float())
    found = sparse_many.linear(x, weight, bias)
    assert found.shape == expected.shape
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
    sizes = x.float().abs() @ dense.abs().T
    rounding = 2e-6 * sizes + torch.finfo(torch.bfloat16).eps * expected.abs()
    assert ((found.float() - expected).abs() <= rounding + 1e-30).all()
    return found


@needs_unit
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_products(unit, bits, group_size):
    for rows, columns in ((7, 1), (16, 31), (33, 96), (49, 513), (200, 1100)):
        weight = SparseWeight.from_dense(make_dense(rows, columns), bits, group_size)
        bias = make_x(1, rows)[0]
        for tokens in (1, 15, 16, 17, 33, 70):
            check(make_x(tokens, columns), weight, bias if tokens != 16 else None)


@needs_unit
@pytest.mark.parametrize("bits", [16, 12, 8])
@pytest.mark.parametrize("columns", [2048, 2049, 4096, 4260])
def test_rows_that_are_gone_through_in_turns(unit, bits, columns):
    """More columns than stay in the cache at once, so that sums wait in memory."""
    weight = SparseWeight.from_dense(make_dense(150, columns), bits)
    for tokens in (16, 50):
        check(make_x(tokens, columns), weight, make_x(1, 150)[0])


@needs_unit
def test_nothing_is_read_that_was_not_written(unit):
    for columns in (40, 2100):
        weight, x = SparseWeight.from_dense(make_dense(45, columns)), make_x(35, columns)
        scratch.scratch(scratch.KEPT_BYTES).fill_(255)  # NaN in every dtype
        check(x, weight)


@needs_unit
def test_what_is_not_finite_stays_with_its_token(unit):
    weight, x = SparseWeight.from_dense(make_dense(45, 100)), make_x(40, 100)
    x[3, 50], x[20, 7] = float("nan"), float("inf")
    found = sparse_many.linear(x, weight)
    assert found[3].isnan().all()
    assert not found[20, 1:].isfinite().any()  # 0 * inf is NaN, as in a dense product
    others = [t for t in range(40) if t not in (3, 20)]
    assert found[others].isfinite().all()


@needs_unit
@pytest.mark.parametrize("bits", [16, 8])
def test_threads_and_parts_make_no_difference(unit, bits, monkeypatch):
    weight = SparseWeight.from_dense(make_dense(400, 2500), bits)
    x = make_x(150, 2500)
    expected = check(x, weight)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 300):
            torch.set_num_threads(threads)
            assert torch.equal(sparse_many.linear(x, weight), expected)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(sparse_many, "MOST_BYTES", 1)
    for least in (16, 40, 149):
        monkeypatch.setattr(sparse_many, "LEAST_TOKENS", least)
        assert torch.equal(sparse_many.linear(x, weight), expected)


@needs_unit
def test_strides_of_x(unit):
    weight, x = SparseWeight.from_dense(make_dense(20, 96)), make_x(40, 96)
    expected = sparse_many.linear(x, weight)
    for same in (
        torch.cat([x, x], dim=1)[:, :96],
        x.T.contiguous().T,
        x[:, None].expand(-1, 2, -1),
    ):
        found = sparse_many.linear(same if same.dim() == 2 else same[:, 0], weight)
        assert torch.equal(found, expected)


@needs_unit
def test_nothing_to_multiply(unit):
    weight, bias = SparseWeight.from_dense(make_dense(20, 96)), make_x(1, 20)[0]
    assert sparse_many.linear(make_x(0, 96), weight, bias).shape == (0, 20)
    empty = SparseWeight.from_dense(torch.zeros(20, 0, dtype=torch.bfloat16))
    assert torch.equal(sparse_many.linear(make_x(3, 0), empty, bias), bias.expand(3, -1))
    assert not sparse_many.linear(make_x(3, 0), empty).any()


@needs_unit
def test_threads_of_python_do_not_share_memory(unit):
    weights = [SparseWeight.from_dense(make_dense(300, 500, seed=i)) for i in range(4)]
    calls = [(make_x(90, 500, seed=i), weight) for i, weight in enumerate(weights)]
    expected = [sparse_many.linear(*call) for call in calls]
    assert differing(sparse_many.linear, calls, expected) == []


@needs_unit
@pytest.mark.parametrize("bits", [16, 12, 8, 4])
def test_many_tokens_of_a_layer_come_here(unit, bits, monkeypatch):
    weight = SparseWeight.from_dense(make_dense(40, 96), bits)
    most = sparse_native.tokens_that_pay(weight)
    seen = []
    for module in (sparse_native, sparse_many, sparse_tiles):
        kernel = module.linear
        monkeypatch.setattr(
            module,
            "linear",
            lambda *args, name=module.__name__, kernel=kernel: seen.append(name) or kernel(*args),
        )
    few = sparse_linear.linear(make_x(most, 96).view(1, most, 96), weight)
    many = sparse_linear.linear(make_x(most + 1, 96).view(1, most + 1, 96), weight)
    assert seen == [sparse_native.__name__, sparse_many.__name__]
    assert (few.shape, many.shape) == ((1, most, 40), (1, most + 1, 40))


@pytest.mark.skipif(not library.available_paths(), reason="the native kernels are not built here")
@pytest.mark.parametrize("path", library.available_paths())
def test_what_is_taken(path, monkeypatch):
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, path)
    for dtype, bits in itertools.product((torch.bfloat16, torch.float16, torch.float32), (16, 8)):
        weight = SparseWeight.from_dense(make_dense(40, 96, dtype), bits)
        assert sparse_many.takes(weight) == (path == "amx" and dtype == torch.bfloat16)
        if not sparse_many.takes(weight):
            with pytest.raises(RuntimeError, match="sizes are out of range"):
                sparse_many.linear(torch.ones(3, 96, dtype=dtype), weight)
