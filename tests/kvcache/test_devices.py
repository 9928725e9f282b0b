"""A cache over several devices, and one kept in CPU memory between uses. They need a GPU."""

import copy

import pytest
import torch
from transformers import DynamicCache

from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.profiles import KVCacheConfig
from tests.conftest import random_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROFILES = [KVCacheConfig(bits=16), KVCacheConfig(bits=(8, 6, 4, 3), residual_length=16)]


def generate(model, cache, device, **settings):
    defaults = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = random_ids(2, 50).to(device)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, **(defaults | settings)
    ).cpu()


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
def test_offloading_changes_nothing(tiny_llama, profile, settings):
    model = tiny_llama.cuda()
    kept = AdaptiveQuantizedCache(model.config, profile)
    offloaded = AdaptiveQuantizedCache(model.config, profile, offloading=True)
    expected = generate(model, kept, "cuda", **settings)
    assert torch.equal(generate(model, offloaded, "cuda", **settings), expected)
    assert {store.raw.device.type for layer in offloaded.layers for store in layer.stores()} >= {
        "cpu"
    }


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
def test_layers_on_two_devices(tiny_llama, settings):
    accelerate = pytest.importorskip("accelerate")
    expected = generate(tiny_llama, DynamicCache(config=tiny_llama.config), "cpu", **settings)
    device_map = {
        "model.embed_tokens": 0,
        "model.rotary_emb": 0,
        "model.layers.0": 0,
        "model.layers.1": 0,
        "model.layers.2": "cpu",
        "model.layers.3": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    model = accelerate.dispatch_model(
        copy.deepcopy(tiny_llama), device_map, main_device="cuda", force_hooks=True
    )
    cache = AdaptiveQuantizedCache(model.config, KVCacheConfig(bits=16))
    got = generate(model, cache, "cuda", **settings)
    assert (got == expected).float().mean() > 0.9  # two devices round differently
    cache = AdaptiveQuantizedCache(model.config, PROFILES[1])
    assert generate(model, cache, "cuda", **settings).shape == expected.shape


def test_a_cache_that_stayed_behind_says_so(tiny_llama):
    model = tiny_llama.cuda()
    cache = AdaptiveQuantizedCache(model.config, PROFILES[1])
    model(input_ids=random_ids(1, 40).cuda(), past_key_values=cache)
    with pytest.raises(ValueError, match="keys on cuda:0, got states on cpu"):
        model.cpu()(input_ids=random_ids(1, 1), past_key_values=cache)


def test_batch_operations_take_indices_from_any_device(tiny_llama):
    model = tiny_llama.cuda()
    cache = AdaptiveQuantizedCache(model.config, PROFILES[1])
    model(input_ids=random_ids(2, 40).cuda(), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([1]).cuda())
    cache.batch_select_indices(torch.tensor([True]))
    assert model(input_ids=random_ids(1, 3).cuda(), past_key_values=cache).logits.shape[0] == 1
