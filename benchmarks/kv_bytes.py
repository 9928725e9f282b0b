"""How many bytes does the adaptive KV cache take, against DynamicCache?

Fills both caches with the same random keys and values, once as one prompt and once token by token,
and compares the bytes that are allocated: packed codes with the slack of their buffers, metadata
and unquantised tails. Prints a table and writes ``results/kv_bytes.json``.

    python benchmarks/kv_bytes.py [--lengths 512 2048 8192] [--head-dim 64] [--dtype bfloat16]

The ratios depend on length, head size and dtype alone; layers and heads are few to be quick.
"""

from __future__ import annotations

import argparse
import time

import torch
from environment import write_result
from transformers import DynamicCache, LlamaConfig

from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.profiles import KVCacheConfig

NUM_LAYERS = 2
PROFILES = {
    "16": KVCacheConfig(bits=16),
    "8": KVCacheConfig(bits=8),
    "8 and 6 (mean 7)": KVCacheConfig(key_bits=(8, 6), value_bits=(6, 8)),
    "6": KVCacheConfig(bits=6),
    "4": KVCacheConfig(bits=4),
    "3": KVCacheConfig(bits=3),
    "2": KVCacheConfig(bits=2),
}


def model_config(head_dim: int, kv_heads: int) -> LlamaConfig:
    """The config of a Llama with the given heads; no model is built."""
    return LlamaConfig(
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=kv_heads * head_dim,
    )


def fill(cache: DynamicCache | AdaptiveQuantizedCache, states: torch.Tensor, chunk: int) -> None:
    """Feed ``states`` (batch, kv_heads, seq, head_dim) to every layer in chunks of tokens."""
    for start in range(0, states.shape[-2], chunk):
        for layer in range(NUM_LAYERS):
            new = states[:, :, start : start + chunk]
            cache.update(new, new, layer)


def stock_nbytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(arguments.seed)
    config = model_config(arguments.head_dim, arguments.kv_heads)
    dtype = getattr(torch, arguments.dtype)
    rows: list[dict[str, object]] = []
    for length in arguments.lengths:
        shape = (1, arguments.kv_heads, length, arguments.head_dim)
        states = torch.randn(shape, generator=generator).to(dtype)
        stock = DynamicCache(config=config)
        fill(stock, states, chunk=length)
        for name, profile in PROFILES.items():
            row: dict[str, object] = {"bits": name, "tokens": length}
            row["dynamic_cache_bytes"] = stock_nbytes(stock)
            fillings = {"prompt": length}
            if length <= arguments.max_steps:
                fillings["single_steps"] = 1
            for filling, chunk in fillings.items():
                cache = AdaptiveQuantizedCache(config, profile)
                fill(cache, states, chunk)
                row[f"{filling}_bytes"] = cache.nbytes
                row[f"{filling}_ratio"] = cache.nbytes / stock_nbytes(stock)
            rows.append(row)
    return rows


def table(rows: list[dict[str, object]]) -> str:
    def ratio(row: dict[str, object], filling: str) -> str:
        value = row.get(f"{filling}_ratio")
        return "" if value is None else f"{value:.4f}"

    lines = [
        "| bits | tokens | filled by a prompt | by single steps |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['bits']} | {row['tokens']} | {ratio(row, 'prompt')} | "
        f"{ratio(row, 'single_steps')} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[63, 512, 2047, 2048, 2049, 8192])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--max-steps", type=int, default=2049, help="longest filled by single steps"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    rows = measure(arguments)
    defaults = KVCacheConfig()
    settings = vars(arguments) | {
        "group_size": defaults.group_size,
        "residual_length": defaults.residual_length,
        "key_mode": defaults.key_mode,
        "layers": NUM_LAYERS,
    }
    result = {
        "question": "bytes of the KV cache against DynamicCache, both as allocated",
        "settings": settings,
        "seconds": round(time.perf_counter() - started, 1),
        "rows": rows,
    }
    write_result("kv_bytes", result, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
