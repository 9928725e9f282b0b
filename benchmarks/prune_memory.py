"""Peak memory of pruning, per metric, against its bound.

Bound: model + 2 x the largest decoder layer + hidden states (+ the Hessians of one layer for
sparsegpt). Each metric runs in a process of its own, single-threaded, on a random Llama of about
300 M parameters in bf16; what is measured is the resident set's high-water mark from the moment the
model and the calibration tokens are in memory and one forward has warmed up the allocator and the
kernels. The forward itself (activations and masks of one window) is measured apart and reported:
it belongs to no metric.

glibc keeps freed blocks below its moving mmap threshold (up to 32 MiB) for later, and they count as
resident. The largest Hessian of this small model falls just below it (30 MiB), so the runs fix the
threshold (``MALLOC_MMAP_THRESHOLD_``; each row records what it ran with): what is measured is what
the program holds. With the default, sparsegpt's high water is 137 MiB here, 1.15 of the bound.

    python benchmarks/prune_memory.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

METRICS = ("magnitude", "wanda", "ria", "lognorm", "sparsegpt")
RESULT = Path(__file__).parent / "results" / "prune_memory.json"
MIB = 2**20
SEED = 0
WINDOWS, TOKENS = 16, 512


def high_water_bytes() -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reset_high_water() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as handle:
        handle.write("5")


def measure(metric: str) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_adaptive_sparse.architecture import decoder_layers, prunable_weights
    from hf_adaptive_sparse.pruning.apply import prune_model, resolve_ratios

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, 32000, (WINDOWS, TOKENS), generator=generator)
    batches = [{"input_ids": window} for window in ids.split(1)]

    def bytes_of(module: torch.nn.Module) -> int:
        return sum(p.nbytes for p in module.parameters())

    _, layers = decoder_layers(model)
    largest_layer = max(bytes_of(layer) for layer in layers)
    hidden = WINDOWS * TOKENS * config.hidden_size * 2
    linears = [m for m in layers[0].modules() if isinstance(m, torch.nn.Linear)]
    hessians = sum(m.in_features**2 * 4 for m in linears) if metric == "sparsegpt" else 0

    start = resident_bytes()
    reset_high_water()
    with torch.no_grad():
        model.model(**batches[0], use_cache=False)
    forward = high_water_bytes() - start

    start = resident_bytes()
    reset_high_water()
    began = time.perf_counter()
    report = prune_model(
        model,
        ratios=resolve_ratios(model, 0.5),
        metric=metric,
        batches=None if metric == "magnitude" else batches,
        progress=False,
    )
    seconds = time.perf_counter() - began
    extra = high_water_bytes() - start
    bound = 2 * largest_layer + hidden + hessians
    return {
        "metric": metric,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prunable": sum(m.weight.numel() for m in prunable_weights(model).values()),
        "mean_sparsity": report.mean_sparsity,
        "model_bytes": bytes_of(model),
        "largest_layer_bytes": largest_layer,
        "hidden_states_bytes": hidden,
        "hessian_bytes": hessians,
        "forward_bytes": forward,
        "extra_bytes": extra,
        "bound_extra_bytes": bound,
        "within_bound": extra <= bound,
        "mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_", "default"),
        "seconds": seconds,
    }


def hardware() -> dict[str, object]:
    import torch
    import transformers

    name = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            name = next(line.split(":")[1].strip() for line in info if "model name" in line)
    except (OSError, StopIteration):
        pass
    return {
        "cpu": name,
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": SEED,
        "calibration_windows": WINDOWS,
        "window_tokens": TOKENS,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metric", help="measure one metric and print its JSON")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.metric:
        print(json.dumps(measure(arguments.metric)))
        return 0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    rows = []
    print("| metric | extra MiB | bound MiB | of bound | one forward MiB | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for metric in METRICS:
        command = [sys.executable, __file__, "--metric", metric]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"| {metric} | {row['extra_bytes'] / MIB:.1f} | {row['bound_extra_bytes'] / MIB:.1f} "
            f"| {row['extra_bytes'] / row['bound_extra_bytes']:.2f} "
            f"| {row['forward_bytes'] / MIB:.1f} | {row['seconds']:.0f} |",
            flush=True,
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"hardware": hardware(), "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["within_bound"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
