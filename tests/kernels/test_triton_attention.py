"""The Triton kernels are held to the readable reference: by Triton's interpreter, and on a GPU.

The interpreter shows that what the kernels compute is right; it knows nothing of compilation, for
which ``test_triton_compilation`` is there. On a machine with a CUDA device and with ``-m gpu`` the
same contract holds the compiled kernels.
"""

import dataclasses
import importlib.util
import logging

import pytest
import torch

from hf_adaptive_sparse.kernels import attention as native
from hf_adaptive_sparse.kernels import (
    triton_attention,
    triton_blocks,
    triton_cuts,
    triton_device,
    triton_plan,
    triton_warp_plan,
)
from hf_adaptive_sparse.kernels.packed import (
    PackedBlocks,
    PackedCache,
    PackedKeys,
    PackedValues,
)
from hf_adaptive_sparse.kernels.reference import attention as reference
from hf_adaptive_sparse.kvcache import attention as cache_attention
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.selection import key_codec, value_codec
from hf_adaptive_sparse.packing.bits import PACKED_BITS as BITS
from hf_adaptive_sparse.profiles import KVCacheConfig

HEAD_SIZES = (64, 72, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is optional and not installed here", allow_module_level=True)


def make_cache(
    *,
    batch=1,
    kv_heads=2,
    blocks=2,
    raw=5,
    block=128,
    head_dim=64,
    value_dim=None,
    key_bits=8,
    value_bits=8,
    dtype=torch.float32,
    key_mode="channel",
    group_size=64,
    lengths=None,
    sinks=0,
    skip=0,
    seed=0,
):
    """A cache of random states, and its keys and values as they decode, in float32.

    Some channels of the keys have a large bias, as in Qwen2.5. Blocks lie in storage with room for
    one more, full of bytes that must not be read.
    """
    generator = torch.Generator().manual_seed(seed)
    value_dim = value_dim or head_dim

    def states(width, bias):
        offset = torch.randn(1, kv_heads, 1, width, generator=generator) * bias
        shape = (batch, kv_heads, blocks * block + raw, width)
        return (torch.randn(shape, generator=generator) + offset).to(dtype)

    def encode(codec, whole):
        encoded = codec.encode(whole.unflatten(2, (blocks, block)), "states")
        roomy = [torch.cat([part, part[:, :, :1] * 0 + 77], dim=2) for part in encoded]
        return encoded, [part[:, :, :blocks] for part in roomy]

    def decode(codec, encoded, whole):
        exact = codec.decode(encoded, (block, whole.shape[-1]), torch.float32)
        pieces = [exact[:, :, i, :length] for i, length in enumerate(lengths or [block] * blocks)]
        head, tail = raw_part(whole)[:, :, :sinks], raw_part(whole)[:, :, sinks:]
        return torch.cat([head.float(), *pieces, tail.float()], dim=2)[:, :, skip:]

    def raw_part(whole):
        return whole[:, :, blocks * block :]

    keys, values = states(head_dim, 3.0), states(value_dim, 0.5)
    codecs = key_codec(key_bits, key_mode, group_size), value_codec(value_bits, group_size)
    if not blocks:
        example = torch.zeros(batch, kv_heads, 1, block, max(head_dim, value_dim), dtype=dtype)
        key_parts = [p[:, :, :0] for p in codecs[0].encode(example[..., :head_dim], "keys")]
        value_parts = [p[:, :, :0] for p in codecs[1].encode(example[..., :value_dim], "values")]
        decoded = keys.float()[:, :, skip:], values.float()[:, :, skip:]
    else:
        encoded_keys, key_parts = encode(codecs[0], keys[:, :, : blocks * block])
        encoded_values, value_parts = encode(codecs[1], values[:, :, : blocks * block])
        decoded = decode(codecs[0], encoded_keys, keys), decode(codecs[1], encoded_values, values)
    packed = PackedBlocks(
        keys=PackedKeys(
            key_bits, *key_parts, group=min(group_size, head_dim) if key_mode == "token" else None
        ),
        values=PackedValues(value_bits, *value_parts, group=min(group_size, value_dim)),
        block_length=block,
        lengths=None if lengths is None else tuple(lengths),
    )
    cache = PackedCache(packed, raw_part(keys), raw_part(values), sinks=sinks, skip=skip)
    assert cache.length == decoded[0].shape[2]
    return cache, *decoded


def make_query(cache, heads=2, queries=1, seed=1):
    raw = cache.raw_keys
    generator = torch.Generator().manual_seed(seed)
    shape = (raw.shape[0], heads, queries, raw.shape[-1])
    return torch.randn(shape, generator=generator).to(raw.dtype)


def move(item, device):
    """Move the tensors of nested dataclasses, keeping their strides."""
    if isinstance(item, torch.Tensor):
        base = torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device=device)
        return base.copy_(item)
    if dataclasses.is_dataclass(item):
        fields = [f.name for f in dataclasses.fields(item) if f.init]
        return type(item)(**{name: move(getattr(item, name), device) for name in fields})
    return item


def check(device, made, query, mask=None, *, is_causal=False, scale=None):
    """Errors: vectors rounded to float16 (11 bits), raw probabilities and output to the dtype.

    Where the kernel of single warps takes the call, the general one is held to them, too. Returns
    the name of the first.
    """
    cache, keys, values = made
    expected = reference(query, keys, values, mask, is_causal=is_causal, scale=scale)
    size = values.abs().max()
    relative = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 2e-3}[query.dtype]
    info = torch.finfo(query.dtype)
    bound = relative * size + info.eps * expected.abs() + info.eps * info.smallest_normal

    def attend():
        moved = move(cache, device)
        given = None if mask is None else move(mask, device)
        options = {"is_causal": is_causal, "scale": scale}
        output = triton_attention.attend(query.to(device), moved, given, **options)
        assert output.dtype == query.dtype
        assert output.shape == expected.shape
        assert ((output.cpu().float() - expected).abs() <= bound).all()
        return kernel_of(query.to(device), moved)

    name = attend()
    if name == triton_blocks.WARP:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_warp_plan, "units", lambda *arguments: None)
            assert attend() == triton_blocks.GENERAL
    return name


def kernel_of(query, cache):
    """Name of the kernel that takes a call."""
    return triton_plan.prepare(query, cache, None, False, 1.0)[0].variant.name


@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize("bits", [(8, 6), (6, 8), (4, 3), (3, 2), (2, 4)])
def test_bits_and_head_sizes(device, bits, head_dim):
    """Every width for keys and values; odd rows of bytes make for words of 8, 16 and 32 bits."""
    dtype = DTYPES[(bits[0] + head_dim // 8) % 3]
    made = make_cache(
        key_bits=bits[0], value_bits=bits[1], head_dim=head_dim, dtype=dtype, kv_heads=1
    )
    check(device, made, make_query(made[0], heads=2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize("place", range(len(BITS)))
def test_all_bits_on_a_device(place, head_dim, dtype):
    """Every width of either, for every head size and dtype; each case is compiled, in seconds."""
    made = make_cache(
        key_bits=BITS[place],
        value_bits=BITS[(place + 2) % len(BITS)],
        head_dim=head_dim,
        dtype=dtype,
        key_mode=("channel", "token")[(place + head_dim // 8) % 2],
        blocks=9,
        batch=2,
    )
    check(torch.device("cuda"), made, make_query(made[0], heads=8))


@pytest.mark.parametrize(
    ("bits", "head_dim", "block", "heads", "queries", "group_size", "masked"),
    [
        ((8, 8), 128, 128, 8, 1, 64, True),
        ((8, 6), 128, 128, 1, 1, 64, False),
        ((6, 8), 64, 128, 4, 2, 64, True),
        ((6, 6), 256, 128, 7, 1, 64, False),
        ((4, 4), 96, 64, 5, 1, 32, True),
        ((3, 3), 128, 128, 2, 1, 128, False),
        ((2, 2), 80, 64, 2, 1, 64, True),
        ((4, 2), 80, 256, 2, 1, 64, False),
    ],
)
def test_calls_that_single_warps_take(
    device, bits, head_dim, block, heads, queries, group_size, masked
):
    """What models ask for while they decode; the kernels agree within the same bound."""
    dtype = (torch.bfloat16, torch.float16)[bits[0] % 4 // 2]
    made = make_cache(
        key_bits=bits[0],
        value_bits=bits[1],
        head_dim=head_dim,
        block=block,
        group_size=group_size,
        blocks=3,
        raw=45,
        dtype=dtype,
        kv_heads=1,
    )
    query = make_query(made[0], heads=heads, queries=queries)
    mask = make_mask("added", (1, heads, queries, made[0].length)) if masked else None
    assert check(device, made, query, mask) == triton_blocks.WARP


def test_tiles_within_a_block_and_tokens_that_are_not_seen(device):
    """Of short blocks, behind a window, and with raw tokens in front."""
    for sinks, skip, lengths in ((3, 0, None), (0, 300, None), (2, 70, (128, 3, 128, 90))):
        made = make_cache(
            blocks=4,
            block=128 if lengths else 256,
            raw=37,
            sinks=sinks,
            skip=skip,
            lengths=lengths,
            dtype=torch.bfloat16,
            kv_heads=1,
        )
        query = make_query(made[0], heads=2, queries=2)
        assert check(device, made, query, is_causal=sinks == 3) == triton_blocks.WARP


@pytest.mark.parametrize("general", [False, True])
def test_what_is_no_number_goes_where_it_counts(device, monkeypatch, general):
    """A NaN in a mask spoils its query; one in a value that is not seen spoils nothing."""
    if general:
        monkeypatch.setattr(triton_warp_plan, "units", lambda *arguments: None)
    cache, keys, values = make_cache(
        dtype=torch.float16, kv_heads=1, blocks=1, raw=6, sinks=3, skip=1
    )
    cache.raw_values[:, :, 0] = torch.nan
    query = make_query(cache, heads=2)
    mask = torch.zeros(1, 2, 1, cache.length)
    mask[0, 1, 0, 9] = torch.nan
    output = triton_attention.attend(query.to(device), move(cache, device), mask.to(device))
    expected = reference(query, keys, values, None)
    torch.testing.assert_close(output[:, :1].cpu().float(), expected[:, :1], atol=5e-3, rtol=1e-3)
    assert output[:, 1].isnan().all()


@pytest.mark.parametrize("general", [False, True])
def test_values_near_the_smallest_of_bfloat16(device, monkeypatch, general):
    if general:
        monkeypatch.setattr(triton_warp_plan, "units", lambda *arguments: None)
    cache, _, _ = make_cache(dtype=torch.bfloat16, kv_heads=1, blocks=1, raw=0)
    scales = cache.blocks.values.scales
    scales.copy_(torch.tensor([1e-36, 0, 1e-36, 0]).expand_as(scales))
    output = triton_attention.attend(make_query(cache).to(device), move(cache, device))
    assert output.isfinite().all()
    assert output.abs().max() < 1e-33


def test_no_tokens_and_a_mask_of_none(device):
    cache, _, _ = make_cache(dtype=torch.float16, kv_heads=1, blocks=1, raw=0, skip=128)
    query = make_query(cache)
    mask = torch.ones(1, 1, 1, 0, dtype=torch.bool)
    output = triton_attention.attend(query.to(device), move(cache, device), mask.to(device))
    assert torch.equal(output.cpu(), torch.zeros_like(query))


@pytest.mark.parametrize(
    ("case", "heads"),
    [
        ({}, 9),
        ({"key_mode": "token"}, 2),
        ({"dtype": torch.float32}, 2),
        ({"key_bits": 3, "head_dim": 64}, 2),
        ({"head_dim": 72}, 2),
        ({"block": 96}, 2),
        ({"group_size": 16}, 2),
        ({"blocks": 0}, 2),
    ],
)
def test_calls_for_the_general_kernel(case, heads):
    case = {"dtype": torch.float16, "kv_heads": 1, "blocks": 1, **case}
    cache, _, _ = make_cache(**case)
    assert kernel_of(make_query(cache, heads=heads), cache) == triton_blocks.GENERAL


def test_words_that_do_not_begin_at_their_size_are_for_the_general_kernel():
    made = make_cache(dtype=torch.float16, kv_heads=1, blocks=1)
    cache = made[0]
    codes = cache.blocks.keys.codes
    storage = torch.zeros(codes.numel() + 4, dtype=torch.uint8)
    moved = storage[4:].view(codes.shape)  # storage begins at a multiple of 64 bytes
    moved.copy_(codes)
    keys = dataclasses.replace(cache.blocks.keys, codes=moved)
    blocks = dataclasses.replace(cache.blocks, keys=keys)
    assert kernel_of(make_query(cache), cache) == triton_blocks.WARP
    cache = dataclasses.replace(cache, blocks=blocks)
    assert kernel_of(make_query(cache), cache) == triton_blocks.GENERAL


def test_the_general_kernel_stands_in_for_one_that_fails(device, monkeypatch, caplog):
    class Broken:
        @property
        def warp_kernel(self):
            raise RuntimeError("ptxas died")

    monkeypatch.setattr(triton_attention, "_failures", {})
    monkeypatch.setattr(triton_attention, "_compiled", {})
    monkeypatch.setattr(triton_attention, "_warp_kernels", Broken)
    triton_device.say_what_failed.cache_clear()
    cache, keys, values = make_cache(dtype=torch.float16, kv_heads=1, blocks=1)
    query = make_query(cache)
    given = query.to(device), move(cache, device)
    with caplog.at_level(logging.WARNING, logger=triton_attention.__name__):
        outputs = [triton_attention.attend(*given) for _ in range(2)]
    assert torch.equal(*outputs)
    expected = reference(query, keys, values, None)
    torch.testing.assert_close(outputs[0].cpu().float(), expected, atol=5e-3, rtol=1e-3)
    assert len(triton_attention._failures) == 1
    (record,) = caplog.records
    assert "RuntimeError: ptxas died" in record.getMessage()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [16, 64, 100])
def test_keys_by_token(device, bits, group_size):
    made = make_cache(
        key_bits=bits,
        value_bits=bits,
        head_dim=80,
        group_size=group_size,
        key_mode="token",
        dtype=torch.float16,
    )
    check(device, made, make_query(made[0], heads=4))


@pytest.mark.parametrize("block", [1, 5, 33, 100, 192, 256])
@pytest.mark.parametrize("bits", [3, 6, 8])
def test_block_lengths(device, block, bits):
    made = make_cache(key_bits=bits, value_bits=bits, block=block, blocks=3, raw=2, kv_heads=1)
    check(device, made, make_query(made[0]))


def test_the_blocks_of_a_cache_are_read_where_they_lie(tiny_llama):
    """A store lays a block of all heads side by side: copying that for each call took longer."""
    cache = AdaptiveQuantizedCache(tiny_llama.config, KVCacheConfig(bits=6, residual_length=32))
    states = torch.randn(1, 2, 100, 16, generator=torch.Generator().manual_seed(0))
    cache.update(states, states, 0)
    packed = cache_attention.pin_pair(*cache.layers[0].stores()).packed
    keys, values = packed.blocks.keys, packed.blocks.values
    query = torch.randn(1, 4, 1, 16)
    call, _ = triton_plan.prepare(query, packed, None, False, 0.25)
    parts = (keys.codes, keys.step, keys.minimum, values.codes, values.step_codes, values.scales)
    given = {argument.data_ptr() for argument in call.arguments if torch.is_tensor(argument)}
    assert {part.data_ptr() for part in parts} <= given
    again, _ = triton_plan.prepare(query, packed, None, False, 0.25)
    assert again.arguments[2] is call.arguments[2]


@pytest.mark.parametrize(("repeats", "queries"), [(1, 1), (3, 1), (7, 2), (8, 1), (1, 16), (20, 2)])
def test_gqa_ratios_and_queries(device, repeats, queries):
    """From one row of the matrix product to more than one program takes."""
    dtype = DTYPES[repeats % 3]
    made = make_cache(batch=2, key_bits=6, value_bits=6, dtype=dtype, blocks=1)
    check(device, made, make_query(made[0], heads=2 * repeats, queries=queries))


@pytest.mark.parametrize(
    ("blocks", "raw"), [(0, 1), (0, 63), (1, 0), (1, 1), (2, 63), (7, 0), (7, 1), (7, 63)]
)
def test_lengths(device, blocks, raw):
    made = make_cache(blocks=blocks, raw=raw, block=64, key_bits=4, kv_heads=1, batch=2)
    check(device, made, make_query(made[0], heads=1))


def test_an_empty_cache_gives_zeros(device):
    cache, _, _ = make_cache(blocks=0, raw=0)
    query = make_query(cache)
    output = triton_attention.attend(query.to(device), move(cache, device))
    assert torch.equal(output.cpu(), torch.zeros_like(query))


def test_key_and_value_heads_of_different_size(device):
    made = make_cache(head_dim=96, value_dim=64, group_size=32)
    check(device, made, make_query(made[0]))
    made = make_cache(head_dim=40, value_dim=8, dtype=torch.bfloat16)
    check(device, made, make_query(made[0]))


@pytest.mark.parametrize("raw", [2, 70])
def test_sinks_window_and_short_blocks(device, raw):
    for sinks, skip, lengths in ((2, 0, None), (0, 150, None), (2, 70, (64, 3, 64, 50))):
        made = make_cache(blocks=4, block=64, raw=raw, sinks=sinks, skip=skip, lengths=lengths)
        check(device, made, make_query(made[0], heads=4, queries=2))


def make_mask(kind, shape, seed=3):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < 0.6
    if kind == "bool":
        return kept
    added = torch.randn(shape, generator=generator)
    return added.masked_fill(~kept, -torch.inf)


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize(("rows", "heads"), [(2, 4), (2, 1), (1, 4), (1, 1)])
@pytest.mark.parametrize("queries", [1, 3])
def test_masks(device, kind, rows, heads, queries):
    made = make_cache(batch=2, blocks=1, block=64, dtype=torch.float16, sinks=1)
    query = make_query(made[0], heads=4, queries=queries)
    mask = make_mask(kind, (rows, heads, queries, made[0].length))
    check(device, made, query, mask)
    if queries > 1:
        check(device, made, query, mask[:, :, :1])


def test_a_mask_for_left_padding(device):
    """As transformers makes it: one row per sequence for all heads, here from a larger tensor."""
    made = make_cache(batch=2, block=64, dtype=torch.bfloat16)
    mask = torch.ones(2, 1, 1, made[0].length + 9, dtype=torch.bool)
    mask[1, ..., :90] = False
    check(device, made, make_query(made[0], heads=4), mask[..., : made[0].length])
    check(device, made, make_query(made[0], heads=2, queries=2), mask[..., : made[0].length])


def test_rows_that_see_nothing(device):
    made = make_cache(batch=2, block=64)
    query = make_query(made[0], heads=2, queries=2)
    mask = torch.ones(2, 1, 2, made[0].length, dtype=torch.bool)
    mask[1, :, 0] = False
    check(device, made, query, mask)
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    check(device, made, query, added)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # wanted: becomes -inf
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lowest_number_as_a_mask(device, dtype):
    """Where all tokens are masked by it they count alike, as in torch."""
    made = make_cache(block=64)
    mask = torch.zeros(1, 1, 2, made[0].length, dtype=dtype)
    mask[..., 0, :] = torch.finfo(dtype).min
    mask[..., 1, 3:] = torch.finfo(dtype).min
    if dtype == torch.float16:  # not low enough to drown the scores
        mask[..., 0, :] = -1000
    check(device, made, make_query(made[0], queries=2), mask)


@pytest.mark.parametrize("queries", [1, 5])
def test_causal_and_scale(device, queries):
    made = make_cache(block=64, sinks=2)
    check(device, made, make_query(made[0], queries=queries), is_causal=True, scale=0.3)


def test_strided_tensors(device):
    made = make_cache(batch=2, head_dim=64, dtype=torch.float16)
    cache = made[0]
    query = make_query(cache, heads=4, queries=3)
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    check(device, made, strided)
    check(device, made, query.mT.contiguous().mT)
    keys, values = cache.blocks.keys, cache.blocks.values
    keys = dataclasses.replace(keys, codes=keys.codes.mT.contiguous().mT)
    values = dataclasses.replace(values, min_codes=values.min_codes.contiguous())
    blocks = dataclasses.replace(cache.blocks, keys=keys, values=values)
    check(device, (dataclasses.replace(cache, blocks=blocks), *made[1:]), query)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 1e-6, 300.0])
def test_tiny_and_large_values(device, dtype, size):
    """Constant values have steps of zero; tiny and large steps keep their digits in float16."""
    cache, keys, values = make_cache(dtype=dtype, block=64)
    exact = torch.randn(1, 2, 2, 64, 64, generator=torch.Generator().manual_seed(5)) * size
    codec = value_codec(8, 64)
    parts = codec.encode(exact.to(dtype), "values")
    raw = torch.zeros_like(cache.raw_values)
    packed = PackedValues(8, *parts, group=64)
    decoded = codec.decode(parts, (64, 64), torch.float32).flatten(2, 3)
    values = torch.cat([decoded, raw.float()], dim=2)
    blocks = dataclasses.replace(cache.blocks, values=packed)
    cache = dataclasses.replace(cache, blocks=blocks, raw_values=raw)
    check(device, (cache, keys, values), make_query(cache))


def test_far_more_programs_than_rows(device, monkeypatch):
    """Many splits, more than are joined at once."""
    for module in (triton_blocks, triton_cuts):
        monkeypatch.setattr(module, "processors", lambda device: 40)
    made = make_cache(blocks=21, block=32, raw=3, key_bits=6, kv_heads=1)
    check(device, made, make_query(made[0], heads=1))


def test_refusals():
    cache, _, _ = make_cache(blocks=1)
    query = make_query(cache)
    assert not triton_attention.is_supported(query, cache, None)  # on the CPU, not interpreted
    with pytest.raises(ValueError, match="takes 1 to 64 queries in float32"):
        triton_attention.attend(query, cache)


def test_a_model_decodes_with_it(device, monkeypatch, tiny_llama):
    """An unmodified model, its default attention: each step is close to that on decoded states."""
    config = KVCacheConfig(key_bits=8, value_bits=6, residual_length=32)
    model = tiny_llama.to(device)
    ids = torch.randint(5, 128, (2, 80), generator=torch.Generator().manual_seed(2)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    calls = []

    def counted(*arguments, **named):
        calls.append(arguments[0].shape)
        return compute(*arguments, **named)

    compute = triton_attention.compute
    monkeypatch.setattr(native, "is_supported", lambda *arguments: False)
    monkeypatch.setattr(triton_attention, "compute", counted)

    def logits():
        cache = AdaptiveQuantizedCache(model.config, config)
        with torch.no_grad():
            model(ids[:, :77], attention_mask=mask[:, :77], past_key_values=cache)
            steps = [
                model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache)
                for i in range(77, 80)
            ]
        return torch.cat([step.logits for step in steps], dim=1)

    packed = logits()
    assert len(calls) == 3 * model.config.num_hidden_layers
    assert {shape.numel() for shape in calls} == {2 * 4 * 16}  # 4 heads, or 2 queries of 2
    monkeypatch.setenv("HF_ADAPTIVE_SPARSE_KERNEL", "none")
    torch.testing.assert_close(packed, logits(), atol=2e-4, rtol=1e-3)


def test_generation_goes_on_when_a_kernel_fails(device, monkeypatch, caplog, tiny_llama):
    """As a compiler error or a GPU with too little shared memory would make it fail."""
    config = KVCacheConfig(key_bits=8, value_bits=6, residual_length=16)
    model = tiny_llama.to(device)
    ids = torch.randint(5, 128, (2, 40), generator=torch.Generator().manual_seed(2)).to(device)
    tries = []

    class Kernel:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                tries.append(constants)
                raise RuntimeError("out of resource: shared memory")

            return launch

    class Broken:
        split_kernel = Kernel()

    monkeypatch.setattr(native, "is_supported", lambda *arguments: False)
    monkeypatch.setattr(triton_attention, "_failures", {})
    monkeypatch.setattr(triton_attention, "_compiled", {})
    monkeypatch.setattr(triton_attention, "_kernels", lambda: Broken)
    triton_device.say_what_failed.cache_clear()

    def generate():
        cache = AdaptiveQuantizedCache(model.config, config)
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        return model.generate(input_ids=ids, past_key_values=cache, **settings)

    with caplog.at_level(logging.WARNING, logger=cache_attention.__name__):
        fallen_back = generate()
    assert len(tries) == len({tuple(sorted(constants.items())) for constants in tries}) > 0
    messages = [r.getMessage() for r in caplog.records if r.name == cache_attention.__name__]
    assert len(messages) == 1
    assert "RuntimeError: out of resource: shared memory" in messages[0]
    monkeypatch.setenv("HF_ADAPTIVE_SPARSE_KERNEL", "none")
    assert torch.equal(fallen_back, generate())


def test_a_device_without_memory_is_not_taken_for_a_broken_kernel(device, monkeypatch):
    cache, _, _ = make_cache(blocks=1)
    query, cache = make_query(cache).to(device), move(cache, device)

    def fail(*arguments):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(triton_attention, "_failures", {})
    monkeypatch.setattr(triton_attention, "_compiled", {})
    monkeypatch.setattr(triton_attention, "_run", fail)
    with pytest.raises(torch.OutOfMemoryError):
        triton_attention.attend(query, cache)
    assert triton_attention._failures == {}


def test_the_environment_switches_it_off(device, monkeypatch):
    cache, _, _ = make_cache(blocks=1)
    query, cache = make_query(cache).to(device), move(cache, device)
    assert triton_attention.is_supported(query, cache, None)
    monkeypatch.setenv("HF_ADAPTIVE_SPARSE_KERNEL", "none")
    assert triton_attention.is_supported(query, cache, None)  # blocks keep their kernel
    cache.blocks.prepared.clear()
    assert not triton_attention.is_supported(query, cache, None)


def test_refusals_of_shapes(device):
    cache, _, _ = make_cache(blocks=1)
    query, cache = make_query(cache, heads=3).to(device), move(cache, device)
    with pytest.raises(ValueError, match="a multiple of kv_heads"):
        triton_attention.attend(query, cache)
    many = query.expand(-1, -1, 65, -1)
    assert not triton_attention.is_supported(many, cache, None)
    assert not triton_attention.is_supported(query.double(), cache, None)
    mask = torch.ones(1, 1, 1, cache.length, dtype=torch.int32, device=device)
    assert not triton_attention.is_supported(query, cache, mask)
