"""Does the adaptive KV cache decode faster than no compression on a GPU, and is it right there?

In one call:

- contract: attention straight from packed caches against the float32 reference, on the device: for
  every head size and dtype each width of keys and of values, ratios of heads, masks and lengths
  taking turns (each combination is compiled anew, which takes seconds).
- decoding: time per token of a random Llama (8 layers x 32 heads over 8 x 128, bfloat16) against
  ``DynamicCache``, both in turns, at 4,096 tokens and batch 1, and at 32,768 tokens and batch 8.
  ``DynamicCache`` runs a second time without cuDNN: where torch takes cuDNN's attention (torch 2.11
  on an H100), it plans each new length anew, which takes the host milliseconds per layer.
- bandwidth: bytes of a packed cache over the time that attention to it takes, as a share of the
  bandwidth (bytes read and written) that a large copy on the device reaches. Caches rotate, so that
  none is read from the L2 cache.
- encoding: time to encode the keys, or the values, of a prompt of 2,048 tokens x 32 heads x 128, as
  a layer of a 7B model has them, and of the 128 that fill a block while decoding: by the kernel
  and by torch, with what Python takes and the wait for the device's word that all was finite.
- the way back: time to decode the same, as attention over a prompt needs it, likewise, and what the
  kernel takes on the device alone. Outputs rotate, several times an L2 cache in all.

    python benchmarks/gpu_kv_cache.py

Writes ``results/gpu_kv_cache.json`` and exits with 1 where the contract does not hold. Where there
is no CUDA device, ``TRITON_INTERPRET=1 python benchmarks/gpu_kv_cache.py --rehearse`` walks through
the script on tiny sizes on the CPU and writes nothing: its times mean nothing.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import gpu
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_adaptive_sparse.architecture import cache_argument
from hf_adaptive_sparse.kernels import triton_attention, triton_decoding, triton_encoding
from hf_adaptive_sparse.kernels.packed import PackedCache
from hf_adaptive_sparse.kernels.reference import attention as reference
from hf_adaptive_sparse.kvcache.attention import PinnedPair, pin_pair
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.channel import ChannelCodec
from hf_adaptive_sparse.kvcache.codec import Codec
from hf_adaptive_sparse.kvcache.selection import key_codec, value_codec
from hf_adaptive_sparse.kvcache.store import TokenStore
from hf_adaptive_sparse.kvcache.transposed import TransposedCodec
from hf_adaptive_sparse.packing.bits import PACKED_BITS
from hf_adaptive_sparse.profiles import KVCacheConfig

TARGETS = {
    "decode_4096_batch_1": 1.0,
    "decode_32768_batch_8": 0.8,
    "bandwidth_share": 0.6,
}
RELATIVE_ERROR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 2e-3}
"""Of the largest value, beside the rounding of the output: as in the contract test."""


WITHOUT_CUDNN = "DynamicCache without cuDNN"

WIDTHS = ((8, 8), (8, 6), (6, 6), (4, 4), (3, 3), (2, 2))
"""Bits of keys and values whose bandwidth is measured."""


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
        encoded_tokens: Tokens per measurement of encoding, whole blocks.
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
    encoded_tokens: tuple[int, ...] = (2048, 128)
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
    encoded_tokens=(256,),
    head_sizes=(16,),
    contract_cases=9,
)


def packed_cache(
    device: torch.device,
    shape: tuple[int, int, int, int],
    bits: tuple[int, int],
    dtype: torch.dtype,
    key_mode: str = "channel",
) -> tuple[PackedCache, PinnedPair]:
    """A cache of random states ``(batch, kv_heads, tokens, head_dim)``."""

    def filled(codec: Codec | None, what: str) -> TokenStore:
        template = torch.empty((*shape[:2], 0, shape[3]), dtype=dtype, device=device)
        store = TokenStore(codec, 128, template)
        for start in range(0, shape[2], 4096):
            count = min(4096, shape[2] - start)
            states = torch.randn((*shape[:2], count, shape[3]), device=device).to(dtype)
            store.commit(store.prepare(states, what))
        return store

    pair = pin_pair(
        filled(key_codec(bits[0], key_mode, 64), "keys"),
        filled(value_codec(bits[1], 64), "values"),
    )
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


@dataclass(frozen=True)
class Case:
    """One call of the contract."""

    dtype: torch.dtype
    head_dim: int
    bits: tuple[int, int]
    repeats: int
    queries: int
    key_mode: str
    tokens: int
    mask: str


def contract_cases(sizes: Sizes) -> list[Case]:
    """Every dtype, head size and width; what else there is takes turns."""
    pairs = list(zip(PACKED_BITS, (*PACKED_BITS[2:], *PACKED_BITS[:2]), strict=True))
    modes = itertools.cycle(["channel", "channel", "token"])
    shapes = itertools.cycle([(1, 1), (4, 1), (8, 2), (3, 1), (1, 4), (16, 1), (2, 1)])
    lengths = itertools.cycle([128, 300, 1000, 1281])
    masks = itertools.cycle(["none", "padding", "none", "added", "none"])
    cases = itertools.product(RELATIVE_ERROR, sizes.head_sizes, pairs)
    return [
        Case(dtype, head_dim, bits, *next(shapes), next(modes), next(lengths), next(masks))
        for dtype, head_dim, bits in itertools.islice(cases, sizes.contract_cases)
    ]


def check_case(case: Case, device: torch.device) -> gpu.Checks:
    """Attention by the kernels against the reference."""
    shape = (2, 2, case.tokens, case.head_dim)
    packed, pair = packed_cache(device, shape, case.bits, case.dtype, case.key_mode)
    keys, values = decoded(pair.keys), decoded(pair.values)
    query = torch.randn(2, 2 * case.repeats, case.queries, case.head_dim, device=device)
    query = query.to(case.dtype)
    mask = make_mask(case.mask, packed, query)
    output = triton_attention.attend(query, packed, mask).float()
    expected = reference(query, keys, values, mask)
    bound = RELATIVE_ERROR[case.dtype] * values.abs().max()
    bound = bound + torch.finfo(case.dtype).eps * expected.abs()
    return [(str(case), ((output - expected).abs() / bound).max().item())]


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
        WITHOUT_CUDNN: DynamicCache(config=model.config),
        "adaptive, mean 7": AdaptiveQuantizedCache(model.config, mean_7),
    }
    for cache in caches.values():
        fill(cache, device, sizes, tokens, batch)
    token = torch.full((batch, 1), 5, device=device)
    times: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(sizes.rounds + 5):
        for name, cache in caches.items():
            torch.backends.cuda.enable_cudnn_sdp(name != WITHOUT_CUDNN)
            step = functools.partial(model, token, **{cache_argument(model): cache})
            spent = gpu.milliseconds(device, step)
            if turn >= 5:
                times[name].append(spent)
    found: dict[str, Any] = {
        name: {"median_ms": statistics.median(series), "mean_ms": statistics.fmean(series)}
        for name, series in times.items()
    }
    gpu.say(found)
    torch.backends.cuda.enable_cudnn_sdp(True)
    found["ratio"] = found["adaptive, mean 7"]["mean_ms"] / found["DynamicCache"]["mean_ms"]
    return found


def read_bytes(packed: PackedCache) -> int:
    """Bytes of codes, metadata and raw tokens, each of which attention reads once."""
    keys, values = packed.blocks.keys, packed.blocks.values
    parts = (
        *(keys.codes, keys.step, keys.minimum),
        *(values.codes, values.step_codes, values.min_codes, values.scales),
        *(packed.raw_keys, packed.raw_values),
    )
    return sum(part.nbytes for part in parts)


def compile_case(case: tuple[Sizes, tuple[int, int]], device: torch.device) -> None:
    """Have the kernels of one pair of widths compiled."""
    sizes, bits = case
    cache = packed_cache(device, (1, sizes.kv_heads, 4096, sizes.head_dim), bits, torch.bfloat16)[0]
    query = torch.randn(1, sizes.heads, 1, sizes.head_dim, device=device).bfloat16()
    triton_attention.attend(query, cache)


def measure_bandwidth(
    device: torch.device, sizes: Sizes, tokens: int, batch: int, copied: float
) -> list[dict[str, Any]]:
    rows = []
    for bits in WIDTHS:
        shape = (batch, sizes.kv_heads, tokens, sizes.head_dim)
        caches = [packed_cache(device, shape, bits, torch.bfloat16)[0]]
        size = read_bytes(caches[0])
        caches += [
            packed_cache(device, shape, bits, torch.bfloat16)[0]
            for _ in range(min(200, sizes.rotation_bytes // size))
        ]
        query = torch.randn(batch, sizes.heads, 1, sizes.head_dim, device=device).bfloat16()
        calls = [functools.partial(triton_attention.attend, query, cache) for cache in caches]
        found = gpu.seconds_of(calls, device)
        rows.append(
            {
                "tokens": tokens,
                "batch": batch,
                "key_bits": bits[0],
                "value_bits": bits[1],
                "bytes": size,
                "caches_in_rotation": len(caches),
                **found,
                "share_of_copy": size / found["device_us"] * 1e6 / copied,
            }
        )
        gpu.say(rows[-1])
        del caches, calls
    return rows


def codecs_of(bits: int) -> dict[str, ChannelCodec | TransposedCodec]:
    return {"keys": ChannelCodec(bits), "values": TransposedCodec(bits, 64)}


def measure_encoding(device: torch.device, sizes: Sizes, tokens: int) -> list[dict[str, Any]]:
    """Microseconds to encode a prompt's keys and values, by the kernel and by torch."""
    shape = (1, tokens, sizes.heads, sizes.head_dim)  # as models have it in memory
    states = torch.randn(shape, device=device).bfloat16().transpose(1, 2)
    blocks = states.unflatten(2, (tokens // 128, 128))
    rows = []
    for bits in PACKED_BITS[::-1]:
        for what, codec in codecs_of(bits).items():
            kernel = functools.partial(triton_encoding.encode, blocks, codec.kernel_format)
            reference = functools.partial(codec.encode, blocks, what)
            encoded = kernel()
            if encoded is None or not all(map(torch.equal, encoded, reference())):
                gpu.say(f"{what} at {bits} bits differ from torch's")
            row: dict[str, Any] = {"tokens": tokens, "what": what, "bits": bits}
            row |= {"kernel_us": gpu.best_seconds([kernel] * 4, device) * 1e6}
            row |= {"torch_us": gpu.best_seconds([reference] * 4, device) * 1e6}
            rows.append(row)
            gpu.say(row)
    return rows


def measure_restoring(device: torch.device, sizes: Sizes, tokens: int) -> list[dict[str, Any]]:
    """Microseconds to decode a prompt's keys and values, by the kernel and by torch."""
    shape = (1, sizes.heads, tokens, sizes.head_dim)
    blocks = torch.randn(shape, device=device).bfloat16().unflatten(2, (tokens // 128, 128))
    size = blocks.numel() * blocks.element_size()
    count = 1 + min(64, sizes.rotation_bytes // size)
    outputs: list[torch.Tensor] = [blocks.new_empty(shape) for _ in range(count)]
    rows = []
    for bits in PACKED_BITS[::-1]:
        for what, codec in codecs_of(bits).items():
            parts = codec.parts_type(*(part.contiguous() for part in codec.encode(blocks, what)))
            kernels = [
                functools.partial(triton_decoding.decode, parts, codec.kernel_format, 128, output)
                for output in outputs
            ]

            def reference(codec: Any = codec, parts: Any = parts) -> torch.Tensor:
                found: torch.Tensor = codec.decode(parts, (128, shape[3]), blocks.dtype)
                outputs[0].copy_(found.flatten(2, 3))
                return outputs[0]

            kernels[-1]()
            if not torch.equal(outputs[-1].view(torch.int16), reference().view(torch.int16)):
                gpu.say(f"{what} at {bits} bits differ from torch's")
            found = gpu.seconds_of(kernels, device)
            row: dict[str, Any] = {"tokens": tokens, "what": what, "bits": bits}
            row |= {"kernel_us": found["call_us"]}
            row |= {"device_us": found["device_us"], "bytes": size + sum(p.nbytes for p in parts)}
            row |= {"torch_us": gpu.best_seconds([reference] * 4, device) * 1e6}
            rows.append(row)
            gpu.say(row)
    return rows


def coding_table(rows: list[dict[str, Any]], name: str) -> list[str]:
    lines = ["", f"| {name} | bits | by the kernel, µs | by torch, µs | times faster |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    return lines + [
        f"| {row['what']} of {row['tokens']} tokens | {row['bits']} | {row['kernel_us']:.0f} | "
        f"{row['torch_us']:.0f} | {row['torch_us'] / row['kernel_us']:.1f} |"
        for row in rows
    ]


def table(result: dict[str, Any]) -> str:
    lines = [
        gpu.verdict(result["contract"]),
        "",
        "| decoding | DynamicCache, ms | without cuDNN, ms | adaptive, ms | ratio |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in result["decoding"].items():
        stock, ours = row["DynamicCache"]["mean_ms"], row["adaptive, mean 7"]["mean_ms"]
        plain = row.get(WITHOUT_CUDNN)
        other = "" if plain is None else f"{plain['mean_ms']:.2f}"
        lines.append(f"| {name} | {stock:.2f} | {other} | {ours:.2f} | {row['ratio']:.3f} |")
    lines += [""]
    lines += ["| attention | bits | µs on the device | with the call | share of a copy |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row['tokens']} x {row['batch']} | {row['key_bits']}/{row['value_bits']} | "
        f"{row['device_us']:.1f} | {row['call_us']:.1f} | {row['share_of_copy']:.2f} |"
        for row in result["bandwidth"]
    ]
    lines += coding_table(result.get("encoding", []), "encoding")
    if "restoring" in result:
        lines += coding_table(result["restoring"], "decoding what was encoded")
    return "\n".join([*lines, *result.get("notes", [])])


def main() -> int:
    parser = gpu.parser_with_contract(__doc__.splitlines()[0])
    arguments = parser.parse_args()
    sizes = REHEARSAL if arguments.rehearse else Sizes()
    device = gpu.find_device(parser, arguments.rehearse)
    torch.manual_seed(arguments.seed)
    started = time.perf_counter()
    contract = gpu.nothing_checked()
    if not arguments.skip_contract:
        contract = gpu.check_contract(check_case, contract_cases(sizes), device)
    result: dict[str, Any] = {
        "question": "decoding and attention from the packed KV cache on a GPU",
        "settings": {"seed": arguments.seed, "triton": gpu.triton_version(), **vars(sizes)},
        "targets": TARGETS,
        "contract": contract,
    }
    gpu.compile_all(compile_case, [(sizes, bits) for bits in WIDTHS], device)
    copied = gpu.copy_bandwidth(device, sizes.copy_bytes)
    result["copy_bytes_per_second"] = copied
    result["bandwidth"] = [
        row
        for tokens, batch in sizes.settings
        for row in measure_bandwidth(device, sizes, tokens, batch, copied)
    ]
    result["encoding"] = [
        row for tokens in sizes.encoded_tokens for row in measure_encoding(device, sizes, tokens)
    ]
    result["restoring"] = [
        row for tokens in sizes.encoded_tokens for row in measure_restoring(device, sizes, tokens)
    ]
    model = make_model(device, sizes, arguments.seed)
    result["decoding"] = {
        f"decode_{tokens}_batch_{batch}": measure_decoding(model, sizes, tokens, batch)
        for tokens, batch in sizes.settings
    }
    result["seconds"] = round(time.perf_counter() - started, 1)
    return gpu.finish("gpu_kv_cache", result, table(result), arguments.rehearse)


if __name__ == "__main__":
    sys.exit(main())
