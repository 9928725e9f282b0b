"""The demo model before training: tokenizer, processor and a LLaVA architecture in small."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_adaptive_sparse.demo.pictures import IMAGE_SIZE

PATCH_SIZE = 8
VOCABULARY_SIZE = 1536
CONTEXT_LENGTH = 1024
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PROMPT = "<s><image>\nQ: {question} A:"


def build_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Join the tokenizer with CLIP's image processor on its PIL backend."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Make the untrained model in float32: eight decoder layers hold four fifths of it."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.05,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=96,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        # The last layer: in a tower of three, one that nothing reads would be a waste.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    # CLIP's own start (0.02 everywhere) takes a tower this small thousands of steps to leave.
    embeddings = model.model.vision_tower.embeddings
    torch.nn.init.normal_(embeddings.patch_embedding.weight, std=(3 * PATCH_SIZE**2) ** -0.5)
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.5)
    projector = model.model.multi_modal_projector
    for linear in (projector.linear_1, projector.linear_2):
        torch.nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    _let_like_attend_to_like(model)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


@torch.no_grad()
def _let_like_attend_to_like(model: LlavaForConditionalGeneration) -> None:
    """Start the decoder's attention as "look at what resembles me, and copy it".

    Query and key projections start equal, and the output projection as the transpose of the
    value projection (after "mimetic initialization", Trockman and Kolter, arXiv:2305.09828).
    Matching the word "circle" to the patches that hold one is then there from the first step;
    from independent projections it takes thousands of steps to appear.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        head_dim = attention.head_dim
        width = attention.k_proj.in_features
        shared = attention.num_key_value_groups
        keys = torch.randn(attention.k_proj.out_features // head_dim, head_dim, width)
        values = torch.randn_like(keys)
        attention.k_proj.weight.copy_((0.075 * keys).flatten(0, 1))
        attention.q_proj.weight.copy_((0.075 * keys.repeat_interleave(shared, 0)).flatten(0, 1))
        attention.v_proj.weight.copy_((0.05 * values).flatten(0, 1))
        outputs = 0.025 * values.repeat_interleave(shared, 0).flatten(0, 1)
        attention.o_proj.weight.copy_(outputs.T)
