"""Every native path is held to the readable reference, over the format's whole range."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from hf_adaptive_sparse.kernels import attention, library
from hf_adaptive_sparse.kernels.packed import PackedBlocks, PackedCache
from hf_adaptive_sparse.kernels.reference import attention as reference
from hf_adaptive_sparse.kvcache.attention import pin_pair
from hf_adaptive_sparse.kvcache.selection import key_codec, value_codec
from hf_adaptive_sparse.kvcache.store import TokenStore

BITS = (2, 3, 4, 6, 8)
HEAD_SIZES = (64, 72, 80, 96, 128, 256)
PATHS = library.available_paths()

pytestmark = pytest.mark.skipif(not PATHS, reason="the native kernels are not built here")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, request.param)
    return request.param


def make_pair(
    length,
    *,
    batch=1,
    kv_heads=2,
    head_dim=64,
    value_dim=None,
    key_bits=8,
    value_bits=8,
    block=128,
    dtype=torch.float32,
    key_mode="channel",
    group_size=64,
    sinks=0,
    seed=0,
):
    """Random keys (some channels with a large bias, as Qwen2.5 has) and values, stored."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(1, kv_heads, 1, head_dim, generator=generator) * 3
    keys = torch.randn(batch, kv_heads, length, head_dim, generator=generator) + bias
    values = torch.randn(batch, kv_heads, length, value_dim or head_dim, generator=generator)
    stores = []
    for states, codec in (
        (keys, key_codec(key_bits, key_mode, group_size)),
        (values, value_codec(value_bits, group_size)),
    ):
        store = TokenStore(codec, block, states.to(dtype), sinks)
        store.commit(store.prepare(states.to(dtype), "states"))
        stores.append(store)
    return stores


def pinned(stores, newest=None):
    return pin_pair(*stores, newest)


def decoded(pinned_states):
    """The stored states without rounding to the model's dtype: what the kernels compute with."""
    exact = pinned_states.raw.float()
    encoded = pinned_states.blocks
    shape = (encoded.block_length, exact.shape[-1])
    blocks = encoded.codec.decode(encoded.parts, shape, torch.float32)
    pieces = [blocks[:, :, i, :length] for i, length in enumerate(encoded.lengths)]
    sinks = pinned_states.sinks
    whole = torch.cat([exact[:, :, :sinks], *pieces, exact[:, :, sinks:]], dim=2)
    return whole[:, :, pinned_states.skip :]


def make_query(pair, heads, queries=1, seed=1):
    raw = pair.keys.raw
    generator = torch.Generator().manual_seed(seed)
    shape = (raw.shape[0], heads, queries, raw.shape[-1])
    return torch.randn(shape, generator=generator).to(raw.dtype)


def check(pair, query, mask=None, *, is_causal=False, scale=None, sharpness=1.0):
    """Errors come from rounding the vectors to 14 bits, and the output to its dtype.

    They grow with the scores, of which ``sharpness`` says how much larger than usual they are.
    """
    keys, values = decoded(pair.keys), decoded(pair.values)
    expected = reference(query, keys, values, mask, is_causal=is_causal, scale=scale)
    output = attention.attend(query, pair.packed, mask, is_causal=is_causal, scale=scale)
    assert output.dtype == query.dtype
    assert output.shape == expected.shape
    size = values.abs().max().clamp(min=1e-6)
    bound = 4e-4 * sharpness * size + torch.finfo(query.dtype).eps * expected.abs()
    assert ((output.float() - expected).abs() <= bound).all()
    return output


@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize("key_bits", BITS)
def test_bits_and_head_sizes(path, key_bits, head_dim):
    for value_bits in BITS:
        stores = make_pair(300, key_bits=key_bits, value_bits=value_bits, head_dim=head_dim)
        pair = pinned(stores)
        check(pair, make_query(pair, heads=2))


@pytest.mark.parametrize("length", [128, 129, 255, 256, 257, 1000, 1152])
@pytest.mark.parametrize("repeats", [1, 2, 3, 7, 16, 20])
def test_lengths_and_gqa_ratios(path, length, repeats):
    pair = pinned(make_pair(length, key_bits=6, value_bits=8, kv_heads=3, batch=2))
    check(pair, make_query(pair, heads=3 * repeats))


@pytest.mark.parametrize("block", [1, 5, 16, 33, 64, 100, 128, 200, 1024])
@pytest.mark.parametrize("head_dim", [8, 16, 24, 72])
def test_block_lengths_and_small_heads(path, block, head_dim):
    bits = {1: 3, 5: 3, 16: 2, 33: 6, 64: 4, 100: 6, 128: 2, 200: 3, 1024: 8}[block]
    stores = make_pair(
        block * 2 + 7, key_bits=bits, value_bits=bits, block=block, head_dim=head_dim, group_size=10
    )
    pair = pinned(stores)
    check(pair, make_query(pair, heads=4, queries=2))


@pytest.mark.parametrize("group_size", [7, 32, 64, 100])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("key_mode", ["token", "channel"])
def test_groups(path, key_mode, head_dim, group_size):
    for bits in BITS:
        stores = make_pair(
            200,
            key_bits=bits,
            value_bits=bits,
            block=64,
            head_dim=head_dim,
            key_mode=key_mode,
            group_size=group_size,
        )
        pair = pinned(stores)
        check(pair, make_query(pair, heads=4))


@pytest.mark.parametrize("queries", [1, 2, 5, 8])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool], ids=str
)
def test_masks(path, dtype, queries):
    pair = pinned(make_pair(333, batch=3, key_bits=6, value_bits=6))
    query = make_query(pair, heads=4, queries=queries)
    generator = torch.Generator().manual_seed(2)
    seen = torch.rand(3, 4, queries, 333, generator=generator) < 0.7
    seen[0, :, :, :200] = False  # left padding, longer than a block
    mask = seen
    if dtype != torch.bool:
        bias = torch.randn(seen.shape, generator=generator)
        mask = torch.where(seen, bias, -torch.inf).to(dtype)
    check(pair, query, mask)
    check(pair, query, mask[:, :1])  # shared by all heads
    check(pair, query, mask[:1, :1, :1])
    check(pair, query, mask.transpose(0, 1).contiguous().transpose(0, 1))  # strides of its own
    if dtype != torch.bool:
        lowest = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)  # as transformers' eager
        check(pair, query, lowest)


def test_a_query_that_sees_nothing_gets_zeros(path):
    pair = pinned(make_pair(300))
    mask = torch.ones(1, 1, 2, 300, dtype=torch.bool)
    mask[..., 1, :] = False
    output = check(pair, make_query(pair, heads=2, queries=2), mask)
    assert output[:, :, 0].abs().min() > 0
    assert (output[:, :, 1] == 0).all()


@pytest.mark.parametrize("queries", [1, 3, 8])
def test_causal_is_aligned_as_in_torch(path, queries):
    pair = pinned(make_pair(140))
    query = make_query(pair, heads=2, queries=queries)
    output = check(pair, query, is_causal=True)
    keys, values = decoded(pair.keys), decoded(pair.values)
    torches = scaled_dot_product_attention(query, keys, values, is_causal=True)
    torch.testing.assert_close(output, torches, rtol=1e-3, atol=1e-3)


def test_scale(path):
    pair = pinned(make_pair(300, key_bits=4))
    for scale in (0.0, 0.3, 1.0):
        check(pair, make_query(pair, heads=2), scale=scale)


@pytest.mark.parametrize("sinks", [1, 4, 127])
def test_sinks(path, sinks):
    pair = pinned(make_pair(400, sinks=sinks, key_bits=4, value_bits=3))
    assert pair.packed.sinks == sinks
    check(pair, make_query(pair, heads=4))


@pytest.mark.parametrize("newest", [1, 20, 44, 45, 150, 299, 300])
def test_only_the_newest_tokens_are_seen(path, newest):
    pair = pinned(make_pair(300, block=64, sinks=3), newest)
    mask = torch.rand(1, 1, 1, newest) < 0.5
    mask[..., -1] = True
    check(pair, make_query(pair, heads=2))
    check(pair, make_query(pair, heads=2), mask)


@pytest.mark.parametrize("removed", [1, 60, 70, 100, 170])
def test_short_blocks(path, removed):
    stores = make_pair(300, block=64, key_bits=6, value_bits=6)
    for store in stores:
        store.remove_newest(removed)
        again = torch.randn(1, 2, 90, 64)
        store.commit(store.prepare(again, "states"))
    pair = pinned(stores)
    assert pair.packed.length == 390 - removed
    mask = torch.rand(1, 1, 1, 390 - removed) < 0.5
    check(pair, make_query(pair, heads=2))
    check(pair, make_query(pair, heads=2), mask)


def test_keys_and_values_of_different_widths(path):
    for key_dim, value_dim in ((192, 128), (64, 96), (16, 40)):
        pair = pinned(make_pair(200, head_dim=key_dim, value_dim=value_dim))
        check(pair, make_query(pair, heads=4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_closer_than_torch_in_16_bits(path, dtype, bits):
    """Root-mean-square error to exact attention over what is stored, ours at most torch's."""
    pair = pinned(make_pair(1500, kv_heads=8, key_bits=bits, value_bits=bits, dtype=dtype))
    query = make_query(pair, heads=8)
    expected = reference(query, decoded(pair.keys), decoded(pair.values))
    ours = check(pair, query).float() - expected
    torches = scaled_dot_product_attention(query, pair.keys.decode(), pair.values.decode())
    assert ours.square().mean() <= (torches.float() - expected).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_strided_queries_and_extreme_numbers(path, dtype):
    pair = pinned(make_pair(300, head_dim=64, kv_heads=2, dtype=dtype))
    query = make_query(pair, heads=4, queries=3)
    expected = attention.attend(query, pair.packed)
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attention.attend(strided, pair.packed), expected)
    columns = query.mT.contiguous().mT
    assert torch.equal(attention.attend(columns, pair.packed), expected)
    for factor in (0.0, 1e-4, 30.0):
        check(pair, query * factor, sharpness=max(1.0, factor))


def test_a_query_that_is_not_finite_gives_nan(path):
    pair = pinned(make_pair(300))
    query = make_query(pair, heads=4)
    query[0, 1, 0, 3] = torch.nan
    query[0, 2, 0, 3] = torch.inf
    output = attention.attend(query, pair.packed)
    assert output[0, 1].isnan().all()
    assert output[0, 2].isnan().all()
    assert output[0, ::3].isfinite().all()


@pytest.mark.parametrize("key_mode", ["channel", "token"])
def test_an_infinite_query_gives_nan_in_blocks_alone(path, key_mode):
    """No token beside the blocks is there to say so."""
    pair = pinned(make_pair(256, key_mode=key_mode))
    query = make_query(pair, heads=2)
    query[0, 1, 0, 3] = torch.inf
    output = attention.attend(query, pair.packed)
    assert output[0, 1].isnan().all()
    assert output[0, 0].isfinite().all()


def test_an_infinite_query_of_a_constant_channel_gives_nan(path):
    """Infinity times a step of zero is no number, and must not hide infinity elsewhere."""
    keys = torch.randn(1, 1, 128, 64, generator=torch.Generator().manual_seed(0))
    keys[..., 5] = -1.0
    stores = []
    for codec in (key_codec(8, "channel", 64), value_codec(8, 64)):
        store = TokenStore(codec, 128, keys)
        store.commit(store.prepare(keys, "states"))
        stores.append(store)
    query = torch.ones(1, 1, 1, 64)
    query[..., 3] = query[..., 5] = torch.inf
    assert attention.attend(query, pinned(stores).packed).isnan().all()


@pytest.mark.parametrize("what", ["keys", "values"])
def test_the_largest_sums_of_codes(path, what):
    """1,024 codes of 255 with the largest vectors would pass 2**31."""
    keys, values = torch.zeros(1, 1, 1024, 1024), torch.zeros(1, 1, 1024, 64)
    if what == "keys":
        keys[:, :, 1:] = 0.01
    else:
        values[..., 0] = 1.0
    stores = []
    for states, codec in ((keys, key_codec(8, "channel", 64)), (values, value_codec(8, 64))):
        store = TokenStore(codec, 1024, states)
        store.commit(store.prepare(states, "states"))
        stores.append(store)
    pair = pinned(stores)
    output = check(pair, torch.full((1, 1, 1, 1024), float(what == "keys")))
    if what == "values":
        assert output[0, 0, 0, 0] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_any_number_of_threads_gives_the_same(path, threads, batch, kv_heads):
    """With fewer heads than threads the sequence is split."""
    pair = pinned(make_pair(2100, batch=batch, kv_heads=kv_heads, block=64, sinks=2))
    query = make_query(pair, heads=2 * kv_heads, queries=2)
    before = torch.get_num_threads()
    mask = torch.rand(batch, 1, 2, 2100) < 0.5
    try:
        torch.set_num_threads(threads)
        check(pair, query)
        check(pair, query, mask)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_combination(data):
    draw = data.draw
    block = draw(st.integers(1, 150))
    length = block + draw(st.integers(0, 500))
    pair = pinned(
        make_pair(
            length,
            batch=draw(st.integers(1, 3)),
            kv_heads=(kv_heads := draw(st.integers(1, 3))),
            head_dim=draw(st.integers(1, 140)),
            value_dim=draw(st.integers(1, 140)),
            key_bits=draw(st.sampled_from(BITS)),
            value_bits=draw(st.sampled_from(BITS)),
            block=block,
            key_mode=draw(st.sampled_from(["channel", "token"])),
            group_size=draw(st.integers(1, 150)),
            seed=draw(st.integers(0, 99)),
        ),
        newest=draw(st.integers(1, length)),
    )
    query = make_query(pair, kv_heads * draw(st.integers(1, 5)), draw(st.integers(1, 8)))
    outputs = []
    for name in PATHS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(library.ENVIRONMENT_VARIABLE, name)
            outputs.append(check(pair, query))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_refused(path):
    pair = pinned(make_pair(200))
    query = make_query(pair, heads=2)
    with pytest.raises(ValueError, match=r"multiple of kv_heads.*\(1, 3, 1, 64\)"):
        attention.attend(make_query(pair, heads=3), pair.packed)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        attention.attend(query.double(), pair.packed)
    with pytest.raises(ValueError, match="blocks of 1500"):
        pair = pinned(make_pair(1500, block=1500))
        attention.attend(query, pair.packed)
    with pytest.raises(RuntimeError, match="expand"):
        pair = pinned(make_pair(200))
        attention.attend(query, pair.packed, torch.ones(1, 1, 1, 7, dtype=torch.bool))


@pytest.mark.parametrize("part", ["codes", "step", "scales", "raw"])
def test_rows_that_do_not_lie_together_are_refused(path, part):
    packed = pinned(make_pair(300)).packed  # two blocks
    query = torch.ones(1, 2, 1, 64)

    def spread(tensor):
        return tensor.mT.contiguous().mT

    keys, values = packed.blocks.keys, packed.blocks.values
    if part in ("codes", "step"):
        keys = replace(keys, **{part: spread(getattr(keys, part))})
        keys = replace(keys, minimum=spread(keys.minimum)) if part == "step" else keys
    if part == "scales":
        values = replace(values, scales=spread(values.scales))
    raw = spread(packed.raw_keys) if part == "raw" else packed.raw_keys
    blocks = PackedBlocks(keys, values, packed.blocks.block_length)
    with pytest.raises(ValueError, match="last dimension is contiguous"):
        attention.attend(query, PackedCache(blocks, raw, packed.raw_values))


FORKING = """
import os, sys
import torch
sys.path.insert(0, "tests/kernels")
from test_attention_kernels import check, make_pair, make_query, pinned
torch.set_num_threads(2)
pair = pinned(make_pair(1500, kv_heads=4))
query = make_query(pair, heads=4)
expected = check(pair, query)
for _ in range(3):
    child = os.fork()
    if child == 0:
        from hf_adaptive_sparse.kernels.attention import attend
        same = all(torch.equal(attend(query, pair.packed), expected) for _ in range(20))
        os._exit(0 if same else 7)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0, status
    assert torch.equal(check(pair, query), expected)
print("survived")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_can_go_on():
    """After torch's OpenMP pool was used in the parent, which a child does not inherit."""
    done = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "survived\n", done.stderr


COUNTING = """
import os, sys
import torch
sys.path.insert(0, "tests/kernels")
from test_attention_kernels import PATHS, library, make_pair, make_query, pinned
from hf_adaptive_sparse.kernels.attention import attend
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
torch.randn(2000, 2000) @ torch.randn(2000, 2000)
torch.randn(3_000_000).exp()
pair = pinned(make_pair(1500, kv_heads=6))
query = make_query(pair, heads=6)
for path in PATHS:
    os.environ[library.ENVIRONMENT_VARIABLE] = path
    before = count()
    for _ in range(10):
        attend(query, pair.packed)
    assert count() == before, (path, before, count())
print("no more threads")
"""


def test_threads_are_torchs():
    """The kernels add no threads to the process beyond those of torch's own pool."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTING], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "no more threads\n", done.stderr


def test_reference_is_torchs_attention():
    query, keys, values = (torch.randn(2, heads, 5, 16) for heads in (6, 3, 3))
    mask = torch.rand(2, 1, 5, 5) < 0.8
    mask[..., 0] = True
    for arguments in ({"attn_mask": mask}, {"is_causal": True}, {"scale": 0.1}):
        expected = scaled_dot_product_attention(query, keys, values, enable_gqa=True, **arguments)
        ours = dict(arguments)
        output = reference(query, keys, values, ours.pop("attn_mask", None), **ours)
        torch.testing.assert_close(output, expected)
