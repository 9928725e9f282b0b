"""How fast is one sparse linear beside torch's own dense one, at which share of the memory's speed?

One linear of random weights, half of them pruned, on the CPU. Enough copies of each weight for the
dense ones to take ``--memory-mb`` are used in turn, so that none is found in a cache, and all kinds
take turns, so that whatever else the machine does hits all alike. Three questions:

- tokens: ``torch.nn.functional.linear`` against ``kernels.sparse_linear.linear`` for 1 to 32,
  values as they are, the same in 12 bits, int8 and int4;
- prefill: the same for hundreds of tokens, where tiles are decompressed;
- bandwidth: bytes of the weight over time, against reading a large tensor.

Figures are ratios within one run, of medians.

    python benchmarks/sparse_linear.py [--shapes 11008x4096 4096x11008] [--memory-mb 1440]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from environment import write_result
from torch.nn import functional

from hf_adaptive_sparse.kernels import library, sparse_linear
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight

TARGETS = {"bfloat16": 2.0, "bfloat16, 12 bits": 2.0, "bfloat16, int8": 2.5}
"""Wanted for one token: times as fast as torch's dense linear."""

FORMS = {"": (16, None), ", 12 bits": (12, None), ", int8": (8, 128), ", int4": (4, 128)}
"""Bits and group size of the values; the same values in 12 bits are there for bfloat16 only."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def clone(weight: SparseWeight) -> SparseWeight:
    parts = {kind: part.clone() for kind, part in weight.tensors().items()}
    offsets = weight.row_offsets.clone()
    return SparseWeight(weight.shape, row_offsets=offsets, group_size=weight.group_size, **parts)


def pruned(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).mul_(0.02)
    gone = torch.rand(rows, columns, generator=generator) < 0.5
    return weight.masked_fill_(gone, 0.0).to(dtype)


def sizes(shape: str) -> tuple[int, int]:
    """Return rows and columns of a shape on the command line, ``"11008x4096"``."""
    rows, columns = map(int, shape.split("x"))
    return rows, columns


def timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1000


def read_bytes_per_ms(memory_mb: int, rounds: int) -> float:
    """Speed of reading a tensor that fits no cache: a sum over it, the best of some rounds."""
    large = torch.ones(memory_mb << 17, dtype=torch.int64)
    fastest = min(timed(large.sum) for _ in range(rounds))
    return large.nbytes / fastest


def measure(
    shape: tuple[int, int], dtype_name: str, arguments: argparse.Namespace
) -> dict[str, dict[str, dict[str, float]]]:
    """Times by tokens and kind of one linear."""
    dtype = DTYPES[dtype_name]
    dense = pruned(*shape, dtype, arguments.seed)
    copies = max(2, (arguments.memory_mb << 20) // dense.nbytes)
    kinds: dict[str, list[Any]] = {"dense": [dense.clone() for _ in range(copies)]}
    for name, (bits, group) in FORMS.items():
        if bits == 12 and dtype != torch.bfloat16:
            continue
        weight = SparseWeight.from_dense(dense, bits, group)
        kinds[dtype_name + name] = [clone(weight) for _ in range(copies)]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for tokens in (*arguments.tokens, *arguments.prefill):
        x = torch.randn(tokens, shape[1]).to(dtype)
        times: dict[str, list[float]] = {name: [] for name in kinds}
        few = tokens in arguments.tokens
        for turn in range(arguments.rounds * copies if few else arguments.prefill_rounds):
            for name, weights in kinds.items():
                function = functional.linear if name == "dense" else sparse_linear.linear
                weight = weights[turn % copies]
                times[name].append(timed(partial(function, x, weight)))
        found[str(tokens)] = {
            name: {
                "median_ms": statistics.median(spent),
                "fastest_ms": min(spent),
                "bytes": kinds[name][0].nbytes,
            }
            for name, spent in times.items()
        }
    return found


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per shape, dtype, tokens and kind, with its ratios."""
    rows = []
    for shape, dtypes in result["times"].items():
        for tokens_found in dtypes.values():
            for tokens, kinds in tokens_found.items():
                dense = kinds["dense"]
                rows += [
                    {
                        "shape": shape,
                        "tokens": int(tokens),
                        "kind": name,
                        "speed": dense["median_ms"] / kind["median_ms"],
                        "speed_of_fastest": dense["fastest_ms"] / kind["fastest_ms"],
                        "bytes": kind["bytes"] / dense["bytes"],
                        "bandwidth": kind["bytes"]
                        / kind["median_ms"]
                        / result["read_bytes_per_ms"],
                        "dense_bandwidth": dense["bytes"]
                        / dense["median_ms"]
                        / result["read_bytes_per_ms"],
                    }
                    for name, kind in kinds.items()
                    if name != "dense"
                ]
    return rows


def table(result: dict[str, Any]) -> str:
    lines = [
        "| shape | tokens | values | bytes of dense | times as fast as dense | share of bandwidth |"
        " dense's share | wanted |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        wanted = TARGETS.get(row["kind"]) if row["tokens"] == 1 else None
        few = row["tokens"] in result["settings"]["tokens"]
        # Of a prompt, the time is not that of reading.
        shares = [f"{row[key]:.0%}" if few else "" for key in ("bandwidth", "dense_bandwidth")]
        lines.append(
            f"| {row['shape']} | {row['tokens']} | {row['kind']} | {row['bytes']:.3f} | "
            f"{row['speed']:.2f} | {' | '.join(shares)} | "
            f"{'' if wanted is None else f'>= {wanted}'} |"
        )
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["11008x4096", "4096x11008", "2048x2048"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--memory-mb", type=int, default=1440, help="of all copies of a dense one")
    parser.add_argument("--rounds", type=int, default=3, help="times each copy is used")
    parser.add_argument("--prefill-rounds", type=int, default=3)
    parser.add_argument("--no-write", action="store_true", help="print, but store no result")
    parser.add_argument(
        "--result", default="sparse_linear", help="name to store it by; another keeps this one's"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "question": "time of one sparse linear against torch's dense one, half of it pruned",
        "kernel": library.describe(),
        "settings": vars(arguments),
        "read_bytes_per_ms": read_bytes_per_ms(arguments.memory_mb, 5),
        "times": {
            shape: {name: measure(sizes(shape), name, arguments) for name in arguments.dtypes}
            for shape in arguments.shapes
        },
        "targets": TARGETS,
    }
    result["rows"] = rows_of(result)
    if not arguments.no_write:
        write_result(arguments.result, result, table(result))
    print(table(result))


if __name__ == "__main__":
    main()
