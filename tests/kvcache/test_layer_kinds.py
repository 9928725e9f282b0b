"""Every kind of layer that DynamicCache makes, in tiny models: the same tokens at 16 bits."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.hybrid import AdaptiveHybridLayer, AdaptiveSlidingHybridLayer
from hf_adaptive_sparse.kvcache.indexed import AdaptiveIndexedLayer
from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer
from hf_adaptive_sparse.kvcache.sliding import AdaptiveSlidingWindowLayer
from hf_adaptive_sparse.profiles import KVCacheConfig
from tests.conftest import random_ids

BASE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"
LINEAR_MOE = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
MODELS = {
    "gemma3": ("Gemma3Text", {"sliding_window": 16, "layer_types": [SLIDING, FULL] * 2}),
    "gemma2": ("Gemma2", {"sliding_window": 12, "layer_types": [SLIDING, FULL] * 2}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "llama4": (
        "Llama4Text",
        {
            "attention_chunk_size": 16,
            "layer_types": [CHUNKED, FULL] * 2,
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "no_rope_layers": [1, 0, 1, 0],
        },
    ),
    "gpt-oss": (
        "GptOss",
        {"sliding_window": 16, "layer_types": [SLIDING, FULL] * 2, "num_local_experts": 4},
    ),
    "qwen3-next": (
        "Qwen3Next",
        {
            "layer_types": ["linear_attention", FULL] * 2,
            **LINEAR_MOE,
        },
    ),
    "jamba": (
        "Jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", FULL] * 2}),
    "falcon-h1": (
        "FalconH1",
        {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 2,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
    ),
    "zaya": (
        "Zaya",
        {
            "layer_types": ["hybrid", "hybrid_sliding"] * 2,
            "sliding_window": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
        },
    ),
    "deepseek v3.2": (
        "DeepseekV32",
        {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "num_key_value_heads": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 24,
        },
    ),
    "qwen4": (
        "Qwen4ExpText",
        {
            "layer_types": ["linear_attention", "indexed_attention"] * 2,
            **LINEAR_MOE,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 24,
            "indexer_compress_ratio": 4,
        },
    ),
    "gemma3n": (
        "Gemma3nText",
        {
            "sliding_window": 16,
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "intermediate_size": [64] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
}
CLASSES = {
    "Gemma3Text": "Gemma3",
    "Qwen4ExpText": "Qwen4Exp",
    "Llama4Text": "Llama4",
    "Gemma3nText": "Gemma3n",
}


def make_model(name):
    kind, changes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**(BASE | changes))
    torch.manual_seed(0)
    return getattr(transformers, f"{CLASSES.get(kind, kind)}ForCausalLM")(config).eval()


def generate(model, cache, ids, **settings):
    defaults = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        output_logits=True,
        return_dict_in_generate=True,
        **(defaults | settings),
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens_at_16_bits(name):
    model = make_model(name)
    ids = random_ids(2, 30)
    expected = generate(model, DynamicCache(config=model.config), ids)
    cache = AdaptiveQuantizedCache(model.config, KVCacheConfig(bits=16))
    got = generate(model, cache, ids)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("name", MODELS)
def test_a_bounded_difference_at_8_bits(name):
    model = make_model(name)
    ids = random_ids(2, 60)
    profile = KVCacheConfig(bits=8, residual_length=16)
    sequences, _ = generate(model, DynamicCache(config=model.config), ids)
    with torch.no_grad():
        stock, ours = (
            DynamicCache(config=model.config),
            AdaptiveQuantizedCache(model.config, profile),
        )
        logits = []
        for cache in (stock, ours):
            parts = [model(input_ids=sequences[:, :60], past_key_values=cache).logits]
            parts += [
                model(input_ids=sequences[:, step : step + 1], past_key_values=cache).logits
                for step in range(60, 100)
            ]
            logits.append(torch.cat(parts, dim=1))
    difference = (logits[1] - logits[0]).std() / logits[0].std()
    assert (0 < difference < 0.02) if quantised(cache) else (difference == 0)


def quantised(cache):
    return [layer for layer in cache.layers if isinstance(layer, AdaptiveQuantizedLayer)]


@pytest.mark.parametrize("name", MODELS)
def test_plain_and_sliding_layers_are_quantised_and_others_are_those_of_transformers(name):
    config = make_model(name).config
    stock = DynamicCache(config=config)
    ours = AdaptiveQuantizedCache(config)
    assert ours.is_sliding == stock.is_sliding
    # Up to 5.23 transformers takes a hybrid layer in a window for one without keys and values.
    assert ours.is_linear == [
        linear and not isinstance(layer, LinearAttentionAndSlidingWindowAttentionLayer)
        for linear, layer in zip(stock.is_linear, stock.layers, strict=True)
    ]
    assert ours.is_dummy == stock.is_dummy
    for mine, theirs in zip(ours.layers, stock.layers, strict=True):
        replaced = {
            DynamicLayer: AdaptiveQuantizedLayer,
            DynamicSlidingWindowLayer: AdaptiveSlidingWindowLayer,
            DynamicIndexedLayer: AdaptiveIndexedLayer,
            LinearAttentionAndFullAttentionLayer: AdaptiveHybridLayer,
            LinearAttentionAndSlidingWindowAttentionLayer: AdaptiveSlidingHybridLayer,
        }
        assert type(mine) is replaced.get(type(theirs), type(theirs))


@pytest.mark.parametrize("name", ["gemma3", "mistral", "llama4", "deepseek v3.2"])
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}])
def test_beams_and_rollbacks_in_windows_and_indexes(name, settings):
    """Beam search reorders the ring; prompt lookup takes rejected tokens back out of it."""
    model = make_model(name)
    ids = random_ids(1, 10).repeat(1, 4)
    expected = generate(model, DynamicCache(config=model.config), ids, **settings)[0]
    cache = AdaptiveQuantizedCache(model.config, KVCacheConfig(bits=16, residual_length=8))
    assert torch.equal(generate(model, cache, ids, **settings)[0], expected)
    cache = AdaptiveQuantizedCache(model.config, KVCacheConfig(bits=8, residual_length=8))
    assert generate(model, cache, ids, **settings)[0].shape == expected.shape


def test_a_model_of_states_alone_takes_the_cache_too():
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=128, hidden_size=32, state_size=8, num_hidden_layers=2, pad_token_id=0
    )
    model = transformers.MambaForCausalLM(config).eval()
    tokens = [
        model.generate(random_ids(2, 9), cache_params=cache, max_new_tokens=20, eos_token_id=None)
        for cache in (DynamicCache(config=config), AdaptiveQuantizedCache(config))
    ]
    assert torch.equal(*tokens)


def test_a_window_of_one_is_left_to_transformers():
    config = make_model("mistral").config
    config.sliding_window = 1
    cache = AdaptiveQuantizedCache(config)
    assert {type(layer) for layer in cache.layers} == {DynamicSlidingWindowLayer}
    assert cache.nbytes == 0
    cache.update(torch.ones(1, 1, 3, 16), torch.ones(1, 1, 3, 16), 0)
    assert cache.nbytes == 2 * 3 * 16 * 4


def test_bytes_of_a_window_stay_below_those_of_transformers():
    config = make_model("mistral").config
    config.sliding_window, config.head_dim = 512, 64
    profile = KVCacheConfig(key_bits=(8, 6) * 2, value_bits=(6, 8) * 2)
    ours, stock = AdaptiveQuantizedCache(config, profile), DynamicCache(config=config)
    for length in (3000, 1, 1, 130, 50):
        states = torch.randn(1, 1, length, 64).bfloat16()
        for layer in range(4):
            ours.update(states, states, layer)
            stock.update(states, states, layer)
    stock_bytes = sum(2 * layer.keys.numel() * 2 for layer in stock.layers)
    assert ours.nbytes < 0.8 * stock_bytes


WITH_STATES = ["falcon-h1", "zaya", "deepseek v3.2"]


def logits_after(model, cache, ids):
    """Logits of the last five of ``ids``, one by one, behind a cache of what precedes them."""
    with torch.no_grad():
        steps = [
            model(input_ids=ids[:, step : step + 1], past_key_values=cache).logits
            for step in range(ids.shape[1] - 5, ids.shape[1])
        ]
    return torch.cat(steps, dim=1)


def filled(model, ids, cache):
    """The cache, after all but the last five of ``ids``."""
    with torch.no_grad():
        model(input_ids=ids[:, :-5], past_key_values=cache)
    return cache


def small_blocks(model, bits=16):
    return AdaptiveQuantizedCache(model.config, KVCacheConfig(bits=bits, residual_length=8))


@pytest.mark.parametrize("name", WITH_STATES)
def test_beams_move_the_states_beside_keys_and_values_too(name):
    model, ids = make_model(name), random_ids(1, 20)
    expected = generate(model, DynamicCache(config=model.config), ids, num_beams=3)[0]
    assert torch.equal(generate(model, small_blocks(model), ids, num_beams=3)[0], expected)


@pytest.mark.parametrize("name", WITH_STATES)
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
)
def test_sequences_are_chosen_with_their_states(name, change, rows):
    model, ids = make_model(name), random_ids(3, 40)
    cache = filled(model, ids, small_blocks(model))
    change(cache)
    stock = filled(model, ids[rows], DynamicCache(config=model.config))
    expected = logits_after(model, stock, ids[rows])
    torch.testing.assert_close(logits_after(model, cache, ids[rows]), expected)


@pytest.mark.parametrize("name", WITH_STATES)
@pytest.mark.parametrize("bits", [16, 6])
def test_layers_are_saved_copied_and_emptied_with_their_states(name, bits, tmp_path):
    model, ids = make_model(name), random_ids(2, 40)
    cache = filled(model, ids, small_blocks(model, bits))
    torch.save(cache.state_dict(), tmp_path / "cache.pt")
    copied = copy.deepcopy(cache)
    expected = logits_after(model, cache, ids)

    loaded = filled(model, random_ids(2, 30, seed=1), small_blocks(model, bits))
    kept = copy.deepcopy(loaded)
    loaded.load_state_dict(torch.load(tmp_path / "cache.pt", weights_only=True))
    assert torch.equal(logits_after(model, loaded, ids), expected)
    assert torch.equal(logits_after(model, copied, ids), expected)

    kept.reset()
    assert torch.equal(logits_after(model, filled(model, ids, kept), ids), expected)
