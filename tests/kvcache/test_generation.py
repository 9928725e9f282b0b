"""generate() makes the adaptive cache where a config has a KV profile, and only there."""

import copy
import pickle

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationMixin,
    LlamaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.generation import AdaptiveEncoderDecoderCache, install
from hf_adaptive_sparse.profiles import KVCacheConfig
from tests.conftest import random_ids

SMALL = {"group_size": 16, "residual_length": 16}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Install the wrapper for one test, over whatever was there."""
    stock = GenerationMixin._prepare_cache_for_generation
    monkeypatch.setattr(GenerationMixin, "_prepare_cache_for_generation", stock)
    install()


def carry(model, bits=16, **changes):
    """A copy of ``model`` whose config carries a KV profile."""
    model = copy.deepcopy(model)
    model.config.quantization_config = {
        "quant_method": "adaptive_sparse",
        "kv_cache": KVCacheConfig(bits=bits, **(SMALL | changes)).to_dict(),
    }
    return model


def repetitive(tokens=40):
    """A prompt in which prompt lookup finds candidates."""
    return random_ids(1, 10).repeat(1, tokens // 10)


def generate(model, ids, **settings):
    defaults = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(input_ids=ids, return_dict_in_generate=True, **(defaults | settings))


def assert_same_generation(model, ids, **settings):
    """Stock tokens from the adaptive cache at 16 bits, made by generate() and given by hand."""
    plain = generate(model, ids, **settings)
    assert type(plain.past_key_values) is DynamicCache
    adaptive = generate(carry(model), ids, **settings)
    assert type(adaptive.past_key_values) is AdaptiveQuantizedCache
    assert torch.equal(adaptive.sequences, plain.sequences)
    cache = AdaptiveQuantizedCache(model.config, KVCacheConfig(bits=16, **SMALL))
    by_hand = generate(model, ids, past_key_values=cache, **settings)
    assert by_hand.past_key_values is cache
    assert torch.equal(by_hand.sequences, plain.sequences)


@pytest.fixture(params=[4, 2, 1], ids=["MHA", "GQA", "MQA"])
def llama(request, tiny_llama):
    config = copy.deepcopy(tiny_llama.config)
    config.num_key_value_heads = request.param
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


def test_greedy(llama):
    assert_same_generation(llama, random_ids(2))


def test_beam_search(llama):
    assert_same_generation(llama, random_ids(2), num_beams=3, num_return_sequences=2)


def test_beam_sampling(tiny_llama):
    ids = random_ids(2)
    results = []
    for model in (tiny_llama, carry(tiny_llama)):
        torch.manual_seed(7)
        results.append(generate(model, ids, do_sample=True, num_beams=3).sequences)
    assert torch.equal(*results)


def test_sampling_with_a_seed(llama):
    ids = random_ids(2)
    results = []
    for model in (llama, carry(llama)):
        torch.manual_seed(7)
        out = generate(model, ids, do_sample=True, temperature=1.5, num_return_sequences=3)
        results.append(out.sequences)
    assert results[0].shape[0] == 6
    assert torch.equal(*results)


def test_left_padded_batch(llama):
    ids = random_ids(3, 40)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 7, 33)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    assert_same_generation(llama, ids, attention_mask=mask)
    # And padding does not change what a row continues with.
    alone = generate(carry(llama), ids[2:, 33:]).sequences[:, 7:]
    together = generate(carry(llama), ids, attention_mask=mask).sequences[2:, 40:]
    assert torch.equal(alone, together)


def test_prompt_lookup(llama):
    assert_same_generation(llama, repetitive(), prompt_lookup_num_tokens=5)


def test_assisted_decoding(llama):
    torch.manual_seed(5)
    assistant = copy.deepcopy(llama)
    for layer in assistant.model.layers[1:]:
        layer.mlp.down_proj.weight.data.mul_(0.7)
    assert_same_generation(llama, random_ids(), assistant_model=assistant)
    # An assistant with a profile of its own drafts from its own adaptive cache.
    plain = generate(llama, random_ids()).sequences
    drafted = generate(
        carry(llama), random_ids(), assistant_model=carry(assistant, bits=4)
    ).sequences
    assert torch.equal(drafted, plain)


@pytest.mark.parametrize("drafting", ["assistant", "prompt lookup"])
def test_rejected_drafts_leave_no_trace_at_8_bits(tiny_llama, drafting):
    model = carry(tiny_llama, bits=8)
    ids = repetitive()
    extra = (
        {"assistant_model": copy.deepcopy(tiny_llama)}
        if drafting == "assistant"
        else {"prompt_lookup_num_tokens": 5}
    )
    drafted = generate(model, ids, **extra)
    assert isinstance(drafted.past_key_values, AdaptiveQuantizedCache)
    assert drafted.sequences.shape == (1, 90)
    length = drafted.past_key_values.get_seq_length()
    for layer in drafted.past_key_values.layers:
        keys, values = layer.decode()
        assert keys.shape[-2] == values.shape[-2] == length == layer.get_seq_length()


def test_an_early_exit_drafts_with_the_first_layers_of_the_profile(tiny_llama):
    model = carry(tiny_llama, bits=(8, 6, 8, 6))
    drafted = generate(model, random_ids(), assistant_early_exit=2)
    assert [layer.key_bits for layer in drafted.past_key_values.layers] == [8, 6, 8, 6]
    assert model.config.num_hidden_layers == 4
    exact = carry(tiny_llama, bits=(16,) * 4)
    plain = generate(tiny_llama, random_ids()).sequences
    assert torch.equal(generate(exact, random_ids(), assistant_early_exit=2).sequences, plain)


def test_a_profile_that_does_not_fit_an_assistant_is_refused(tiny_llama):
    assistant = carry(tiny_llama, bits=(8,) * 6)
    with pytest.raises(ValueError, match="the model has 4 layers, the list has 6 entries"):
        generate(tiny_llama, random_ids(), assistant_model=assistant)


def test_chunked_prefill(tiny_llama):
    assert_same_generation(tiny_llama, random_ids(2, 50), prefill_chunk_size=7)


def test_a_conversation_goes_on_with_the_same_cache(tiny_llama):
    results = []
    for model in (tiny_llama, carry(tiny_llama)):
        first = generate(model, random_ids(1, 30))
        turn = torch.cat([first.sequences, random_ids(1, 11, seed=3)], dim=1)
        second = generate(model, turn, past_key_values=first.past_key_values)
        assert second.past_key_values is first.past_key_values
        results.append(second.sequences)
    assert torch.equal(*results)


def test_a_vlm_generates_with_the_profile_of_its_whole_config(tiny_llava, image_batches):
    batch = image_batches[0]
    settings = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    plain = tiny_llava.generate(**batch, **settings)
    adaptive = carry(tiny_llava).generate(**batch, **settings)
    assert isinstance(adaptive.past_key_values, AdaptiveQuantizedCache)
    assert torch.equal(adaptive.sequences, plain.sequences)


def test_bits_of_the_profile_reach_the_cache(tiny_llama):
    model = carry(tiny_llama, bits=(8, 6, 4, 2))
    cache = generate(model, random_ids()).past_key_values
    assert [layer.key_bits for layer in cache.layers] == [8, 6, 4, 2]
    assert cache.kv_cache.residual_length == 16


# Whatever the caller says has precedence


def test_models_without_a_profile_are_left_alone(tiny_llama):
    assert type(generate(tiny_llama, random_ids()).past_key_values) is DynamicCache
    tiny_llama.config.quantization_config = {"quant_method": "adaptive_sparse", "kv_cache": False}
    assert type(generate(tiny_llama, random_ids()).past_key_values) is DynamicCache


def test_a_cache_that_is_passed_is_used(tiny_llama):
    model, cache = carry(tiny_llama), DynamicCache(config=tiny_llama.config)
    assert generate(model, random_ids(), past_key_values=cache).past_key_values is cache


def test_a_cache_implementation_is_honoured(tiny_llama):
    model = carry(tiny_llama)
    for name, kind in (("static", StaticCache), ("dynamic", DynamicCache)):
        out = generate(model, random_ids(), cache_implementation=name)
        assert type(out.past_key_values) is kind
    model.generation_config.cache_implementation = "dynamic"
    assert type(generate(model, random_ids()).past_key_values) is DynamicCache


def test_no_cache_is_no_cache(tiny_llama):
    out = generate(carry(tiny_llama, bits=2), random_ids(), use_cache=False)
    assert out.past_key_values is None
    assert torch.equal(out.sequences, generate(tiny_llama, random_ids()).sequences)


def test_a_plain_forward_is_not_touched(tiny_llama):
    out = carry(tiny_llama)(input_ids=random_ids(), use_cache=True)
    assert type(out.past_key_values) is DynamicCache


# Installation


def test_installing_again_changes_nothing():
    once = GenerationMixin._prepare_cache_for_generation
    install()
    assert GenerationMixin._prepare_cache_for_generation is once


def test_copies_and_pickles_use_their_own_config(tiny_llama):
    model = carry(tiny_llama, bits=4)
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    twin.config.quantization_config["kv_cache"]["key_bits"] = 2
    bits = [
        generate(m, random_ids()).past_key_values.layers[0].key_bits for m in (model, twin, thawed)
    ]
    assert bits == [4, 2, 4]
    assert "_prepare_cache_for_generation" not in vars(model)


# Encoder-decoder models


@pytest.fixture
def tiny_t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_encoder_decoder_models_quantise_self_attention(tiny_t5, settings):
    ids = random_ids(1, 20) % 60 + 2
    plain = generate(tiny_t5, ids, **settings)
    adaptive = generate(carry(tiny_t5), ids, **settings)
    cache = adaptive.past_key_values
    assert type(cache) is AdaptiveEncoderDecoderCache
    assert type(cache.self_attention_cache) is AdaptiveQuantizedCache
    assert type(cache.cross_attention_cache) is DynamicCache
    assert len(cache.self_attention_cache) == 2
    assert torch.equal(adaptive.sequences, plain.sequences)


def test_whisper_returns_all_tokens_of_its_cache(tiny_whisper):
    """It makes the cache it returns anew, out of what the layers' keys and values are."""
    model = tiny_whisper
    model.generation_config.eos_token_id = None
    settings = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 40}
    sounds = torch.randn(1, 8, 32)
    plain = model.generate(sounds, **settings)
    adaptive = carry(model).generate(sounds, **settings)
    assert torch.equal(adaptive["sequences"], plain["sequences"])
    returned = carry(model, bits=8).generate(sounds, **settings).past_key_values
    assert returned.get_seq_length() == plain.past_key_values.get_seq_length() == 40
