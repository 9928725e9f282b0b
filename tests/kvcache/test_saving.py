"""A cache as plain tensors, through a file and back."""

import copy
import io

import pytest
import torch
import transformers
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.saving import layer_state
from hf_adaptive_sparse.profiles import KVCacheConfig
from tests.conftest import random_ids

PROFILES = [
    KVCacheConfig(bits=16),
    KVCacheConfig(bits=8, residual_length=16),
    KVCacheConfig(bits=(3, 16, 4, 2), value_bits=(16, 6, 2, 8), residual_length=16, sink_length=3),
    KVCacheConfig(bits=6, residual_length=16, key_mode="token"),
]


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@torch.no_grad()
def feed(model, cache, *pieces):
    return torch.cat([model(input_ids=ids, past_key_values=cache).logits for ids in pieces], dim=1)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("tokens", [5, 32, 61])
@pytest.mark.parametrize("crop", [0, 4])
def test_a_loaded_cache_goes_on_like_the_saved_one(tiny_llama, profile, tokens, crop):
    cache = AdaptiveQuantizedCache(tiny_llama.config, profile)
    feed(tiny_llama, cache, random_ids(2, tokens))
    cache.crop(-crop)
    loaded = AdaptiveQuantizedCache(tiny_llama.config, profile)
    loaded.load_state_dict(through_file(cache.state_dict()))
    assert loaded.get_seq_length() == cache.get_seq_length() == tokens - crop
    assert loaded.nbytes <= cache.nbytes
    new = random_ids(2, 30, seed=1).split([1, 20, 9], dim=1)
    assert torch.equal(feed(tiny_llama, loaded, *new), feed(tiny_llama, cache, *new))


def test_a_state_keeps_what_the_cache_held(tiny_llama):
    """A crop makes room that the next tokens overwrite, in the cache and not in its states."""
    profile = KVCacheConfig(bits=8, residual_length=16)
    cache, loaded = (AdaptiveQuantizedCache(tiny_llama.config, profile) for _ in range(2))
    feed(tiny_llama, cache, random_ids(1, 40))
    state = cache.state_dict()
    expected = copy.deepcopy(state)
    for count in (3, 30):
        cache.crop(-count)
        feed(tiny_llama, cache, random_ids(1, count, seed=1))
    for source in (state, expected):
        loaded.load_state_dict(source)
        source["logits"] = feed(tiny_llama, loaded, random_ids(1, 5, seed=2))
    assert torch.equal(state["logits"], expected["logits"])


def test_an_empty_cache_and_one_that_held_something_else(tiny_llama):
    cache = AdaptiveQuantizedCache(tiny_llama.config)
    loaded = AdaptiveQuantizedCache(tiny_llama.config)
    feed(tiny_llama, loaded, random_ids(3, 140))
    loaded.load_state_dict(through_file(cache.state_dict()))
    assert loaded.get_seq_length() == loaded.nbytes == 0
    assert feed(tiny_llama, loaded, random_ids(1, 5)).shape[0] == 1


@pytest.mark.parametrize("bits", [(8, 8), (8, 16), (16, 8)])
@pytest.mark.parametrize("kind", ["Mistral", "Lfm2"])
def test_windows_and_layers_of_transformers_are_saved_too(kind, bits):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        pad_token_id=0,
        **(
            {"layer_types": ["conv", "full_attention"]} if kind == "Lfm2" else {"sliding_window": 9}
        ),
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    profile = KVCacheConfig(key_bits=bits[0], value_bits=bits[1], residual_length=8)
    cache = AdaptiveQuantizedCache(config, profile)
    feed(model, cache, random_ids(2, 50))
    state = through_file(cache.state_dict())
    new = random_ids(2, 3, seed=1).split(1, dim=1)
    expected = feed(model, cache, *new)
    for _ in range(2):  # what one cache makes of a state does not change it
        loaded = AdaptiveQuantizedCache(config, profile)
        loaded.load_state_dict(state)
        assert torch.equal(feed(model, loaded, *new), expected)
    assert loaded.get_mask_sizes(1, 1) == cache.get_mask_sizes(1, 1)


def test_what_does_not_fit_is_refused(tiny_llama):
    cache = AdaptiveQuantizedCache(tiny_llama.config, KVCacheConfig(bits=8, residual_length=16))
    feed(tiny_llama, cache, random_ids(1, 40))
    state = cache.state_dict()
    for other in (KVCacheConfig(bits=6, residual_length=16), KVCacheConfig(bits=8)):
        with pytest.raises(ValueError, match="same profile and number of layers"):
            AdaptiveQuantizedCache(tiny_llama.config, other).load_state_dict(state)
    config = copy.deepcopy(tiny_llama.config)
    config.num_hidden_layers = 2
    with pytest.raises(ValueError, match=r"4 layers.*this one 2 layers"):
        AdaptiveQuantizedCache(config, cache.kv_cache).load_state_dict(state)
    with pytest.raises(ValueError, match="format_version 99"):
        cache.load_state_dict(state | {"format_version": 99})
    broken = copy.deepcopy(state)
    parts = broken["layers"][1]["stores"][0]["parts"]
    parts[0] = parts[0][..., :-1]
    with pytest.raises(ValueError, match="saved blocks of layer 1 do not fit its codec"):
        cache.load_state_dict(broken)
    lossless = AdaptiveQuantizedCache(tiny_llama.config, KVCacheConfig(bits=16))
    with pytest.raises(ValueError, match="Layer 0 keeps 16 bits"):
        lossless.load_state_dict(state | {"kv_cache": lossless.kv_cache.to_dict()})


def test_a_state_of_another_form_is_refused(tiny_llama):
    cache = AdaptiveQuantizedCache(tiny_llama.config, PROFILES[1])
    feed(tiny_llama, cache, random_ids(1, 40))
    state = cache.state_dict()
    layers = state["layers"]
    stores = [layers[0], layers[1] | {"stores": [None, None]}, *layers[2:]]
    forms = [{"layers": other} for other in (None, 3, "layers", [None] * 4, {}, stores)]
    for broken in (None, [], 3, *({**state, **form} for form in forms)):
        with pytest.raises(ValueError, match="state of a cache must be a dict"):
            cache.load_state_dict(broken)
    with pytest.raises(KeyError, match="layers"):
        cache.load_state_dict({"format_version": 1})


def test_a_state_that_is_refused_leaves_the_cache_as_it_was(tiny_llama):
    caches = [AdaptiveQuantizedCache(tiny_llama.config, PROFILES[1]) for _ in range(3)]
    for cache, tokens in zip(caches, (40, 23, 23), strict=True):
        feed(tiny_llama, cache, random_ids(1, tokens))
    broken = caches[0].state_dict()
    broken["layers"][3]["stores"][1]["sinks"] = 400
    with pytest.raises(ValueError, match="layer 3 must have"):
        caches[1].load_state_dict(broken)
    new = random_ids(1, 20, seed=1)
    assert torch.equal(feed(tiny_llama, caches[1], new), feed(tiny_llama, caches[2], new))


def test_keys_and_values_of_different_sequences_are_refused(tiny_llama):
    """Kernels read as many values as there are keys."""
    caches = [AdaptiveQuantizedCache(tiny_llama.config, PROFILES[1]) for _ in range(2)]
    for cache, batch in zip(caches, (2, 1), strict=True):
        feed(tiny_llama, cache, random_ids(batch, 40))
    states = [cache.state_dict() for cache in caches]
    stores = [state["layers"][2]["stores"] for state in states]
    stores[0][1] = stores[1][1]
    with pytest.raises(ValueError, match=r"layer 2 must have as many sequences.*\(2, 2, "):
        caches[0].load_state_dict(states[0])


def test_what_is_not_plain_is_refused_by_name():
    layer = DynamicLayer()
    layer.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    assert set(layer_state(layer)) >= {"keys", "values", "is_initialized"}
    layer.note = {"made": (1, 2)}
    assert layer_state(layer)["note"] == {"made": [1, 2]}
    layer.note = {"made": object()}
    with pytest.raises(TypeError, match="note of type object cannot be saved"):
        layer_state(layer)


def test_it_is_a_dynamic_cache_to_whom_asks(tiny_llama):
    cache = AdaptiveQuantizedCache(tiny_llama.config)
    assert isinstance(cache, DynamicCache)
    assert not cache.is_compileable
    both = transformers.EncoderDecoderCache(cache, DynamicCache())
    feed(LlamaForCausalLM(tiny_llama.config), cache, random_ids(2, 150))
    both.crop(-3)
    both.batch_repeat_interleave(2)
    both.batch_select_indices(torch.tensor([0, 3]))
    both.reorder_cache(torch.tensor([1, 0]))
    assert both.get_seq_length() == 147


def test_parts_of_no_blocks_are_not_believed(tiny_llama):
    """They would say where kernels write."""
    cache = AdaptiveQuantizedCache(tiny_llama.config, PROFILES[1])
    feed(tiny_llama, cache, random_ids(1, 5))
    state = cache.state_dict()
    for layer in state["layers"]:
        for store in layer["stores"]:
            batch, heads = store["raw"].shape[:2]
            store["parts"] = [torch.zeros(batch, heads, 0, 1, dtype=torch.uint8)] * 3
    loaded = AdaptiveQuantizedCache(tiny_llama.config, PROFILES[1])
    loaded.load_state_dict(state)
    new = random_ids(1, 100, seed=1)
    assert torch.equal(feed(tiny_llama, loaded, new), feed(tiny_llama, cache, new))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lengths", [5000, 16], "must hold 1 to 16 tokens each"),
        ("lengths", [16, 16, 16], "must hold 1 to 16 tokens each"),
        ("lengths", [16, 0], "must hold 1 to 16 tokens each"),
        ("lengths", [16, 15.5], "whole numbers lengths"),
        ("lengths", None, "whole numbers lengths"),
        ("sinks", 400, "sinks"),
        ("sinks", "3", "whole number sinks"),
        ("parts", None, "list of tensors parts"),
        ("raw", torch.ones(1, 2, 8), "states raw"),
        ("raw", torch.ones(1, 2, 8, 0), "states raw"),
        ("raw", None, "states raw"),
    ],
)
def test_numbers_that_the_tensors_do_not_bear_out_are_refused(tiny_llama, field, value, message):
    """Kernels read as far as these say."""
    cache = AdaptiveQuantizedCache(tiny_llama.config, PROFILES[1])
    feed(tiny_llama, cache, random_ids(1, 40))
    state = cache.state_dict()
    state["layers"][1]["stores"][0][field] = value
    loaded = AdaptiveQuantizedCache(tiny_llama.config, PROFILES[1])
    with pytest.raises(ValueError, match=message):
        loaded.load_state_dict(state)


@pytest.mark.parametrize("which", [0, 1])
def test_tensors_on_several_devices_are_refused(tiny_llama, which):
    """A kernel takes their addresses for its own device's."""
    cache = AdaptiveQuantizedCache(tiny_llama.config, PROFILES[1])
    feed(tiny_llama, cache, random_ids(1, 40))
    for move in (
        lambda store: store.update(raw=store["raw"].to("meta")),
        lambda store: store["parts"].append(store["parts"].pop().to("meta")),
    ):
        state = cache.state_dict()
        move(state["layers"][1]["stores"][which])
        with pytest.raises(ValueError, match="on one device"):
            cache.load_state_dict(state)


@pytest.mark.parametrize("tokens", [-1, 39, 41, 40.0, None])
def test_a_length_that_is_not_that_of_the_tokens_is_refused(tiny_llama, tokens):
    cache = AdaptiveQuantizedCache(tiny_llama.config, PROFILES[1])
    feed(tiny_llama, cache, random_ids(1, 40))
    state = cache.state_dict()
    state["layers"][1]["cumulative_length"] = tokens
    with pytest.raises(ValueError, match=f"layer 1 must hold.*40 of {tokens}"):
        cache.load_state_dict(state)
