"""The two short stages before training proper: seeing, and naming what is seen.

Without them a model this small spends thousands of steps on a plateau where it answers from the
question alone. Their order is LLaVA's own: a vision tower that sees, an alignment on captions,
then questions.
"""

from __future__ import annotations

import argparse
import logging
import random
import time

import torch
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from hf_adaptive_sparse.demo.batches import IGNORED_LABEL, training_seed, visual_batch
from hf_adaptive_sparse.demo.build import PATCH_SIZE
from hf_adaptive_sparse.demo.pictures import (
    COLOURS,
    COLUMNS,
    IMAGE_SIZE,
    KINDS,
    ROWS,
    Scene,
    draw_scene,
    make_scene,
)
from hf_adaptive_sparse.demo.schedule import learning_rate

logger = logging.getLogger(__name__)

_WORD_LOGIT_SCALE = 25.0
"""Makes a patch that is the plain sum of its words' embeddings score each of them about 8."""
_NOTHING_LOGIT = 4.0
"""Score of "no shape here": half of what a word that is there reaches."""


def learn_to_see(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace
) -> None:
    """Train vision tower and projector so that every patch holds the words for its quarter.

    The projected patch is compared with the decoder's own word embeddings: colour and kind of
    the shape in its quarter of the picture (or none), and where that quarter is.
    """
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    embeddings = model.get_input_embeddings()
    vocabularies = [
        torch.tensor([processor.tokenizer(f" {word}").input_ids[0] for word in words])
        for words in (COLOURS, KINDS, COLUMNS, ROWS)
    ]
    weights = [*tower.parameters(), *projector.parameters(), *embeddings.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=0.0, fused=True)
    model.set_attn_implementation("eager")
    started = time.monotonic()
    for step in range(args.vision_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.vision_steps, args.learning_rate)
        rng = random.Random(f"vision-{training_seed(args.seed, step)}")
        scenes = [make_scene(rng) for _ in range(args.vision_images)]
        pictures = [draw_scene(scene) for scene in scenes]
        pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        targets = torch.stack([patch_labels(scene) for scene in scenes]).flatten(0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            states = tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
            patches = projector(states).float().flatten(0, 1)
        losses = []
        for column, words in enumerate(vocabularies):
            logits = _WORD_LOGIT_SCALE * patches @ embeddings.weight[words].T
            if column < 2:
                nothing = torch.full_like(logits[:, :1], _NOTHING_LOGIT)
                logits = torch.cat([nothing, logits], dim=1)
            losses.append(cross_entropy(logits, targets[:, column]))
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.log_every == 0:
            logger.info(
                "seeing %d/%d: loss of colour %.3f, kind %.3f, column %.3f, row %.3f; %.0f s",
                step + 1,
                args.vision_steps,
                *(loss.item() for loss in losses),
                time.monotonic() - started,
            )


def patch_labels(scene: Scene) -> torch.Tensor:
    """Say for each patch what its quarter of the picture holds.

    Returns:
        int64 `(patches, 4)`: colour (0 none, else 1 + its index), kind (the same), column, row.
    """
    side = IMAGE_SIZE // PATCH_SIZE
    half = side // 2
    labels = torch.zeros(side, side, 4, dtype=torch.int64)
    labels[:, half:, 2] = 1
    labels[half:, :, 3] = 1
    for shape in scene.shapes:
        rows = slice(shape.row * half, (shape.row + 1) * half)
        columns = slice(shape.column * half, (shape.column + 1) * half)
        labels[rows, columns, 0] = 1 + list(COLOURS).index(shape.colour)
        labels[rows, columns, 1] = 1 + KINDS.index(shape.kind)
    return labels.flatten(0, 1)


def learn_to_name(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace
) -> None:
    """Train the whole model on captions, so that words find the patches they speak of."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    model.set_attn_implementation("eager")
    model.train()
    started = time.monotonic()
    for step in range(args.caption_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.caption_steps, args.learning_rate)
        rng = random.Random(f"captions-{training_seed(args.seed, step)}")
        scenes = [make_scene(rng) for _ in range(args.caption_images)]
        batch = visual_batch(processor, scenes, rng, questions=0)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.log_every == 0:
            labels = batch["labels"][:, 1:]
            asked = labels != IGNORED_LABEL
            right = output.logits[:, :-1].argmax(-1)[asked] == labels[asked]
            logger.info(
                "naming %d/%d: loss %.3f, words right %.3f, %.0f s",
                step + 1,
                args.caption_steps,
                output.loss.item(),
                right.float().mean().item(),
                time.monotonic() - started,
            )
