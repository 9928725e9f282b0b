"""Decoder layers, prunable linears and config facts, over many families on the meta device."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from hf_adaptive_sparse.architecture import (
    UNLIMITED_CONTEXT,
    accepts_images,
    cache_argument,
    context_length,
    cross_attention_layers,
    decoder_layers,
    dense_expert_weights,
    fused_rows,
    generating_parts,
    image_token_id,
    kv_widths,
    layer_index,
    linear_role,
    num_decoder_layers,
    prunable_weights,
)
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.runtime.sparse_linear import SparseLinear
from tests.families.catalogue import PHI
from tests.families.tiny_models import tiny_config, tiny_model

# family, class, name of the layers, linears per layer
FAMILIES = [
    ("llava", AutoModelForImageTextToText, "model.language_model.layers", 7),
    ("qwen2_vl", AutoModelForImageTextToText, "model.language_model.layers", 7),
    ("qwen3_vl", AutoModelForImageTextToText, "model.language_model.layers", 7),
    ("smolvlm", AutoModelForImageTextToText, "model.text_model.layers", 7),
    ("idefics3", AutoModelForImageTextToText, "model.text_model.layers", 7),
    ("gemma3", AutoModelForImageTextToText, "model.language_model.layers", 7),
    ("paligemma", AutoModelForImageTextToText, "model.language_model.layers", 7),
    ("internvl", AutoModelForImageTextToText, "model.language_model.layers", 7),
    ("mllama", AutoModelForImageTextToText, "model.language_model.layers", 7),
    ("llama", AutoModelForCausalLM, "model.layers", 7),
    ("qwen3", AutoModelForCausalLM, "model.layers", 7),
    ("mistral", AutoModelForCausalLM, "model.layers", 7),
    ("phi3", AutoModelForCausalLM, "model.layers", 4),
    ("opt", AutoModelForCausalLM, "model.decoder.layers", 6),
    ("modernbert-decoder", AutoModelForCausalLM, "model.layers", 6),
]


def on_meta(family: str, auto: type, **changes: object) -> nn.Module:
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(family, **changes))


@pytest.mark.parametrize(("family", "auto", "name", "per_layer"), FAMILIES)
def test_finds_the_language_model_and_nothing_else(family, auto, name, per_layer):
    model = on_meta(family, auto)
    found, layers = decoder_layers(model)
    assert found == name
    assert model.get_submodule(name) is layers
    assert len(layers) == num_decoder_layers(model) == len(kv_widths(model))
    linears = prunable_weights(model)
    assert len(linears) == per_layer * len(layers)
    for key, module in linears.items():
        assert model.get_submodule(key) is module
    indices = [layer_index(key, name) for key in linears]
    assert indices == sorted(indices)
    assert set(indices) == set(range(len(layers)))
    assert accepts_images(model) == (auto is AutoModelForImageTextToText)
    assert (image_token_id(model) is not None) == (auto is AutoModelForImageTextToText)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 16}, (32, 32)),
        ("falcon", {}, (64, 64)),  # multi-query
        ("opt", {}, (768, 768)),  # no num_key_value_heads
    ],
)
def test_kv_widths(family, changes, expected):
    assert set(kv_widths(AutoConfig.for_model(family, **changes))) == {expected}


def test_kv_widths_of_layers_without_a_cache_and_of_unequal_layers():
    assert set(kv_widths(AutoConfig.for_model("qwen3_next"))) == {(0, 0), (512, 512)}
    keys, values = kv_widths(AutoConfig.for_model("deepseek_v3"))[0]
    assert keys > values


def test_context_length(tiny_llava):
    assert context_length(tiny_llava) == context_length(tiny_llava.config) == 512
    assert context_length(AutoConfig.for_model("mamba")) == UNLIMITED_CONTEXT


def test_tied_weights_are_left_out(tiny_llama):
    layers = tiny_llama.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    found = prunable_weights(tiny_llama)
    assert "model.layers.0.mlp.up_proj" not in found
    assert "model.layers.1.mlp.up_proj" not in found
    assert len(found) == 26
    assert not any("lm_head" in name or "embed" in name for name in found)


def test_exclusions_by_name_parent_and_glob(tiny_llama):
    everything = prunable_weights(tiny_llama)
    assert len(everything) == 28
    kept = prunable_weights(
        tiny_llama, ["model.layers.0", "*.k_proj", "model.layers.3.mlp.up_proj"]
    )
    assert len(kept) == 28 - 7 - 3 - 1
    assert not any(name.startswith("model.layers.0.") for name in kept)


def test_an_exclusion_that_matches_nothing_lists_names(tiny_llama):
    with pytest.raises(ValueError, match=r"'\*\.kproj' matches none.*self_attn\.q_proj"):
        prunable_weights(tiny_llama, ["*.kproj"])


def test_models_without_decoder_layers_are_refused():
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )
    for model in (vision, nn.Sequential(nn.Linear(4, 4))):
        with pytest.raises(ValueError, match="must have decoder layers of a language model"):
            decoder_layers(model)


def test_conv1d_models_are_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"'transformer\.h' of GPT2LMHeadModel .* Conv1D"):
        prunable_weights(on_meta("gpt2", AutoModelForCausalLM, n_layer=2))
    with torch.device("meta"):
        bare = tiny_model("llama")
    for layer in bare.model.layers:
        layer.self_attn = layer.mlp = nn.Identity()
    with pytest.raises(ValueError, match="No prunable linears"):
        prunable_weights(bare)


def test_linears_with_a_forward_of_their_own_are_refused_with_the_reason(tiny_llama):
    model = on_meta("falcon", AutoModelForCausalLM, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"FalconForCausalLM have another one \(FalconLinear\)"):
        prunable_weights(model)
    for name, linear in prunable_weights(tiny_llama).items():
        weight = SparseWeight.from_dense(linear.weight.detach())
        tiny_llama.set_submodule(name, SparseLinear.from_weight(weight))
    with pytest.raises(ValueError, match=r"No prunable linears.*runtime='dense'"):
        prunable_weights(tiny_llama)


def test_experts_are_prunable_where_their_layout_is_known():
    model = on_meta("mixtral", AutoModelForCausalLM, num_hidden_layers=2)
    weights = prunable_weights(model)
    assert len(weights) == 12
    assert list(weights)[4:6] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]
    stack = weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert (stack.count, stack.out_features, stack.in_features) == (8, 28672, 4096)
    assert stack.fused_rows == (14336, 14336)
    assert len(prunable_weights(model, ["*.experts.*"])) == 12 - 4
    assert dense_expert_weights(model) == []
    with torch.device("meta"):
        other = tiny_model("jetmoe")
    assert "model.layers.0.mlp.input_linear.weight" in dense_expert_weights(other)
    # A short convolution is 3-D as well, but no expert.
    assert dense_expert_weights(on_meta("mamba", AutoModelForCausalLM, num_hidden_layers=2)) == []


def test_routers_that_are_linears_by_descent_are_left_alone():
    with torch.device("meta"):
        model = tiny_model("phimoe")
    assert isinstance(model.model.layers[0].mlp.router, nn.Linear)
    assert not [name for name in prunable_weights(model) if "router" in name]


@pytest.mark.parametrize(
    ("model_type", "router"),
    [
        ("afmoe", "model.layers.1.mlp.router.gate"),
        ("jetmoe", "model.layers.0.self_attention.experts.router.layer"),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate"),
    ],
)
def test_linears_of_a_router_are_left_alone(model_type: str, router: str) -> None:
    with torch.device("meta"):
        model = tiny_model(model_type)
    assert type(model.get_submodule(router)) is nn.Linear
    assert router not in prunable_weights(model)


def test_a_model_that_only_leads_its_parts_names_them() -> None:
    with torch.device("meta"):
        model = tiny_model("qwen2_5_omni")
    with pytest.raises(ValueError, match=r"only leads its parts \(Qwen2_5OmniThinkerFor\w+, Qwen"):
        decoder_layers(model)
    assert decoder_layers(model.thinker)[0] == "model.language_model.layers"


def test_an_encoder_of_as_many_layers_is_not_the_decoder() -> None:
    with torch.device("meta"):
        model = tiny_model("git")
    assert decoder_layers(model)[0] == "git.encoder.layer"


def test_encoders_inside_the_decoder_are_not_its_layers():
    layers = {"audio_config.num_blocks": 1, "audio_config.intermediate_size": 4096}
    with torch.device("meta"):
        model = tiny_model("phi4_multimodal", {**PHI, **layers})
    assert decoder_layers(model)[0] == "model.layers"


def test_fused_projections_are_several_matrices():
    model = tiny_model("phi3")
    assert fused_rows(model, "model.layers.1.self_attn.qkv_proj") == (32, 16, 16)
    assert fused_rows(model, "model.layers.1.mlp.gate_up_proj") == (48, 48)
    assert fused_rows(model, "model.layers.1.mlp.down_proj") == (32,)


def test_layers_that_attend_to_images_keep_nothing_per_token():
    config = tiny_config("mllama", {"text_config.cross_attention_layers": [1]})
    assert cross_attention_layers(config) == {1}
    assert kv_widths(config) == [(16, 16), (0, 0)]
    assert cross_attention_layers(AutoConfig.for_model("llama")) == frozenset()


def test_parts_that_generate_for_the_whole():
    with torch.device("meta"):
        blip = tiny_model("blip-2", {"num_query_tokens": 4})
    assert generating_parts(blip) == [blip.language_model]
    assert generating_parts(on_meta("llama", AutoModelForCausalLM, num_hidden_layers=1)) == []


def test_the_cache_goes_by_the_name_that_forward_gives_it(tiny_llama):
    assert cache_argument(tiny_llama) in inspect.signature(tiny_llama.forward).parameters


def test_layer_index_refuses_outsiders():
    assert layer_index("model.layers.12.mlp.up_proj", "model.layers") == 12
    with pytest.raises(ValueError, match=r"inside 'model\.layers'"):
        layer_index("lm_head", "model.layers")


def test_config_without_attention_is_refused():
    with pytest.raises(ValueError, match="no config"):
        kv_widths(nn.Linear(2, 2))


def test_the_role_of_a_linear_is_its_name_below_the_layer_without_numbers():
    assert linear_role("model.layers.3.self_attn.q_proj", "model.layers") == "self_attn.q_proj"
    assert linear_role("m.layers.0.mlp.experts.7.up_proj", "m.layers") == "mlp.experts.up_proj"
    with pytest.raises(ValueError, match=r"inside 'model\.layers'"):
        linear_role("lm_head", "model.layers")
