"""The dispatcher of products with sparse weights: shapes, bad input, gradient."""

from __future__ import annotations

import threading

import pytest
import torch

from hf_adaptive_sparse.kernels import library, sparse_linear, sparse_native, sparse_tiles
from hf_adaptive_sparse.kernels.sparse_reference import linear as reference
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight


@pytest.fixture(params=["auto", "none"], autouse=True)
def path(request, monkeypatch):
    """With the native kernels, where they are built, and in torch alone."""
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, request.param)
    return request.param


def make_sparse(rows, columns, bits=16, dtype=torch.float32, seed=0, ratio=0.5, group_size=None):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < ratio] = 0
    return SparseWeight.from_dense(weight.to(dtype), bits, group_size)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5), (0,), (2, 0, 3), (40,)])
def test_leading_dimensions(bits, shape):
    weight = make_sparse(6, 70, bits)
    x, bias = torch.randn(*shape, 70), torch.randn(6)
    for given in (None, bias):
        found = sparse_linear.linear(x, weight, given)
        assert found.shape == (*shape, 6)
        assert found.is_contiguous()
        torch.testing.assert_close(found, reference(x, weight, given), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_weights(shape):
    weight = SparseWeight.from_dense(torch.zeros(shape))
    for tokens in (0, 2, 40):
        found = sparse_linear.linear(torch.ones(tokens, shape[1]), weight)
        assert torch.equal(found, torch.zeros(tokens, shape[0]))
        back = sparse_linear.input_gradient(torch.ones(tokens, shape[0]), weight)
        assert torch.equal(back, torch.zeros(tokens, shape[1]))


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("tile_rows", [1, 4, 100])
def test_tiles(monkeypatch, bits, tile_rows):
    monkeypatch.setattr(sparse_tiles, "TILE_BYTES", tile_rows * 45 * 4)
    weight = make_sparse(10, 45, bits)
    x, gradient, bias = torch.randn(133, 45), torch.randn(133, 10), torch.randn(10)
    found = sparse_linear.linear(x, weight, bias)  # more tokens than a kernel takes
    torch.testing.assert_close(found, reference(x, weight, bias))
    back = sparse_linear.input_gradient(gradient, weight)
    torch.testing.assert_close(back, gradient @ weight.to_dense(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiles_of_what_the_processor_does_not_multiply_are_float32(monkeypatch, dtype):
    monkeypatch.setattr(sparse_tiles, "multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(sparse_tiles, "TILE_BYTES", 4 * 45 * 4)
    dense = make_sparse(10, 45).to_dense().to(dtype)
    weight = SparseWeight.from_dense(dense)
    x, gradient, bias = torch.randn(33, 45), torch.randn(33, 10), torch.randn(10)
    x, gradient, bias = x.to(dtype), gradient.to(dtype), bias.to(dtype)
    found = sparse_tiles.linear(x, weight, bias)
    expected = x.float() @ dense.float().T + bias.float()
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)
    without = sparse_tiles.linear(x, weight)
    expected = (x.float() @ dense.float().T).to(dtype)
    torch.testing.assert_close(without, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    back = sparse_tiles.input_gradient(gradient, weight)
    expected = (gradient.float() @ dense.float()).to(dtype)
    torch.testing.assert_close(back, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("bits", [12, 8, 4])
def test_float32_tiles_hold_what_the_weights_dtype_holds(path, monkeypatch, bits):
    monkeypatch.setattr(sparse_tiles, "multiplies", lambda dtype: dtype == torch.float32)
    weight = SparseWeight.from_dense(make_sparse(10, 45).to_dense().bfloat16(), bits)
    monkeypatch.setattr(sparse_tiles, "TILE_BYTES", 4 * 45 * 4)
    tiles = [tile.clone() for _, _, tile in sparse_tiles._tiles(weight, torch.float32, 1)]
    assert torch.equal(torch.cat(tiles), weight.to_dense().float())


def test_tiles_are_whole_multiples_of_what_a_product_takes(monkeypatch):
    weight = make_sparse(300, 45)
    for rows, expected in ((3, [3] * 100), (64, [64] * 4 + [44]), (191, [128, 128, 44])):
        monkeypatch.setattr(sparse_tiles, "TILE_BYTES", rows * 45 * 4)
        found = [stop - start for start, stop, _ in sparse_tiles._tiles(weight, weight.dtype, 1)]
        assert found == expected


def test_the_buffer_serves_inside_and_outside_of_inference_mode():
    weight, x = make_sparse(10, 45), torch.randn(33, 45)
    results = []
    done = threading.Thread(target=lambda: results.extend(in_both_modes(x, weight)))
    done.start()  # a thread of its own starts without a buffer
    done.join()
    assert torch.equal(results[0], results[1])


def in_both_modes(x, weight):
    with torch.inference_mode():
        inside = sparse_linear.linear(x, weight)
    return inside.clone(), sparse_linear.linear(x, weight)


def test_going_without_a_kernel_is_said_once(path, monkeypatch, caplog):
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "none")
    sparse_linear._say_why_not.cache_clear()
    weight = make_sparse(6, 70)
    for tokens in (1, 2, 40):
        sparse_linear.linear(torch.ones(tokens, 70), weight)
    assert caplog.text.count("No kernel for sparse weights on cpu") == 1


@pytest.mark.skipif(not library.available_paths(), reason="the native kernels are not built here")
def test_few_tokens_go_through_the_kernel(path, monkeypatch):
    seen = []
    kernel = sparse_linear.sparse_native.linear
    monkeypatch.setattr(
        sparse_linear.sparse_native, "linear", lambda *args: seen.append(args) or kernel(*args)
    )
    weight = make_sparse(6, 70)
    most = sparse_native.tokens_that_pay(weight) or 8
    for tokens in (1, most, most + 1):
        sparse_linear.linear(torch.ones(tokens, 70), weight)
    assert [len(call[0]) for call in seen] == ([] if path == "none" else [1, most])


def test_bad_input_is_refused():
    weight = make_sparse(6, 70)
    x = torch.ones(2, 70)
    for call, message in (
        (lambda: sparse_linear.linear(x[:, 1:], weight), "dimension of 70"),
        (lambda: sparse_linear.linear(torch.tensor(1.0), weight), "dimension of 70"),
        (lambda: sparse_linear.linear(x.half(), weight), "must be torch.float32"),
        (lambda: sparse_linear.linear(x.to("meta"), weight), "on meta"),
        (lambda: sparse_linear.linear(x, weight, torch.ones(7)), "bias must end in"),
        (lambda: sparse_linear.input_gradient(x, weight), "gradient must end in"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
