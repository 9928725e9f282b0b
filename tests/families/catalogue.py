"""The families of the matrix: what each is called, and what it is fed beside text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig

Features = dict[str, Any]
Form = Callable[[PretrainedConfig], Features]
SIZE = 32
PROMPT = 24
"""Tokens of a prompt without the placeholders of its features, whatever their number."""
FIRST = 2
"""Where the placeholders begin."""


@dataclass(frozen=True)
class Family:
    """One row of the matrix.

    Attributes:
        model_type: As in a ``config.json``.
        kind: What it is fed beside text: ``"image"``, ``"video"``, ``"audio"``, or ``"text"``.
        form: Makes the features of one image, clip or sound, as the model's forward takes them.
        changes: Dotted path -> value of the config, where the table of sizes does not suffice.
        tokens: Placeholders of the features in the prompt; ``None``: the model is asked.
        placeholder: The field of the config that names their id.
        limit: What is not tried, in words for the table; limits that a run shows are found there.
    """

    model_type: str
    kind: str
    form: Form
    changes: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    placeholder: str = "image_token_id"
    limit: str = ""

    @property
    def title(self) -> str:
        """The model type, and what it is fed where that is not an image or text."""
        return self.model_type + (f" ({self.kind})" if self.kind in ("video", "audio") else "")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def text(config: PretrainedConfig) -> Features:
    return {}


def picture(config: PretrainedConfig) -> Features:
    """One image: ``(1, channels, height, width)``."""
    return {"pixel_values": noise(1, 3, SIZE, SIZE)}


def sized_picture(config: PretrainedConfig) -> Features:
    return {**picture(config), "image_sizes": torch.tensor([[SIZE, SIZE]])}


def tiles(config: PretrainedConfig) -> Features:
    """An image and its tiles: ``(1, tiles, channels, height, width)``."""
    return {"pixel_values": noise(1, 3, 3, SIZE, SIZE), "image_sizes": torch.tensor([[SIZE, 64]])}


def pictures(config: PretrainedConfig) -> Features:
    """Several images of one sequence: ``(1, images, channels, height, width)``."""
    return {"pixel_values": noise(1, 2, 3, SIZE, SIZE)}


def patches(config: PretrainedConfig) -> Features:
    """Flattened patches of an image, and its grid in time, height and width."""
    return {"pixel_values": _patches(config, 1), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def video_patches(config: PretrainedConfig) -> Features:
    """Flattened patches of two frames' pairs, and their grid."""
    return {"pixel_values_videos": _patches(config, 2), "video_grid_thw": torch.tensor([[2, 4, 4]])}


def frame_patches(config: PretrainedConfig) -> Features:
    """Flattened patches of one pair of frames (Qwen3-VL puts text between the pairs)."""
    return {"pixel_values_videos": _patches(config, 1), "video_grid_thw": torch.tensor([[1, 4, 4]])}


def _patches(config: PretrainedConfig, time: int) -> torch.Tensor:
    vision: Any = config.vision_config
    depth = getattr(vision, "temporal_patch_size", 1)
    channels: Any = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
    return noise(time * 4 * 4, channels * depth * vision.patch_size**2)


def frames(config: PretrainedConfig) -> Features:
    """A clip: ``(1, frames, channels, height, width)``."""
    return {"pixel_values_videos": noise(1, 4, 3, SIZE, SIZE)}


def tall_tiles(config: PretrainedConfig) -> Features:
    """Two tiles of one image that the decoder attends to: ``(1, images, tiles, channels, ...)``."""
    return {
        "pixel_values": noise(1, 1, 2, 3, SIZE, SIZE),
        "aspect_ratio_ids": torch.tensor([[2]]),
        "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, PROMPT, 1, 2, dtype=torch.long),
    }


def placed_patches(config: PretrainedConfig) -> Features:
    """Patches of an image and where they lie: ``(1, patches, values)``, ``(1, patches, 2)``."""
    size = config.vision_config.patch_size
    side = torch.arange(SIZE // size)
    places = torch.cartesian_prod(side, side).unsqueeze(0)
    return {
        "pixel_values": noise(1, places.shape[1], 3 * size**2).sigmoid(),
        "image_position_ids": places,
    }


def flat_patches(config: PretrainedConfig) -> Features:
    """Patches of an image in rows and columns: ``(1, patches, values)``, ``(1, 2)``."""
    return {
        "pixel_values": _patches(config, 1).unsqueeze(0),
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }


def square_patches(config: PretrainedConfig) -> Features:
    """Patches of an image as small images: ``(patches, channels, height, width)``."""
    size = config.vision_config.patch_size
    return {**patches(config), "pixel_values": noise(16, 3, size, size)}


def merged_patches(config: PretrainedConfig) -> Features:
    return {**patches(config), "image_merge_sizes": torch.tensor([2])}


def pooled_patches(config: PretrainedConfig) -> Features:
    """Patches of an image, and the four that each token is pooled from."""
    places = torch.arange(16).view(2, 2, 2, 2)  # rows of tokens, rows in one, and so for columns
    return {
        "pixel_values": _patches(config, 1).unsqueeze(0),
        "image_token_pooling": places.transpose(1, 2).reshape(4, 4),
        "image_grids": torch.tensor([[2, 2, 0, 0]]),
    }


def kept_tiles(config: PretrainedConfig) -> Features:
    """Tiles of an image, and which of them are no padding."""
    return {**pictures(config), "pixel_attention_mask": torch.ones(1, 2, dtype=torch.bool)}


def question_and_picture(config: PretrainedConfig) -> Features:
    """An image, and the question as the Q-Former reads it."""
    return {**picture(config), "qformer_input_ids": torch.tensor([[5, 6, 7]])}


def picture_in_place(config: PretrainedConfig) -> Features:
    """An image, and a mask of the tokens that stand for it."""
    mask = torch.zeros(1, PROMPT, dtype=torch.long)
    mask[:, FIRST : FIRST + config.latent_query_num] = 1
    return {**picture(config), "image_embeds_position_mask": mask}


def crops(config: PretrainedConfig) -> Features:
    """An image and one crop of it: ``(1, crops, channels, height, width)``."""
    return {
        "image_pixel_values": noise(1, 2, 3, SIZE, SIZE),
        "image_sizes": torch.tensor([[SIZE, SIZE]]),
        "image_attention_mask": torch.ones(1, 2, 4, 4, dtype=torch.long),
    }


def mel(config: PretrainedConfig) -> Features:
    """A sound: ``(1, mel bins, frames)``."""
    audio = config.audio_config
    return {"input_features": noise(1, audio.num_mel_bins, 2 * audio.max_source_positions)}


def masked_mel(config: PretrainedConfig) -> Features:
    features = mel(config)
    frames = features["input_features"].shape[-1]
    return {**features, "feature_attention_mask": torch.ones(1, frames, dtype=torch.long)}


def sound_frames(config: PretrainedConfig) -> Features:
    """A sound: ``(1, frames, mel bins)``."""
    return {"input_features": noise(1, 15, config.encoder_config.input_dim)}


def phi_sound(config: PretrainedConfig) -> Features:
    return {
        "audio_input_features": noise(1, 32, config.audio_config.input_size),
        "audio_embed_sizes": torch.tensor([4]),
    }


MROPE = {
    "text_config.rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 1, 1],  # of half a head, for time, height and width
    }
}
HALF_MROPE = {
    "text_config.rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 0, 0],
    }
}
HYBRID = {"text_config.layer_types": ["linear_attention", "full_attention"]}
SQUARE = {"vision_config.image_size": [SIZE, SIZE], "vision_config.patch_size": [8, 8]}
PHI = {
    "vision_config.crop_size": SIZE,
    "audio_config.num_blocks": 1,
    "audio_config.ext_pw_out_channel": 32,
    "audio_config.depthwise_separable_out_channel": 32,
    "audio_config.nemo_conv_channels": 32,
}
FULL = {"layer_types": ["full_attention"] * 2}
MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
GROUPS = {"n_group": 1, "topk_group": 1}
INDEXER = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 2}
OMNI = {
    **MROPE,
    "vision_start_token_id": 90,
    "vision_end_token_id": 91,
    "audio_start_token_id": 92,
    "audio_end_token_id": 93,
}
ARIA = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
GRID = {"image_grid_pinpoints": [[SIZE, 64]]}
VIDEO = "video_token_id"
AUDIO = "audio_token_id"

FAMILIES = [
    Family("llava", "image", picture),
    Family("llava_next", "image", tiles, GRID),
    Family("llava_onevision", "image", tiles, GRID),
    Family("vipllava", "image", picture, {"vision_feature_layers": [-2, -1]}),
    Family("qwen2_vl", "image", patches, MROPE),
    Family("qwen2_5_vl", "image", patches, MROPE),
    Family("qwen3_vl", "image", patches),
    Family("qwen3_vl_moe", "image", patches),
    Family("qwen3_5", "image", patches, HYBRID),
    Family("qwen3_5_moe", "image", patches, HYBRID),
    Family("glm4v", "image", patches, MROPE),
    Family("glm46v", "image", patches, MROPE),
    Family("glm4v_moe", "image", patches, HALF_MROPE),
    Family("glm_ocr", "image", patches, MROPE),
    Family("exaone4_5", "image", patches),
    Family("idefics2", "image", pictures),
    Family("idefics3", "image", pictures),
    Family("smolvlm", "image", pictures),
    Family("paligemma", "image", picture),
    Family("gemma3", "image", picture, {"mm_tokens_per_image": 4}),
    Family(
        "gemma4",
        "image",
        placed_patches,
        {
            "vision_config": {},
            "vision_config.pooling_kernel_size": 2,
            "vision_config.position_embedding_size": 16,
            "text_config.vocab_size_per_layer_input": 160,
            "text_config.layer_types": ["sliding_attention", "full_attention"],
            "text_config.per_layer_config": {"1": {"head_dim": 16}},
        },
    ),
    Family("internvl", "image", picture, SQUARE),
    Family("qianfan_ocr", "image", picture, SQUARE),
    Family("mistral3", "image", sized_picture),
    Family("lighton_ocr", "image", sized_picture),
    Family("aya_vision", "image", picture),
    Family("cohere2_vision", "image", picture, {"alignment_intermediate_size": 64}),
    Family("got_ocr2", "image", picture),
    Family("deepseek_vl", "image", picture),
    Family(
        "janus",
        "image",
        picture,
        {
            "vq_config.base_channels": 32,
            "vq_config.channel_multiplier": [1, 1],
            "vq_config.num_embeddings": 16,
            "vq_config.latent_channels": 32,
        },
    ),
    Family(
        "mllama",
        "image",
        tall_tiles,
        {
            "text_config.cross_attention_layers": [1],
            "vision_config.supported_aspect_ratios": [[1, 1], [1, 2]],
            "vision_config.max_num_tiles": 2,
            "vision_config.num_global_layers": 1,
            "vision_config.intermediate_layers_indices": [0],
            "vision_config.vision_output_dim": 64,
        },
        tokens=0,
    ),
    Family("ovis2", "image", picture),
    Family(
        "aria",
        "image",
        picture,
        {
            **{f"text_config.{key}": value for key, value in ARIA.items()},
            "projector_patch_to_query_dict": {16: 4},
        },
    ),
    Family(
        "florence2",
        "image",
        picture,
        {
            "vision_config.embed_dim": [8, 8, 16, 16],
            "vision_config.num_heads": [2] * 4,
            "vision_config.num_groups": [2] * 4,
            "vision_config.depths": [1] * 4,
            "vision_config.window_size": 4,
        },
    ),
    Family("blip-2", "image", picture, {"num_query_tokens": 4, "image_token_index": 50}),
    Family(
        "instructblip",
        "image",
        question_and_picture,
        {"num_query_tokens": 4, "image_token_index": 50},
    ),
    Family(
        "kosmos-2",
        "image",
        picture_in_place,
        {
            "latent_query_num": 4,
            "text_config.layers": 2,
            "text_config.attention_heads": 4,
            "text_config.embed_dim": 32,
        },
        tokens=0,
    ),
    Family(
        "phi4_multimodal",
        "image",
        crops,
        PHI,
        tokens=13,
        placeholder="vision_config.image_token_id",
    ),
    Family(
        "lfm2_vl", "image", flat_patches, {"text_config.layer_types": ["conv", "full_attention"]}
    ),
    Family("video_llama_3", "image", merged_patches),
    Family("paddleocr_vl", "image", square_patches, MROPE),
    Family("granite_docling", "image", kept_tiles),
    Family("hyperclovax_vision_v2", "image", patches),
    Family("pp_chart2table", "image", picture),
    Family("qwen2_5_omni_thinker", "image", patches, OMNI),
    Family("qwen3_omni_moe_thinker", "image", patches, OMNI),
    Family(
        "qwen4_exp",
        "image",
        patches,
        {
            "text_config.layer_types": ["linear_attention", "indexed_attention"],
            "text_config.indexer_n_heads": 2,
            "text_config.indexer_kv_heads": 1,
            "text_config.indexer_head_dim": 8,
            "text_config.indexer_budget": 24,
            "text_config.indexer_compress_ratio": 4,
        },
    ),
    Family(
        "ernie4_5_vl_moe",
        "image",
        patches,
        {
            "text_config.rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            },
            "text_config.moe_num_experts": 4,
            "text_config.moe_k": 2,
            "text_config.moe_intermediate_size": [16, 16],
        },
    ),
    Family(
        "molmo2",
        "image",
        pooled_patches,
        {
            "adapter_config.vision_feature_layer": [-1, 0],
            "adapter_config.text_hidden_size": 32,
            "vision_config.num_position_embeddings": 16,
            "image_patch_id": 50,
        },
        tokens=4,
        placeholder="image_patch_id",
    ),
    Family("llava_next_video", "video", frames, GRID, placeholder=VIDEO),
    Family("llava_onevision", "video", frames, GRID, placeholder=VIDEO),
    Family("video_llava", "video", frames, placeholder=VIDEO),
    Family("qwen2_vl", "video", video_patches, MROPE, placeholder=VIDEO),
    Family("qwen2_5_vl", "video", video_patches, MROPE, placeholder=VIDEO),
    Family("qwen3_vl", "video", frame_patches, placeholder=VIDEO),
    Family(
        "qwen2_audio",
        "audio",
        masked_mel,
        {"audio_config.max_source_positions": 8},
        tokens=4,
        placeholder=AUDIO,
    ),
    Family(
        "voxtral",
        "audio",
        mel,
        {"audio_config.max_source_positions": 12, AUDIO: 50},
        placeholder=AUDIO,
    ),
    Family("granite_speech", "audio", sound_frames, placeholder=AUDIO),
    Family(
        "phi4_multimodal",
        "audio",
        phi_sound,
        PHI,
        tokens=4,
        placeholder="audio_config.audio_token_id",
    ),
    Family(
        "gemma3n_text",
        "text",
        text,
        {
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 160,
            "hidden_size_per_layer_input": 8,
            "activation_sparsity_pattern": [0.0, 0.0],
            "intermediate_size": [48, 48],
            "laurel_rank": 4,
        },
        limit="its language model alone: transformers needs timm for its vision tower",
    ),
    Family("llama", "text", text),
    Family("qwen3", "text", text),
    Family("qwen3_moe", "text", text),
    Family("mistral", "text", text),
    Family("mixtral", "text", text),
    Family("qwen2_moe", "text", text),
    Family("olmoe", "text", text),
    Family("granitemoe", "text", text),
    Family("phimoe", "text", text),
    Family("glm4_moe", "text", text, GROUPS),
    Family("minimax_m2", "text", text),
    Family("ernie4_5_moe", "text", text, {"moe_num_experts": 4, "moe_k": 2}),
    Family(
        "deepseek_v3",
        "text",
        text,
        {**MLA, **GROUPS, "first_k_dense_replace": 1},
    ),
    Family("deepseek_v32", "text", text, {**MLA, **GROUPS, **INDEXER, "first_k_dense_replace": 1}),
    Family("mistral4", "text", text, {**MLA, "qk_head_dim": 8}),
    Family("gpt_oss", "text", text, FULL),
    Family(
        "llama4_text",
        "text",
        text,
        {
            **FULL,
            "intermediate_size_mlp": 48,
            "no_rope_layers": [1, 1],
            "moe_layers": [0, 1],
        },
    ),
    Family("nemotron_h", "text", text),
    Family("jetmoe", "text", text),
    Family("qwen3_next", "text", text, {"layer_types": ["linear_attention", "full_attention"]}),
    Family(
        "lfm2_moe",
        "text",
        text,
        {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    Family(
        "falcon_h1",
        "text",
        text,
        {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 2,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
    ),
    Family(
        "zamba2",
        "text",
        text,
        {
            "layer_types": ["linear_attention", "hybrid"],
            "hybrid_layer_ids": [1],
            "num_mem_blocks": 1,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "mamba_d_state": 8,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "adapter_rank": 4,
        },
    ),
    Family("smollm3", "text", text, {"no_rope_layers": [1, 0]}),
    Family("olmo3", "text", text),
    Family("starcoder2", "text", text),
    Family("phi3", "text", text),
    Family("gpt2", "text", text),
    Family("opt", "text", text),
]
