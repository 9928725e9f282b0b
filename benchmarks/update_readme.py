"""Write the measured tables into the README, from the JSON of the benchmarks.

The README's figures are never typed: they stand between two marks and a test checks that they are
what this script writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_adaptive_sparse.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results"
QUALITY, CODECS = RESULTS / "quality.json", RESULTS / "kv_codecs.json"
RUNTIME = RESULTS / "sparse_runtime.json"
DEFAULTS = "defaults, "
"""How rows of ``kv_codecs.json`` start that use the cache's default settings."""

START, END = "<!-- table: quality -->\n", "<!-- end -->"
RUNTIME_START = "<!-- table: runtime -->\n"
FAMILIES_START = "<!-- table: families -->\n"
FAMILIES = RESULTS / "families.json"
OFFLOAD_START = "<!-- table: offload -->\n"
OFFLOAD = RESULTS / "offload.json"
JOBS = {
    "memory": "prune",
    "offload": "prune --offload",
    "compress": "compress",
    "compress-offload": "compress --offload",
}
"""Modes of ``offload.json``, as a person types them."""


def readme_table() -> str:
    """Return what stands between the marks."""
    result = json.loads(QUALITY.read_text(encoding="utf-8"))
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
    rows = json.loads(CODECS.read_text(encoding="utf-8"))["rows"]
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
    result = json.loads(RUNTIME.read_text(encoding="utf-8"))
    loading, machine = result["loading"], result["environment"]
    dense_bytes, kernels = result["dense_pruned_bytes"], result["kernels"].split(" (")[0]
    steps = {form: step["median_ms"] for form, step in result["decoding"].items()}
    lines: list[dict[str, object]] = [
        {
            "in memory": form,
            "pruned weights": f"{(loaded['pruned_bytes'] or dense_bytes) / 1e6:,.0f} MB",
            "whole process": f"{loaded['peak_bytes'] / 1e6:,.0f} MB",
            "tokens per second": f"{1000 / steps[form]:.1f}",
            "against dense": f"{steps['dense'] / steps[form]:.2f} x",
        }
        for form, loaded in loading.items()
    ]
    return (
        f"{markdown_table(lines)}\n\n"
        f"<sub>A random Llama of {result['parameters'] / 1e9:.2f} B pruned parameters, bfloat16, "
        f"behind {result['context']:,} tokens; {machine['processor']}, {machine['cores']} cores, "
        f"kernels: {kernels}. Dense decodes with DynamicCache, sparse with the adaptive cache. "
        f"From [sparse_runtime.md](benchmarks/results/sparse_runtime.md).</sub>\n"
    )


def offload_table() -> str:
    """Return the time and memory that each job takes for a model of 7 B parameters."""
    result = json.loads(OFFLOAD.read_text(encoding="utf-8"))
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


def families_table() -> str:
    """Return which families work, which with a limit, and which are refused."""
    rows = json.loads(FAMILIES.read_text(encoding="utf-8"))["rows"]
    lines: list[dict[str, object]] = []
    for status in ("works", "works, with a limit", "refused"):
        groups: dict[str, list[str]] = {}
        for row in rows:
            if row["status"] == status:
                groups.setdefault(row["remark"], []).append(row["family"])
        for remark, families in groups.items():
            lines.append({"status": status, "families": ", ".join(families), "remark": remark})
    return markdown_table(lines) + "\n"


def updated(text: str) -> str:
    """Return the README's text with the table in its place."""
    tables = {
        START: readme_table(),
        RUNTIME_START: runtime_table(),
        OFFLOAD_START: offload_table(),
        FAMILIES_START: families_table(),
    }
    for start, table in tables.items():
        before, rest = text.split(start)
        text = before + start + table + END + rest.split(END, 1)[1]
    return text


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
