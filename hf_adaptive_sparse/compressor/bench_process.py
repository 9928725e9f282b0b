"""The process in which ``bench`` measures one model: a task on stdin, figures on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.plugin import register
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.evaluation.forward import resolve_kv_cache
from hf_adaptive_sparse.evaluation.resource_meter import ResourceMeter
from hf_adaptive_sparse.evaluation.resources import kv_bytes_per_token

ROUNDS = 3
"""Each time is the best of so many."""

_READ_BYTES = 1 << 30


def main() -> None:
    """Read a task, measure, and print one line of JSON."""
    register()
    print(json.dumps(measure(json.load(sys.stdin))))


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `BenchRow`, and ``bytes_per_second``.

    Args:
        task: ``source`` (the fields of a `ModelSource`), ``runtime``, ``compressed`` (whether it
            carries our config), ``prompt_tokens``, ``new_tokens``.
    """
    source, runtime = ModelSource(**task["source"]), task["runtime"]
    config = None
    if task["compressed"]:
        config = SparsityConfig(runtime=runtime, kv_cache=False if runtime == "dense" else None)
    prompt, new = task["prompt_tokens"], task["new_tokens"]
    generator = torch.Generator().manual_seed(0)
    with ResourceMeter() as load:
        started = time.perf_counter()
        model = source.load(config)
        loaded = time.perf_counter() - started
        _generate(model, torch.ones((1, 1), dtype=torch.int64), 1)
        first = time.perf_counter() - started
    quantizer = getattr(model, "hf_quantizer", None)
    choice = getattr(quantizer, "runtime_choice", None)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (1, prompt), generator=generator)
    prefill = _best(lambda: _generate(model, ids, 1))
    whole = _best(lambda: _generate(model, ids, 1 + new))
    decoded = whole - prefill
    speed = new / decoded if decoded > 0 else None
    bandwidth = _bytes_per_second(model.device)
    length = prompt + new // 2
    read = decoder_bytes(model) + round(length * kv_bytes_per_token(model.config, length=length))
    peak = load.peak_rss_bytes - load.start_rss_bytes
    return {
        "runtime": runtime if choice is None else choice.runtime,
        "adaptive_cache": resolve_kv_cache(model.config, None) is not None,
        "reason": "" if choice is None else choice.reason,
        "memory_bytes": model.get_memory_footprint(),
        "load_seconds": loaded,
        "first_token_seconds": first,
        "load_peak_bytes": load.peak_cuda_bytes or peak,
        "prefill_tokens_per_second": prompt / prefill,
        "decode_tokens_per_second": speed,
        "read_bytes_per_token": read,
        "bandwidth_share": None if speed is None else read * speed / bandwidth,
        "bytes_per_second": bandwidth,
    }


def decoder_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the weights that one decoded token is multiplied with.

    Those of the language model's decoder and of the output head; of an embedding that is not also
    the head, a token reads a single row.
    """
    parts: list[nn.Module] = [model.get_decoder()]
    head = model.get_output_embeddings()
    parts += [] if head is None else [head]
    tensors = {}
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Embedding):
                continue
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensors[id(tensor)] = tensor.nbytes
    return sum(tensors.values())


def _generate(model: PreTrainedModel, ids: torch.Tensor, count: int) -> None:
    ids = ids.to(model.device)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
    )
    _wait(model.device)


def _best(function: Callable[[], None]) -> float:
    """Return the least seconds of some calls, after one that is not counted."""
    function()
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def _bytes_per_second(device: torch.device) -> float:
    """Return how fast a plain read of memory goes, with the threads that torch uses."""
    data = torch.zeros(_READ_BYTES // 4, device=device)

    def read() -> None:
        data.sum()
        _wait(device)

    return _READ_BYTES / _best(read)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
