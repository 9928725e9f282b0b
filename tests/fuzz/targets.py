"""What reads bytes that strangers wrote: each target takes any bytes and may only raise ValueError.

A target turns its input into what a reader is given, from a valid form that the input's bytes
change here and there; the first byte says how far to stray. `run` holds every execution to the
rules: no other exception, and no more memory than a bound that the input's size explains.
"""

from __future__ import annotations

import copy
import functools
import json
import random
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.headers import parse_header, read_headers
from hf_adaptive_sparse.packing.bitmask import decompress, row_bytes
from hf_adaptive_sparse.packing.bits import pack, unpack
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.profiles import CompressionProfile, KVCacheConfig

MAX_BYTES = 64 << 20
"""What Python may allocate in one execution: inputs are kilobytes, the rest is margin."""

CONFIG = SparsityConfig(
    sparsity={"model.layers.0.mlp.up_proj": 0.5, "model.layers.1.*": 0.25},
    kv_cache=KVCacheConfig(key_bits=(8, 6), value_bits=(6, 8)),
    provenance={"base_model": "a/b", "seed": 0},
).to_dict()

PROFILE = {
    "format_version": 1,
    "sparsity": {"format_version": 1, "ratios": {"a.b": 0.5, "a.c": 0.0}},
    "kv_cache": KVCacheConfig(bits=(8, 6)).to_dict(),
}

HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight_values": {"dtype": "BF16", "shape": [6], "data_offsets": [0, 12]},
    "a.weight_bitmask": {"dtype": "U8", "shape": [2, 1], "data_offsets": [12, 14]},
}
HEADER_DATA_BYTES = 14

_ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 8, 16, 1 << 31, 1 << 63, -(1 << 70), 0.5, 1.0, -0.0, 1e308,
    float("nan"), float("inf"), "", "a", "2:4", "0:0", "9:4", "*", "\x00", "é" * 40, [], [8], [[]],
    [0.5, "x"], {}, {"a": 0.5}, {"": {}}, "unstructured", "channel", "dense", "sparse", 10**400,
)  # fmt: skip


def mutated(value: Any, rng: random.Random, changes: int) -> Any:
    """Return a JSON value with some of its parts replaced, removed, doubled or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(changes):
        places: list[tuple[Any, Any]] = []

        def collect(node: Any, places: list[tuple[Any, Any]] = places) -> None:
            keys = node if isinstance(node, dict) else range(len(node))
            for key in list(keys):
                places.append((node, key))
                if isinstance(node[key], dict | list):
                    collect(node[key])

        if not isinstance(value, dict | list) or not value:
            return value
        collect(value)
        node, key = rng.choice(places)
        action = rng.randrange(4)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, dict):
            node[rng.choice(("", "bits", "ratios", "runtime", str(key) + "x"))] = node.pop(key)
        elif action == 2 and isinstance(node[key], int | float) and abs(node[key]) < 1e300:
            node[key] = node[key] * rng.choice((-1, 2, 0.5, 1e9)) + rng.choice((0, 1, -1))
        else:
            # A copy: later changes are not to change the list, or put a value into itself.
            node[key] = copy.deepcopy(rng.choice(_ODD_VALUES))
    return value


def _seeded(data: bytes) -> tuple[random.Random, int]:
    return random.Random(data), 1 + (data[0] % 4 if data else 0)


def config(data: bytes) -> None:
    """``config.json`` of a checkpoint; what is read is written and read again."""
    rng, changes = _seeded(data)
    made = SparsityConfig.from_dict(mutated(CONFIG, rng, changes))
    again = SparsityConfig.from_dict(json.loads(json.dumps(made.to_dict())))
    if again != made:
        raise AssertionError(f"{made.to_dict()} was not read back as it was written")


def profile(data: bytes) -> None:
    """``profile.json`` of a search."""
    rng, changes = _seeded(data)
    made = CompressionProfile.from_dict(mutated(PROFILE, rng, changes))
    if CompressionProfile.from_dict(json.loads(json.dumps(made.to_dict()))) != made:
        raise AssertionError(f"{made.to_dict()} was not read back as it was written")


def header(data: bytes) -> None:
    """The JSON header of a safetensors file: changed by parts, or by bytes."""
    rng, changes = _seeded(data)
    if data and data[0] % 2:
        raw = bytearray(json.dumps(HEADER).encode())
        for byte in data[1:9]:
            raw[rng.randrange(len(raw))] = byte
        parse_header(bytes(raw), HEADER_DATA_BYTES, "file")
    else:
        text = json.dumps(mutated(HEADER, rng, changes)).encode()
        parse_header(text, HEADER_DATA_BYTES, "file")


def safetensors_file(data: bytes) -> None:
    """A whole file on disk: length, header and data, any of which may lie."""
    rng, changes = _seeded(data)
    text = json.dumps(mutated(HEADER, rng, changes - 1)).encode()
    length = rng.choice((len(text), len(text) + 1, 0, 1 << 62, rng.getrandbits(64)))
    whole = struct.pack("<Q", length) + text + data[:HEADER_DATA_BYTES].ljust(HEADER_DATA_BYTES)
    whole = whole[: rng.choice((len(whole), rng.randrange(len(whole) + 1)))]
    folder = Path(_folder().name)
    (folder / "model.safetensors").write_bytes(whole)
    read_headers(folder)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for the files of this process; in memory where the system has such a place."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)


def bitmask(data: bytes) -> None:
    """Values and a bitmask that may not belong together."""
    rng, _ = _seeded(data)
    columns = rng.choice((0, 1, 7, 8, 9, 31, 64, rng.randrange(100)))
    wide = rng.choice((row_bytes(columns), rng.randrange(12)))
    mask = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
    rows = mask.numel() // wide if wide else rng.randrange(3)
    mask = mask[: rows * wide].view(rows, wide)
    kept = sum(bin(byte).count("1") for byte in data[: rows * wide])
    values = torch.ones(max(0, kept + rng.choice((0, 0, 0, 1, -1, 100))), dtype=torch.bfloat16)
    decompress(values, mask, columns)


def bits(data: bytes) -> None:
    """Packed codes of any width and count; codes that fit come back as they went in."""
    rng, _ = _seeded(data)
    width = rng.choice((1, 2, 3, 4, 6, 8, 16, -1))
    stream = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
    unpack(stream, width, rng.choice((0, 1, stream.numel(), rng.randrange(2000), 1 << 40)))
    codes = stream & ((1 << width) - 1)
    if not torch.equal(unpack(pack(codes, width), width, codes.numel()), codes):
        raise AssertionError(f"{codes.tolist()} did not come back from {width} bits")


def sparse_weight(data: bytes) -> None:
    """The tensors of one sparse weight in memory."""
    rng, _ = _seeded(data)
    rows, columns = rng.randrange(5), rng.randrange(70)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    dense = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
    dense[torch.rand(rows, columns, generator=generator) < 0.5] = 0
    weight = SparseWeight.from_dense(dense, rng.choice((16, 8, 4)))
    tensors = dict(weight.tensors())
    name = rng.choice(list(tensors))
    tensor = tensors[name].clone()
    if tensor.numel():
        place = rng.randrange(tensor.numel() * tensor.element_size())
        tensor.view(-1).view(torch.uint8)[place] = data[0] if data else 0
    tensors[name] = rng.choice((tensor, tensor.view(-1)[1:], tensor.float(), tensor[None]))
    arguments: dict[str, Any] = tensors
    again = SparseWeight.from_tensors(columns, **arguments)
    if again.to_dense().shape != dense.shape:
        raise AssertionError(f"{again.to_dense().shape} instead of {dense.shape}")


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (config, profile, header, safetensors_file, bitmask, bits, sparse_weight)
}


def run(name: str, data: bytes, *, measure_memory: bool = False) -> bool:
    """Execute a target once.

    Args:
        name: Name of the target.
        data: Its input.
        measure_memory: Hold it to `MAX_BYTES` too (slow).

    Returns:
        Whether the input was accepted; False if it was refused with a ValueError.

    Raises:
        AssertionError: If a rule is broken.
        Exception: Whatever else the reader let through, which is a bug of ours.
    """
    if measure_memory:
        tracemalloc.start()
    try:
        TARGETS[name](data)
    except ValueError:
        return False
    finally:
        if measure_memory:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            if peak > MAX_BYTES:
                raise AssertionError(f"{name} allocated {peak} bytes for {len(data)} of input")
    return True
