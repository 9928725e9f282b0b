"""What does each way of storing keys and values cost in perplexity, and how many bits does it take?

Perplexity of the shared trained model on its evaluation text, one forward per window through the
cache, against the unquantised model: over bits, key modes, group sizes, block lengths, widths of
the metadata, sinks, and with the scales ending at the extremes instead of fitted. The first rows
are the defaults on the whole text; ``--windows`` limits the others.

    python benchmarks/kv_codecs.py [--windows 32] [--default-windows 0] [--length 512]

Keys per token and values with 16-bit metadata are never fitted, so that at 2 and 3 bits they are to
be compared with the rows "from minimum to maximum".

The bits per element are counted from what a cache of 1,024 tokens has allocated, in bfloat16.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from environment import shared, write_result
from torch.nn import functional
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from hf_adaptive_sparse.calibration.data import Batch, load_batches
from hf_adaptive_sparse.kvcache import channel, transposed
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.kvcache.grouped import GroupCodec
from hf_adaptive_sparse.profiles import KVCacheConfig

BITS = (8, 6, 4, 3, 2)


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: What is varied against the defaults.
        profile: The KV profile.
        wide_metadata: Values with a 16-bit step and minimum per token and group, not 8-bit ones.
        fitted: Whether scales of 2 and 3 bits are fitted, not from minimum to maximum.
        whole: Whether it is measured on the whole text.
    """

    name: str
    profile: KVCacheConfig
    wide_metadata: bool = False
    fitted: bool = True
    whole: bool = False


def cases(layers: int) -> Iterator[Case]:
    mean_7 = KVCacheConfig(
        key_bits=tuple((8, 6)[i % 2] for i in range(layers)),
        value_bits=tuple((6, 8)[i % 2] for i in range(layers)),
    )
    yield Case("defaults, mean 7", mean_7, whole=True)
    for bits in BITS:
        yield Case(f"defaults, {bits}", KVCacheConfig(bits=bits), whole=True)
    for bits in (4, 3, 2):
        base = KVCacheConfig(bits=bits)
        yield Case(f"defaults, {bits}", base)
        yield Case(f"keys only, {bits}", replace(base, value_bits=16))
        yield Case(f"values only, {bits}", replace(base, key_bits=16))
        yield Case(f"keys per token, {bits}", replace(base, key_mode="token"))
        yield Case(f"values with 16-bit metadata, {bits}", base, wide_metadata=True)
        if bits < 4:
            yield Case(f"scales from minimum to maximum, {bits}", base, fitted=False)
        yield Case(f"groups of 32, {bits}", replace(base, group_size=32))
        yield Case(f"blocks of 64, {bits}", replace(base, residual_length=64))
        yield Case(f"4 sinks, {bits}", replace(base, sink_length=4))


@contextmanager
def as_in(case: Case) -> Iterator[None]:
    """Switch the fitting of scales off where the case asks for it."""
    if case.fitted:
        yield
        return
    with patch.object(channel, "KEY_FITS", {}), patch.object(transposed, "VALUE_FITS", {}):
        yield


def new_cache(model: PreTrainedModel, case: Case) -> AdaptiveQuantizedCache:
    cache = AdaptiveQuantizedCache(model.config, case.profile)
    if case.wide_metadata:
        for layer in cache.layers:
            layer._value_codec = GroupCodec(layer.value_bits, case.profile.group_size)
    return cache


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: list[Batch], case: Case | None) -> float:
    loss, count = 0.0, 0
    for batch in batches:
        ids = batch["input_ids"]
        cache = None if case is None else new_cache(model, case)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits
        scored = functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        loss += float(scored)
        count += ids[:, 1:].numel()
    return math.exp(loss / count)


def bits_per_element(model: PreTrainedModel, case: Case, tokens: int = 1024) -> float:
    """Bits allocated per key and value, in bfloat16, at a whole number of blocks."""
    config = model.config.get_text_config()
    cache = new_cache(model, case)
    shape = (1, config.num_key_value_heads, tokens + case.profile.sink_length, config.head_dim)
    states = torch.randn(shape).bfloat16()
    for layer in range(len(cache)):
        cache.update(states, states, layer)
    return 8 * cache.nbytes / (2 * len(cache) * states.numel())


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| keys and values | bits per element | windows | perplexity | against dense |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['name']} | {row['bits_per_element']:.3f} | {row['windows']} | "
        f"{row['perplexity']:.4f} | {row['increase_percent']:+.3f} % |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=32, help="of the variants")
    parser.add_argument("--default-windows", type=int, default=0, help="of the defaults; 0: all")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    started = time.perf_counter()
    folder = shared("models/tiny-llava")
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    batches = load_batches(
        shared("data/wikitext2/evaluation.parquet"),
        AutoProcessor.from_pretrained(folder),
        config=model.config,
        num_samples=arguments.default_windows or None,
        sequence_length=arguments.length,
        batch_size=8,
        split="validation",
    )
    few = batches[: max(1, arguments.windows // 8)]
    dense: dict[bool, float] = {}
    rows: list[dict[str, object]] = []
    for case in (None, *cases(len(AdaptiveQuantizedCache(model.config)))):
        for whole in (True, False):
            chosen = batches if whole else few
            if case is not None and case.whole is not whole:
                continue
            with as_in(case or Case("dense", KVCacheConfig())):
                value = perplexity(model, chosen, case)
                bits = 16.0 if case is None else bits_per_element(model, case)
            if case is None:
                dense[whole] = value
            rows.append(
                {
                    "name": "unquantised" if case is None else case.name,
                    "windows": sum(len(batch["input_ids"]) for batch in chosen),
                    "bits_per_element": bits,
                    "perplexity": value,
                    "increase_percent": 100 * (value / dense[whole] - 1),
                }
            )
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    result = {
        "question": "perplexity of the shared model through each way of storing keys and values",
        "settings": vars(arguments),
        "seconds": round(time.perf_counter() - started, 1),
        "rows": rows,
    }
    write_result("kv_codecs", result, table(rows))


if __name__ == "__main__":
    main()
