"""Triton's kernels of sparse weights are held to the readable reference, as those of the cache are.

By the interpreter, and with ``-m gpu`` on a CUDA device. Every format is in the matrix; shapes and
tiles take turns in it, because the interpreter is slow.
"""

import functools
import importlib.util
import itertools
import logging
import types
from dataclasses import replace

import pytest
import torch

from hf_adaptive_sparse.kernels import (
    sparse_linear,
    sparse_native,
    sparse_tiles,
    triton_device,
    triton_sparse,
    triton_sparse_plan,
)
from hf_adaptive_sparse.kernels.sparse_reference import linear as reference
from hf_adaptive_sparse.kernels.triton_sparse_plan import Tile
from hf_adaptive_sparse.packing import offsets
from hf_adaptive_sparse.packing.offsets import count_block_offsets
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.runtime import operator

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is optional and not installed here", allow_module_level=True)

FORMATS = [
    (dtype, bits, group)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for bits, group in ((16, None), (8, None), (8, 96), (4, None), (4, 128))
]
SHAPES = itertools.cycle([(6, 200), (5, 31), (5, 320), (6, 513), (4, 64), (3, 1), (5, 128)])
TILES = itertools.cycle([Tile(1, 1), Tile(2, 2), Tile(4, 1)])
CASES = [(*format, next(SHAPES), next(TILES)) for format in FORMATS]


def make_sparse(shape, dtype, bits=16, group=None, seed=0):
    """Half of the weights of each row, of the first none, and of the last all."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < 0.5] = 0
    weight[0] = 0
    weight[-1] = torch.randn(shape[1], generator=generator)
    return SparseWeight.from_dense(weight.to(dtype), bits, group)


def make_x(tokens, columns, dtype, seed=1):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(x, weight, device, bias=None):
    """Errors come from sums in float32 and from rounding the output."""
    expected = reference(x, weight, bias)
    given = None if bias is None else bias.to(device)
    found = triton_sparse.linear(x.to(device), weight.to(device), given).cpu()
    assert found.dtype == x.dtype
    assert found.is_contiguous()
    sizes = x.float().abs() @ weight.to_dense(torch.float32).abs().T
    rounding = 2e-6 * sizes + torch.finfo(x.dtype).eps * expected.abs()
    assert ((found.float() - expected).abs() <= rounding + torch.finfo(x.dtype).tiny).all()


@pytest.mark.parametrize(("dtype", "bits", "group", "shape", "tile"), CASES)
def test_products(device, monkeypatch, dtype, bits, group, shape, tile):
    monkeypatch.setattr(triton_sparse, "vector_tiles", lambda weight: [tile])
    weight = make_sparse(shape, dtype, bits, group)
    check(make_x(1, shape[1], dtype), weight, device)
    check(make_x(3, shape[1], dtype), weight, device, make_x(1, shape[0], dtype)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "group"), [(16, None), (8, None), (8, 64), (4, None), (4, 128), (8, 96)]
)
def test_whole_tiles_and_parts_of_them(device, monkeypatch, dtype, bits, group):
    """Rows that are whole tiles, none, or one and a part, of an odd number of rows, by each tile.

    With columns that 16 bytes of x are whole of, and groups of whole blocks, words are multiplied
    as they are: by the matrix units of a GPU.
    """
    tiles = triton_sparse.vector_tiles
    tokens = itertools.cycle((1, triton_sparse.MAX_TOKENS, 2, 3, 5))
    for columns, place in ((4096, 0), (2048, 1), (1056, 0), (1608, 1)):
        weight = make_sparse((3, columns), dtype, bits, group)
        monkeypatch.setattr(
            triton_sparse, "vector_tiles", lambda weight, place=place: [tiles(weight)[place]]
        )
        check(make_x(next(tokens), columns, dtype), weight, device)


def test_rows_that_keep_eight_warps_busy(device, monkeypatch):
    tiles = triton_sparse.vector_tiles
    assert len(tiles(make_sparse((3, 16_320), torch.float16))) == 3
    weight = make_sparse((3, 16_384), torch.float16)
    monkeypatch.setattr(triton_sparse, "vector_tiles", lambda weight: tiles(weight)[3:])
    assert [tile.warps for tile in triton_sparse.vector_tiles(weight)] == [8]
    check(make_x(1, 16_384, torch.float16), weight, device)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_products_with_a_part_of_the_rows(device, bits):
    """Its offsets count from the first value of all rows, and 4-bit ones may start in a byte."""
    whole = make_sparse((9, 130), torch.float32, bits).to(device)
    if device.type == "cuda":
        whole = replace(whole, block_offsets=sparse_linear.block_offsets_for(whole))
    x = make_x(2, 130, torch.float32)
    found = triton_sparse.linear(x.to(device), whole.part(3, 8)).cpu()
    expected = triton_sparse.linear(x.to(device), whole).cpu()[:, 3:8]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("dtype", "bits", "group", "shape", "tile"), CASES)
def test_decompression_is_exact(device, monkeypatch, dtype, bits, group, shape, tile):
    monkeypatch.setattr(triton_sparse_plan, "decompress_tile", lambda weight: tile)
    weight = make_sparse(shape, dtype, bits, group)
    for start, stop in ((0, shape[0]), (1, shape[0] - 1)):
        found = torch.full((stop - start, shape[1]), 7.0, dtype=dtype, device=device)
        triton_sparse.decompress(weight.to(device), start, stop, found)
        expected = weight.dense_rows(start, stop)
        if device.type == "cpu" and dtype == torch.bfloat16 and bits != 16:
            # Triton's interpreter cuts float32 to bfloat16, where devices round.
            expected = (expected.view(torch.int32) & -65536).view(torch.float32)
        assert torch.equal(found.cpu(), expected.to(dtype))


@pytest.mark.parametrize("columns", [0, 1, 64, 129, 1 << 16])
def test_block_offsets_count_what_lies_before(columns):
    """From 65,536 columns on they do not fit into 16 bits."""
    weight = make_sparse((3, columns), torch.float32)
    offsets = count_block_offsets(weight.bitmask, columns)
    assert offsets.dtype == (torch.int32 if columns == 1 << 16 else torch.int16)
    kept = (weight.to_dense() != 0).long()
    expected = (kept.cumsum(1) - kept)[:, ::64]
    assert torch.equal(
        offsets.long() & 0xFFFFFFFF & (0xFFFF if columns < 1 << 16 else -1), expected
    )


def test_rows_of_more_values_than_fit_into_16_bits(device):
    weight = SparseWeight.from_dense(torch.ones(1, 70_000))
    check(make_x(1, 70_000, torch.float32), weight, device)


@pytest.mark.parametrize("bits", [16, 4])
def test_offsets_of_64_bits_and_unaligned_tensors(device, monkeypatch, bits):
    monkeypatch.setattr(offsets, "offset_dtype", lambda nnz: torch.int64)
    weight = make_sparse((4, 96), torch.float32, bits).to(device)
    assert weight.row_offsets.dtype == torch.int64
    shifted = torch.empty(weight.bitmask.numel() + 1, dtype=torch.uint8, device=device)
    mask = shifted[1:].view_as(weight.bitmask).copy_(weight.bitmask)
    parts = (mask, weight.values, weight.row_offsets, weight.scales)
    moved = SparseWeight(weight.shape, *parts)
    x = torch.randn(2, 192, device=device)[:, ::2]
    found = triton_sparse.linear(x, moved)
    torch.testing.assert_close(found, triton_sparse.linear(x.contiguous(), weight))


@pytest.mark.parametrize("columns", [100, 512])
def test_what_is_not_finite_stays_so(device, columns):
    weight = make_sparse((4, columns), torch.bfloat16).to(device)
    x = make_x(2, columns, torch.bfloat16).to(device)
    x[0, 17] = torch.inf
    found = triton_sparse.linear(x, weight)
    assert not found[0].isfinite().any()  # zeros too, as in a dense product
    assert found[1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_weights(device, shape):
    weight = SparseWeight.from_dense(torch.zeros(shape)).to(device)
    x, bias = torch.ones(1, shape[1], device=device), torch.ones(shape[0], device=device)
    assert torch.equal(triton_sparse.linear(x, weight, bias), bias.expand(1, -1))


def test_the_operator_reaches_the_kernels(device, monkeypatch):
    """One and a few tokens by products, many by tiles that are decompressed in a kernel."""
    monkeypatch.setattr(sparse_native, "is_supported", lambda weight: False)
    monkeypatch.setattr(sparse_native, "takes", lambda x, weight, bias: False)
    monkeypatch.setattr(sparse_tiles, "TILE_BYTES", 2 * 70 * 4)
    names = ("vector_kernel", "decompress_kernel")
    kernels, seen = triton_sparse._kernels(), []

    class Watched:
        def __getattr__(self, name):
            seen.append(name)
            return getattr(kernels, name)

    monkeypatch.setattr(triton_sparse, "_kernels", Watched)
    weight = make_sparse((6, 70), torch.float32)
    for tokens in (1, triton_sparse.MAX_TOKENS, triton_sparse.MAX_TOKENS + 1):
        x = make_x(tokens, 70, torch.float32)
        found = operator.linear(x.to(device), weight.to(device), None).cpu()
        torch.testing.assert_close(found, reference(x, weight))
    assert set(seen) & set(names) == set(names)


def test_a_kernel_that_fails_is_told_once_and_replaced(device, monkeypatch, caplog):
    tries = []

    class Broken:
        def __getattr__(self, name):
            return self

        def __getitem__(self, grid):
            return self

        def __call__(self, *arguments, **constants):
            tries.append(constants)
            raise RuntimeError("out of resource: registers")

    monkeypatch.setattr(sparse_native, "is_supported", lambda weight: False)
    monkeypatch.setattr(sparse_native, "takes", lambda x, weight, bias: False)
    monkeypatch.setattr(triton_sparse, "_failures", {})
    monkeypatch.setattr(triton_sparse, "_chosen", {})
    monkeypatch.setattr(triton_sparse, "_kernels", Broken)
    triton_device.say_what_failed.cache_clear()
    weight, x = make_sparse((6, 70), torch.float32), make_x(1, 70, torch.float32)
    with caplog.at_level(logging.WARNING, logger=triton_sparse.__name__):
        for _ in range(3):
            found = sparse_linear.linear(x.to(device), weight.to(device)).cpu()
    torch.testing.assert_close(found, reference(x, weight))
    assert len(tries) == 2  # the product, and decompression in its place: once each
    assert [r.getMessage() for r in caplog.records if "registers" in r.getMessage()]
    assert len(caplog.records) == 1


def test_the_environment_switches_it_off(device, monkeypatch):
    weight = make_sparse((4, 64), torch.float32).to(device)
    assert triton_sparse.is_supported(weight)
    monkeypatch.setenv("HF_ADAPTIVE_SPARSE_KERNEL", "none")
    assert triton_sparse.is_supported(weight)  # a weight keeps its kernel
    assert not triton_sparse.is_supported(make_sparse((4, 64), torch.float32).to(device))


def test_the_fastest_tile_is_measured_once(device, monkeypatch):
    """Of those that run; small weights are not measured, and nothing while a graph is recorded."""
    kernels, ran, measured = triton_sparse._kernels(), [], []

    class Watched:
        vector_kernel = property(lambda self: self)

        def __getitem__(self, grid):
            return functools.partial(self.launch, grid)

        def launch(self, grid, *arguments, **constants):
            ran.append(constants["BLOCKS"])
            if constants["BLOCKS"] == 4:
                raise RuntimeError("out of resource")
            kernels.vector_kernel[grid](*arguments, **constants)

    def measure(function):
        function()
        measured.append(ran[-1])
        return {2: 3.0, 1: 2.0}[ran[-1]]

    tiles = [Tile(2, 1), Tile(4, 1), Tile(1, 1)]
    monkeypatch.setattr(triton_sparse, "vector_tiles", lambda weight: tiles)
    monkeypatch.setattr(triton_sparse, "_kernels", Watched)
    monkeypatch.setattr(triton_sparse, "_chosen", {})
    monkeypatch.setattr(triton_sparse, "_seconds", measure)
    weight = make_sparse((4, 256), torch.float32)
    for can, least, expected, measures in (
        (True, 1 << 20, 2, []),
        (False, 0, 2, []),
        (True, 0, 1, [2, 1]),
        (True, 0, 1, [2, 1]),
    ):
        if least == 0 and not can:
            triton_sparse._chosen.clear()
        monkeypatch.setattr(triton_sparse, "_can_measure", lambda device, can=can: can)
        monkeypatch.setattr(triton_sparse, "_TUNED_ELEMENTS", least)
        check(make_x(1, 256, torch.float32), weight, device)
        assert ran[-1] == expected
        assert measured == measures


def test_numbers_of_tokens_share_a_kernel(device, monkeypatch):
    """The next power of two; what is there beyond the tokens' memory is not touched."""
    compiled = []
    launch = triton_sparse.compile_and_launch

    def compile_and_launch(kernel, grid, arguments, constants):
        compiled.append(constants["TOKENS"])
        return launch(kernel, grid, arguments, constants)

    monkeypatch.setattr(triton_sparse, "compile_and_launch", compile_and_launch)
    monkeypatch.setattr(triton_sparse, "_chosen", {})
    weight = make_sparse((5, 128), torch.bfloat16).to(device)
    for tokens in range(1, triton_sparse.MAX_TOKENS + 1):
        memory = torch.full(
            (triton_sparse.MAX_TOKENS + 1, 128), torch.nan, device=device
        ).bfloat16()
        memory[:tokens] = make_x(tokens, 128, torch.bfloat16)
        found = triton_sparse.linear(memory[:tokens], weight)
        torch.testing.assert_close(
            found.float().cpu(),
            reference(memory[:tokens].cpu(), weight.to("cpu")),
            rtol=8e-3,
            atol=1e-5,
        )
    assert compiled == [1, 2, 4, 8]


def test_a_full_device_is_asked_to_measure_once(device, monkeypatch):
    tries = []

    def measure(function):
        tries.append(function)
        raise torch.OutOfMemoryError("no room to flush the cache")

    monkeypatch.setattr(triton_sparse, "_chosen", {})
    monkeypatch.setattr(triton_sparse, "_seconds", measure)
    monkeypatch.setattr(triton_sparse, "_can_measure", lambda device: True)
    monkeypatch.setattr(triton_sparse, "_TUNED_ELEMENTS", 0)
    weight = make_sparse((4, 64), torch.float32).to(device)
    x = make_x(1, 64, torch.float32).to(device)
    for _ in range(3):
        triton_sparse.linear(x, weight)
    assert len(tries) == 1


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "expected"),
    [
        (11008, 4096, 2048, 8192),  # four rounds of 132 processors, which have 128 x 256 each
        (4096, 11008, 2048, 2048),
        (4096, 11008, 8192, 2560),
        (8192, 28672, 2048, 2048),  # of more bytes than a tile should have
        (8192, 28672, 256, 1152),  # processors cannot be kept busy
        (8192, 1 << 20, 2048, 128),
        (100, 4096, 2048, 100),
        (100, 4096, 0, 100),
        (0, 64, 9, 0),
    ],
)
def test_tiles_on_a_gpu_keep_its_processors_busy(monkeypatch, rows, columns, tokens, expected):
    monkeypatch.setattr(sparse_tiles, "processors", lambda device: 132)
    weight = types.SimpleNamespace(
        shape=(rows, columns), dtype=torch.bfloat16, device=torch.device("cuda")
    )
    assert sparse_tiles._tile_rows(weight, weight.dtype, tokens) == expected
