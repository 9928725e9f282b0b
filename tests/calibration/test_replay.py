"""The layer-by-layer engine gives the hidden states that the model itself computes."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    T5Config,
)

from hf_adaptive_sparse.architecture import decoder_layers
from hf_adaptive_sparse.calibration.forward import execution_device
from hf_adaptive_sparse.calibration.replay import DecoderReplay
from tests.families.tiny_models import tiny_model


def last_layer_output(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    _, layers = decoder_layers(model)
    seen = []

    def keep(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = layers[-1].register_forward_hook(keep)
    with torch.no_grad():
        model(**batch, use_cache=False)
    handle.remove()
    return seen[0]


def assert_replays(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> None:
    expected = [last_layer_output(model, batch) for batch in batches]
    replay = DecoderReplay(model, batches)
    _, layers = decoder_layers(model)
    for index in range(len(layers)):
        replay.run_layer(index, advance=False)
        replay.run_layer(index, advance=True)
    for ours, theirs in zip(replay.hidden_states, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text(tiny_llama, text_batches, dtype):
    assert_replays(tiny_llama.to(dtype), text_batches)


def test_images(tiny_llava, image_batches):
    assert_replays(tiny_llava, image_batches)


SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {}),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("mistral", {"sliding_window": 8}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "activation_function": "gelu"}),
        ("mixtral", {"num_local_experts": 4}),
    ],
)
def test_families(family, changes, text_batches):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SMALL | changes))
    assert_replays(AutoModelForCausalLM.from_config(config).eval(), text_batches[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_between_layers_is_replayed(dtype):
    """Qwen3-VL adds visual features to the hidden states after its first layers."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = AutoConfig.for_model(
        "qwen3_vl",
        text_config=SMALL | {"rope_parameters": rope, "rope_scaling": rope},
        vision_config=vision,
        image_token_id=4,
        video_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )
    model = AutoModelForImageTextToText.from_config(config).to(dtype).eval()
    ids = torch.randint(10, 128, (1, 12))
    ids[0, 1], ids[0, 2:6], ids[0, 6] = 6, 4, 7
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(16, 48),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 4).int(),
    }
    replay = DecoderReplay(model, [batch])
    assert any(call.change is not None for call in replay._calls[0])
    assert_replays(model, [batch])


def zaya() -> PreTrainedModel:
    """Its layers hand on the states of their router, beside the hidden states."""
    return tiny_model("zaya", {"num_experts_per_tok": 1})


def blip_2_t5() -> PreTrainedModel:
    """T5's first layer computes the position biases of all."""
    model = tiny_model(
        "blip-2",
        {
            "text_config": T5Config(**T5),
            "use_decoder_only_language_model": False,
            "num_query_tokens": 4,
            "image_token_index": 50,
        },
    )
    bias = model.language_model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias
    bias.weight.data.normal_(std=5)
    return model


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 160}
IDS = torch.arange(24).view(2, 12) + 100
READ = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
PLACED = torch.cat([torch.full((2, 4), 50), IDS], dim=1)
SEEN = {"input_ids": PLACED, "attention_mask": torch.ones_like(PLACED)}
SEEN |= {"pixel_values": torch.ones(2, 3, 32, 32), "decoder_input_ids": IDS, "labels": IDS}


@pytest.mark.parametrize("stand_ins", [False, True])
@pytest.mark.parametrize(("make", "batch"), [(zaya, READ), (blip_2_t5, SEEN)])
def test_what_layers_hand_on_is_that_of_the_layers_as_they_are(make, batch, stand_ins):
    model = make()
    replay = DecoderReplay(model, [batch], stand_ins=stand_ins)
    _, layers = decoder_layers(model)
    for parameter in layers[0].parameters():
        parameter.data *= 0.9
    for index in range(len(layers)):
        replay.run_layer(index, advance=True)
    assert torch.equal(replay.hidden_states[0], last_layer_output(model, batch))


class TupleLayer(nn.Module):
    """A decoder layer in the older style: it returns a tuple."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **arguments):
        return (self.layer(hidden_states, **arguments),)


def test_tuple_outputs(tiny_llama, text_batches):
    plain = DecoderReplay(tiny_llama, text_batches)
    wrapped = DecoderReplay(tiny_llama, text_batches)
    for index, layer in enumerate(tiny_llama.model.layers):
        plain.run_layer(index, advance=True)
        wrapped._layers[index] = TupleLayer(layer)
        wrapped.run_layer(index, advance=True)
        wrapped._layers[index] = layer
    for ours, theirs in zip(wrapped.hidden_states, plain.hidden_states, strict=True):
        assert torch.equal(ours, theirs)


SPLIT = {
    "model.embed_tokens": "cpu",
    "lm_head": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    **{f"model.layers.{i}": "cpu" for i in range(4)},
}


@pytest.mark.parametrize("device_map", [{"": "cpu"}, SPLIT], ids=["one", "split"])
def test_accelerate_hooks(tiny_llama, text_batches, device_map):
    expected = DecoderReplay(tiny_llama, text_batches)
    model = dispatch_model(copy.deepcopy(tiny_llama), device_map, force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in model.modules())
    assert_replays(model, text_batches)
    replay = DecoderReplay(model, text_batches)
    assert torch.equal(replay.hidden_states[0], expected.hidden_states[0])
    assert execution_device(model.model.layers[0]) == torch.device("cpu")
    remove_hook_from_submodules(model)


def test_arguments_are_held_once(tiny_llama, text_batches):
    replay = DecoderReplay(tiny_llama, text_batches)
    cosines = {id(call.kwargs["position_embeddings"][0]) for c in replay._calls for call in c}
    assert len(cosines) == 1  # 4 batches x 4 layers


def test_training_mode_is_restored_and_dropout_is_off(tiny_llama, text_batches):
    tiny_llama.train()
    tiny_llama.model.layers[2].eval()
    before = [module.training for module in tiny_llama.modules()]
    replay = DecoderReplay(tiny_llama, text_batches)
    replay.run_layer(0, advance=True)
    assert [module.training for module in tiny_llama.modules()] == before


def test_errors(tiny_llama, text_batches):
    with pytest.raises(ValueError, match="at least one batch"):
        DecoderReplay(tiny_llama, [])
    tiny_llama.model.layers[2] = tiny_llama.model.layers[1]
    with pytest.raises(ValueError, match="more than once per forward"):
        DecoderReplay(tiny_llama, text_batches)
    assert not tiny_llama.model.layers[1]._forward_hooks


def test_labels_are_ignored(tiny_llama, text_batches):
    batch = text_batches[0] | {"labels": text_batches[0]["input_ids"]}
    assert_replays(tiny_llama, [batch])
