"""The cache in front of whole models, against DynamicCache; bytes, construction, refusals."""

import copy
import io
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    QuantizedCache,
)
from transformers.cache_utils import DynamicLayer

from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.carrying import carried_profile
from hf_adaptive_sparse.profiles import KVCacheConfig
from tests.conftest import random_ids

MEAN_7 = KVCacheConfig(key_bits=(8, 6, 8, 6), value_bits=(6, 8, 6, 8))
MEAN_7_SHORT = replace(MEAN_7, residual_length=64)


@torch.no_grad()
def logits_in_chunks(model, ids, cache, sizes, mask=None):
    """Logits of all tokens, fed in chunks of the given sizes through the cache."""
    parts, start = [], 0
    for size in sizes:
        end = start + size
        part = model(
            input_ids=ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(part.logits)
        start = end
    return torch.cat(parts, dim=1)


def states(tokens, dtype=torch.bfloat16, heads=16, width=64):
    generator = torch.Generator().manual_seed(tokens)
    shape = (1, heads, tokens, width)
    return torch.randn(shape, generator=generator).to(dtype)


# Construction


def test_it_is_a_quantized_cache_with_one_layer_per_decoder_layer(tiny_llama):
    cache = AdaptiveQuantizedCache(config=tiny_llama.config, kv_cache=MEAN_7)
    assert isinstance(cache, QuantizedCache)
    bits = [(layer.key_bits, layer.value_bits) for layer in cache.layers]
    assert bits == [(8, 6), (6, 8), (8, 6), (6, 8)]
    assert len(cache) == 4
    assert not cache.is_compileable
    assert cache.is_croppable
    assert cache.get_seq_length() == 0
    assert cache.get_max_length() == -1


def test_the_whole_config_of_a_vlm_is_taken(tiny_llava):
    cache = AdaptiveQuantizedCache(tiny_llava.config)
    assert len(cache) == tiny_llava.config.text_config.num_hidden_layers
    assert [layer.key_bits for layer in cache.layers] == [8] * 4


def test_a_list_of_the_wrong_length_is_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"4 layers, the list has 3 entries"):
        AdaptiveQuantizedCache(tiny_llama.config, KVCacheConfig(key_bits=(8, 6, 8)))


def test_something_else_than_a_profile_is_refused(tiny_llama):
    with pytest.raises(TypeError, match=r"KVCacheConfig\(bits=8\), got dict"):
        AdaptiveQuantizedCache(tiny_llama.config, {"bits": 8})


@pytest.mark.parametrize(
    "kv_cache", [KVCacheConfig(bits=4), KVCacheConfig(bits=4).to_dict()], ids=["object", "dict"]
)
@pytest.mark.parametrize("form", ["object", "dict"])
def test_the_profile_of_the_config_is_found(tiny_llama, kv_cache, form):
    fields = {"quant_method": "adaptive_sparse", "kv_cache": kv_cache}
    config = copy.deepcopy(tiny_llama.config)
    config.quantization_config = fields if form == "dict" else SimpleNamespace(**fields)
    found = carried_profile(config)
    assert found.layer_bits(4) == ((4, 4),) * 4
    assert [layer.key_bits for layer in AdaptiveQuantizedCache(config).layers] == [4] * 4
    # An argument has precedence.
    cache = AdaptiveQuantizedCache(config, KVCacheConfig(bits=6))
    assert [layer.key_bits for layer in cache.layers] == [6] * 4


@pytest.mark.parametrize(
    "quantization",
    [
        None,
        {"quant_method": "adaptive_sparse"},
        {"quant_method": "adaptive_sparse", "kv_cache": None},
        {"quant_method": "adaptive_sparse", "kv_cache": False},
        {"quant_method": "bitsandbytes", "kv_cache": {"bits": 4}},
        SimpleNamespace(quant_method="gptq", bits=4),
    ],
)
def test_configs_without_a_profile_have_none(tiny_llama, quantization):
    config = copy.deepcopy(tiny_llama.config)
    assert carried_profile(config) is None
    config.quantization_config = quantization
    assert carried_profile(config) is None


def test_an_unknown_kind_of_profile_is_refused(tiny_llama):
    tiny_llama.config.quantization_config = {"quant_method": "adaptive_sparse", "kv_cache": 8}
    with pytest.raises(TypeError, match="got int"):
        carried_profile(tiny_llama.config)


def test_repr_is_readable(tiny_llama):
    cache = AdaptiveQuantizedCache(
        tiny_llama.config, KVCacheConfig(bits=8, value_bits=(8, 6, 4, 2))
    )
    tiny_llama(input_ids=random_ids(1, 70), past_key_values=cache)
    assert repr(cache) == (
        "AdaptiveQuantizedCache(layers=4 (4 quantised), key_bits=8, value_bits=[8, 6, 4, 2], "
        "group_size=64, residual_length=128, key_mode=channel, tokens=70, "
        f"nbytes={cache.nbytes:,})"
    )


# Models


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_at_16_bits_logits_equal_dynamic_cache(tiny_llama, kv_heads, attention):
    config = copy.deepcopy(tiny_llama.config)
    config.num_key_value_heads = kv_heads
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids, sizes = random_ids(2, 150), [70, 1, 1, 30, 1, 47]
    ours = AdaptiveQuantizedCache(config, KVCacheConfig(bits=16))
    expected = logits_in_chunks(model, ids, DynamicCache(config=config), sizes)
    assert torch.equal(logits_in_chunks(model, ids, ours, sizes), expected)


@pytest.mark.parametrize(
    ("profile", "bound"),
    [
        (KVCacheConfig(bits=8), 0.006),
        (MEAN_7, 0.02),
        (KVCacheConfig(bits=6), 0.025),
        (KVCacheConfig(bits=4), 0.08),
        (KVCacheConfig(bits=3), 0.16),
        (KVCacheConfig(bits=2), 0.32),
        (KVCacheConfig(key_bits=16, value_bits=4), 0.08),
        (KVCacheConfig(key_bits=2, value_bits=16), 0.006),
    ],
)
def test_logits_differ_by_a_bounded_amount_and_by_some(tiny_llama, profile, bound):
    ids, sizes = random_ids(2, 200), [130, 1, 1, 1, 60, 7]
    expected = logits_in_chunks(tiny_llama, ids, DynamicCache(config=tiny_llama.config), sizes)
    cache = AdaptiveQuantizedCache(tiny_llama.config, profile)
    difference = logits_in_chunks(tiny_llama, ids, cache, sizes) - expected
    assert 0 < difference.std() / expected.std() < bound


def test_one_forward_pass_sees_the_quantisation(tiny_llama):
    ids = random_ids(1, 128)
    dense = tiny_llama(input_ids=ids).logits
    cache = AdaptiveQuantizedCache(tiny_llama.config, KVCacheConfig(bits=2))
    assert (tiny_llama(input_ids=ids, past_key_values=cache).logits - dense).abs().max() > 1e-3


@pytest.mark.parametrize("bits", [16, 8])
def test_chunks_of_whole_blocks_equal_one_forward_pass(tiny_llama, bits):
    ids = random_ids(2, 200)
    profile = KVCacheConfig(bits=bits, residual_length=64)
    once = AdaptiveQuantizedCache(tiny_llama.config, profile)
    pieces = AdaptiveQuantizedCache(tiny_llama.config, profile)
    whole = logits_in_chunks(tiny_llama, ids, once, [200])
    chunked = logits_in_chunks(tiny_llama, ids, pieces, [64, 128, 8])
    torch.testing.assert_close(chunked, whole, rtol=1e-3, atol=1e-3 * float(whole.std()))
    assert once.get_seq_length() == pieces.get_seq_length() == 200


def test_left_padding_changes_nothing(tiny_llama):
    ids = random_ids(1, 90)
    alone = logits_in_chunks(
        tiny_llama, ids, AdaptiveQuantizedCache(tiny_llama.config, MEAN_7_SHORT), [80, 5, 5]
    )
    padded = torch.cat([torch.zeros(1, 64, dtype=torch.long), ids], dim=1)
    mask = (padded > 0).long()
    cache = AdaptiveQuantizedCache(tiny_llama.config, MEAN_7_SHORT)
    together = logits_in_chunks(tiny_llama, padded, cache, [144, 5, 5], mask)[:, 64:]
    # Positions differ where none are given, rotary attention does not mind; blocks stay aligned.
    torch.testing.assert_close(together, alone, rtol=0.02, atol=0.02 * float(alone.std()))


def test_a_long_decode_crosses_many_blocks(tiny_llama):
    ids = random_ids(1, 330)
    sizes = [30] + [1] * 300
    cache = AdaptiveQuantizedCache(tiny_llama.config, KVCacheConfig(bits=8, residual_length=32))
    ours = logits_in_chunks(tiny_llama, ids, cache, sizes)
    stock = logits_in_chunks(tiny_llama, ids, DynamicCache(config=tiny_llama.config), sizes)
    assert (ours - stock).abs().max() / stock.std() < 0.006
    assert cache.layers[0]._quantized_keys.blocks.length == 320


@pytest.mark.parametrize(("bits", "bound"), [(16, 0.0), (8, 0.01)])
def test_rollback_and_retry_gives_the_same_logits(tiny_llama, bits, bound):
    """Taking tokens back and feeding them again must leave no trace, whatever was packed."""
    profile = KVCacheConfig(bits=bits, residual_length=32)
    ids = random_ids(2, 160)
    for removed in (1, 3, 31, 32, 33, 70, 100):
        cache = AdaptiveQuantizedCache(tiny_llama.config, profile)
        logits_in_chunks(tiny_llama, ids[:, :140], cache, [140])
        cache.crop(-removed)
        assert cache.get_seq_length() == 140 - removed
        again = logits_in_chunks(tiny_llama, ids[:, 140 - removed :], cache, [removed + 20])
        stock = DynamicCache(config=tiny_llama.config)
        logits_in_chunks(tiny_llama, ids[:, :140], stock, [140])
        stock.crop(-removed)
        expected = logits_in_chunks(tiny_llama, ids[:, 140 - removed :], stock, [removed + 20])
        assert (again - expected).std() <= bound * expected.std()


@pytest.mark.parametrize(("bits", "bound"), [(16, 0.0), (8, 0.01)])
def test_batch_operations_equal_dynamic_cache(tiny_llama, bits, bound):
    ids = random_ids(3, 100)
    profile = KVCacheConfig(bits=bits, residual_length=32)
    ours = AdaptiveQuantizedCache(tiny_llama.config, profile)
    stock = DynamicCache(config=tiny_llama.config)
    results = []
    for cache in (ours, stock):
        logits_in_chunks(tiny_llama, ids, cache, [100])
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0, 1, 3]))
        results.append(logits_in_chunks(tiny_llama, random_ids(4, 70, seed=1), cache, [1, 69]))
    assert (results[0] - results[1]).std() <= bound * results[1].std()


def test_iteration_gives_what_dynamic_cache_gives(tiny_llama):
    ours = AdaptiveQuantizedCache(tiny_llama.config, KVCacheConfig(bits=16))
    stock = DynamicCache(config=tiny_llama.config)
    assert [entry[0] for entry in ours] == [None] * 4
    for cache in (ours, stock):
        logits_in_chunks(tiny_llama, random_ids(2, 90), cache, [80, 10])
    for mine, theirs in zip(ours, stock, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
        assert mine[2] is theirs[2] is None


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), lambda c: save_and_load(c)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_go_on_by_themselves(tiny_llama, duplicate):
    ids = random_ids(2, 140)
    cache = AdaptiveQuantizedCache(tiny_llama.config, MEAN_7)
    logits_in_chunks(tiny_llama, ids[:, :100], cache, [100])
    twin = duplicate(cache)
    assert repr(twin) == repr(cache)
    there = logits_in_chunks(tiny_llama, ids[:, 100:], twin, [1, 39])
    assert cache.get_seq_length() == 100
    here = logits_in_chunks(tiny_llama, ids[:, 100:], cache, [1, 39])
    assert torch.equal(there, here)


def save_and_load(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_another_batch_or_model_is_refused(tiny_llama):
    cache = AdaptiveQuantizedCache(tiny_llama.config, MEAN_7)
    tiny_llama(input_ids=random_ids(2, 10), past_key_values=cache)
    with pytest.raises(ValueError, match=r"Layer 0 .* batch size 2.* got batch size 3"):
        tiny_llama(input_ids=random_ids(3, 1), past_key_values=cache)
    config = copy.deepcopy(tiny_llama.config)
    config.num_key_value_heads = 4
    other = LlamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"2 heads of 16 .* got .* 4 heads of 16"):
        other(input_ids=random_ids(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"float32; got .*bfloat16"):
        tiny_llama.bfloat16()(input_ids=random_ids(2, 1), past_key_values=cache)
    cache.reset()
    tiny_llama(input_ids=random_ids(3, 5), past_key_values=cache)
    assert cache.get_seq_length() == 5


@torch.no_grad()
def test_nan_names_the_layer_that_made_it(tiny_llama):
    tiny_llama.model.layers[2].self_attn.v_proj.weight[0, 0] = float("nan")
    cache = AdaptiveQuantizedCache(tiny_llama.config)
    with pytest.raises(ValueError, match="values of layer 2 must be finite"):
        tiny_llama(input_ids=random_ids(1, 130), past_key_values=cache)


# Bytes


@pytest.fixture
def wide_config(tiny_llama):
    """Four layers of 4 key-value heads of 64, for caches that are fed without a model."""
    config = copy.deepcopy(tiny_llama.config)
    config.num_key_value_heads, config.head_dim = 4, 64
    return config


def feed(cache, states, step):
    """Feed every layer, without looking at what it returns: only bytes are wanted."""
    for layer in cache.layers:
        layer._view = lambda newest: (None, None)
        for start in range(0, states.shape[-2], step):
            layer.update(states[:, :, start : start + step], states[:, :, start : start + step])


@pytest.mark.parametrize(
    ("tokens", "step", "bound"),
    [(2048, 2048, 0.49), (2048, 1, 0.49), (8192, 8192, 0.46), (8192, 16, 0.46)],
)
def test_mean_7_bits_take_at_most_46_percent_of_bf16(wide_config, tokens, step, bound):
    ours = AdaptiveQuantizedCache(wide_config, MEAN_7)
    feed(ours, states(tokens, heads=4), step)
    assert ours.get_seq_length() == tokens
    ratio = ours.nbytes / (4 * 2 * 4 * tokens * 64 * 2)
    metadata_bits = (32 / 128 + 16 / 64 + 64 / (64 * 128)) / 2
    assert ratio == pytest.approx((7 + metadata_bits) / 16)
    assert ratio <= bound


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 16])
def test_bytes_are_those_of_the_formula_plus_bounded_slack(wide_config, bits):
    cache = AdaptiveQuantizedCache(wide_config, KVCacheConfig(bits=bits, residual_length=32))
    keys = states(1, heads=4)
    raw_bytes = 2 * 4 * 4 * 64 * 2
    blocks_bytes = 0
    if bits != 16:
        layer = cache.layers[0]
        per_head = sum(
            codec.block_size_bytes(32, 64) for codec in (layer._key_codec, layer._value_codec)
        )
        blocks_bytes = 4 * 4 * per_head
    worst = 0.0
    for length in range(1, 1500):
        feed(cache, keys, 1)
        tail = length if bits == 16 else length % 32
        exact = (length - tail) / 32 * blocks_bytes + tail * raw_bytes
        assert cache.nbytes >= exact
        if length > 1024:
            worst = max(worst, cache.nbytes / exact)
    assert worst < 1.04


def test_bytes_include_everything_allocated(wide_config):
    cache = AdaptiveQuantizedCache(wide_config, MEAN_7)
    keys = states(100, heads=4)
    for index in range(4):
        cache.update(keys, keys, index)
    tensors = {}

    def visit(thing):
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            tensors[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, (list, tuple)):
            for entry in thing:
                visit(entry)
        elif hasattr(thing, "__dict__") and not isinstance(thing, KVCacheConfig):
            for entry in vars(thing).values():
                visit(entry)

    visit(cache.layers)
    assert sum(tensors.values()) == cache.nbytes


def test_dynamic_layer_is_what_gets_replaced(tiny_llama):
    """Should transformers rename or subclass its plain layer, this fails, not the savings."""
    layers = DynamicCache(config=tiny_llama.config).layers
    assert [type(layer) for layer in layers] == [DynamicLayer] * 4


# The shared model


@pytest.fixture
def shared_model(shared_dir):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    folder = shared_dir / "models/tiny-llava"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def prose(shared_dir, shared_model):
    import pyarrow.parquet

    _, tokenizer = shared_model
    table = pyarrow.parquet.read_table(shared_dir / "data/wikitext2/evaluation.parquet")
    text = "\n".join(table.column("text").to_pylist()[:120])
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


@pytest.mark.shared_data
def test_real_model_chunks_do_not_matter(shared_model, prose):
    model, _ = shared_model
    ids, profile = prose[:, :512], KVCacheConfig(bits=(8, 6) * 4)
    targets = ids[0, 1:]

    def loss(sizes):
        cache = AdaptiveQuantizedCache(model.config, profile)
        logits = logits_in_chunks(model, ids, cache, sizes)
        return torch.nn.functional.cross_entropy(logits[0, :-1], targets)

    once = loss([512])
    torch.testing.assert_close(loss([64, 192, 256]), once, rtol=1e-4, atol=0)
    # Inside a block the newest tokens are still unquantised when they are fed one by one.
    torch.testing.assert_close(loss([100] * 5 + [12]), once, rtol=1e-3, atol=0)
    torch.testing.assert_close(loss([500] + [1] * 12), once, rtol=1e-3, atol=0)


@pytest.mark.shared_data
def test_real_model_8_bit_greedy_decoding_equals_dense(shared_model, prose):
    model, _ = shared_model
    same, total = 0, 0
    for start in (0, 700):
        ids = prose[:, start : start + 200]
        settings = {"max_new_tokens": 80, "do_sample": False, "eos_token_id": None}
        dense = model.generate(input_ids=ids, **settings)
        cache = AdaptiveQuantizedCache(model.config, KVCacheConfig(bits=8))
        ours = model.generate(input_ids=ids, past_key_values=cache, **settings)
        same += int((dense[:, 200:] == ours[:, 200:]).sum())
        total += 80
    assert same / total > 0.9


@pytest.mark.shared_data
@torch.no_grad()
def test_real_model_loses_nothing_at_8_bits_and_visibly_at_2(shared_model, prose):
    model, _ = shared_model
    ids = prose[:, :1024]

    def loss(cache):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))

    dense = loss(DynamicCache(config=model.config))

    def rise(bits):
        return loss(AdaptiveQuantizedCache(model.config, KVCacheConfig(bits=bits))) - dense

    assert abs(rise(8)) < 0.001
    assert abs(rise((8, 6) * 4)) < 0.001
    assert rise(2) > 0.02
