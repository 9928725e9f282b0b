"""What does the cache cost a decode step per layer, beyond the attention kernel itself?

Measured within a model (that of ``kv_cache.py``), because right after a layer's weights went
through the processor's caches each call costs several times what it costs in a loop. Microseconds
per layer, the median over layers and tokens, of ``update``, of scaled dot-product attention, and of
the native kernel inside it, for our cache and for ``DynamicCache``. One thread, so that waking
others is no part of it; a busy machine makes all figures larger.

    python benchmarks/kv_overhead.py [--context 256] [--rounds 60]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from environment import write_result
from kv_cache import BASELINE, OURS, cache_makers, fill, make_model
from transformers.cache_utils import DynamicLayer

from hf_adaptive_sparse.kernels import library
from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer


def timing(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    """Return the function, which notes the microseconds of each call."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **kwargs)
        times.append((time.perf_counter() - started) * 1e6)
        return result

    return timed


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=60, help="tokens decoded per cache")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true", help="print, but store no result")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of names that transformers will drop
    torch.set_num_threads(1)
    loaded = library.library()
    if loaded is None:
        raise SystemExit("The native kernels are not built: see `hf-adaptive-sparse env`.")
    model, token = make_model(arguments.seed), torch.tensor([[5]])
    caches = {name: make() for name, make in cache_makers([BASELINE, OURS]).items()}
    for cache in caches.values():
        fill(cache, arguments.context, arguments.seed)
    functional = torch.nn.functional
    times: dict[str, list[float]] = {"update": [], "attention": [], "kernel": []}
    found: dict[str, dict[str, list[float]]] = {
        name: {part: [] for part in times} for name in caches
    }
    with (
        mock.patch.object(loaded, "has_attend", timing(loaded.has_attend, times["kernel"])),
        mock.patch.object(DynamicLayer, "update", timing(DynamicLayer.update, times["update"])),
        mock.patch.object(
            AdaptiveQuantizedLayer,
            "update",
            timing(AdaptiveQuantizedLayer.update, times["update"]),
        ),
        mock.patch.object(
            functional,
            "scaled_dot_product_attention",
            timing(functional.scaled_dot_product_attention, times["attention"]),
        ),
    ):
        for turn in range(arguments.rounds + 2):
            for name, cache in caches.items():
                for series in times.values():
                    series.clear()
                model(token, past_key_values=cache)
                if turn >= 2:
                    for part, series in times.items():
                        found[name][part] += series
    medians = {
        name: {part: round(statistics.median(s), 1) for part, s in parts.items() if s}
        for name, parts in found.items()
    }
    ours = medians[OURS]
    result = {
        "question": "microseconds per layer and token of the cache beyond the attention kernel",
        "kernel": library.describe(),
        "settings": vars(arguments),
        "median_us": medians,
        "beyond_kernel_us": round(ours["update"] + ours["attention"] - ours["kernel"], 1),
    }
    lines = ["| cache | update, us | attention, us | kernel, us |", "| --- | --- | --- | --- |"]
    for name, parts in medians.items():
        cells = [str(parts.get(part, "")) for part in times]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"Beyond the kernel: {result['beyond_kernel_us']} us per layer and token."]
    if not arguments.no_write:
        write_result("kv_overhead", result, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
