"""What does the sparse runtime save and gain in a whole model of one billion parameters?

A random Llama (22 layers, hidden 2,048, grouped-query attention, bfloat16), half of whose weights
are gone, is written layer by layer in five forms: dense, and compressed with values of 16, 12 (the
same values, without loss), 8 and 4 bits. ``--shape 7b`` gives it layers as LLaVA-1.5-7B has them.
Times and bytes do not depend on what the weights say. Four questions:

- memory: bytes of the pruned weights in memory, and the resident memory of a process that loads
  each form and has it answer, each in a process of its own.
- loading: time until the model is there and until its first token (files in the page cache), and
  the peak until then against the final size.
- decoding: time per token behind 2,048 tokens of context, dense with ``DynamicCache`` against
  sparse with the adaptive cache. All forms take turns, one token each per round, so that whatever
  else the machine does hits all alike.
- prompt: time of a prompt of 512 tokens with an empty cache, in turns as well.

Figures are ratios within one run.

    python benchmarks/sparse_runtime.py [--shape 1b] [--layers 22] [--context 2048] [--rounds 24]
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from environment import write_result
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from turns import in_turns

import hf_adaptive_sparse as has
from hf_adaptive_sparse.architecture import cache_argument, prunable_weights
from hf_adaptive_sparse.evaluation.resource_meter import ResourceMeter
from hf_adaptive_sparse.kernels import library
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.report import markdown_table
from hf_adaptive_sparse.runtime.conversion import sparse_linears

HEADS = 32
SHAPES = {"1b": (4, 64, 5632), "7b": (32, 128, 11008)}
"""KV heads, channels of a head, and width of the MLP."""

FORMS = {"dense": None} | {f"sparse, {bits} bits": bits for bits in (16, 12, 8, 4)}
TARGETS = {
    "memory_16": ("at most", 0.58),
    "memory_12": ("at most", 0.58),
    "memory_8": ("at most", 0.33),
    "peak_16": ("at most", 1.15),
    "peak_12": ("at most", 1.15),
    "peak_8": ("at most", 1.15),
    "first_token_16": ("at most", 1.2),
    "first_token_12": ("at most", 1.2),
    "decode_16": ("at least", 2.0),
    "decode_12": ("at least", 2.0),
    "decode_8": ("at least", 2.0),
}


def model_config(shape: str, layers: int) -> LlamaConfig:
    kv_heads, head_dim, intermediate = SHAPES[shape]
    return LlamaConfig(
        hidden_size=HEADS * head_dim,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        vocab_size=32000,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )


def shards(config: LlamaConfig, seed: int) -> Iterator[tuple[dict[str, torch.Tensor], set[str]]]:
    """Yield the tensors of embedding, layers and last norm, and the names of those pruned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    pruned = {f"{name}.weight" for name in prunable_weights(model)}
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        key = ".".join(name.split(".")[:3]) if ".layers." in name else name
        groups.setdefault(key, {})[name] = parameter.shape
    for shapes in groups.values():
        tensors = {}
        for name, shape in shapes.items():
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
                continue
            weight = torch.empty(shape, dtype=torch.bfloat16)
            weight.normal_(0.0, 1 / math.sqrt(shape[1]), generator=generator)
            if name in pruned:
                weight.masked_fill_(torch.rand(shape, generator=generator) < 0.5, 0.0)
            tensors[name] = weight
        yield tensors, pruned & shapes.keys()


def write_models(folder: Path, config: LlamaConfig, seed: int) -> None:
    """Write every form of one model, a shard per layer."""
    names: set[str] = set()
    indices: dict[str, dict[str, str]] = {form: {} for form in FORMS}
    for number, (tensors, pruned) in enumerate(shards(config, seed)):
        names |= pruned
        for form, bits in FORMS.items():
            stored = dict(tensors)
            if bits is not None:
                for name in pruned:
                    group = 64 if bits == 4 else None
                    weight = SparseWeight.from_dense(stored.pop(name), bits, group)
                    stored |= {f"{name}_{kind}": part for kind, part in weight.tensors().items()}
            file = f"model-{number:05d}.safetensors"
            (folder / form).mkdir(exist_ok=True)
            save_file(stored, folder / form / file, metadata={"format": "pt"})
            indices[form] |= dict.fromkeys(stored, file)
    modules = sorted(name.removesuffix(".weight") for name in names)
    for form, bits in FORMS.items():
        if bits is not None:
            quantised: dict[str, Any] = {}
            if bits != 16:
                quantised = {"weight_bits": dict.fromkeys(modules, bits)}
            config.quantization_config = has.SparsityConfig(
                target_sparsity=0.5,
                metric="magnitude",
                sparsity=dict.fromkeys(modules, 0.5),
                kv_cache=kv_profile(config),
                **quantised,
            )
        config.save_pretrained(folder / form)
        index = {"metadata": {}, "weight_map": indices[form]}
        (folder / form / "model.safetensors.index.json").write_text(json.dumps(index))


def kv_profile(config: LlamaConfig) -> has.KVCacheConfig:
    """Mean 7 bits: half the layers at 8, half at 6."""
    bits = tuple(8 if layer % 2 else 6 for layer in range(config.num_hidden_layers))
    return has.KVCacheConfig(bits=bits)


def load(folder: Path, form: str) -> LlamaForCausalLM:
    config = None if FORMS[form] is None else has.SparsityConfig(runtime="sparse")
    return AutoModelForCausalLM.from_pretrained(
        folder / form, sparsity_config=config, dtype=torch.bfloat16
    ).eval()


def say(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


# Loading: a process per form and round


def measure_loading(folder: Path, form: str) -> dict[str, float]:
    """Load a form and have it answer, in this process."""
    gc.collect()  # or a collection of all that was imported falls into some of the forms
    with ResourceMeter() as measured:
        started = time.perf_counter()
        model = load(folder, form)
        loaded = time.perf_counter() - started
        with torch.no_grad():
            model(torch.tensor([[1]]), logits_to_keep=1)
        first = time.perf_counter() - started
    return {
        "load_seconds": loaded,
        "first_token_seconds": first,
        "peak_bytes": measured.peak_rss_bytes - measured.start_rss_bytes,
        "final_bytes": model.get_memory_footprint(),
        "pruned_bytes": sum(module.memory_bytes for module in sparse_linears(model).values()),
    }


def loading(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    for _ in range(rounds):
        for form in FORMS:
            say(f"loading {form}")
            done = subprocess.run(
                [sys.executable, __file__, "--child", str(folder), form],
                capture_output=True,
                text=True,
                check=True,
            )
            found[form].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        form: {key: min(run[key] for run in runs) for key in runs[0]}
        for form, runs in found.items()
    }


# Decoding and prompts: all forms in turns


def new_cache(form: str, config: LlamaConfig) -> Any:
    if FORMS[form] is None:
        return DynamicCache(config=config)
    return has.AdaptiveQuantizedCache(config, kv_profile(config))


def filled_cache(form: str, config: LlamaConfig, tokens: int) -> Any:
    """Return a cache with random keys and values of a prompt in every layer."""
    cache = new_cache(form, config)
    generator = torch.Generator().manual_seed(1)
    heads = (config.num_key_value_heads, config.head_dim)
    for layer in range(config.num_hidden_layers):
        states = [
            torch.randn((1, tokens, *heads), generator=generator).to(torch.bfloat16).transpose(1, 2)
            for _ in range(2)
        ]
        cache.update(*states, layer)
    return cache


def decoder(
    model: LlamaForCausalLM, form: str, config: LlamaConfig, context: int
) -> Callable[[], object]:
    """Return what decodes one token behind a context."""
    token = torch.tensor([[5]])
    arguments = {cache_argument(model): filled_cache(form, config, context)}
    return lambda: model(token, logits_to_keep=1, **arguments)


@torch.no_grad()
def in_models(folder: Path, config: LlamaConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Measure ``decoding`` behind a context, and a ``prompt``, of all forms."""
    say("loading all forms")
    models = {form: load(folder, form) for form in FORMS}
    argument = cache_argument(models["dense"])
    prompt = torch.randint(0, config.vocab_size, (1, options.prompt))

    def reader(form: str) -> Callable[[], object]:
        return lambda: models[form](prompt, logits_to_keep=1, **{argument: new_cache(form, config)})

    say(f"decoding, {options.rounds} rounds")
    decoding = in_turns(
        {form: decoder(models[form], form, config, options.context) for form in FORMS},
        options.rounds,
    )
    say(f"reading prompts, {options.prompt_rounds} rounds")
    prompts = in_turns({form: reader(form) for form in FORMS}, options.prompt_rounds)
    return {"decoding": summaries(decoding), "prompts": summaries(prompts)}


def summaries(spent: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {
        form: {"median_ms": 1000 * statistics.median(t), "least_ms": 1000 * min(t)}
        for form, t in spent.items()
    }


def compare(result: dict[str, Any], parameters: int) -> dict[str, float]:
    loads, decodes, prompts = result["loading"], result["decoding"], result["prompts"]
    ratios = {}
    for form, bits in FORMS.items():
        if bits is None:
            continue
        own, dense = loads[form], loads["dense"]
        ratios[f"memory_{bits}"] = own["pruned_bytes"] / (2 * parameters)
        ratios[f"model_memory_{bits}"] = own["final_bytes"] / dense["final_bytes"]
        ratios[f"peak_{bits}"] = own["peak_bytes"] / own["final_bytes"]
        ratios[f"load_{bits}"] = own["load_seconds"] / dense["load_seconds"]
        ratios[f"first_token_{bits}"] = own["first_token_seconds"] / dense["first_token_seconds"]
        ratios[f"decode_{bits}"] = decodes["dense"]["median_ms"] / decodes[form]["median_ms"]
        ratios[f"prompt_{bits}"] = prompts["dense"]["median_ms"] / prompts[form]["median_ms"]
    return ratios


def table(result: dict[str, Any]) -> str:
    rows = []
    for form, bits in FORMS.items():
        own, speed = result["loading"][form], result["decoding"][form]
        pruned = own["pruned_bytes"] or result["dense_pruned_bytes"]
        gain, read = (
            1.0 if bits is None else result["ratios"][f"{name}_{bits}"]
            for name in ("decode", "prompt")
        )
        row = {
            "form": form,
            "pruned weights": f"{pruned / 1e6:,.0f} MB",
            "whole model": f"{own['final_bytes'] / 1e6:,.0f} MB",
            "resident peak": f"{own['peak_bytes'] / 1e6:,.0f} MB",
            "load s": f"{own['load_seconds']:.2f}",
            "first token s": f"{own['first_token_seconds']:.2f}",
            "decode ms": f"{speed['median_ms']:.1f}",
            "tokens per second against dense": f"{gain:.2f} x",
            "prompt ms": f"{result['prompts'][form]['median_ms']:,.0f}",
            "prompt against dense": f"{read:.2f} x",
        }
        rows.append(row)
    verdicts = [
        {
            "figure": name,
            "measured": f"{result['ratios'][name]:.3f}",
            "wanted": f"{kind} {wanted}",
            "reached": "yes" if reached(result["ratios"][name], kind, wanted) else "no",
        }
        for name, (kind, wanted) in TARGETS.items()
    ]
    machine = result["kernels"]
    return (
        "# The sparse runtime in a model of a billion parameters or more\n\n"
        f"Random Llama of {result['parameters'] / 1e9:.2f} B pruned parameters, half of them gone, "
        f"{result['layers']} layers of {result['shape'].upper()}'s shape, bfloat16; "
        f"{result['context']:,} tokens of context; {machine}. Dense decodes with "
        "DynamicCache, sparse with the adaptive cache at a mean of 7 bits. Memory and load times "
        f"of each form come from processes of their own, the best of {result['load_rounds']}; "
        f"decoding is the median of {result['rounds']} rounds in turns, a prompt of "
        f"{result['prompt']:,} tokens that of {result['prompt_rounds']}.\n\n"
        f"{markdown_table(rows)}\n\n"
        "`memory_N`: bytes of the pruned weights against dense; `peak_N`: resident peak until the "
        "first token against the final size; `first_token_N`: time until it against the dense "
        "checkpoint's; `decode_N`: tokens per second against dense.\n\n"
        f"{markdown_table(verdicts)}\n"
    )


def reached(value: float, kind: str, wanted: float) -> bool:
    return value <= wanted if kind == "at most" else value >= wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument(
        "--prompt", type=int, default=512, help="tokens of the prompt that is timed"
    )
    parser.add_argument("--prompt-rounds", type=int, default=9)
    parser.add_argument("--load-rounds", type=int, default=3)
    parser.add_argument(
        "--result", default="sparse_runtime", help="name to store it by; another keeps this one's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, form = options.child
        print(json.dumps(measure_loading(Path(folder), form)))
        return
    config = model_config(options.shape, options.layers)
    with torch.device("meta"):
        linears = prunable_weights(LlamaForCausalLM(config))
        parameters = sum(module.weight.numel() for module in linears.values())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("writing the model in every form")
        write_models(folder, model_config(options.shape, options.layers), options.seed)
        result: dict[str, Any] = {
            "seed": options.seed,
            "shape": options.shape,
            "layers": options.layers,
            "parameters": parameters,
            "dense_pruned_bytes": 2 * parameters,
            "context": options.context,
            "rounds": options.rounds,
            "prompt": options.prompt,
            "prompt_rounds": options.prompt_rounds,
            "load_rounds": options.load_rounds,
            "kernels": library.describe(),
            "loading": loading(folder, options.load_rounds),
            **in_models(folder, config, options),
        }
    result["ratios"] = compare(result, parameters)
    result["targets"] = {
        name: {
            "wanted": f"{kind} {wanted}",
            "reached": reached(result["ratios"][name], kind, wanted),
        }
        for name, (kind, wanted) in TARGETS.items()
    }
    text = table(result)
    write_result(options.result, result, text)
    print(text)


if __name__ == "__main__":
    main()
