"""Processors of a few hundred tokens, built here: of images, of videos, and of sounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as decoding
from transformers import (
    BatchFeature,
    CLIPImageProcessor,
    LlavaNextVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.llava_next_video.video_processing_llava_next_video import (
    LlavaNextVideoVideoProcessor,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
"""Ids 0 to 4, as in the configs of conftest.py."""

CHARACTERS = " \n" + "abcdefghijklmnopqrstuvwxyz0123456789.,:?'!-ABCDEFGHIJKLMNOPQRSTUVWXYZ=<>"

CHAT_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def make_tokenizer(*, adds_bos: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token per character (fewer than 128 in all); anything else is <unk>."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoding.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>" if pad else None,
        extra_special_tokens={"image_token": "<image>"},
    )


def make_llava_processor(
    *, chat_template: str | None = None, adds_bos: bool = False, pad: bool = True
) -> LlavaProcessor:
    """Processor of ``tiny_llava``: images of 16 x 16 become 4 image tokens."""
    images = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=make_tokenizer(adds_bos=adds_bos, pad=pad),
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


SOUND_SECONDS = 1


def make_audio_processor(chat_template: str | None = None) -> Qwen2AudioProcessor:
    """Processor of sounds of a second, 25 tokens at most, at 16 kHz."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<audio>"], special_tokens=True)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=SOUND_SECONDS)
    # An empty template: none at all would become ChatML, whose tokens are not there.
    processor = Qwen2AudioProcessor(
        extractor, tokenizer, chat_template=chat_template or "", audio_token="<audio>"
    )
    return processor


class Frames(LlavaNextVideoVideoProcessor):
    """Frames of 16 x 16 as they are; transformers' own video processors need torchvision."""

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        self.options = kwargs
        pixels = [np.stack([np.asarray(frame) for frame in video]) for video in videos]
        return BatchFeature(
            {"pixel_values_videos": torch.tensor(np.stack(pixels)).movedim(-1, 2) / 255}
        )


class FramesProcessor(LlavaNextVideoProcessor):
    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        if isinstance(argument, Frames):
            return type(argument)
        return super().check_argument_for_proper_class(argument_name, argument)


def make_video_processor() -> LlavaNextVideoProcessor:
    """Processor of clips: one token for each frame of 16 x 16."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    return FramesProcessor(
        video_processor=Frames(),
        image_processor=make_llava_processor().image_processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
    )
