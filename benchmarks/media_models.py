"""Trains a small video-language and a small audio-language model on generated clips and beeps.

Both are made as the large ones are, from a model that exists: the bundled demo model, which knows
text and pictures. The video model has its decoder, its vision tower and its projector in the
architecture of LLaVA-NeXT-Video; the audio model has its decoder behind an audio tower of
Qwen2-Audio's, which starts from nothing. Text (and, for the video model, pictures) go on being
trained beside, so that neither is forgotten.

    python benchmarks/media_models.py video --work FOLDER
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from clips import clip_lesson, picture_lesson
from lessons import Lesson, MakeLesson, lesson_batch
from tones import SAMPLING_RATE, SECONDS, sound_lesson
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    BatchFeature,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next_video.video_processing_llava_next_video import (
    LlavaNextVideoVideoProcessor,
)

from hf_adaptive_sparse.calibration.questions import IGNORED
from hf_adaptive_sparse.demo.batches import text_batches, training_seed
from hf_adaptive_sparse.demo.build import PATCH_SIZE
from hf_adaptive_sparse.demo.pictures import IMAGE_SIZE
from hf_adaptive_sparse.demo.run import CHECKPOINT
from hf_adaptive_sparse.demo.schedule import learning_rate

logger = logging.getLogger(__name__)

HOP = 320
"""Samples per frame of the audio features: 50 frames a second, of which 12.5 tokens are made."""
MEL_BINS = 32
AUDIO_CHAT = (
    "{{ bos_token }}{% for part in messages[0]['content'] %}{% if part['type'] == 'audio' %}<audio>"
    "{% else %}\nQ: {{ part['text'] }} A:{% endif %}{% endfor %}"
)
"""The plain prompt as a template: a Qwen2-Audio processor without one takes ChatML."""


class FramesByPillow(LlavaNextVideoVideoProcessor):
    """LLaVA-NeXT-Video's video processor without torchvision: each frame as CLIP takes an image.

    Frames must have `IMAGE_SIZE`, as all of ours do.
    """

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """Return ``pixel_values_videos``, float32 ``(videos, frames, 3, height, width)``."""
        clip = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
        frames = [frame for video in videos for frame in video]
        pixels = clip(images=frames, return_tensors="pt")["pixel_values"]
        return BatchFeature({"pixel_values_videos": pixels.unflatten(0, (len(videos), -1))})


class ClipProcessor(LlavaNextVideoProcessor):
    """LLaVA-NeXT-Video's processor where torchvision is absent."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """Take our video processor as it is: the class to check it against needs torchvision."""
        if isinstance(argument, FramesByPillow):
            return type(argument)
        found: type = super().check_argument_for_proper_class(argument_name, argument)
        return found


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        steps: Optimiser steps.
        batch: Clips or sounds per step.
        pictures: Pictures per step.
        text_tokens: Tokens of prose per step.
        questions: Questions about each clip, picture or sound.
        peak: Highest learning rate.
        seed: Of new weights and of the data.
    """

    steps: int
    batch: int
    pictures: int
    text_tokens: int
    questions: int = 4
    peak: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Kind:
    """One of the two models.

    Attributes:
        make: Makes its lessons.
        model: Makes it, untrained where the demo model has nothing to give.
        processor: Makes its processor.
        recipe: How it is trained.
    """

    make: MakeLesson
    model: Callable[[], PreTrainedModel]
    processor: Callable[[], Any]
    recipe: Recipe


def tokenizer(extra: str) -> PreTrainedTokenizerFast:
    """Return the demo model's tokenizer with one special token more."""
    made = AutoTokenizer.from_pretrained(CHECKPOINT)
    made.add_tokens([extra], special_tokens=True)
    return made


def video_processor() -> ClipProcessor:
    """Return a processor of clips and pictures of `IMAGE_SIZE`, on Pillow alone."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return ClipProcessor(
        video_processor=FramesByPillow(),
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size=size,
            image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]],
        ),
        tokenizer=tokenizer("<video>"),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def video_model() -> PreTrainedModel:
    """Return a LLaVA-NeXT-Video model with the demo model's weights: 9 tokens for each frame."""
    demo = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    words = tokenizer("<video>")
    config = LlavaNextVideoConfig(
        text_config={**demo.config.text_config.to_dict(), "vocab_size": len(words)},
        vision_config=demo.config.vision_config.to_dict(),
        image_token_index=demo.config.image_token_index,
        video_token_index=words.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
        image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]],
        tie_word_embeddings=True,
    )
    return _with_weights_of(demo, LlavaNextVideoForConditionalGeneration(config))


def audio_processor() -> Qwen2AudioProcessor:
    """Return a processor of sounds of `SECONDS`."""
    return Qwen2AudioProcessor(
        feature_extractor=WhisperFeatureExtractor(
            feature_size=MEL_BINS,
            sampling_rate=SAMPLING_RATE,
            hop_length=HOP,
            chunk_length=SECONDS,
        ),
        tokenizer=tokenizer("<audio>"),
        audio_token="<audio>",
        chat_template=AUDIO_CHAT,
    )


def audio_model() -> PreTrainedModel:
    """Return a Qwen2-Audio model with the demo model's decoder and a new audio tower."""
    demo = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    words = tokenizer("<audio>")
    text = demo.config.text_config.to_dict()
    config = Qwen2AudioConfig(
        # The architecture has an output head of its own; it starts as the word embeddings.
        text_config={**text, "vocab_size": len(words), "tie_word_embeddings": False},
        audio_config=Qwen2AudioEncoderConfig(
            num_mel_bins=MEL_BINS,
            d_model=96,
            encoder_layers=2,
            encoder_attention_heads=3,
            encoder_ffn_dim=256,
            max_source_positions=SECONDS * SAMPLING_RATE // HOP // 2,
        ).to_dict(),
        audio_token_index=words.convert_tokens_to_ids("<audio>"),
        tie_word_embeddings=False,
    )
    return _with_weights_of(demo, Qwen2AudioForConditionalGeneration(config))


@torch.no_grad()
def _with_weights_of(demo: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    """Copy the demo model's weights to where ``model`` has them, too; it may have more words."""
    known = demo.state_dict()
    for name, tensor in model.state_dict().items():
        if name in known:
            tensor[: len(known[name])] = known[name]
    model.generation_config.eos_token_id = demo.config.text_config.eos_token_id
    model.generation_config.pad_token_id = demo.config.text_config.pad_token_id
    return model


KINDS: Mapping[str, Kind] = {
    "video": Kind(
        clip_lesson,
        video_model,
        video_processor,
        Recipe(steps=1000, batch=10, pictures=3, text_tokens=256),
    ),
    "audio": Kind(
        sound_lesson,
        audio_model,
        audio_processor,
        Recipe(steps=1000, batch=16, pictures=0, text_tokens=256),
    ),
}


def train(model: PreTrainedModel, processor: Any, make: MakeLesson, recipe: Recipe) -> None:
    """Train in place; matrix products in bfloat16, weights and optimiser in float32."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=recipe.peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    texts = text_batches(processor.tokenizer, recipe.seed, recipe.text_tokens)
    model.train()
    model.set_attn_implementation("eager")  # its backward pass is the faster one on short sequences
    started = time.monotonic()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps, recipe.peak)
        rng = random.Random(f"lessons-{training_seed(recipe.seed, step)}")
        parts = {"own": lessons(make, rng, recipe.batch, recipe.questions)}
        if recipe.pictures:
            parts["pictures"] = lessons(picture_lesson, rng, recipe.pictures, recipe.questions)
        batches = {name: lesson_batch(processor, part) for name, part in parts.items()}
        window = next(texts)
        batches["text"] = {"input_ids": window, "labels": window}
        right = {}
        for name, batch in batches.items():
            with torch.autocast("cpu", torch.bfloat16):
                output = model(**batch)
            output.loss.backward()
            right[name] = (output.loss.item(), _share_right(output.logits, batch["labels"]))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            told = ", ".join(f"{n} loss {a:.3f} right {b:.3f}" for n, (a, b) in right.items())
            elapsed = time.monotonic() - started
            logger.info("step %d/%d: %s, %.0f s", step + 1, recipe.steps, told, elapsed)
    model.eval()
    model.set_attn_implementation("sdpa")


def lessons(make: MakeLesson, rng: random.Random, count: int, questions: int) -> Sequence[Lesson]:
    """Make so many lessons."""
    return [make(rng, questions) for _ in range(count)]


def _share_right(logits: torch.Tensor, labels: torch.Tensor) -> float:
    asked = labels[:, 1:] != IGNORED
    return float((logits[:, :-1].argmax(-1) == labels[:, 1:])[asked].float().mean())


def trained(name: str, work: Path, steps: int | None = None) -> Path:
    """Return the folder of a trained model; train it there unless it is there already.

    Args:
        name: Of `KINDS`.
        work: Folder for the trained models.
        steps: Other than the recipe's.
    """
    kind = KINDS[name]
    recipe = kind.recipe if steps is None else replace(kind.recipe, steps=steps)
    folder = work / f"{name}-{recipe.seed}"
    wanted = json.dumps(asdict(recipe))
    note = folder / "recipe.json"
    if note.is_file() and json.loads(note.read_text())["recipe"] == json.loads(wanted):
        return folder
    torch.manual_seed(recipe.seed)
    started = time.monotonic()
    model = kind.model()
    train(model, kind.processor(), kind.make, recipe)
    model.save_pretrained(folder)
    seconds = round(time.monotonic() - started)
    note.write_text(json.dumps({"recipe": json.loads(wanted), "seconds": seconds}))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(KINDS))
    parser.add_argument("--work", type=Path, required=True, help="folder for the trained models")
    parser.add_argument("--steps", type=int, help="of training; default: the recipe's")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(trained(options.name, options.work, options.steps))


if __name__ == "__main__":
    main()
