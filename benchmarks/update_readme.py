"""Write the measured tables into the README, from the JSON of the benchmarks.

The README's figures are never typed: they stand between two marks and a test checks that they are
what this script writes.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_adaptive_sparse.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results"
MARK, END = "<!-- table: {name} -->\n", "<!-- end -->"
DEFAULTS = "defaults, "
"""How rows of ``kv_codecs.json`` start that use the cache's default settings."""
GPU_TILE_BYTES = 64 << 20
"""The tile that the package decompresses at once, of those in ``gpu_sparse.json``."""
GPU_LARGE = ("4096x11008", "11008x4096", "8192x28672")
GPU_VALUES = {"bfloat16": "16 bits", "int8": "8 bits", "int4": "4 bits"}
"""Values in ``gpu_sparse.json``, as the README calls them."""
JOBS = {
    "memory": "prune",
    "offload": "prune --offload",
    "compress": "compress",
    "compress-offload": "compress --offload",
}
"""Modes of ``offload.json``, as a person types them."""


def read(name: str) -> Any:
    """Return what a benchmark measured."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def quality_tables() -> str:
    """Return what pruning costs, and what each width of the KV cache does."""
    result = read("quality")
    machine, held_out = result["environment"], result["held_out_tokens"]
    return (
        f"{markdown_table(quality_rows(result))}\n\n"
        f"{markdown_table(cache_rows())}\n\n"
        f"<sub>A LLaVA-architecture model of 13 M parameters, {held_out:,} tokens of WikiText-2 "
        f"and questions of easy-VQA that neither calibration nor search saw; "
        f"{machine['processor']}, seed {result['seed']}. From "
        f"[quality.md](benchmarks/results/quality.md), which has intervals and more rows; "
        f"[method_table.md](benchmarks/results/method_table.md) has 30 to 70 %, and "
        f"[kv_codecs.md](benchmarks/results/kv_codecs.md) the cache on the dense model.</sub>\n"
    )


def quality_rows(result: dict[str, Any]) -> list[dict[str, object]]:
    """Return what a person chooses between: the rows that were asked questions, too."""
    rows = [row for row in result["rows"] if row["accuracy"] is not None]
    dense = rows[0]["perplexity"]
    return [
        {
            "model": row["name"],
            "weights removed": f"{row['sparsity']:.0%}",
            "perplexity": f"{row['perplexity']:.2f}",
            "against dense": f"{row['perplexity'] / dense - 1:+.1%}",
            "answers right": f"{row['accuracy']:.1%}",
        }
        for row in rows
    ]


def cache_rows() -> list[dict[str, object]]:
    """Return what each width of the KV cache costs with the default settings."""
    rows = read("kv_codecs")["rows"]
    most = max(row["windows"] for row in rows)
    return [
        {
            "KV cache": f"{row['name'].removeprefix(DEFAULTS)} bits",
            "bits per element, metadata included": f"{row['bits_per_element']:.2f}",
            "perplexity against 16 bits": f"{row['increase_percent']:+.3f} %",
        }
        for row in rows
        if row["name"].startswith(DEFAULTS) and row["windows"] == most
    ]


def runtime_table() -> str:
    """Return what the sparse runtime saves and gains, by the bits of the values."""
    result = read("sparse_runtime")
    loading, machine = result["loading"], result["environment"]
    dense_bytes, kernels = result["dense_pruned_bytes"], result["kernels"].split(" (")[0]
    steps = {form: step["median_ms"] for form, step in result["decoding"].items()}
    prompts = {form: prompt["median_ms"] for form, prompt in result["prompts"].items()}
    lines: list[dict[str, object]] = [
        {
            "in memory": form,
            "pruned weights": f"{(loaded['pruned_bytes'] or dense_bytes) / 1e6:,.0f} MB",
            "whole process": f"{loaded['peak_bytes'] / 1e6:,.0f} MB",
            "tokens per second": f"{1000 / steps[form]:.1f}",
            "against dense": f"{steps['dense'] / steps[form]:.2f} x",
            "prompt against dense": f"{prompts['dense'] / prompts[form]:.2f} x",
        }
        for form, loaded in loading.items()
    ]
    return (
        f"{markdown_table(lines)}\n\n"
        f"<sub>A random Llama of {result['parameters'] / 1e9:.2f} B pruned parameters, bfloat16, "
        f"behind {result['context']:,} tokens; {machine['processor']}, {machine['cores']} cores, "
        f"kernels: {kernels}. Dense decodes with DynamicCache, sparse with the adaptive cache. The "
        f"last column is the speed of a prompt of {result['prompt']:,} tokens. "
        f"From [sparse_runtime.md](benchmarks/results/sparse_runtime.md).</sub>\n"
    )


def offload_table() -> str:
    """Return the time and memory that each job takes for a model of 7 B parameters."""
    result = read("offload")
    machine = result["environment"]
    rows = [row for row in result["rows"] if row["size"] == "7b"]
    lines: list[dict[str, object]] = [
        {
            "job": JOBS[row["mode"]],
            "memory needed, without mapped files": (f"{row['peak_anonymous_bytes'] / 1e9:.1f} GB"),
            "minutes": f"{row['seconds'] / 60:.1f}",
            "calibration": f"{row['samples']} x {row['tokens']} tokens",
        }
        for row in rows
    ]
    resident = {row["mode"]: row["peak_rss_bytes"] / 1e9 for row in rows}
    return (
        f"{markdown_table(lines)}\n\n"
        f"<sub>Pages of the checkpoint's mapped files are not counted, because the system takes "
        f"them back where memory is short; with them, `compress --offload` peaked at "
        f"{resident['compress-offload']:.1f} GB. Random bfloat16 weights, `lognorm` at 50 %; "
        f"{machine['processor']}, {machine['cores']} cores. These runs used little data and short "
        f"searches; time grows with the number of calibration tokens, and with trials times "
        f"evaluation tokens. Times of `prune` are not to be compared with those of `compress`, "
        f"which ran at another time and on one core. From "
        f"[offload.md](benchmarks/results/offload.md), which also has 1 B and 13 B.</sub>\n"
    )


def headline() -> str:
    """Return the most that is gained and what it costs, each with its baseline."""
    quality = read("quality")
    perplexity = {row["name"]: row["perplexity"] for row in quality["rows"]}
    increase = perplexity["quality best (alps, searched)"] / perplexity["dense"] - 1
    runtime = read("sparse_runtime")
    weights = [
        runtime["loading"][form]["pruned_bytes"] / runtime["dense_pruned_bytes"]
        for form in ("sparse, 16 bits", "sparse, 8 bits")
    ]
    steps = {form: step["median_ms"] for form, step in runtime["decoding"].items()}
    speed = [steps["dense"] / steps[form] for form in ("sparse, 16 bits", "sparse, 8 bits")]
    text = (
        f"**In figures:** with half of its weights removed, a random language model of "
        f"{runtime['parameters'] / 1e9:.2f} B decoder weights keeps them in "
        f"{100 * weights[0]:.0f} % of their bfloat16 memory and decodes {speed[0]:.2f} times as "
        f"fast as the dense model on a 2-core CPU; with 8-bit values it is "
        f"{100 * weights[1]:.0f} % and {speed[1]:.2f} times. On a trained LLaVA of 13 M "
        f"parameters, the largest model that was scored, removing half of the weights "
        f"(`--quality best`) raises perplexity by {100 * increase:.1f} %."
    )
    return textwrap.fill(text, 105, break_on_hyphens=False) + "\n"


def spread(values: Iterable[float]) -> str:
    """Return the least and the largest of some ratios."""
    found = sorted(values)
    least, most = f"{found[0]:.2f}", f"{found[-1]:.2f}"
    return least if least == most else f"{least} to {most}"


def bits_table() -> str:
    """Return what equal sizes lose by fewer bits and by fewer weights."""
    result = read("open_questions")
    rows = result["answers"]["weight_bits"]["rows"]
    lines: list[dict[str, object]] = [
        {
            "bits per weight": f"{row['bits_per_weight']:.2f}",
            "made of": name.replace(" sparse", " removed").replace(".0%", "%").replace("%", " %"),
            "loss above dense, nats per token": f"{row['gap']:+.4f}",
        }
        for name, row in sorted(rows.items(), key=lambda found: -found[1]["bits_per_weight"])
        if row["bits_per_weight"] < 16
    ]
    return (
        f"{markdown_table(lines)}\n\n"
        f"<sub>The same LLaVA, {result['held_out_tokens']:,} held-out tokens; uniform `lognorm` "
        f"masks without a weight update, rounding to nearest. Counted are the scales of 4-bit "
        f"values, and a bitmask where weights were removed; checkpoints of this package always "
        f"have the bitmask. From "
        f"[open_questions.md](benchmarks/results/open_questions.md).</sub>\n"
    )


def gpu_tables() -> str:
    """Return how fast sparse products are on a GPU, where they gain and where they lose."""
    result = read("gpu_sparse")
    machine = result["environment"]
    prompts = [row for row in result["tile_bytes"] if row["tile_bytes"] == GPU_TILE_BYTES]

    def line(tokens: str, shapes: str, rows: list[dict[str, Any]]) -> dict[str, object]:
        cells: dict[str, object] = {"tokens at once": tokens, "weight": shapes}
        for values, name in GPU_VALUES.items():
            chosen = [row for row in rows if row["values"] == values]
            on_device = spread(row["speed"] for row in chosen)
            cells[name] = f"{on_device} ({spread(row['call_speed'] for row in chosen)})"
        return cells

    def products(tokens: int, *shapes: str) -> list[dict[str, Any]]:
        rows = result["products"]
        return [row for row in rows if row["tokens"] == tokens and row["shape"] in shapes]

    lines = [
        line("1", "4,096 x 4,096", products(1, "4096x4096")),
        line("1", "three larger ones", products(1, *GPU_LARGE)),
        *(
            line(str(tokens), "11,008 x 4,096", products(tokens, "11008x4096"))
            for tokens in result["settings"]["tokens"]
        ),
        line(f"{result['settings']['prefill']:,}", "all four", prompts),
    ]
    return (
        f"{markdown_table(lines)}\n\n"
        f"<sub>How many times as fast as cuBLAS with the dense bfloat16 weight, on the device and, "
        f"in brackets, with the Python that starts it. {machine['gpus'][0]}, torch "
        f"{machine['versions']['torch']}; from [gpu_sparse.md](benchmarks/results/gpu_sparse.md)."
        f"</sub>\n\n"
        f"{markdown_table(gpu_model_rows())}\n\n"
        f"<sub>A random Llama of LLaVA-1.5-7B's shape, half of its weights gone, bfloat16; a "
        f"prompt and a context of 2,048 tokens, batch 1; the same machine. The first row uses "
        f"`DynamicCache` and torch's default attention, the sparse ones the adaptive cache. From "
        f"[gpu_model.md](benchmarks/results/gpu_model.md).</sub>\n"
    )


def gpu_model_rows() -> list[dict[str, object]]:
    """Return what each form of a model of 7 B parameters takes on a GPU."""
    rows = read("gpu_model")["rows"]
    return [
        {
            "form": row["form"],
            "weights": f"{row['model_bytes'] / 1e9:.1f} GB",
            "cache": f"{row['cache_bytes'] / 1e6:,.0f} MB",
            "prompt": f"{row['prefill_ms']:.0f} ms",
            "token": f"{row['decode_ms']:.0f} ms",
            "its kernels alone": f"{row['kernels_ms']:.1f} ms",
        }
        for row in rows
    ]


def alternatives() -> str:
    """Return llama.cpp and transformers' stock caches beside ours."""
    llama, cache = read("beside_llama_cpp"), read("kv_cache")
    theirs = next(form for form in llama["bytes"] if form.startswith("llama.cpp"))
    times = llama["milliseconds"]
    forms: list[dict[str, object]] = [
        {
            "form": form,
            "weights": f"{size / 1e6:,.0f} MB",
            "a token": f"{times[form]:.1f} ms",
            "speed against llama.cpp": f"{times[theirs] / times[form]:.2f} x",
        }
        for form, size in llama["bytes"].items()
    ]
    plain, kept = "DynamicCache", cache["decoding"]["8192"]
    caches: list[dict[str, object]] = []
    for name, row in kept.items():
        if name != "floor":
            short, prompt = cache["decoding"]["2048"], cache["prefill"]["2048"]
            ratios = {
                "a token at 2,048": short[name]["median_ms"] / short[plain]["median_ms"],
                "at 8,192": row["median_ms"] / kept[plain]["median_ms"],
                "a prompt of 2,048": prompt[name]["median_ms"] / prompt[plain]["median_ms"],
                "bytes at 8,192": row["nbytes"] / kept[plain]["nbytes"],
                "peak memory at 8,192": cache["peak_bytes"][name] / cache["peak_bytes"][plain],
            }
            ratios_text = {column: f"{ratio:.2f}" for column, ratio in ratios.items()}
            caches.append({"cache": name, **ratios_text})
    first, second = llama["environment"], cache["environment"]
    parameters = read("sparse_runtime")["parameters"]
    return (
        f"**llama.cpp**, decoding one sequence on a CPU:\n\n"
        f"{markdown_table(forms)}\n\n"
        f"<sub>A random Llama of {parameters / 1e9:.2f} B parameters in its decoder, "
        f"{llama['context']:,} tokens of context; "
        f"{first['processor']}, {first['threads']} threads. llama.cpp keeps all weights, ours half "
        f"of them, and neither was scored; its embedding has 8 bits, ours 16. It ran without its "
        f"AMX buffers, because its AMX path crashed. From [beside_llama_cpp.md](benchmarks/results/"
        f"beside_llama_cpp.md).</sub>\n\n"
        f"**The other caches of transformers**, on a CPU:\n\n"
        f"{markdown_table(caches)}\n\n"
        f"<sub>Time and bytes against `DynamicCache`; less is better. A random bfloat16 Llama "
        f"of {cache['settings']['layers']} layers; {second['processor']}, {second['threads']} "
        f"threads. "
        f"From [kv_cache.md](benchmarks/results/kv_cache.md).</sub>\n"
    )


def families_table() -> str:
    """Return which families work, which with a limit, and which are refused."""
    rows = read("families")["rows"]
    lines: list[dict[str, object]] = []
    for status in ("works", "works, with a limit", "refused"):
        groups: dict[str, list[str]] = {}
        for row in rows:
            if row["status"] == status:
                groups.setdefault(row["remark"], []).append(row["family"])
        for remark, families in groups.items():
            lines.append({"status": status, "families": ", ".join(families), "remark": remark})
    return markdown_table(lines) + "\n"


TABLES = {
    "headline": headline,
    "quality": quality_tables,
    "bits": bits_table,
    "runtime": runtime_table,
    "gpu": gpu_tables,
    "offload": offload_table,
    "alternatives": alternatives,
    "families": families_table,
}
"""What writes each table, in the README's order."""


def updated(text: str) -> str:
    """Return the README's text with the tables in their places."""
    for name, table in TABLES.items():
        start = MARK.format(name=name)
        before, rest = text.split(start)
        text = before + start + table() + END + rest.split(END, 1)[1]
    return text


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
