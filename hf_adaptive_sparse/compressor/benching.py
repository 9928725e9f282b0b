"""``bench``: one model, dense against compressed, on the machine at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hf_adaptive_sparse.architecture import context_length
from hf_adaptive_sparse.checkpoint.config import our_config
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.evaluation.resources import weight_bytes_on_disk
from hf_adaptive_sparse.profiles import check_count
from hf_adaptive_sparse.report.tables import format_bytes

CHILD = "hf_adaptive_sparse.compressor.bench_process"

PROMPT_TOKENS = 512
"""Length of the prompt, where the context has room for it."""


@dataclass(frozen=True)
class BenchRow:
    """One model in one runtime, measured in a process of its own.

    Attributes:
        name: The model.
        runtime: ``"dense"`` or ``"sparse"``: what it ran in, which is dense where no weight is
            stored compressed.
        adaptive_cache: Whether the cache was that of the model's own KV profile; else it was
            ``DynamicCache``.
        reason: Why that runtime, where it was left to the package.
        disk_bytes: Bytes of its weights on disk; ``None`` for a repo that is not a local folder.
        memory_bytes: Bytes of parameters and buffers: ``model.get_memory_footprint()``.
        load_seconds: Time of ``from_pretrained``.
        first_token_seconds: Time from there on to the first token of a prompt of one token. Weights
            that are mapped from a file are read here.
        load_peak_bytes: Highest resident memory until that token, above what the process had
            before; on a GPU the memory that torch allocated.
        prefill_tokens_per_second: Tokens of the prompt per second.
        decode_tokens_per_second: Tokens generated after it per second, one at a time; ``None``
            where they took less time than the measurement varies by.
        read_bytes_per_token: Bytes of weights and KV cache that one decoded token reads.
        bandwidth_share: Those bytes per second, as a share of what a plain read of memory reaches;
            ``None`` likewise.
    """

    name: str
    runtime: str
    adaptive_cache: bool
    reason: str
    disk_bytes: int | None
    memory_bytes: int
    load_seconds: float
    first_token_seconds: float
    load_peak_bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    read_bytes_per_token: int
    bandwidth_share: float | None


@dataclass(frozen=True)
class BenchResult:
    """What :func:`bench` measured.

    Attributes:
        rows: The compressed model in the sparse and in the dense runtime (where only its cache is
            compressed, with and without its KV profile), and the dense model if one was given; or
            the one model, if it is not compressed.
        prompt_tokens: Length of the prompt.
        new_tokens: Tokens decoded after it.
        bytes_per_second: What a plain read of memory reaches, with as many threads as torch uses.
    """

    rows: tuple[BenchRow, ...]
    prompt_tokens: int
    new_tokens: int
    bytes_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]}

    def table_rows(self) -> list[dict[str, object]]:
        """Return rows for a person to read."""
        return [
            {
                "model": row.name,
                "runtime": row.runtime,
                "KV cache": "own profile" if row.adaptive_cache else "DynamicCache",
                "on disk": "" if row.disk_bytes is None else format_bytes(row.disk_bytes),
                "in memory": format_bytes(row.memory_bytes),
                "peak loading": format_bytes(row.load_peak_bytes),
                "load s": f"{row.load_seconds:.2f}",
                "first token s": f"{row.first_token_seconds:.2f}",
                "prefill tok/s": f"{row.prefill_tokens_per_second:,.1f}",
                "decode tok/s": _shown(row.decode_tokens_per_second, ",.1f"),
                "of bandwidth": _shown(row.bandwidth_share, ".0%"),
            }
            for row in self.rows
        ]


def bench(
    model: ModelSource,
    dense: ModelSource | None = None,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int = 32,
    runtimes: Sequence[str] = ("sparse", "dense"),
) -> BenchResult:
    """Measure a model: bytes, load time, tokens per second, and the share of memory bandwidth.

    Each row is measured in a process of its own, one after the other, so that peaks are its own. A
    compressed model is measured in each runtime; in the sparse one with its own KV profile, in the
    dense one, which stands for the dense model, with ``DynamicCache``. So is one that compresses
    nothing but its cache, though both its rows run in the dense runtime.

    Args:
        model: The model, compressed or not.
        dense: The dense model it was made from, to be measured beside it.
        prompt_tokens: Length of the (random) prompt. ``None``: 512, or fewer where ``new_tokens``
            would not fit the context after them.
        new_tokens: Tokens decoded after it.
        runtimes: Runtimes to measure a compressed model in.

    Raises:
        ValueError: If a number is below 1, the tokens do not fit a model's context, or a model
            cannot be measured.
        OSError: If a model cannot be found.
    """
    check_count(new_tokens, "new_tokens")
    if prompt_tokens is not None:
        check_count(prompt_tokens, "prompt_tokens")
    sources = [model] if dense is None else [model, dense]
    prompt_tokens = _prompt_tokens(sources, prompt_tokens, new_tokens)
    jobs: list[tuple[ModelSource, str]]
    jobs = [(model, runtime) for runtime in runtimes] if _is_ours(model) else [(model, "dense")]
    jobs += [] if dense is None else [(dense, "dense")]
    rows, bandwidth = [], 0.0
    for source, runtime in jobs:
        found = _measure(source, runtime, prompt_tokens, new_tokens, compressed=_is_ours(source))
        bandwidth = max(bandwidth, found.pop("bytes_per_second"))
        rows.append(BenchRow(name=str(source.name), disk_bytes=_disk_bytes(source), **found))
    # The share of one figure for all: what the machine reached at best.
    rows = [replace(row, bandwidth_share=_share(row, bandwidth)) for row in rows]
    return BenchResult(tuple(rows), prompt_tokens, new_tokens, bandwidth)


def _prompt_tokens(sources: Sequence[ModelSource], asked: int | None, new_tokens: int) -> int:
    """Return the length of the prompt, which with the new tokens fits the context of each model."""
    contexts = {source.name: context_length(source.load_config()) for source in sources}
    name = min(contexts, key=lambda name: contexts[name])
    room = contexts[name] - new_tokens
    prompt_tokens = max(1, min(PROMPT_TOKENS, room)) if asked is None else asked
    if prompt_tokens > room:
        raise ValueError(
            f"prompt_tokens and new_tokens together must fit the context of {name}, "
            f"{contexts[name]} tokens; got {prompt_tokens} and {new_tokens}. Give fewer."
        )
    return prompt_tokens


def _share(row: BenchRow, bandwidth: float) -> float | None:
    if row.decode_tokens_per_second is None:
        return None
    return row.decode_tokens_per_second * row.read_bytes_per_token / bandwidth


def _shown(figure: float | None, form: str) -> str:
    return "-" if figure is None else format(figure, form)


def _measure(
    source: ModelSource, runtime: str, prompt_tokens: int, new_tokens: int, *, compressed: bool
) -> dict[str, Any]:
    """Measure one row in a child process."""
    task = {
        "source": asdict(source) | {"name": os.fspath(source.name)},
        "runtime": runtime,
        "compressed": compressed,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
    }
    done = subprocess.run(
        [sys.executable, "-m", CHILD], input=json.dumps(task), capture_output=True, text=True
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ValueError(f"{source.name} cannot be measured in the {runtime} runtime: {last[0]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _is_ours(source: ModelSource) -> bool:
    return our_config(source.load_config()) is not None


def _disk_bytes(source: ModelSource) -> int | None:
    folder = Path(source.name)
    return weight_bytes_on_disk(folder) if folder.is_dir() else None
