"""Does the adaptive KV cache decode faster than no compression on a GPU, and is it right there?

**Not run on a GPU yet**: no device was at hand when the Triton kernels were written. What they
compute was tested by Triton's interpreter, and that they compile for compute capability 8.0 and 9.0
by its compiler. This script answers the rest in one call:

- contract: attention straight from packed caches against the float32 reference, on the device: for
  every head size and dtype each width of keys and of values, ratios of heads, masks and lengths
  taking turns (each combination is compiled anew, which takes seconds).
- decoding: time per token of a random Llama (8 layers x 32 heads over 8 x 128, bfloat16) against
  ``DynamicCache``, both in turns, at 4,096 tokens and batch 1, and at 32,768 tokens and batch 8.
- bandwidth: bytes of a packed cache over the time that attention to it takes, as a share of the
  bandwidth (bytes read and written) that a large copy on the device reaches. Caches rotate, so that
  none is read from the L2 cache.

    python benchmarks/gpu_kv_cache.py

Writes ``results/gpu_kv_cache.json`` and exits with 1 where the contract does not hold. Where there
is no CUDA device, ``TRITON_INTERPRET=1 python benchmarks/gpu_kv_cache.py --rehearse`` walks through
the script on tiny sizes on the CPU and writes nothing: its times mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from environment import write_result
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_adaptive_sparse.kernels import triton_attention
from hf_adaptive_sparse.kernels.packed import PackedCache
from hf_adaptive_sparse.kernels.reference import attention as reference
from hf_adaptive_sparse.kvcache.attention import PinnedPair, pin_pair
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.selection import key_codec, value_codec
from hf_adaptive_sparse.kvcache.store import TokenStore
from hf_adaptive_sparse.packing.bits import PACKED_BITS
from hf_adaptive_sparse.profiles import KVCacheConfig

TARGETS = {
    "decode_4096_batch_1": 1.0,
    "decode_32768_batch_8": 0.8,
    "bandwidth_share": 0.6,
}
RELATIVE_ERROR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 2e-3}
"""Of the largest value, beside the rounding of the output: as in the contract test."""


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        layers: Decoder layers.
        heads: Heads of the queries.
        kv_heads: Heads of keys and values.
        head_dim: Channels of a head.
        settings: (tokens of context, batch size) per measurement.
        rounds: Tokens decoded per setting, more than a block so that each cache is flushed once.
        copy_bytes: Bytes of the large copy.
        rotation_bytes: Bytes of all caches that take turns, several times an L2 cache.
        head_sizes: Head sizes of the contract.
        contract_cases: How many of its cases are checked, None: all.
    """

    layers: int = 8
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    settings: tuple[tuple[int, int], ...] = ((4096, 1), (32768, 8))
    rounds: int = 140
    copy_bytes: int = 4 << 30
    rotation_bytes: int = 1 << 30
    head_sizes: tuple[int, ...] = (64, 72, 80, 96, 128, 256)
    contract_cases: int | None = None


REHEARSAL = Sizes(
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    settings=((200, 1), (300, 2)),
    rounds=3,
    copy_bytes=1 << 20,
    rotation_bytes=1 << 16,
    head_sizes=(16,),
    contract_cases=9,
)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def packed_cache(
    device: torch.device,
    shape: tuple[int, int, int, int],
    bits: tuple[int, int],
    dtype: torch.dtype,
    key_mode: str = "channel",
) -> tuple[PackedCache, PinnedPair]:
    """A cache of random states ``(batch, kv_heads, tokens, head_dim)``."""
    stores = []
    codecs = (key_codec(bits[0], key_mode, 64), value_codec(bits[1], 64))
    for codec, what in zip(codecs, ("keys", "values"), strict=True):
        template = torch.empty((*shape[:2], 0, shape[3]), dtype=dtype, device=device)
        store = TokenStore(codec, 128, template)
        for start in range(0, shape[2], 4096):
            count = min(4096, shape[2] - start)
            states = torch.randn((*shape[:2], count, shape[3]), device=device).to(dtype)
            store.commit(store.prepare(states, what))
        stores.append(store)
    pair = pin_pair(*stores)
    if pair.packed is None:
        raise SystemExit(f"{shape[2]} tokens fill no block.")
    return pair.packed, pair


def decoded(pinned: Any) -> torch.Tensor:
    """The states in float32, as the kernels see them."""
    encoded = pinned.blocks
    parts = (encoded.block_length, pinned.raw.shape[-1])
    blocks = encoded.codec.decode(encoded.parts, parts, torch.float32).flatten(2, 3)
    return torch.cat([blocks, pinned.raw.float()], dim=2)


def make_mask(kind: str, packed: PackedCache, query: torch.Tensor) -> torch.Tensor | None:
    """No mask, left padding as transformers masks it, or one per head that is added."""
    batch, heads, queries, _ = query.shape
    if kind == "none":
        return None
    if kind == "added":
        return torch.randn(batch, heads, queries, packed.length, device=query.device)
    mask = torch.ones(batch, 1, 1, packed.length, dtype=torch.bool, device=query.device)
    mask[0, ..., :77] = False
    return mask


def check_contract(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Attention by the kernels against the reference."""
    failures: list[str] = []
    worst: dict[str, float] = {}
    count = 0
    pairs = list(zip(PACKED_BITS, (*PACKED_BITS[2:], *PACKED_BITS[:2]), strict=True))
    cases = itertools.product(RELATIVE_ERROR, sizes.head_sizes, pairs)
    modes = itertools.cycle(["channel", "channel", "token"])
    shapes = itertools.cycle([(1, 1), (4, 1), (8, 2), (3, 1), (1, 4), (16, 1), (2, 1)])
    lengths = itertools.cycle([128, 300, 1000, 1281])
    kinds = itertools.cycle(["none", "padding", "none", "added", "none"])
    started = time.perf_counter()
    for dtype, head_dim, bits in itertools.islice(cases, sizes.contract_cases):
        (repeats, queries), key_mode, kind = next(shapes), next(modes), next(kinds)
        shape = (2, 2, next(lengths), head_dim)
        name = (
            f"{dtype} head_dim={head_dim} bits={bits} keys by {key_mode}, {repeats} heads per KV "
            f"head, queries={queries} tokens={shape[2]} mask={kind}"
        )
        packed, pair = packed_cache(device, shape, bits, dtype, key_mode)
        keys, values = decoded(pair.keys), decoded(pair.values)
        query = torch.randn(2, 2 * repeats, queries, head_dim, device=device).to(dtype)
        mask = make_mask(kind, packed, query)
        count += 1
        try:
            output = triton_attention.attend(query, packed, mask).float()
        except Exception as error:  # recorded: one call must tell all that is wrong
            failures.append(f"{name}: {type(error).__name__}: {error}"[:500])
            continue
        expected = reference(query, keys, values, mask)
        bound = RELATIVE_ERROR[dtype] * values.abs().max()
        bound = bound + torch.finfo(dtype).eps * expected.abs()
        share = ((output - expected).abs() / bound).max().item()
        worst[str(dtype)] = max(worst.get(str(dtype), 0.0), share)
        if not share <= 1:
            failures.append(f"{name}: error is {share:.2f} of the bound")
    return {
        "checked": count,
        "seconds": round(time.perf_counter() - started, 1),
        "worst_share_of_bound": worst,
        "failures": len(failures),
        "first_failures": failures[:20],
    }


def make_model(device: torch.device, sizes: Sizes, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=sizes.heads * sizes.head_dim,
        intermediate_size=2 * sizes.heads * sizes.head_dim,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=4096,
        max_position_embeddings=65536,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def fill(cache: Any, device: torch.device, sizes: Sizes, tokens: int, batch: int) -> None:
    """Random states, 4,096 tokens at a time: encoding them all at once would take more memory."""
    for layer in range(sizes.layers):
        for start in range(0, tokens, 4096):
            count = min(4096, tokens - start)
            shape = (batch, sizes.kv_heads, count, sizes.head_dim)
            keys, values = (
                torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2)
            )
            cache.update(keys, values, layer)


@torch.inference_mode()
def measure_decoding(
    model: LlamaForCausalLM, sizes: Sizes, tokens: int, batch: int
) -> dict[str, Any]:
    """Milliseconds per token of both caches, in turns."""
    device = model.device
    alternating = ((8, 6) * sizes.layers)[: sizes.layers]
    mean_7 = KVCacheConfig(key_bits=alternating, value_bits=tuple(14 - b for b in alternating))
    caches: dict[str, Any] = {
        "DynamicCache": DynamicCache(config=model.config),
        "adaptive, mean 7": AdaptiveQuantizedCache(model.config, mean_7),
    }
    for cache in caches.values():
        fill(cache, device, sizes, tokens, batch)
    token = torch.full((batch, 1), 5, device=device)
    times: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(sizes.rounds + 5):
        for name, cache in caches.items():
            synchronise(device)
            started = time.perf_counter()
            model(token, past_key_values=cache)
            synchronise(device)
            if turn >= 5:
                times[name].append((time.perf_counter() - started) * 1000)
    found: dict[str, Any] = {
        name: {"median_ms": statistics.median(series), "mean_ms": statistics.fmean(series)}
        for name, series in times.items()
    }
    found["ratio"] = found["adaptive, mean 7"]["mean_ms"] / found["DynamicCache"]["mean_ms"]
    return found


def best_seconds(
    functions: Sequence[Callable[[], Any]], device: torch.device, repeats: int = 5
) -> float:
    """Seconds of one of the functions, on average over all, in the fastest of several passes."""
    passes = []
    for _ in range(repeats + 1):  # the first compiles
        synchronise(device)
        started = time.perf_counter()
        for function in functions:
            function()
        synchronise(device)
        passes.append((time.perf_counter() - started) / len(functions))
    return min(passes[1:])


def read_bytes(packed: PackedCache) -> int:
    """Bytes of codes, metadata and raw tokens, each of which attention reads once."""
    keys, values = packed.blocks.keys, packed.blocks.values
    parts = (keys.codes, keys.step, keys.minimum)
    parts += (values.codes, values.step_codes, values.min_codes, values.scales)
    return sum(p.numel() * p.element_size() for p in (*parts, packed.raw_keys, packed.raw_values))


def copy_bandwidth(device: torch.device, size_bytes: int) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / best_seconds([lambda: target.copy_(source)] * 4, device)


def measure_bandwidth(
    device: torch.device, sizes: Sizes, tokens: int, batch: int, copied: float
) -> list[dict[str, Any]]:
    rows = []
    for bits in ((8, 8), (8, 6), (6, 6), (4, 4), (3, 3), (2, 2)):
        shape = (batch, sizes.kv_heads, tokens, sizes.head_dim)
        caches = [packed_cache(device, shape, bits, torch.bfloat16)[0]]
        size = read_bytes(caches[0])
        caches += [
            packed_cache(device, shape, bits, torch.bfloat16)[0]
            for _ in range(min(200, sizes.rotation_bytes // size))
        ]
        query = torch.randn(batch, sizes.heads, 1, sizes.head_dim, device=device).bfloat16()
        calls = [functools.partial(triton_attention.attend, query, cache) for cache in caches]
        seconds = best_seconds(calls, device)
        rows.append(
            {
                "tokens": tokens,
                "batch": batch,
                "key_bits": bits[0],
                "value_bits": bits[1],
                "bytes": size,
                "caches_in_rotation": len(caches),
                "microseconds": seconds * 1e6,
                "bytes_per_second": size / seconds,
                "share_of_copy": size / seconds / copied,
            }
        )
        del caches, calls
    return rows


def table(result: dict[str, Any]) -> str:
    contract = result["contract"]
    lines = [
        f"Contract: {contract['checked']} cases, {contract['failures']} failures.",
        "",
        "| decoding | DynamicCache, ms | adaptive, ms | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in result["decoding"].items():
        stock, ours = row["DynamicCache"]["mean_ms"], row["adaptive, mean 7"]["mean_ms"]
        lines.append(f"| {name} | {stock:.2f} | {ours:.2f} | {row['ratio']:.3f} |")
    lines += ["", "| attention | bits | µs | share of a copy |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row['tokens']} x {row['batch']} | {row['key_bits']}/{row['value_bits']} | "
        f"{row['microseconds']:.1f} | {row['share_of_copy']:.2f} |"
        for row in result["bandwidth"]
    ]
    return "\n".join(lines)


def triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, nothing is written")
    arguments = parser.parse_args()
    sizes = REHEARSAL if arguments.rehearse else Sizes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not (
        arguments.rehearse and os.environ.get("TRITON_INTERPRET") == "1"
    ):
        parser.error("this needs a CUDA device (or TRITON_INTERPRET=1 and --rehearse)")
    if not triton_attention.is_available():
        parser.error(
            "this needs Triton (pip install 'hf-adaptive-sparse[gpu]') and a GPU it serves"
        )
    torch.manual_seed(arguments.seed)
    started = time.perf_counter()
    result: dict[str, Any] = {
        "question": "decoding and attention from the packed KV cache on a GPU",
        "settings": {"seed": arguments.seed, "triton": triton_version(), **vars(sizes)},
        "targets": TARGETS,
        "contract": check_contract(device, sizes),
    }
    copied = copy_bandwidth(device, sizes.copy_bytes)
    result["copy_bytes_per_second"] = copied
    result["bandwidth"] = [
        row
        for tokens, batch in sizes.settings
        for row in measure_bandwidth(device, sizes, tokens, batch, copied)
    ]
    model = make_model(device, sizes, arguments.seed)
    result["decoding"] = {
        f"decode_{tokens}_batch_{batch}": measure_decoding(model, sizes, tokens, batch)
        for tokens, batch in sizes.settings
    }
    result["seconds"] = round(time.perf_counter() - started, 1)
    if not arguments.rehearse:
        write_result("gpu_kv_cache", result, table(result))
    print(table(result))
    for failure in result["contract"]["first_failures"]:
        print(failure, file=sys.stderr)
    return 1 if result["contract"]["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
