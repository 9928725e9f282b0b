"""The lazy views that ``update`` returns, and unmodified models that attend over them."""

import concurrent.futures
import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import BartConfig, DynamicCache, LlamaForCausalLM
from transformers.integrations.sdpa_attention import repeat_kv

from hf_adaptive_sparse.kernels import library
from hf_adaptive_sparse.kernels.reference import attention as reference
from hf_adaptive_sparse.kvcache import attention as cache_attention
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer
from hf_adaptive_sparse.kvcache.pinned import Pinned
from hf_adaptive_sparse.kvcache.view import CacheView
from hf_adaptive_sparse.profiles import KVCacheConfig

PROFILE = KVCacheConfig(bits=8, residual_length=32)
LENGTH = 75

needs_kernels = pytest.mark.skipif(
    not library.available_paths(), reason="the native kernels are not built here"
)


def states(length, seed=0, batch=2, kv_heads=2, head_dim=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, kv_heads, length, head_dim, generator=generator)


@pytest.fixture
def layer():
    layer = AdaptiveQuantizedLayer(8, 6, residual_length=32)
    layer.update(states(LENGTH), states(LENGTH, seed=1))
    return layer


@pytest.fixture
def views(layer):
    return layer._view(None)


@pytest.fixture
def native_calls(monkeypatch):
    """Counts the calls of the native kernel."""
    calls = []
    compute = cache_attention.native.compute

    def counted(query, cache, mask=None, **arguments):
        calls.append((tuple(query.shape), cache.length))
        return compute(query, cache, mask, **arguments)

    monkeypatch.setattr(cache_attention.native, "compute", counted)
    return calls


@pytest.fixture
def no_decoding(monkeypatch):
    """A switch: from its call on, decoding the cache fails the test."""

    def forbid():
        def fail(self):
            raise AssertionError("the cache was decoded")

        monkeypatch.setattr(Pinned, "decode", fail)

    return forbid


# Views as tensors


def test_a_view_says_what_it_is_without_decoding(views, no_decoding):
    no_decoding()
    for view in views:
        assert type(view) is CacheView
        assert view.shape == (2, 2, LENGTH, 16)
        assert (view.dtype, view.device, view.layout) == (
            torch.float32,
            torch.device("cpu"),
            torch.strided,
        )
        assert (view.size(-2), view.dim(), view.ndim, len(view)) == (LENGTH, 4, 4, 2)
        assert view.numel() == 2 * 2 * LENGTH * 16
        assert not view.requires_grad
        assert view.is_floating_point()


OPERATIONS = {
    "add": lambda x: x + 1,
    "radd": lambda x: 1 + x,
    "matmul": lambda x: torch.randn(2, 2, 3, 16, generator=torch.Generator().manual_seed(0)) @ x.mT,
    "transpose": lambda x: x.transpose(1, 2),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "to": lambda x: x.to(torch.float64),
    "half": lambda x: x.half(),
    "index": lambda x: x[:, :, 3],
    "slice": lambda x: x[:, :, -5:, :],
    "mask": lambda x: x[x > 0],
    "stack": lambda x: torch.stack([x, x]),
    "cat": lambda x: torch.cat([x, torch.zeros(2, 2, 1, 16)], dim=2),
    "einsum": lambda x: torch.einsum("bhsd->bsh", x),
    "iterate": lambda x: torch.stack(list(x)),
    "reshape": lambda x: x.reshape(4, -1),
    "view": lambda x: x.view(2, -1),
    "new axis": lambda x: x[:, None],
    "expand": lambda x: x[:, :, None].expand(2, 2, 3, LENGTH, 16),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
    "repeat_kv": lambda x: repeat_kv(x, 3) + 0,
    "repeat_kv transposed": lambda x: repeat_kv(x, 3).transpose(1, 2),
    "repeat_kv split": lambda x: x[:, :, None, :, :].expand(2, 2, 3, LENGTH, 16) * 1,
    "repeat_kv unfinished": lambda x: x[:, :, None, :, :] * 1,
    "repeat_kv flattened": lambda x: (
        x[:, :, None, :, :].expand(2, 2, 3, LENGTH, 16).reshape(2, 6, -1)
    ),
    "repeat_kv split twice": lambda x: x[:, :, None, :, :][:, :, None, :, :] * 1,
    "detach": lambda x: x.detach(),
    "out": lambda x: torch.add(x, x, out=torch.empty(2, 2, LENGTH, 16)),
    "aten": lambda x: torch.ops.aten.mul.Tensor(x, 2.0),
    "numpy": lambda x: torch.from_numpy(np.asarray(x.numpy())),
    "array": lambda x: torch.tensor(x.tolist()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "stride": lambda x: torch.tensor(x.stride()),
    "T": lambda x: x.mT,
    "addresses": lambda x: torch.tensor(x.data_ptr() % 2),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_other_reader_gets_the_decoded_tensor(layer, views, name):
    operation = OPERATIONS[name]
    for view, expected in zip(views, layer.decode(), strict=True):
        result = operation(view)
        assert type(result) is torch.Tensor
        assert torch.equal(result, operation(expected))


def test_two_views_in_one_operation(layer, views):
    keys, values = layer.decode()
    assert torch.equal(views[0] @ views[1].mT, keys @ values.mT)
    assert torch.equal(torch.cat(views), torch.cat([keys, values]))
    assert repr(views[0]) == repr(keys)


def test_a_view_decodes_once(views):
    assert views[0].decode() is views[0].decode()
    assert views[0].mT.data_ptr() == views[0].decode().data_ptr()


def test_a_view_is_pinned(layer, no_decoding):
    """Appends, flushed blocks, batch operations and growth leave it as it was."""
    early = layer._view(None)
    expected = [tensor.clone() for tensor in layer.decode()]
    for step in range(90):
        layer.update(states(1, seed=step), states(1, seed=step + 500))
    layer.batch_select_indices(torch.tensor([1]))
    layer.reset()
    for view, before in zip(early, expected, strict=True):
        assert view.shape == before.shape
        assert torch.equal(view + 0, before)


@needs_kernels
def test_attention_over_a_pinned_view(layer, no_decoding):
    early = layer._view(None)
    query = states(1, seed=7)
    expected = scaled_dot_product_attention(query, *layer.decode())
    for step in range(90):
        layer.update(states(1, seed=step), states(1, seed=step + 500))
    no_decoding()
    output = scaled_dot_product_attention(query, *early)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)


@needs_kernels
def test_a_call_is_prepared_once_for_all_tokens_between_two_flushes(layer, monkeypatch):
    prepared = []
    prepare = cache_attention.native._prepare
    monkeypatch.setattr(
        cache_attention.native,
        "_prepare",
        lambda blocks: prepared.append(blocks) or prepare(blocks),
    )
    query = states(1, seed=7)
    changes = []
    for step in range(70):
        views = layer.update(states(1, seed=step), states(1, seed=step + 500))
        output = scaled_dot_product_attention(query, *views)
        exact = scaled_dot_product_attention(query, *layer.decode())
        torch.testing.assert_close(output, exact, rtol=1e-3, atol=1e-3)
        changes.append(len(layer.stores()[0].lengths))
    assert len(prepared) == len(set(changes)) == 3
    layer.crop(-3)
    layer.reorder_cache(torch.tensor([1, 0]))
    scaled_dot_product_attention(query, *layer._view(None))
    assert len(prepared) == 4


@needs_kernels
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_reads_its_own_blocks(layer, duplicate):
    """What is prepared for a layer's blocks holds their addresses, and stays with them."""
    query = states(1, seed=7)
    before = scaled_dot_product_attention(query, *layer._view(None))
    twin = duplicate(layer)
    for store in layer.stores():
        for part in store.parts:
            part.zero_()
    assert torch.equal(scaled_dot_product_attention(query, *twin._view(None)), before)


@needs_kernels
def test_threads_decode_caches_of_their_own_and_read_one_together(layer):
    """The library runs without the interpreter's lock, so calls do overlap."""
    shared = layer._view(None)

    def decode(seed):
        own = AdaptiveQuantizedLayer(8, 6, residual_length=32)
        views = own.update(states(LENGTH, seed=seed), states(LENGTH, seed=seed + 1))
        outputs = []
        for step in range(60):
            query = states(1, seed=step)
            outputs.append(scaled_dot_product_attention(query, *views))
            outputs.append(scaled_dot_product_attention(query, *shared))
            views = own.update(states(1, seed=seed + step), states(1, seed=step))
        return torch.cat(outputs)

    alone = [decode(seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(decode, range(4)))
    for mine, expected in zip(together, alone, strict=True):
        assert torch.equal(mine, expected)


def test_writing_to_a_view_changes_it_alone(layer, views):
    keys, values = views
    before = layer.decode()[0].clone()
    keys.mul_(2)
    keys[:, :, 0] = 5.0
    assert torch.equal(layer.decode()[0], before)
    expected = before * 2
    expected[:, :, 0] = 5.0
    assert torch.equal(keys + 0, expected)
    query = states(1, seed=3)
    output = scaled_dot_product_attention(query, keys, values)
    exact = reference(query, expected, layer.decode()[1])
    torch.testing.assert_close(output, exact, rtol=1e-4, atol=1e-4)


def test_nothing_packed_and_16_bits_are_plain_tensors():
    for bits, length in ((8, 20), (16, 100)):
        layer = AdaptiveQuantizedLayer(bits, bits, residual_length=32)
        keys, values = layer.update(states(length), states(length))
        assert type(keys) is type(values) is torch.Tensor
        assert torch.equal(keys, states(length))


@pytest.mark.parametrize(("key_bits", "value_bits"), [(16, 4), (4, 16)])
def test_one_side_at_16_bits_is_decoded(key_bits, value_bits):
    layer = AdaptiveQuantizedLayer(key_bits, value_bits, residual_length=32)
    keys, values = layer.update(states(LENGTH), states(LENGTH, seed=1))
    assert torch.equal(keys, layer.decode()[0])
    assert torch.equal(values, layer.decode()[1])


# Which calls the kernel serves


@needs_kernels
@pytest.mark.parametrize("queries", [1, 2, 8])
@pytest.mark.parametrize("mask_kind", [None, "bool", "float", "causal"])
def test_attention_reads_the_packed_blocks(layer, views, native_calls, queries, mask_kind):
    query = states(queries, seed=5, kv_heads=6)
    arguments = {}
    if mask_kind == "causal":
        arguments["is_causal"] = True
    elif mask_kind:
        seen = torch.rand(2, 1, queries, LENGTH) < 0.7
        as_float = torch.where(seen, 0.0, -torch.inf)
        arguments["attn_mask"] = seen if mask_kind == "bool" else as_float
    keys, values = layer.decode()
    expected = scaled_dot_product_attention(query, keys, values, enable_gqa=True, **arguments)
    grouped = scaled_dot_product_attention(query, *views, enable_gqa=True, **arguments)
    repeated = [repeat_kv(view, 3) for view in views]
    assert [type(view) for view in repeated] == [CacheView, CacheView]
    assert repeated[0].shape == (2, 6, LENGTH, 16)
    outputs = [grouped, scaled_dot_product_attention(query, *repeated, **arguments)]
    assert len(native_calls) == 2
    for output in outputs:
        assert type(output) is torch.Tensor
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)


@needs_kernels
def test_what_a_kernel_cannot_do_is_decoded_for_torch(layer, views, native_calls):
    keys, values = layer.decode()
    query = states(2, seed=5)
    swapped = scaled_dot_product_attention(query, views[1], views[0])
    assert torch.equal(swapped, scaled_dot_product_attention(query, values, keys))
    mixed = scaled_dot_product_attention(query, views[0], values)
    assert torch.equal(mixed, scaled_dot_product_attention(query, keys, values))
    views = layer._view(None)
    prompt = states(65, seed=6)
    output = scaled_dot_product_attention(prompt, *views)
    assert torch.equal(output, scaled_dot_product_attention(prompt, keys, values))
    dropped = scaled_dot_product_attention(query, *layer._view(None), dropout_p=1.0)
    assert (dropped == 0).all()
    folded = states(2, seed=5, batch=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = scaled_dot_product_attention(query, *layer._view(None))
        assert torch.equal(cast, scaled_dot_product_attention(query, keys, values))
    broadcast = scaled_dot_product_attention(folded, *layer._view(None))
    assert torch.equal(broadcast, scaled_dot_product_attention(folded, keys, values))
    assert native_calls == []


@needs_kernels
def test_gradients_reach_the_queries(layer, native_calls):
    keys, values = layer.decode()
    gradients = []
    for arguments in (layer._view(None), (keys, values)):
        query = states(1, seed=5).requires_grad_()
        scaled_dot_product_attention(query, *arguments).square().sum().backward()
        gradients.append(query.grad)
    assert torch.equal(*gradients)
    assert native_calls == []


def test_wrong_shapes_fail_as_in_torch(layer):
    for query in (states(1, head_dim=8), states(1, kv_heads=3), states(1, kv_heads=4)):
        with pytest.raises(RuntimeError) as theirs:
            scaled_dot_product_attention(query, *layer.decode())
        with pytest.raises(RuntimeError) as ours:
            scaled_dot_product_attention(query, *layer._view(None))
        assert str(ours.value) == str(theirs.value)


def test_falling_back_is_said_once(caplog):
    cache_attention._say_why_not.cache_clear()
    layer = AdaptiveQuantizedLayer(8, 8, residual_length=32)
    double = states(LENGTH).double()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            keys, values = layer.update(double, double)
            query = states(1, seed=2).double()
            output = scaled_dot_product_attention(query, keys, values)
            expected = scaled_dot_product_attention(query, *layer.decode())
            assert torch.equal(output, expected)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "decodes all of it at every step" in messages[0]
    assert "float64 on cpu" in messages[0] or "not built" in messages[0]


@needs_kernels
def test_each_limit_that_is_exceeded_is_said(caplog):
    cache_attention._say_why_not.cache_clear()
    for block, tokens, head_dim in ((1025, 1030, 16), (32, 40, 1032)):
        layer = AdaptiveQuantizedLayer(8, 8, residual_length=block)
        new = states(tokens, batch=1, head_dim=head_dim)
        scaled_dot_product_attention(new[:, :, -1:], *layer.update(new, new))
    layer = AdaptiveQuantizedLayer(8, 8, residual_length=32)
    keys, values = layer.update(states(LENGTH), states(LENGTH))
    mask = torch.zeros(1, LENGTH, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="mask"):  # torch, which takes over, refuses it
        scaled_dot_product_attention(states(1), keys, values, mask)
    messages = [record.getMessage() for record in caplog.records]
    assert "blocks of up to 1024 tokens; choose a smaller residual_length" in messages[0]
    assert "keys of up to 1024 channels, these have 1032" in messages[1]
    assert "masks in torch.float64 with queries in torch.float32" in messages[2]


def test_without_kernels_torch_computes(layer, monkeypatch):
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "none")
    query = states(1, seed=2)
    output = scaled_dot_product_attention(query, *layer._view(None))
    assert torch.equal(output, scaled_dot_product_attention(query, *layer.decode()))


# Unmodified models


def random_ids(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 100, (batch, length), generator=generator)


def model_with(tiny_llama, kv_heads=2, attention="sdpa"):
    config = copy.deepcopy(tiny_llama.config)
    config.num_key_value_heads = kv_heads
    config._attn_implementation = attention
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def decode_steps(model, ids, sizes, cache, mask=None):
    outputs, start = [], 0
    for size in sizes:
        end = start + size
        arguments = {} if mask is None else {"attention_mask": mask[:, :end]}
        result = model(input_ids=ids[:, start:end], past_key_values=cache, **arguments)
        outputs.append(result.logits)
        start = end
    return torch.cat(outputs, dim=1)


@needs_kernels
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("padding", [0, 40])
def test_a_model_decodes_from_packed_blocks(tiny_llama, native_calls, padding, kv_heads):
    """GQA and left padding included, single tokens and a few at once."""
    model = model_with(tiny_llama, kv_heads)
    ids, sizes = random_ids(2, 120), [80, 1, 1, 1, 5, 8, 1, 1, 22]
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    logits = {}
    for path in ("auto", "none"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(library.ENVIRONMENT_VARIABLE, path)
            cache = AdaptiveQuantizedCache(model.config, PROFILE)
            logits[path] = decode_steps(model, ids, sizes, cache, mask)
    # All but the prompt of 80; the chunk of 22 is at most 64 rows with up to two heads each.
    expected = 7 + (22 * 4 // kv_heads <= cache_attention.MAX_ROWS)
    assert len(native_calls) == expected * len(model.model.layers)
    seen = mask.bool()
    difference = (logits["auto"] - logits["none"])[seen]
    assert difference.abs().max() < 1e-3 * logits["none"].std()


@needs_kernels
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}])
def test_generate_never_decodes_after_the_prompt(
    tiny_llama, native_calls, no_decoding, settings, monkeypatch
):
    ids = random_ids(1, 20).repeat(1, 4)
    arguments = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, **settings}
    arguments["past_key_values"] = AdaptiveQuantizedCache(tiny_llama.config, PROFILE)
    forward = tiny_llama.forward

    def forward_then_forbid(*positional, **keyword):
        output = forward(*positional, **keyword)
        no_decoding()
        return output

    monkeypatch.setattr(tiny_llama, "forward", forward_then_forbid)
    generated = tiny_llama.generate(input_ids=ids, **arguments)
    assert generated.shape == (1, 110)
    assert native_calls


def test_a_prompt_decodes_keys_and_values_of_each_layer_once(tiny_llama, monkeypatch):
    decoded, decode = [], Pinned.decode

    def counted(pinned):
        decoded.append(pinned)
        return decode(pinned)

    monkeypatch.setattr(Pinned, "decode", counted)
    cache = AdaptiveQuantizedCache(tiny_llama.config, PROFILE)
    tiny_llama(random_ids(2, 300), past_key_values=cache)
    assert len(decoded) == 2 * len(cache.layers)


@needs_kernels
def test_generated_tokens_are_those_of_the_decoded_cache(tiny_llama, monkeypatch):
    ids = random_ids(3, 90)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    arguments = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    tokens = {}
    for path in (*library.available_paths(), "none"):
        monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, path)
        cache = AdaptiveQuantizedCache(tiny_llama.config, PROFILE)
        tokens[path] = tiny_llama.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, **arguments
        )
    for path, found in tokens.items():
        assert torch.equal(found, tokens["none"]), path


def test_eager_attention_gets_right_values(tiny_llama):
    ids, sizes = random_ids(2, 100), [70, 1, 1, 28]
    eager = model_with(tiny_llama, attention="eager")
    sdpa = model_with(tiny_llama)
    logits = [
        decode_steps(model, ids, sizes, AdaptiveQuantizedCache(model.config, PROFILE))
        for model in (eager, sdpa)
    ]
    assert (logits[0] - logits[1]).abs().max() < 1e-3 * logits[1].std()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_16_bits(tiny_llama, native_calls, dtype):
    model = model_with(tiny_llama).to(dtype)
    ids, sizes = random_ids(2, 100), [90] + [1] * 10
    ours = decode_steps(model, ids, sizes, AdaptiveQuantizedCache(model.config, PROFILE))
    stock = decode_steps(model, ids, sizes, DynamicCache(config=model.config))
    assert native_calls
    assert (ours - stock).float().square().mean().sqrt() < 0.03 * stock.float().std()


@needs_kernels
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_models_work_and_graph_breaks_are_counted(tiny_llama, native_calls, request):
    counters = torch._dynamo.utils.counters
    ids, sizes = random_ids(1, 60), [50] + [1] * 10
    expected = decode_steps(
        tiny_llama, ids, sizes, AdaptiveQuantizedCache(tiny_llama.config, PROFILE)
    )
    eager_calls = len(native_calls)
    request.addfinalizer(torch._dynamo.reset)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(tiny_llama, backend="eager")
    cache = AdaptiveQuantizedCache(tiny_llama.config, PROFILE)
    output = decode_steps(compiled, ids, sizes, cache)
    torch.testing.assert_close(output, expected)
    assert len(native_calls) == 2 * eager_calls
    if torch.__version__ < (2, 9):
        return  # which also compiles what is called where a graph breaks, piece by piece
    breaks = sum(counters["graph_break"].values())
    reasons = {reason.splitlines()[0] for reason in counters["graph_break"]}
    # One where the cache is updated and one at attention, in every frame that holds either; none
    # for another reason.
    assert 2 <= breaks <= 40, counters["graph_break"]
    assert all("torch.compiler.disable" in reason for reason in reasons), reasons


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llava"])
def test_flex_attention_gets_decoded_tensors(name, request):
    """transformers compiles it, and may be told to use it at any time."""
    model = request.getfixturevalue(name)
    cache = AdaptiveQuantizedCache(model.config, PROFILE)
    kinds = []
    for implementation in ("sdpa", "flex_attention", "eager"):
        model.set_attn_implementation(implementation)
        kinds.append(type(cache.update(states(40), states(40, seed=1), 0)[0]))
    assert kinds == [CacheView, torch.Tensor, CacheView]


def test_copies_of_a_cache_follow_the_model(tiny_llama):
    cache = AdaptiveQuantizedCache(tiny_llama.config, PROFILE)
    copies = [copy.deepcopy(cache), copy.deepcopy(copy.deepcopy(cache))]
    tiny_llama.set_attn_implementation("flex_attention")
    for twin in (*copies, pickle.loads(pickle.dumps(cache))):
        assert type(twin.update(states(40), states(40, seed=1), 0)[0]) is torch.Tensor
        twin.reset()


def test_a_pickled_cache_holds_nothing_of_the_config(tiny_llama):
    empty = len(pickle.dumps(AdaptiveQuantizedCache(tiny_llama.config, PROFILE)))
    tiny_llama.config.label = "x" * 10_000
    assert len(pickle.dumps(AdaptiveQuantizedCache(tiny_llama.config, PROFILE))) == empty


def test_encoder_decoders_with_one_config_say_how_they_attend():
    sizes = {"d_model": 32, "decoder_attention_heads": 2, "decoder_layers": 1, "encoder_layers": 1}
    config = BartConfig(**sizes)
    cache = AdaptiveQuantizedCache(config, PROFILE)
    config._attn_implementation = "flex_attention"
    assert type(cache.update(states(40), states(40, seed=1), 0)[0]) is torch.Tensor


@pytest.mark.slow
def test_a_model_with_flex_attention_reads_the_cache(tiny_llama):
    ids, logits = random_ids(2, 70), []
    for implementation in ("sdpa", "flex_attention"):
        tiny_llama.set_attn_implementation(implementation)
        cache = AdaptiveQuantizedCache(tiny_llama.config, PROFILE)
        logits.append(decode_steps(tiny_llama, ids, [70], cache))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
