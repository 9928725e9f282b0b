"""kvpress itself compresses our cache: it is optional, and not what this package installs.

kvpress 0.5 asks for transformers below 5.3. Newer ones hand attention layers the cache as
``cache`` and no ``cache_position``; where they do, its hooks get both under the names they know.
"""

import functools
import importlib

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.profiles import KVCacheConfig

TOKENS = 100
PRESSES = {
    "knorm": lambda kvpress, ratio: kvpress.KnormPress(compression_ratio=ratio),
    "snapkv": lambda kvpress, ratio: kvpress.SnapKVPress(compression_ratio=ratio, window_size=8),
    "expected attention": lambda kvpress, ratio: kvpress.ExpectedAttentionPress(
        compression_ratio=ratio
    ),
}


@pytest.fixture(scope="module")
def kvpress():
    """The library. Its import replaces all attention functions of transformers: put back after."""
    functions = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    try:
        yield importlib.import_module("kvpress")
    except ModuleNotFoundError:
        pytest.skip("kvpress is optional and not installed here")
    except ImportError as error:
        pytest.skip(f"kvpress is installed and cannot be imported: {error}")
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._local_mapping.update(functions)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=PRESSES)
def press(request, monkeypatch, kvpress):
    press = PRESSES[request.param](kvpress, 0.5)
    hook = press.forward_hook

    @functools.wraps(hook)
    def with_old_names(module, inputs, kwargs, output):
        old = {
            "past_key_values": kwargs.get("cache"),
            "cache_position": torch.arange(kwargs["hidden_states"].shape[1]),
        }
        return hook(module, inputs, old | kwargs, output)

    monkeypatch.setattr(press, "forward_hook", with_old_names)
    return press


def prompt(tokens=TOKENS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 128, (1, tokens), generator=generator)


@torch.no_grad()
def compressed(model, press, cache):
    """Feed a prompt under the press, then three tokens without it; the logits of those."""
    with press(model):
        model(prompt(), past_key_values=cache)
    positions = torch.arange(TOKENS, TOKENS + 3)[:, None]
    return torch.cat(
        [
            model(token[None], position_ids=at[None], past_key_values=cache).logits
            for token, at in zip(prompt(3, seed=1)[0][:, None], positions, strict=True)
        ],
        dim=1,
    )


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 1e-5), (8, 0.05)])
def test_a_press_keeps_of_our_cache_what_it_keeps_of_a_dynamic_one(model, press, bits, tolerance):
    """The same half of the tokens, and so nearly the same logits afterwards."""
    ours = AdaptiveQuantizedCache(model.config, KVCacheConfig(bits=bits, residual_length=16))
    stock = DynamicCache(config=model.config)
    got, expected = compressed(model, press, ours), compressed(model, press, stock)
    for mine, theirs in zip(ours.layers, stock.layers, strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length() == TOKENS // 2 + 3
    if bits == 16:
        for (keys, values, _), layer in zip(ours, stock.layers, strict=True):
            torch.testing.assert_close(keys, layer.keys, rtol=0, atol=0)
            torch.testing.assert_close(values, layer.values, rtol=0, atol=0)
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * expected.std().item())


def test_a_pressed_cache_is_smaller_and_goes_on(model, press):
    config = KVCacheConfig(bits=8, residual_length=16)
    whole, cache = (AdaptiveQuantizedCache(model.config, config) for _ in range(2))
    with torch.no_grad():
        model(prompt(), past_key_values=whole)
        with press(model):
            model(prompt(), past_key_values=cache)
    assert cache.nbytes < 0.6 * whole.nbytes
    stores = [store for layer in cache.layers for store in layer.stores()]
    assert all(store.blocks.length == TOKENS // 2 for store in stores)  # all of it is packed
    for number in range(20):
        with torch.no_grad():
            model(prompt(1, seed=number), past_key_values=cache)
    assert {layer.get_seq_length() for layer in cache.layers} == {TOKENS // 2 + 20}
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([0]))
    assert {layer.get_seq_length() for layer in cache.layers} == {TOKENS // 2 + 17}
