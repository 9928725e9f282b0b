"""Every native path is held to the readable reference, over the format's whole range."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from torch.nn import functional

from hf_adaptive_sparse.kernels import library, sparse_calls, sparse_linear, sparse_native
from hf_adaptive_sparse.kernels.sparse_reference import linear as reference
from hf_adaptive_sparse.packing import offsets
from hf_adaptive_sparse.packing.offsets import count_row_offsets
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from tests.kernels.threads import differing

PATHS = library.available_paths()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = [  # each dtype as it is; codes with every kind of group, and each dtype with both widths
    *((dtype, 16, None) for dtype in DTYPES),
    (torch.bfloat16, 12, None),
    (torch.bfloat16, 8, None),
    (torch.float16, 8, 32),
    (torch.float32, 8, 96),
    (torch.bfloat16, 8, 320),
    (torch.float16, 4, None),
    (torch.bfloat16, 4, 64),
    (torch.float32, 4, 128),
]
COLUMNS = (1, 31, 64, 100, 513, 1100)
ROWS = 7

pytestmark = pytest.mark.skipif(not PATHS, reason="the native kernels are not built here")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, request.param)
    return request.param


def make_dense(columns, dtype, ratio=0.5, rows=ROWS, seed=0):
    """Random rows, the first of them empty and the last full; a few values are tiny."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.where(torch.rand(rows, columns, generator=generator) < 0.02, 1e-6, 1.0)
    weight[torch.rand(rows, columns, generator=generator) < ratio] = 0
    weight[0] = 0
    weight[-1] = torch.randn(columns, generator=generator)
    return weight.to(dtype)


def make_x(tokens, columns, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator).to(dtype)


def check(x, weight, bias=None):
    """Errors come from sums in float32, x on 15 bits where there are codes, and the output."""
    expected = reference(x, weight, bias)
    found = sparse_native.linear(x, weight, bias)
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    sizes = x.float().abs() @ weight.to_dense(torch.float32).abs().T
    rounding = 1e-6 * sizes
    if weight.scales is not None:
        # Half a step, as long as the largest x; generous where segments have smaller ones.
        kept = weight.to_dense(torch.float32).abs().sum(dim=1)
        rounding = rounding + x.float().abs().amax(dim=1, keepdim=True) / 65278 * 1.01 * kept
    rounding = rounding + torch.finfo(x.dtype).eps * expected.abs() + torch.finfo(x.dtype).tiny
    assert ((found.float() - expected).abs() <= rounding).all()
    return found


@pytest.mark.parametrize(("dtype", "bits", "group_size"), FORMATS)
def test_products(path, dtype, bits, group_size):
    for columns, ratio in itertools.product(COLUMNS, (0.0, 0.5, 0.95, 1.0)):
        rows = 40 if columns == 513 else ROWS  # more than are multiplied at a time, and fewer
        weight = SparseWeight.from_dense(make_dense(columns, dtype, ratio, rows), bits, group_size)
        for tokens in (1, 3, 17) if ratio == 0.5 else (2,):
            bias = make_dense(rows, dtype, rows=1)[0] if tokens != 2 else None
            check(make_x(tokens, columns, dtype), weight, bias)


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 320), (4, 32), (4, 64), (8, 2560)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [256, 448, 4224, 4260])
def test_rows_of_many_scales(path, dtype, bits, group_size, columns):
    weight = SparseWeight.from_dense(make_dense(columns, dtype, rows=20), bits, group_size)
    for tokens in (1, 2):
        x = make_x(tokens, columns, dtype)
        x[:, ::300] = 0
        check(x, weight)
        x[0, 1] = float("nan")
        assert sparse_native.linear(x, weight)[0].isnan().all()


@pytest.mark.parametrize(("dtype", "bits", "group_size"), FORMATS)
def test_decompression_is_exact(path, dtype, bits, group_size):
    for columns, ratio in itertools.product(COLUMNS, (0.0, 0.5, 1.0)):
        weight = SparseWeight.from_dense(make_dense(columns, dtype, ratio), bits, group_size)
        expected = weight.to_dense()
        for start, stop in itertools.combinations((0, 1, 4, ROWS), 2):
            found = torch.full((stop - start, columns), 7.0, dtype=dtype)
            sparse_native.decompress(weight, start, stop, found)
            assert torch.equal(found, expected[start:stop])


@pytest.mark.parametrize(("dtype", "bits", "group_size"), FORMATS)
def test_rows_are_decompressed_to_float32(path, dtype, bits, group_size):
    for columns in (45, 1100):
        weight = SparseWeight.from_dense(make_dense(columns, dtype), bits, group_size)
        found = torch.full((ROWS - 1, columns + 3), 7.0)
        sparse_native.decompress(weight, 1, ROWS, found[:, :columns])
        assert torch.equal(found[:, :columns], weight.to_dense()[1:].float())
        assert (found[:, columns:] == 7.0).all()


@pytest.mark.parametrize("bits", [16, 12, 8, 4])
def test_tokens_and_threads(path, bits):
    weight = SparseWeight.from_dense(make_dense(300, torch.bfloat16, rows=400), bits)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for tokens in (1, 2, 5, 15, 16, 17, 31, 32, 33, 70):
                x = make_x(tokens, 300, torch.bfloat16)
                together = check(x, weight)
                for token in range(0, tokens, 9):
                    alone = sparse_native.linear(x[token : token + 1], weight)
                    # One token is not summed by tiles, or not in that order of columns.
                    if path == "amx" or bits == 12:
                        torch.testing.assert_close(alone[0], together[token])
                    else:
                        assert torch.equal(alone[0], together[token])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_any_strides_of_x(path, bits):
    dtype = torch.float32
    weight = SparseWeight.from_dense(make_dense(100, dtype), bits)
    x = make_x(5, 100, dtype)
    expected = sparse_linear.linear(x, weight)
    wide = torch.zeros(5, 300, dtype=dtype)
    wide[:, 50:150] = x
    sparse = torch.zeros(5, 200, dtype=dtype)
    sparse[:, ::2] = x
    for strided in (
        wide[:, 50:150],
        sparse[:, ::2],
        x.T.contiguous().T,
        x[::2],
        x[:1].expand(5, 100),
    ):
        wanted = {3: expected[::2]}.get(strided.shape[0], expected)
        if strided.stride(0) == 0:
            wanted = expected[:1].expand(5, ROWS)
        assert torch.equal(sparse_linear.linear(strided, weight), wanted)


@pytest.mark.parametrize(("dtype", "bits", "group_size"), FORMATS)
def test_a_part_of_the_rows(path, dtype, bits, group_size):
    """Its offsets count from the first value of all rows; one of 4 bits may start in a byte."""
    for columns, rows in ((100, (1, 4)), (513, (19, 38))):
        dense = make_dense(columns, dtype, rows=40)
        part = SparseWeight.from_dense(dense, bits, group_size).part(*rows)
        for tokens in (1, 3):
            check(make_x(tokens, columns, dtype), part)
        found = torch.empty(part.shape, dtype=dtype)
        sparse_native.decompress(part, 0, part.shape[0], found)
        assert torch.equal(found, part.to_dense())


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_int64_offsets(path, bits, monkeypatch):
    dense = make_dense(300, torch.float32)
    narrow = SparseWeight.from_dense(dense, bits)
    monkeypatch.setattr(offsets, "offset_dtype", lambda nnz: torch.int64)
    wide = SparseWeight.from_dense(dense, bits)
    x = make_x(2, 300, torch.float32)
    assert wide.row_offsets.dtype == torch.int64
    assert torch.equal(sparse_native.linear(x, wide), sparse_native.linear(x, narrow))


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_stays_within_its_token_and_sign(path, bits):
    """Where rows are wider than what is taken at a time, tokens more, and groups smaller."""
    weight = SparseWeight.from_dense(make_dense(2080, torch.bfloat16), bits, 32)
    x = make_x(19, 2080, torch.bfloat16)
    expected = [sparse_native.linear(token[None], weight)[0] for token in x]
    x[4, 32], x[9, 2050] = torch.nan, torch.nan
    found = sparse_native.linear(x, weight)
    for token in range(19):
        if token in (4, 9):
            assert not found[token].isfinite().any()
        else:
            assert torch.equal(found[token], expected[token])


@pytest.mark.parametrize("bits", [16, 12, 8, 4])
def test_rows_of_several_pieces(path, bits):
    for columns in (4097, 5000):
        weight = SparseWeight.from_dense(make_dense(columns, torch.bfloat16), bits)
        x = make_x(9, columns, torch.bfloat16)
        found = check(x, weight)
        check(x[:1], weight)
        assert torch.equal(found[:5], sparse_native.linear(x[:5], weight))


@pytest.mark.parametrize("bits", [16, 12, 8, 4])
def test_what_is_not_finite_stays_so(path, bits):
    weight = SparseWeight.from_dense(make_dense(300, torch.bfloat16), bits)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = make_x(2, 300, torch.bfloat16)
        x[0, 17] = bad
        found = sparse_native.linear(x, weight)
        assert not found[0].isfinite().any()  # zeros too: a dense product has NaN there
        assert found[1].isfinite().all()


@pytest.mark.parametrize(
    ("bits", "dtype"), [(8, torch.bfloat16), (4, torch.float16), (4, torch.float32)]
)
def test_large_and_small_x_with_codes(path, bits, dtype):
    weight = SparseWeight.from_dense(make_dense(600, dtype), bits)
    for magnitude in (0.0, 1e-4, 1e2):
        check((make_x(2, 600, torch.float32) * magnitude).to(dtype), weight)
    x = make_x(2, 600, torch.float32)
    x[:, 5] = 3e3  # an outlier in the first segment costs precision there and nowhere else
    weight = SparseWeight.from_dense(make_dense(600, dtype)[1:], bits)
    found, expected = sparse_native.linear(x.to(dtype), weight), reference(x.to(dtype), weight)
    torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=2.0)


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        (16, torch.bfloat16),
        (16, torch.float16),
        (12, torch.bfloat16),
        (8, torch.bfloat16),
        (4, torch.bfloat16),
    ],
)
def test_the_error_is_no_larger_than_that_of_torchs_own_product(path, bits, dtype):
    """Both against float32, over all outputs of one layer."""
    weight = SparseWeight.from_dense(make_dense(2048, dtype, rows=300), bits, None)
    x = make_x(4, 2048, dtype)
    exact = reference(x, weight)
    own = functional.linear(x, weight.to_dense()).float() - exact
    ours = sparse_native.linear(x, weight).float() - exact
    assert ours.pow(2).mean() <= own.pow(2).mean() * 1.001
    assert ours.abs().max() <= own.abs().max() * 1.001


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 64)])
def test_rounding_x_is_little_beside_rounding_the_weights(path, bits, group_size):
    """In a float32 model, which could tell."""
    dense = make_dense(2048, torch.float32, rows=300)
    weight = SparseWeight.from_dense(dense, bits, group_size)
    x = make_x(4, 2048, torch.float32)
    exact = reference(x, weight)
    of_weights = (exact - x.double() @ dense.double().T).pow(2).mean().sqrt()
    of_x = (sparse_native.linear(x, weight) - exact).pow(2).mean().sqrt()
    assert of_x <= 0.02 * of_weights


@pytest.mark.parametrize("columns", [64, 100, 513, 1100])
def test_every_bit_pattern_comes_back_from_12_bits(path, columns):
    """Most of these upper bytes have no code, so that exceptions lie side by side."""
    generator = torch.Generator().manual_seed(2)
    patterns = torch.randint(-(2**15), 2**15, (40, columns), generator=generator)
    dense = patterns.to(torch.int16).masked_fill(patterns % 3 == 0, 0).view(torch.bfloat16)
    weight = SparseWeight.from_dense(dense, 12)
    assert weight.codebook.numel() > weight.nnz // 2
    for start, stop in ((0, 40), (7, 30), (39, 40)):
        found = torch.empty(stop - start, columns, dtype=torch.bfloat16)
        sparse_native.decompress(weight, start, stop, found)
        assert torch.equal(found.view(torch.int16), dense[start:stop].view(torch.int16))


@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_exceptions_are_multiplied_where_they_belong(path, tokens):
    """In the first and last column, in neighbours, and behind rows without any."""
    dense = make_dense(1100, torch.bfloat16, rows=40)
    places = [(2, 0), (2, 1), (2, 1099), (20, 511), (20, 512), (20, 513), (38, 1000), (39, 1099)]
    for row, column in places:
        dense[row, column] = 2.0**60
    weight = SparseWeight.from_dense(dense, 12)
    x = make_x(tokens, 1100, torch.bfloat16)
    check(x, weight)
    plain = sparse_native.linear(x, weight.plain())
    torch.testing.assert_close(sparse_native.linear(x, weight), plain, rtol=0.01, atol=0.01)
    check(x, weight.part(20, 39))


def test_exceptions_replace_what_their_codes_stand_for(path):
    """Lower bytes from 0x80 on make normal numbers with code 0; and a file may say anything."""
    dense = make_dense(256, torch.bfloat16)
    dense[1, :4] = torch.tensor([0x0091, 0x00C0, 0x7F00, 0x1234], dtype=torch.int16).view(
        torch.bfloat16
    )
    weight = SparseWeight.from_dense(dense, 12)
    count = weight.nnz
    numbers = torch.tensor([5, 6, count - 1]) << 16
    halves = torch.tensor([1.0, -2.0, 0.5]).bfloat16().view(torch.int16).long() & 0xFFFF
    weight.codebook.resize_(2).resize_(5)[2:] = numbers | halves  # of values that have codes, too
    for tokens in (1, 2):
        for column in range(0, 256, 5):
            x = torch.zeros(tokens, 256, dtype=torch.bfloat16)
            x[:, column] = 3.0
            found = sparse_native.linear(x, weight)
            torch.testing.assert_close(found.float(), reference(x, weight), rtol=0.01, atol=0)


def test_several_threads_at_once(path):
    """Calls from different Python threads share nothing."""
    weights = [
        SparseWeight.from_dense(make_dense(300, torch.float32, rows=200, seed=i)) for i in range(4)
    ]
    calls = [(make_x(1 + i, 300, torch.float32), weight) for i, weight in enumerate(weights)]
    expected = [sparse_native.linear(*call) for call in calls]
    assert differing(sparse_native.linear, calls, expected) == []


def test_the_call_structure_is_that_of_the_library():
    size = library.library().has_sparse_call_size_bytes()
    assert size == ctypes.sizeof(sparse_calls.Call)


def test_sizes_that_the_library_refuses(path, monkeypatch):
    weight = SparseWeight.from_dense(make_dense(64, torch.float32))
    monkeypatch.setattr(sparse_native, "MAX_TOKENS", sparse_native.MAX_TOKENS + 1)
    with pytest.raises(RuntimeError, match="sizes are out of range"):
        sparse_native.linear(make_x(sparse_native.MAX_TOKENS, 64, torch.float32), weight)


def test_data_of_another_dtype_are_not_taken_for_the_old_ones(path):
    """``parameter.data = parameter.data.float()`` leaves the parameter what it was."""
    weight = SparseWeight.from_dense(make_dense(96, torch.bfloat16))
    x = make_x(2, 96, torch.bfloat16)
    assert sparse_native.takes(x, weight, None)
    weight.values.data = weight.values.data.float()
    assert not sparse_native.takes(x, weight, None)
    found = sparse_native.linear(x.float(), weight)
    assert torch.allclose(found, reference(x.float(), weight), atol=1e-4)


def test_what_a_kernel_takes(path):
    weight = SparseWeight.from_dense(make_dense(96, torch.bfloat16))
    rows, most = weight.shape[0], sparse_native.tokens_that_pay(weight)
    x, bias = make_x(most, 96, torch.bfloat16), torch.zeros(rows, dtype=torch.bfloat16)
    assert sparse_native.takes(x, weight, bias)
    for other_x, other_bias in (
        (make_x(most + 1, 96, torch.bfloat16), bias),
        (x[:0], bias),
        (x[:, 1:], bias),
        (x.float(), bias),
        (x.to("meta"), bias),
        (torch.tensor(1.0, dtype=torch.bfloat16), bias),
        (x, bias[1:]),
        (x, bias.float()),
        (x, bias.to("meta")),
        (x, bias[None]),
    ):
        assert not sparse_native.takes(other_x, weight, other_bias)
    coded = SparseWeight.from_dense(make_dense(96, torch.float32), 8)
    assert sparse_native.takes(make_x(1, 96, torch.float32), coded, None)


def test_leading_dimensions_and_strides_of_x(path):
    weight = SparseWeight.from_dense(make_dense(96, torch.float32))
    x = make_x(6, 96, torch.float32)
    expected = sparse_native.linear(x, weight)
    for same in (x.view(2, 3, 96), x.view(1, 6, 1, 96), x.T.contiguous().T):
        found = sparse_native.linear(same, weight)
        assert found.shape == (*same.shape[:-1], weight.shape[0])
        assert torch.equal(found.view(expected.shape), expected)
    wide = torch.cat([x, x], dim=1)[:, :96]
    assert torch.equal(sparse_native.linear(wide, weight), expected)
    one = sparse_native.linear(x[0], weight)
    assert one.shape == (weight.shape[0],)


def test_without_a_path_there_is_no_kernel(monkeypatch):
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "none")
    weight = SparseWeight.from_dense(make_dense(64, torch.float32))
    assert not sparse_native.is_supported(weight)
    assert sparse_native.tokens_that_pay(weight) == 0
    with pytest.raises(ValueError, match="no native library"):
        sparse_native.linear(make_x(1, 64, torch.float32), weight)


def test_how_many_tokens_pay_is_the_processors_matter(path):
    ice_lake = path == "avx512" and not library.multiplies(torch.bfloat16)
    few = 32 if path in ("avx2", "avx512f") or ice_lake else 8
    unit = path == "amx"
    for dtype, bits, group_size, expected in (
        (torch.bfloat16, 16, None, 32 if unit else few),
        (torch.float16, 16, None, few),
        (torch.bfloat16, 8, None, 64 if unit else few),
        (torch.bfloat16, 8, 96, few),
        (torch.float16, 4, 64, 128 if unit else few),
        (torch.float32, 16, None, few),
        (torch.float32, 8, None, 128 if unit else few),
    ):
        weight = SparseWeight.from_dense(make_dense(128, dtype), bits, group_size)
        assert sparse_native.tokens_that_pay(weight) == expected


def test_row_offsets_are_counted():
    for rows, row_bytes in ((0, 3), (1, 1), (5, 8), (3000, 21), (7, 4000)):
        bitmask = torch.randint(0, 256, (rows, row_bytes), dtype=torch.uint8)
        counted = sparse_native.count_row_offsets(bitmask)
        expected = count_row_offsets(bitmask)
        assert counted is not None
        assert torch.equal(counted, expected)
        assert counted.dtype == expected.dtype
    assert sparse_native.count_row_offsets(torch.ones(6, 8, dtype=torch.uint8)[:, ::2]) is None
