"""Does memory grow while a compressed model generates, thousands of times over?

The bundled model, compressed, answers prompts of changing length and batch size: greedy, with
beams, with a cache handed in and with one that ``generate()`` makes. Beside it, in a process of its
own and with the same prompts, the model as it is generates with transformers' `DynamicCache`.

torch keeps what its matrix products in bfloat16 compile for every number of rows, twice: in its own
cache and in oneDNN's, each of the 1,024 entries used last (``LRU_CACHE_CAPACITY``,
``ONEDNN_PRIMITIVE_CACHE_CAPACITY``). So there are two questions. *Repeated*: with lengths that
repeat, those caches fill early; does anything grow after? *Changing*: with every length from 8 to
127, do both models grow by the same, and not at all once those caches hold one entry each?

    python benchmarks/soak.py [--calls 10000] [--stock-calls 2000] [--changing-calls 400]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from environment import write_result
from transformers import AutoModelForImageTextToText, DynamicCache, PreTrainedModel

import hf_adaptive_sparse as has
from hf_adaptive_sparse.architecture import cache_argument
from hf_adaptive_sparse.demo.run import CHECKPOINT
from hf_adaptive_sparse.report import markdown_table

PAGE_BYTES = 4096
NEW_TOKENS = 4
BLOCK = 32
"""Short blocks, so that prompts of this length fill and flush several."""

SHORTEST, LENGTHS = 8, 120
READINGS = 20
PER_SHAPE_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")

INTRODUCTION = """# Memory over thousands of calls of `generate()`

The bundled model, pruned to 50 % and with an 8/6-bit cache ("compressed"), and the same model as
it is with `DynamicCache` ("stock"), each in a process of its own with the same prompts: batches of
1 to 3, every fifth call with beams; compressed, every seventh call is handed a 4-bit cache.
*In use* is what glibc has given out (`mallinfo2`), *resident* what the system counts, *trimmed* the
same after `malloc_trim`: the difference was free already. Growth is the slope over the second half
of the calls.

In the rows *repeated* the prompts have 16 lengths, in the rows *changing* 120, with batches and
beams hundreds of shapes. torch and oneDNN each keep what they compile for the last 1,024 shapes of
bfloat16 products; *capacity 1* holds both to one entry.

"""


class MallocInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost")
    )  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What the process holds after a number of calls."""

    calls: int
    resident_bytes: int
    in_use_bytes: int
    objects: int
    tensors: int
    mappings: int
    shapes: int


def libc() -> Any:
    """Return the C library, with `mallinfo2` declared (glibc 2.33 or newer)."""
    library = ctypes.CDLL("libc.so.6")
    library.mallinfo2.restype = MallocInfo
    return library


def resident_bytes() -> int:
    """Return the resident set of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def read(library: Any, calls: int, shapes: int) -> Reading:
    """Collect what Python holds no more, and count what remains."""
    gc.collect()
    info = library.mallinfo2()
    objects = gc.get_objects()
    # By type: isinstance() would look into lazy modules and have them import things.
    tensors = sum(issubclass(type(found), torch.Tensor) for found in objects)
    with open("/proc/self/maps") as lines:
        mappings = sum(1 for _ in lines)
    in_use = info.uordblks + info.hblkhd
    return Reading(calls, resident_bytes(), in_use, len(objects), tensors, mappings, shapes)


def load(compressed: bool) -> PreTrainedModel:
    """Return the bundled model, as it is or as it comes back from a compressed checkpoint."""
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    if not compressed:
        return model.eval()
    cache = has.KVCacheConfig(key_bits=8, value_bits=6, residual_length=BLOCK)
    has.prune(model, has.SparsityConfig(metric="magnitude", kv_cache=cache), progress=False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder)
    return model.eval()


def measure(compressed: bool, calls: int, lengths: int, seed: int) -> dict[str, Any]:
    """Generate, and return what the process held at some points, and after trimming."""
    generator = torch.Generator().manual_seed(seed)
    choice = (SHORTEST + torch.randperm(LENGTHS, generator=generator)[:lengths]).tolist()
    model, library = load(compressed), libc()
    readings, shapes = [], set()
    started = time.perf_counter()
    for call in range(calls):
        batch, beams = 1 + call % 3, 2 if call % 5 == 0 else 1
        length = choice[int(torch.randint(0, lengths, (), generator=generator))]
        ids = torch.randint(10, 200, (batch, length), generator=generator)
        settings: dict[str, Any] = {"num_beams": beams}
        if not compressed:
            settings[cache_argument(model)] = DynamicCache(config=model.config.get_text_config())
        elif call % 7 == 0:
            profile = has.KVCacheConfig(bits=4, residual_length=BLOCK)
            settings[cache_argument(model)] = has.AdaptiveQuantizedCache(model.config, profile)
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            **settings,
        )
        shapes.add((batch, beams, length))
        if call % max(1, calls // READINGS) == 0 or call == calls - 1:
            readings.append(read(library, call + 1, len(shapes)))
            print(
                readings[-1], f"{time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True
            )
    del settings, ids
    library.malloc_trim(0)
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "readings": [asdict(reading) for reading in readings],
        "trimmed": asdict(read(library, calls, len(shapes))),
    }


def in_a_process(capacity: int | None, **arguments: Any) -> dict[str, Any]:
    """Measure in a new process, with torch's caches per shape held to a capacity."""
    environment = dict(os.environ)
    for name in PER_SHAPE_CACHES:
        environment.pop(name, None)
        if capacity is not None:
            environment[name] = str(capacity)
    command = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def slope(readings: list[dict[str, int]], field: str) -> float:
    """Return the growth per call over the second half of the calls, by least squares."""
    half = [r for r in readings if 2 * r["calls"] >= readings[-1]["calls"]]
    x, y = [r["calls"] for r in half], [r[field] for r in half]
    middle, mean = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - middle) * (b - mean) for a, b in zip(x, y, strict=True))
    return products / sum((a - middle) ** 2 for a in x)


def row(title: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table."""
    readings = found["readings"]
    first, last, trimmed = readings[0], readings[-1], found["trimmed"]
    mib = 2**20
    return {
        "run": title,
        "calls": f"{last['calls']:,}",
        "shapes": last["shapes"],
        "tensors": f"{first['tensors']} to {last['tensors']}",
        "in use, MiB": f"{first['in_use_bytes'] / mib:.1f} to {last['in_use_bytes'] / mib:.1f}",
        "growth, bytes per call": f"{slope(readings, 'in_use_bytes'):,.0f}",
        "resident, MiB": f"{first['resident_bytes'] / mib:.0f} to "
        f"{last['resident_bytes'] / mib:.0f}",
        "growth, bytes per call (resident)": f"{slope(readings, 'resident_bytes'):,.0f}",
        "mappings": f"{first['mappings']:,} to {last['mappings']:,}",
        "trimmed, MiB": f"{trimmed['resident_bytes'] / mib:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--changing-calls", type=int, default=400)
    parser.add_argument("--stock-calls", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(**json.loads(options.measure))))
        return
    every = {"calls": options.changing_calls, "lengths": LENGTHS, "seed": options.seed}
    few = {"lengths": 16, "seed": options.seed}
    plans = {
        "changing, compressed": (None, {"compressed": True, **every}),
        "changing, stock": (None, {"compressed": False, **every}),
        "changing, compressed, capacity 1": (1, {"compressed": True, **every}),
        "changing, stock, capacity 1": (1, {"compressed": False, **every}),
        "repeated, stock": (None, {"compressed": False, "calls": options.stock_calls, **few}),
        "repeated, compressed": (None, {"compressed": True, "calls": options.calls, **few}),
    }
    runs: dict[str, Any] = {}
    for title, (capacity, arguments) in plans.items():
        runs[title] = {**arguments, "capacity": capacity, **in_a_process(capacity, **arguments)}
        print(title, f"{runs[title]['seconds']} s", file=sys.stderr, flush=True)
        table = markdown_table([row(name, found) for name, found in runs.items()])
        write_result("soak", {"new_tokens": NEW_TOKENS, "runs": runs}, INTRODUCTION + table)
    print(table)


if __name__ == "__main__":
    main()
