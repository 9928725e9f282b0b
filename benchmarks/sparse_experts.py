"""What does the sparse runtime save and gain in a mixture of experts?

A random Qwen3-MoE (hidden 2,048, 64 experts of 768, 8 of them per token, bfloat16), half of whose
weights are gone. Dense in transformers' two ways of running experts that a CPU has, sparse with
values of 16, 8 and 4 bits. All forms take turns, a token each per round, behind a short context.
Times and bytes do not depend on what the weights say.

    python benchmarks/sparse_experts.py [--layers 4] [--rounds 24]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from environment import write_result
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM
from turns import in_turns

import hf_adaptive_sparse as has
from hf_adaptive_sparse.architecture import cache_argument
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.kernels import library
from hf_adaptive_sparse.report import markdown_table
from hf_adaptive_sparse.runtime.sparse_experts import sparse_stacks

DENSE = ("grouped_mm", "eager")
BITS = (16, 8, 4)


def random_model(layers: int, seed: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        vocab_size=32000,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def forms(layers: int, seed: int) -> dict[str, Qwen3MoeForCausalLM]:
    """Return the model in every form."""
    model = random_model(layers, seed)
    made = {}
    for bits in BITS:
        form = f"sparse, {bits} bits"
        print(form, "...", file=sys.stderr, flush=True)
        made[form] = copy.deepcopy(model)
        config = has.SparsityConfig(metric="magnitude", runtime="sparse", weight_bits=bits)
        apply_config(made[form], config, progress=False)
    for way in DENSE:
        shared = {id(p): p for p in model.parameters()}
        made[f"dense, {way}"] = copy.deepcopy(model, shared)
        made[f"dense, {way}"].set_experts_implementation(way)
    return made


@torch.no_grad()
def decode_step(model: Qwen3MoeForCausalLM, context: int) -> Callable[[], object]:
    """Return what decodes a token behind a prompt: the same tokens in all forms, each another."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 32000, (1, context), generator=generator)
    tokens = itertools.cycle(torch.randint(3, 32000, (64, 1, 1), generator=generator).unbind())
    cache = {cache_argument(model): DynamicCache(config=model.config)}
    model(prompt, logits_to_keep=1, **cache)
    return lambda: model(next(tokens), logits_to_keep=1, **cache)


def decoding(models: dict[str, Qwen3MoeForCausalLM], context: int, rounds: int) -> dict[str, float]:
    """Return the median milliseconds per token of each form."""
    steps = {form: decode_step(model, context) for form, model in models.items()}
    seconds = in_turns(steps, rounds)
    return {form: 1000 * statistics.median(taken) for form, taken in seconds.items()}


def expert_bytes(model: Qwen3MoeForCausalLM) -> int:
    stacks = sparse_stacks(model)
    if stacks:
        return sum(stack.memory_bytes for stack in stacks.values())
    return sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)


def table(result: dict[str, Any]) -> str:
    dense = result["forms"][f"dense, {DENSE[0]}"]
    rows = [
        {
            "form": form,
            "experts": f"{found['expert_bytes'] / 1e6:,.0f} MB",
            "of dense": f"{found['expert_bytes'] / dense['expert_bytes']:.3f}",
            "decode ms": f"{found['milliseconds']:.1f}",
            "tokens per second against grouped_mm": (
                f"{dense['milliseconds'] / found['milliseconds']:.2f} x"
            ),
        }
        for form, found in result["forms"].items()
    ]
    return (
        "# The sparse runtime in a mixture of experts\n\n"
        f"Random Qwen3-MoE of {result['layers']} layers, 64 experts each of which a token takes 8, "
        f"half of the weights gone, bfloat16, {result['context']} tokens of context, DynamicCache "
        f"in all; {result['kernels']}. Medians of {result['rounds']} rounds in turns.\n\n"
        + markdown_table(rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    models = forms(options.layers, options.seed)
    times = decoding(models, options.context, options.rounds)
    result = {
        **vars(options),
        "kernels": library.describe(),
        "forms": {
            form: {"expert_bytes": expert_bytes(model), "milliseconds": times[form]}
            for form, model in models.items()
        },
    }
    text = table(result)
    write_result("sparse_experts", result, text)
    print(text)


if __name__ == "__main__":
    main()
