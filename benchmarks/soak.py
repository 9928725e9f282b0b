"""Does memory grow while a compressed model generates, thousands of times over?

The bundled model, compressed, answers prompts of changing length and batch size: greedy, with
beams, with a cache handed in and with one that ``generate()`` makes. The resident set is read now
and then; what counts is its slope over the second half, when everything that is made once is made.

    python benchmarks/soak.py [--calls 10000]
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path

import torch
from environment import write_result
from transformers import AutoModelForImageTextToText

import hf_adaptive_sparse as has
from hf_adaptive_sparse.architecture import cache_argument
from hf_adaptive_sparse.demo.run import CHECKPOINT

PAGE_BYTES = 4096
NEW_TOKENS = 8
BLOCK = 32
"""Short blocks, so that prompts of this length fill and flush several."""


def resident_bytes() -> int:
    """Return the resident set of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def compressed_model(folder: Path) -> torch.nn.Module:
    """Prune the bundled model by magnitude, save it, and load what was saved."""
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    cache = has.KVCacheConfig(key_bits=8, value_bits=6, residual_length=BLOCK)
    has.prune(model, has.SparsityConfig(metric="magnitude", kv_cache=cache), progress=False)
    model.save_pretrained(folder)
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = compressed_model(Path(folder))
    every = max(1, options.calls // 50)
    readings: list[tuple[int, int]] = []
    started = time.perf_counter()
    for call in range(options.calls):
        batch, length = 1 + call % 3, 8 + int(torch.randint(0, 120, (), generator=generator))
        ids = torch.randint(10, 200, (batch, length), generator=generator)
        settings = {"num_beams": 2} if call % 5 == 0 else {}
        if call % 7 == 0:
            profile = has.KVCacheConfig(bits=4, residual_length=BLOCK)
            settings[cache_argument(model)] = has.AdaptiveQuantizedCache(model.config, profile)
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            **settings,
        )
        if call % every == 0:
            gc.collect()
            readings.append((call, resident_bytes()))
            print(f"{call}: {readings[-1][1] / 2**20:.1f} MiB", file=sys.stderr, flush=True)
    half = readings[len(readings) // 2 :]
    mean_call = sum(c for c, _ in half) / len(half)
    mean_size = sum(s for _, s in half) / len(half)
    slope = sum((c - mean_call) * (s - mean_size) for c, s in half) / sum(
        (c - mean_call) ** 2 for c, _ in half
    )
    result = {
        "calls": options.calls,
        "seed": options.seed,
        "first_mib": round(readings[0][1] / 2**20, 1),
        "half_mib": round(half[0][1] / 2**20, 1),
        "last_mib": round(readings[-1][1] / 2**20, 1),
        "second_half_bytes_per_call": round(slope, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_result("soak", result)
    print(result)


if __name__ == "__main__":
    main()
