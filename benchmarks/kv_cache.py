"""Does the adaptive KV cache decode faster than no compression, in less memory?

Against ``DynamicCache`` and every stock ``QuantizedCache`` backend that is installed, on the CPU,
in bfloat16, on a random Llama (8 layers x 16 heads x 64, hidden 1,024) that no one has trained:
times and bytes do not depend on what the weights say. Four questions:

- decoding: time per token at each context. Every cache is filled with the same random states, then
  all take turns, one token each per round, in an order that is drawn anew: whatever else the
  machine does hits all alike, and so does what the one before left in the processor's caches. The
  rounds pass through at least one flush of each cache (every 128 tokens).
- prefill: time of one forward pass over a prompt into an empty cache, in turns as well.
- memory: bytes allocated, and the resident set's high-water mark while tokens are decoded at the
  longest context, through one flush, above what it was before the cache was filled; one process per
  cache.
- drift: one layer, 16,384 tokens one by one; what a step costs beyond attention itself, early and
  late.

Figures are ratios within one run. The model's own share of a step differs between machines (the
row "floor"): ``beyond_floor`` is what a cache adds to it, as a ratio to what DynamicCache adds.
A backend that is missing or cannot run here is left out, and the result says why. quanto compiles
its kernels at its first use on a machine, which takes minutes and is not timed.

    python benchmarks/kv_cache.py [--contexts 2048 8192] [--rounds 130] [--drift-tokens 16384]
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from environment import write_result
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

from hf_adaptive_sparse.kernels import library
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer
from hf_adaptive_sparse.profiles import KVCacheConfig

LAYERS, HEADS, HEAD_DIM = 8, 16, 64
FLUSH, STEPS = 128, 16
"""Tokens between two flushes, and tokens decoded for the peak memory: one flush in their middle."""
BASELINE, OURS = "DynamicCache", "adaptive, mean 7"
TARGETS = {
    "decode_2048": 0.5,
    "decode_8192": 0.25,
    "prefill_2048": 1.1,
    "nbytes_8192": 0.46,
    "peak_8192": 0.6,
}


def model_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=2816,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=32000,
        max_position_embeddings=32768,
    )


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(model_config()).to(torch.bfloat16).eval()


def cache_makers(wanted: list[str] | None = None) -> dict[str, Callable[[], Any]]:
    """Every cache that this installation can make, or those wanted, by name."""
    config = model_config()
    mean_7 = KVCacheConfig(key_bits=(8, 6) * (LAYERS // 2), value_bits=(6, 8) * (LAYERS // 2))
    makers: dict[str, Callable[[], Any]] = {
        BASELINE: lambda: DynamicCache(config=config),
        OURS: lambda: AdaptiveQuantizedCache(config, mean_7),
        "adaptive, 8": lambda: AdaptiveQuantizedCache(config, KVCacheConfig(bits=8)),
        "adaptive, 4": lambda: AdaptiveQuantizedCache(config, KVCacheConfig(bits=4)),
    }
    if importlib.util.find_spec("optimum.quanto"):
        makers["quanto, 4"] = lambda: QuantizedCache("quanto", config=config, nbits=4)
    makers["fp8"] = lambda: QuantizedCache("fp8", config=config)
    if importlib.util.find_spec("hqq"):
        for bits in (8, 4):
            makers[f"hqq, {bits}"] = functools.partial(
                QuantizedCache, "hqq", config=config, nbits=bits, axis_key=1, axis_value=1
            )
    unknown = set(wanted or ()) - set(makers)
    if unknown:
        raise SystemExit(f"Unknown caches {sorted(unknown)}; there are {sorted(makers)}.")
    return {name: make for name, make in makers.items() if wanted is None or name in wanted}


def warmed_up(
    makers: dict[str, Callable[[], Any]], model: LlamaForCausalLM
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Use every cache once: those that work, and why the others do not."""
    working, failed = {}, {}
    for name, make in makers.items():
        say(f"warming up {name}")
        try:
            cache = make()
            fill(cache, 256, 0)
            model(torch.tensor([[5]]), past_key_values=cache)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            failed[name] = f"{type(error).__name__}: {lines[-1]}"
            say(f"nothing of {name}: {failed[name]}")
        else:
            working[name] = make
    if not {BASELINE, OURS} <= set(working):
        raise SystemExit(f"{BASELINE} and {OURS} must work: {failed}")
    return working, failed


def random_states(tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Keys or values as a model makes them: (1, heads, tokens, head_dim), tokens outermost."""
    shape = (1, tokens, HEADS, HEAD_DIM)
    return torch.randn(shape, generator=generator).to(torch.bfloat16).transpose(1, 2)


def fill(cache: Any, tokens: int, seed: int) -> None:
    """Put random states into every layer, as a prompt would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in range(LAYERS):
        keys, values = random_states(tokens, generator), random_states(tokens, generator)
        cache.update(keys, values, layer)


def say(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


def timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1000


def shuffled_rounds(names: list[str], rounds: int, seed: int) -> Iterator[list[str]]:
    """Every name once per round, in an order that differs from round to round."""
    draw = random.Random(seed)
    for _ in range(rounds):
        yield draw.sample(names, len(names))


def summary(times: list[float]) -> dict[str, float]:
    return {
        "median_ms": statistics.median(times),
        "mean_ms": statistics.fmean(times),
        "fastest_ms": min(times),
    }


def measure_decoding(
    model: LlamaForCausalLM,
    makers: dict[str, Callable[[], Any]],
    context: int,
    rounds: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    say(f"decoding at {context} tokens")
    caches = {name: make() for name, make in makers.items()}
    for cache in caches.values():
        fill(cache, context, seed)
    # The cost of all that is not the cache: the same step with hardly any context.
    caches["floor"] = DynamicCache(config=model.config)
    fill(caches["floor"], 8, seed)
    token = torch.tensor([[5]])
    times: dict[str, list[float]] = {name: [] for name in caches}
    for turn, names in enumerate(shuffled_rounds(list(caches), rounds + 2, seed)):
        for name in names:
            spent = timed(functools.partial(model, token, past_key_values=caches[name]))
            if turn >= 2:
                times[name].append(spent)
    found = {name: summary(series) for name, series in times.items()}
    for name, cache in caches.items():
        found[name]["nbytes"] = tensor_bytes(cache)
    return found


def measure_prefill(
    model: LlamaForCausalLM,
    makers: dict[str, Callable[[], Any]],
    tokens: int,
    rounds: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    say(f"prefill of {tokens} tokens")
    ids = torch.randint(3, 32000, (1, tokens), generator=torch.Generator().manual_seed(seed))
    times: dict[str, list[float]] = {name: [] for name in makers}
    for turn, names in enumerate(shuffled_rounds(list(makers), rounds + 1, seed)):
        for name in names:
            step = functools.partial(model, ids, past_key_values=makers[name](), logits_to_keep=1)
            spent = timed(step)
            if turn >= 1:
                times[name].append(spent)
    return {name: summary(series) for name, series in times.items()}


def tensor_bytes(thing: Any, seen: set[int] | None = None) -> int:
    """Bytes of all storages that an object holds, tensors of tensors included."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, type):
        return 0
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        if hasattr(thing, "__tensor_flatten__"):
            names, _ = thing.__tensor_flatten__()
            return sum(tensor_bytes(getattr(thing, name), seen) for name in names)
        storage = thing.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(thing, (list, tuple)):
        return sum(tensor_bytes(entry, seen) for entry in thing)
    if isinstance(thing, dict):
        return sum(tensor_bytes(entry, seen) for entry in thing.values())
    return tensor_bytes(vars(thing), seen) if hasattr(thing, "__dict__") else 0


def status_bytes(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}.")


def measure_peak(name: str, context: int, seed: int) -> int:
    """High-water mark of decoding above the memory before the cache was filled, in bytes."""
    model = make_model(seed)
    make = cache_makers()[name]
    token = torch.tensor([[5]])
    warm = make()
    fill(warm, 300, seed)
    model(token, past_key_values=warm)
    del warm
    before = status_bytes("VmRSS")
    cache = make()
    # The stock caches quantise what comes first, and flush 128 tokens later; ours at every 128th.
    fill(cache, context - FLUSH, seed)
    fill(cache, FLUSH - STEPS // 2, seed)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as handle:
        handle.write("5")
    for _ in range(STEPS):
        model(token, past_key_values=cache)
    return status_bytes("VmHWM") - before


def peak_in_process(name: str, context: int, seed: int) -> int:
    say(f"peak memory of {name} at {context} tokens")
    command = [sys.executable, __file__, "--peak-of", name, "--contexts", str(context)]
    # Large allocations go back to the system at once, so that what is resident is what is used.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [*command, "--seed", str(seed)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(json.loads(done.stdout.splitlines()[-1]))


def measure_drift(tokens: int, seed: int) -> list[dict[str, float]]:
    """What a step costs one layer beyond attention over what is cached, window by window."""
    say(f"drift over {tokens} tokens")
    generator = torch.Generator().manual_seed(seed)
    layer = AdaptiveQuantizedLayer(8, 6, residual_length=KVCacheConfig().residual_length)
    query = random_states(1, generator)
    windows, size = [], 1024
    for first in range(0, tokens, size):
        whole, alone = [], []
        for _ in range(size):
            new = random_states(1, generator)
            started = time.perf_counter()
            keys, values = layer.update(new, new)
            between = time.perf_counter()
            scaled_dot_product_attention(query, keys, values)
            ended = time.perf_counter()
            whole.append((ended - started) * 1e6)
            alone.append((ended - between) * 1e6)
        updates = [both - attention for both, attention in zip(whole, alone, strict=True)]
        windows.append(
            {
                "tokens": first + size,
                "step_us": statistics.median(whole),
                "attention_us": statistics.median(alone),
                "update_us": statistics.median(updates),
                "update_mean_us": statistics.fmean(updates),
            }
        )
    return windows


def ratios(found: dict[str, dict[str, float]], field: str) -> dict[str, float]:
    base = found[BASELINE][field]
    return {name: row[field] / base for name, row in found.items() if field in row}


def beyond_floor(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """What each cache adds to a step with hardly any context, to what the baseline adds."""
    floor = rows["floor"]["median_ms"]
    added = rows[BASELINE]["median_ms"] - floor
    return {k: (row["median_ms"] - floor) / added for k, row in rows.items() if k != "floor"}


def table(result: dict[str, Any]) -> str:
    contexts = list(result["decoding"])
    names = list(result["decoding"][contexts[0]])
    header = ["cache"]
    columns: list[dict[str, str]] = []
    for context in contexts:
        found = result["decoding"][context]
        compared = ratios(found, "median_ms")
        header += [f"decode {context}, ms", "ratio", "beyond floor"]
        columns.append({name: f"{found[name]['median_ms']:.1f}" for name in names})
        columns.append({name: f"{compared[name]:.2f}" for name in names})
        columns.append({name: f"{ratio:.2f}" for name, ratio in beyond_floor(found).items()})
    for tokens, found in result["prefill"].items():
        header.append(f"prefill {tokens}, ratio")
        columns.append({k: f"{v:.2f}" for k, v in ratios(found, "median_ms").items()})
    header.append(f"bytes {contexts[-1]}, ratio")
    stored = ratios(result["decoding"][contexts[-1]], "nbytes")
    columns.append({name: f"{stored[name]:.3f}" for name in names if name != "floor"})
    if result["peak_bytes"]:
        base = result["peak_bytes"][BASELINE]
        header.append(f"peak {contexts[-1]}, ratio")
        columns.append({k: f"{v / base:.2f}" for k, v in result["peak_bytes"].items()})
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    lines += [
        "| " + " | ".join([name, *(column.get(name, "") for column in columns)]) + " |"
        for name in names
    ]
    lines += ["", "| figure | found | wanted |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {found:.3f} | <= {TARGETS[name]} |"
        for name, found in result["figures"].items()
        if name in TARGETS
    ]
    lines += [f"\nNot measured: {name} ({why})." for name, why in result["left_out"].items()]
    if result["drift"]:
        first, last = result["drift"][1 % len(result["drift"])], result["drift"][-1]
        lines += [
            "",
            f"Drift: beyond attention itself a step of one layer costs {first['update_us']:.0f} us "
            f"(mean {first['update_mean_us']:.0f}) at {first['tokens']} tokens and "
            f"{last['update_us']:.0f} us (mean {last['update_mean_us']:.0f}) at {last['tokens']}.",
        ]
    return "\n".join(lines)


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Our cache's ratios, by the names of the targets."""
    found = {}
    for context, rows in result["decoding"].items():
        found[f"decode_{context}"] = ratios(rows, "median_ms")[OURS]
        found[f"decode_mean_{context}"] = ratios(rows, "mean_ms")[OURS]
        found[f"nbytes_{context}"] = ratios(rows, "nbytes")[OURS]
        found[f"beyond_floor_{context}"] = beyond_floor(rows)[OURS]
    for tokens, rows in result["prefill"].items():
        found[f"prefill_{tokens}"] = ratios(rows, "median_ms")[OURS]
    if peaks := result["peak_bytes"]:
        found[f"peak_{list(result['decoding'])[-1]}"] = peaks[OURS] / peaks[BASELINE]
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--caches", nargs="+", help="names of the caches; default: all")
    parser.add_argument("--rounds", type=int, default=130, help="tokens decoded per cache")
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048])
    parser.add_argument("--prefill-rounds", type=int, default=17)
    parser.add_argument("--drift-tokens", type=int, default=16384)
    parser.add_argument("--no-peak", action="store_true", help="skip peak memory (Linux only)")
    parser.add_argument("--no-write", action="store_true", help="print, but store no result")
    parser.add_argument(
        "--result", default="kv_cache", help="name to store it by; another keeps this one's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    contexts, seed = arguments.contexts, arguments.seed
    if arguments.peak_of:
        print(json.dumps(measure_peak(arguments.peak_of, contexts[0], seed)))
        return
    warnings.simplefilter("ignore", FutureWarning)  # of names that transformers will drop
    started = time.perf_counter()
    makers = cache_makers(arguments.caches)
    if not {BASELINE, OURS} <= set(makers):
        raise SystemExit(f"--caches must include {BASELINE!r} and {OURS!r}.")
    model = make_model(seed)
    makers, left_out = warmed_up(makers, model)
    peaks = {}
    if not arguments.no_peak and sys.platform == "linux":
        peaks = {name: peak_in_process(name, contexts[-1], seed) for name in makers}
    result: dict[str, Any] = {
        "question": "decoding time, prefill time and memory of the KV cache against DynamicCache",
        "kernel": library.describe(),
        "settings": vars(arguments)
        | {"layers": LAYERS, "heads": HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
        "decoding": {
            str(context): measure_decoding(model, makers, context, arguments.rounds, seed)
            for context in contexts
        },
        "prefill": {
            str(tokens): measure_prefill(model, makers, tokens, arguments.prefill_rounds, seed)
            for tokens in arguments.prefill
        },
        "peak_bytes": peaks,
        "left_out": left_out,
        "drift": measure_drift(arguments.drift_tokens, seed),
    }
    result["figures"] = figures(result)
    result["targets"] = TARGETS
    result["seconds"] = round(time.perf_counter() - started, 1)
    if not arguments.no_write:
        write_result(arguments.result, result, table(result))
    print(table(result))


if __name__ == "__main__":
    main()
