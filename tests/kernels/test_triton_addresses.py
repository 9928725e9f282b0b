"""Triton's kernels touch nothing but the tensors they are given.

The interpreter reads and writes what addresses point to, whatever that is, as a GPU does where the
memory beside a tensor is another's. Here each address is looked up first.
"""

import sys

import numpy as np
import pytest
import torch

from hf_adaptive_sparse.kernels import (
    triton_attention,
    triton_decoding,
    triton_device,
    triton_encoding,
    triton_sparse,
)
from hf_adaptive_sparse.kernels.packed import PackedBlocks, PackedCache, PackedKeys, PackedValues
from hf_adaptive_sparse.kvcache.selection import key_codec, value_codec
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight

pytest.importorskip("triton", reason="Triton is optional and not installed here")

WORD_BYTES = 4
"""Of a tensor's last word all may be read: it is in the same page of memory."""


class Guard:
    """The interpreter's memory, asked for nothing but what a launch was given."""

    def __init__(self, memory):
        self._memory = memory
        self.given = []
        self.accesses = 0

    def __getattr__(self, name):
        return getattr(self._memory, name)

    def give(self, arguments):
        parts = [part.untyped_storage() for part in arguments if isinstance(part, torch.Tensor)]
        self.given = [(part.data_ptr(), part.data_ptr() + part.nbytes()) for part in parts]

    def load(self, pointers, mask, other, dtype):
        self._check(pointers, mask, np.dtype(dtype).itemsize, WORD_BYTES)
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self._check(pointers, mask, np.asarray(value).dtype.itemsize, 1)
        return self._memory.store(pointers, value, mask)

    def _check(self, pointers, mask, size, unit):
        addresses, mask = np.broadcast_arrays(np.asarray(pointers), np.asarray(mask, dtype=bool))
        addresses = addresses[mask].astype(np.int64)
        inside = np.zeros(addresses.shape, dtype=bool)
        for start, end in self.given:
            inside |= (addresses >= start) & (addresses + size <= end + -end % unit)
        assert inside.all(), f"{(~inside).sum()} of {inside.size} addresses are of no argument"
        self.accesses += inside.size


@pytest.fixture
def guard(device, monkeypatch):
    """Guard all launches of a test; ``device`` has made the interpreter the one that launches."""
    interpreter = sys.modules["triton.runtime.interpreter"]
    guard = Guard(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", guard)
    launch = triton_device.compile_and_launch

    def launch_guarded(kernel, grid, arguments, constants):
        guard.give(arguments)
        launch(kernel, grid, arguments, constants)
        return lambda grid, arguments: launch_guarded(kernel, grid, arguments, constants)

    for module in (triton_attention, triton_device, triton_sparse):
        monkeypatch.setattr(module, "compile_and_launch", launch_guarded)
    for module in (triton_attention, triton_decoding, triton_encoding, triton_sparse):
        kept = "_chosen" if module is triton_sparse else "_compiled"
        monkeypatch.setattr(module, kept, {})
    yield guard
    assert guard.accesses


interpreted = pytest.mark.parametrize("device", ["interpreter"], indirect=True)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "bits", "group"),
    [
        (torch.bfloat16, 16, None),
        (torch.float16, 8, 96),
        (torch.bfloat16, 4, 64),
        (torch.float32, 16, None),
        (torch.float32, 4, None),
    ],
)
@pytest.mark.parametrize("shape", [(5, 320), (3, 31), (4, 1032)])
def test_sparse_weights(guard, dtype, bits, group, shape):
    weight = torch.randn(shape)
    weight[torch.rand(shape) < 0.5] = 0
    weight[-1] = 1  # the last row ends with the last value
    sparse = SparseWeight.from_dense(weight.to(dtype), bits, group)
    triton_sparse.linear(
        torch.randn(2, shape[1]).to(dtype), sparse, torch.randn(shape[0]).to(dtype)
    )
    triton_sparse.decompress(sparse, 1, shape[0], torch.empty(shape[0] - 1, shape[1], dtype=dtype))


@interpreted
@pytest.mark.parametrize(
    ("dtype", "width", "bits", "mode", "heads", "queries"),
    [
        (torch.bfloat16, 128, (8, 6), "channel", 8, 1),
        (torch.float16, 72, (3, 6), "channel", 14, 2),
        (torch.bfloat16, 80, (4, 3), "token", 6, 1),
        (torch.float32, 64, (2, 8), "channel", 2, 1),
        (torch.bfloat16, 80, (6, 4), "channel", 2, 1),
    ],
)
def test_attention(guard, dtype, width, bits, mode, heads, queries):
    states = torch.randn(1, 2, 3, 128, width).to(dtype)
    keys = PackedKeys(
        bits[0],
        *(part.clone() for part in key_codec(bits[0], mode, 64).encode(states, "keys")),
        group=None if mode == "channel" else 64,
    )
    values = PackedValues(
        bits[1], *(part.clone() for part in value_codec(bits[1], 64).encode(states, "values")), 64
    )
    raw = torch.randn(1, 2, 5, width).to(dtype)
    cache = PackedCache(PackedBlocks(keys, values, 128, lengths=(128, 7, 100)), raw, raw)
    query = torch.randn(1, heads, queries, width).to(dtype)
    triton_attention.attend(query, cache, torch.rand(1, 1, queries, cache.length) < 0.9)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "width", "bits"), [(torch.bfloat16, 128, 6), (torch.float16, 72, 3)]
)
@pytest.mark.parametrize("kind", ["channel", "token", "values"])
def test_encoding_and_decoding(guard, dtype, width, bits, kind):
    codec = value_codec(bits, 64) if kind == "values" else key_codec(bits, kind, 64)
    states = torch.randn(1, 2, 2, 64, width).to(dtype)
    parts = triton_encoding.encode(states, codec.kernel_format)
    output = torch.empty(1, 2, 100, width, dtype=dtype)
    triton_decoding.decode(parts, codec.kernel_format, 64, output, lengths=(64, 36))
