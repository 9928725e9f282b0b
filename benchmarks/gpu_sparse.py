"""Are the Triton kernels of sparse weights right on a GPU, and faster than dense weights there?

In one call:

- contract: products of 1 to 65 tokens and decompression against the float32 reference, for every
  dtype and width of values, shapes and groups taking turns; the operator under ``torch.compile``
  and in a recorded graph of launches.
- decoding: one token, ``torch.nn.functional.linear`` (cuBLAS) with dense bfloat16 weights against
  sparse ones, half of the weights gone, with values of 16, 8 and 4 bits. Time on the device is that
  of recorded graphs, since Python takes longer to launch a layer than a GPU to compute it; what
  single calls take is beside it. Weights rotate, so that none is read from the L2 cache. Bytes over
  time are stated as a share of the bandwidth that a large copy reaches.
- tokens: 2 to 64 tokens.
- prefill: 2,048 tokens, by the size of the tiles that are decompressed; likewise in graphs.
- 2:4: weights of that pattern as torch's semi-structured tensors, one token and 2,048.

    python benchmarks/gpu_sparse.py

Writes ``results/gpu_sparse.json`` and exits with 1 where the contract does not hold. Where there is
no CUDA device, ``TRITON_INTERPRET=1 python benchmarks/gpu_sparse.py --rehearse`` walks through the
script on tiny sizes on the CPU and writes nothing: its times mean nothing.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import gpu
import torch
from torch.nn import functional

from hf_adaptive_sparse.kernels import (
    sparse_linear,
    sparse_tiles,
    triton_sparse,
    triton_sparse_plan,
)
from hf_adaptive_sparse.kernels.sparse_reference import linear as reference
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.runtime import operator

TARGETS = {"decoding, bfloat16, 4096x11008 and larger": 1.2, "prefill": 0.9}
"""Wanted: times as fast as torch's dense linear."""

TILES = 4
"""Tiles that a product may be given, at most."""

FORMATS = {"bfloat16": (16, None), "int8": (8, 128), "int4": (4, 128)}


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        shapes: (rows, columns) of weights.
        tokens: Tokens between one and many.
        prefill: Many tokens.
        tile_bytes: Bytes of a decompressed tile.
        rotation_bytes: Bytes of all weights of a kind that take turns, several times an L2 cache.
        copy_bytes: Bytes of the large copy.
        contract_columns: Columns of the contract's weights.
        contract_tokens: Tokens of its products.
    """

    shapes: tuple[tuple[int, int], ...] = (
        (4096, 4096),
        (4096, 11008),
        (11008, 4096),
        (8192, 28672),
    )
    tokens: tuple[int, ...] = (2, 4, 8, 64)
    prefill: int = 2048
    tile_bytes: tuple[int, ...] = (32 << 20, 64 << 20, 128 << 20)
    rotation_bytes: int = 1 << 30
    copy_bytes: int = 4 << 30
    contract_columns: tuple[int, ...] = (1, 31, 64, 100, 513, 1120, 4096)
    contract_tokens: tuple[int, ...] = (1, 3, 4, 5, 65)


REHEARSAL = Sizes(
    shapes=((64, 128), (32, 256)),
    tokens=(2,),
    prefill=80,
    tile_bytes=(1 << 12,),
    rotation_bytes=1 << 15,
    copy_bytes=1 << 20,
    contract_columns=(31, 200),
    contract_tokens=(1, 3, 65),
)


def pruned(
    shape: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Random weights, half of each row gone but for an empty and a full one."""
    weight = torch.randn(shape, device=device, dtype=dtype) * 0.02
    weight[torch.rand(shape, device=device) < 0.5] = 0
    weight[0] = 0
    weight[-1] = 0.5
    return weight


def two_of_four(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Random weights, two of every four gone."""
    weight = torch.randn(shape[0], shape[1] // 4, 4, device=device) * 0.02
    places = torch.rand_like(weight).argsort(dim=2)
    return weight.masked_fill_(places < 2, 0.0).view(shape).bfloat16()


def clone(weight: SparseWeight) -> SparseWeight:
    scales = None if weight.scales is None else weight.scales.clone()
    parts = (weight.bitmask.clone(), weight.values.clone(), weight.row_offsets.clone())
    return indexed(SparseWeight(weight.shape, *parts, scales, weight.group_size))


def indexed(weight: SparseWeight) -> SparseWeight:
    """Return the weight with the offsets that the sparse runtime has on the device."""
    return replace(weight, block_offsets=sparse_linear.block_offsets_for(weight))


@dataclass(frozen=True)
class Case:
    """One weight of the contract, and the numbers of tokens it is multiplied with."""

    dtype: torch.dtype
    bits: int
    group: int | None
    columns: int
    tokens: tuple[int, ...]


def contract_cases(sizes: Sizes) -> list[Case | str]:
    """Every dtype, format and number of columns; then the operator, by what runs it."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    formats = ((16, None), (8, None), (8, 32), (8, 96), (4, None), (4, 128))
    weights = [
        Case(dtype, *format, columns, sizes.contract_tokens)
        for dtype, format, columns in itertools.product(dtypes, formats, sizes.contract_columns)
    ]
    return [*weights, "compiled", "recorded"]


def share_of_bound(
    found: torch.Tensor, x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor
) -> float:
    """Error as a share of that of sums in float32 and of rounding the output."""
    expected = reference(x.double().float(), weight, bias)
    lengths = x.float().abs() @ weight.to_dense(torch.float32).abs().T
    bound = 4e-6 * lengths + torch.finfo(x.dtype).eps * expected.abs() + 1e-30
    if x.shape[0] > triton_sparse.MAX_TOKENS:  # decompressed weights are rounded to their dtype
        bound = bound + torch.finfo(x.dtype).eps * lengths
    return float(((found.float() - expected).abs() / bound).max())


def check_case(case: Case | str, device: torch.device) -> gpu.Checks:
    """Hold products and decompression of one weight, or the operator, to the reference."""
    if isinstance(case, str):
        {"compiled": check_compiled, "recorded": check_recorded}[case](device)
        return [(case, 0.0)]
    dtype, columns = case.dtype, case.columns
    weight = SparseWeight.from_dense(pruned((37, columns), device, dtype), case.bits, case.group)
    bias = torch.randn(37, device=device).to(dtype)
    checks = []
    exact = torch.full((37, columns), 7.0, dtype=dtype, device=device)
    triton_sparse.decompress(weight, 0, 37, exact)
    # The interpreter cuts float32 to bfloat16 where it should round.
    if device.type == "cuda" or dtype != torch.bfloat16 or case.bits == 16:
        wrong = bool((exact != weight.to_dense()).any())
        checks.append((f"{case}, decompressed", float("inf") if wrong else 0.0))
    for tokens in case.tokens:
        x = torch.randn(tokens, columns, device=device).to(dtype)
        few = tokens <= triton_sparse.MAX_TOKENS
        linear = triton_sparse.linear if few else sparse_linear.linear
        share = share_of_bound(linear(x, weight, bias), x, weight, bias)
        checks.append((f"{case}, {tokens} tokens", share))
    return checks


def check_compiled(device: torch.device) -> None:
    """The operator gives the same inside of ``torch.compile`` as outside."""
    weight = SparseWeight.from_dense(pruned((256, 512), device))
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(operator.linear, fullgraph=True, backend=backend)
    for tokens in (1, 4, 80):
        x = torch.randn(tokens, 512, device=device).bfloat16()
        torch.testing.assert_close(compiled(x, weight, None), operator.linear(x, weight, None))


def check_recorded(device: torch.device) -> None:
    """Launches recorded in a graph compute with what lies in their input when they are replayed."""
    if device.type != "cuda":
        return
    weight = SparseWeight.from_dense(pruned((256, 512), device))
    for tokens in (1, 4, 80):
        x = torch.randn(tokens, 512, device=device).bfloat16()
        graph, outputs = gpu.record([functools.partial(operator.linear, x, weight, None)])
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(outputs[0], operator.linear(x, weight, None))


def compile_case(case: tuple[int, int, int, int | None, int], device: torch.device) -> None:
    """Have one product compiled, by one of the tiles that it may take."""
    columns, tokens, bits, group, place = case
    weight = indexed(SparseWeight.from_dense(pruned((8, columns), device), bits, group))
    tiles = triton_sparse_plan.vector_tiles(weight)
    if place < len(tiles):
        with mock.patch.object(triton_sparse, "vector_tiles", return_value=[tiles[place]]):
            triton_sparse.linear(torch.randn(tokens, columns, device=device).bfloat16(), weight)


def rotation(weight: Any, size: int, sizes: Sizes, copy: Callable[[Any], Any]) -> list[Any]:
    """As many copies of a weight as its share of memory asks for, two at least."""
    return [weight, *(copy(weight) for _ in range(max(1, min(64, sizes.rotation_bytes // size))))]


def kinds_of(
    dense: torch.Tensor, sizes: Sizes
) -> Iterator[tuple[str, int, list[Any], Callable[..., Any]]]:
    """Name, bytes, weights in rotation, and product, of dense and sparse weights."""
    yield (
        "dense",
        dense.nbytes,
        rotation(dense, dense.nbytes, sizes, torch.clone),
        functional.linear,
    )
    for name, (bits, group) in FORMATS.items():
        weight = indexed(SparseWeight.from_dense(dense, bits, group))
        weights = rotation(weight, weight.nbytes, sizes, clone)
        yield name, weight.nbytes, weights, sparse_linear.linear


def measure(
    device: torch.device, shape: tuple[int, int], tokens: int, sizes: Sizes, copied: float
) -> list[dict[str, Any]]:
    """One row per kind of weights."""
    rows: list[dict[str, Any]] = []
    x = torch.randn(tokens, shape[1], device=device).bfloat16()
    for name, size, weights, product in kinds_of(pruned(shape, device), sizes):
        found = gpu.seconds_of(
            [functools.partial(product, x, weight) for weight in weights], device
        )
        dense = rows[0] if rows else found
        rows.append(
            {
                "shape": f"{shape[0]}x{shape[1]}",
                "tokens": tokens,
                "values": name,
                "bytes": size,
                **found,
                "speed": dense["device_us"] / found["device_us"],
                "call_speed": dense["call_us"] / found["call_us"],
                "share_of_copy": size / found["device_us"] * 1e6 / copied,
            }
        )
        gpu.say(rows[-1])
    return rows


def measure_tile_bytes(
    device: torch.device, shape: tuple[int, int], sizes: Sizes
) -> list[dict[str, Any]]:
    """Time of many tokens, by the bytes of a decompressed tile, against the dense product."""
    dense = pruned(shape, device)
    x = torch.randn(sizes.prefill, shape[1], device=device).bfloat16()
    plain = gpu.seconds_of([functools.partial(functional.linear, x, dense)] * 3, device)
    rows, before = [], sparse_tiles.GPU_TILE_BYTES
    for (name, format), size in itertools.product(FORMATS.items(), sizes.tile_bytes):
        weight = indexed(SparseWeight.from_dense(dense, *format))
        sparse_tiles.GPU_TILE_BYTES = size
        try:
            spent = gpu.seconds_of([functools.partial(sparse_linear.linear, x, weight)] * 3, device)
            tile_rows = sparse_tiles._tile_rows(weight, weight.dtype, sizes.prefill)
        finally:
            sparse_tiles.GPU_TILE_BYTES = before
        rows.append(
            {
                "shape": f"{shape[0]}x{shape[1]}",
                "tokens": sizes.prefill,
                "values": name,
                "tile_bytes": size,
                "tile_rows": tile_rows,
                **spent,
                "dense_us": plain["device_us"],
                "speed": plain["device_us"] / spent["device_us"],
                "call_speed": plain["call_us"] / spent["call_us"],
            }
        )
        gpu.say(rows[-1])
    return rows


def measure_two_of_four(
    device: torch.device, shape: tuple[int, int], sizes: Sizes
) -> list[dict[str, Any]]:
    """Time of weights of the pattern 2:4: dense, in our format, and in torch's semi-structured."""
    rows = []
    dense = two_of_four(shape, device)
    ours = indexed(SparseWeight.from_dense(dense))
    for tokens in (1, sizes.prefill):
        x = torch.randn(tokens, shape[1], device=device).bfloat16()
        row: dict[str, Any] = {"shape": f"{shape[0]}x{shape[1]}", "tokens": tokens}
        calls = [functools.partial(functional.linear, x, dense)] * 3
        row["dense_us"] = gpu.best_seconds(calls, device) * 1e6
        calls = [functools.partial(sparse_linear.linear, x, ours)] * 3
        row["ours_us"] = gpu.best_seconds(calls, device) * 1e6
        try:
            theirs = torch.sparse.to_sparse_semi_structured(dense)
            calls = [functools.partial(functional.linear, x, theirs)] * 3
            found, expected = calls[0](), functional.linear(x, dense)
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
            row["semi_structured_us"] = gpu.best_seconds(calls, device) * 1e6
        except Exception as error:  # as torch says what it does not support
            row["semi_structured_failure"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
        gpu.say(row)
    return rows


def table(result: dict[str, Any]) -> str:
    lines = [gpu.verdict(result["contract"]), ""]
    lines += [
        "| shape | tokens | values | µs on the device | times as fast as dense | with the call | "
        "share of a copy |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['shape']} | {row['tokens']} | {row['values']} | {row['device_us']:.1f} | "
        f"{row['speed']:.2f} | {row['call_speed']:.2f} | {row['share_of_copy']:.0%} |"
        for row in result["products"]
    ]
    lines += [
        "",
        "| prefill | values | MiB of a tile | rows | times as fast as dense | with the call |",
    ]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {row['shape']} x {row['tokens']} | {row['values']} | {row['tile_bytes'] / 2**20:g} | "
        f"{row['tile_rows']} | {row['speed']:.2f} | {row['call_speed']:.2f} |"
        for row in result["tile_bytes"]
    ]
    lines += ["", "| 2:4 | tokens | dense, µs | ours | semi-structured |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for row in result["two_of_four"]:
        theirs = row.get("semi_structured_us")
        lines.append(
            f"| {row['shape']} | {row['tokens']} | {row['dense_us']:.1f} | {row['ours_us']:.1f} | "
            f"{'failed' if theirs is None else f'{theirs:.1f}'} |"
        )
    return "\n".join([*lines, *result.get("notes", [])])


@torch.inference_mode()
def measure_all(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    copied = gpu.copy_bandwidth(device, sizes.copy_bytes)
    few = [tokens for tokens in sizes.tokens if tokens <= triton_sparse.MAX_TOKENS]
    cases = [
        (columns, tokens, *format, tile)
        for columns in dict.fromkeys(columns for _, columns in sizes.shapes)
        for format in FORMATS.values()
        for tile in range(TILES)
        for tokens in (1, *few)
        if tokens == 1 or columns == sizes.shapes[-2][1]
    ]
    gpu.compile_all(compile_case, cases, device)
    one = [measure(device, shape, 1, sizes, copied) for shape in sizes.shapes]
    # A few tokens with one shape: how the time grows is the question.
    more = [measure(device, sizes.shapes[-2], tokens, sizes, copied) for tokens in sizes.tokens]
    return {
        "copy_bytes_per_second": copied,
        "products": list(itertools.chain.from_iterable(one + more)),
        "tile_bytes": [
            row for shape in sizes.shapes for row in measure_tile_bytes(device, shape, sizes)
        ],
        "two_of_four": [
            row for shape in sizes.shapes for row in measure_two_of_four(device, shape, sizes)
        ],
    }


def main() -> int:
    parser = gpu.parser_with_contract(__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", help="rows x columns, as in 4096x11008")
    arguments = parser.parse_args()
    sizes = REHEARSAL if arguments.rehearse else Sizes()
    if arguments.shapes:
        pairs = [tuple(int(size) for size in shape.split("x")) for shape in arguments.shapes]
        sizes = replace(sizes, shapes=tuple((pair[0], pair[1]) for pair in pairs))
    device = gpu.find_device(parser, arguments.rehearse)
    torch.manual_seed(arguments.seed)
    started = time.perf_counter()
    contract = gpu.nothing_checked()
    if not arguments.skip_contract:
        contract = gpu.check_contract(check_case, contract_cases(sizes), device)
    result: dict[str, Any] = {
        "question": "sparse weights on a GPU: right, and how fast beside dense ones?",
        "settings": {"seed": arguments.seed, "triton": gpu.triton_version(), **vars(sizes)},
        "targets": TARGETS,
        "contract": contract,
        **measure_all(device, sizes),
    }
    result["seconds"] = round(time.perf_counter() - started, 1)
    return gpu.finish("gpu_sparse", result, table(result), arguments.rehearse)


if __name__ == "__main__":
    sys.exit(main())
