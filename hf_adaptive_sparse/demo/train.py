"""Trains the bundled demo model from nothing, on generated scenes and text.

`python -m hf_adaptive_sparse.demo.train --output DIR` makes the tokenizer, trains a small
LLaVA-architecture model (CLIP vision, Llama text) in float32, saves it in bfloat16 beside its
processor, loads that folder again and writes what it measures there to `training_report.json`.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from hf_adaptive_sparse.demo.batches import (
    answer_positions,
    text_batches,
    tokenizer_corpus,
    training_seed,
    visual_batch,
)
from hf_adaptive_sparse.demo.build import build_model, build_processor, build_tokenizer
from hf_adaptive_sparse.demo.grounding import learn_to_name, learn_to_see
from hf_adaptive_sparse.demo.measure import measure
from hf_adaptive_sparse.demo.pictures import make_scene
from hf_adaptive_sparse.demo.schedule import learning_rate

logger = logging.getLogger(__name__)

_LONGEST_EAGER_WINDOW = 256


def train(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace
) -> int:
    """Train in place; matrix products in bfloat16, weights and optimiser in float32.

    Returns:
        Tokens seen, text and visual questions together, padding left out.
    """
    decayed = [weight for weight in model.parameters() if weight.ndim >= 2]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    texts = text_batches(processor.tokenizer, args.seed, args.text_tokens)
    tokens, started = 0, time.monotonic()
    recent: dict[str, list[float]] = {"text": [], "visual": [], "right": []}
    model.train()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        window = next(texts)
        rng = random.Random(f"questions-{training_seed(args.seed, step)}")
        scenes = [make_scene(rng) for _ in range(args.images)]
        visual = visual_batch(processor, scenes, rng, args.questions_per_image)
        with torch.autocast("cpu", torch.bfloat16):
            # On CPUs the backward pass of fused attention is the slower one on short sequences.
            long = window.shape[1] > _LONGEST_EAGER_WINDOW
            model.set_attn_implementation("sdpa" if long else "eager")
            text_loss = model(input_ids=window, labels=window).loss
            text_loss.backward()
            model.set_attn_implementation("eager")
            output = model(**visual)
            output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += window.numel() + int(visual["attention_mask"].sum())
        answers = answer_positions(visual["labels"], processor.tokenizer.eos_token_id)
        hits = output.logits[:, :-1].argmax(-1)[answers] == visual["labels"][:, 1:][answers]
        recent["text"].append(text_loss.item())
        recent["visual"].append(output.loss.item())
        recent["right"].append(hits.float().mean().item())
        if (step + 1) % args.log_every == 0:
            means = {name: sum(values) / len(values) for name, values in recent.items()}
            recent = {name: [] for name in recent}
            logger.info(
                "step %d/%d: text loss %.3f, visual loss %.3f, answers right %.3f, %.0f s",
                step + 1,
                args.steps,
                means["text"],
                means["visual"],
                means["right"],
                time.monotonic() - started,
            )
    return tokens


def write_readme(directory: Path, args: argparse.Namespace) -> None:
    """Say in the folder how it was made."""
    options = vars(args) | {"output": "DIR"}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    directory.joinpath("README.md").write_text(
        "# Demo model\n\n"
        "A tiny LLaVA-architecture model trained from nothing on scenes and text that\n"
        "`hf_adaptive_sparse/demo/scenes.py` generates; no outside data. Made by\n\n"
        f"```sh\npython -m hf_adaptive_sparse.demo.train {flags}\n```\n\n"
        "What it measured afterwards on held-out data is in `training_report.json`.\n"
        "Prompt: `<s><image>\\nQ: {question} A:`; the answer follows as ` {answer}` and `</s>`.\n"
        "The tokenizer adds no special tokens by itself.\n",
        encoding="utf-8",
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model from nothing.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="weights and training data")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak")
    parser.add_argument("--text-tokens", type=int, default=1024, help="text tokens per step")
    parser.add_argument("--images", type=int, default=12, help="pictures per step")
    parser.add_argument("--vision-steps", type=int, default=500, help="learning to see, first")
    parser.add_argument("--vision-images", type=int, default=32, help="pictures in each of those")
    parser.add_argument("--caption-steps", type=int, default=250, help="learning to name, second")
    parser.add_argument("--caption-images", type=int, default=16, help="pictures in each of those")
    parser.add_argument("--questions-per-image", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--log-every", type=int, default=50, help="steps between progress lines")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train, save, measure, report; returns the exit code."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started = time.monotonic()
    tokenizer = build_tokenizer(tokenizer_corpus(args.seed))
    processor = build_processor(tokenizer)
    model = build_model(tokenizer)
    learn_to_see(model, processor, args)
    learn_to_name(model, processor, args)
    tokens = train(model, processor, args)
    model.to(torch.bfloat16).save_pretrained(args.output)
    processor.save_pretrained(args.output)
    trained = time.monotonic() - started
    report = {
        "options": {name: value for name, value in vars(args).items() if name != "output"},
        "training_tokens": tokens,
        "training_seconds": round(trained),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **measure(args.output, questions=500, windows=64),
    }
    text = json.dumps(report, indent=2)
    args.output.joinpath("training_report.json").write_text(text + "\n", encoding="utf-8")
    write_readme(args.output, args)
    logger.info("%s", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
