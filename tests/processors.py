"""A LLaVA processor of a few hundred tokens, built here, for the tiny models of conftest.py."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as decoding
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

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
