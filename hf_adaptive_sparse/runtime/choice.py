"""Which runtime a model is loaded into, where the caller left it open, and why.

``"auto"`` takes the sparse runtime where one decoded token takes no longer with it, as measured on
this machine with a layer of the model's own size, or where only it fits into memory. Models whose
weights lie in the processor's caches gain nothing by it and stay dense.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from hf_adaptive_sparse.kernels import sparse_linear
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight, size_bytes
from hf_adaptive_sparse.packing.stored_weight import ValueFormat
from hf_adaptive_sparse.packing.upper_bytes import UPPER_BYTE_BITS
from hf_adaptive_sparse.packing.weight_codes import CODE_BITS, SCALE_DTYPES, group_count
from hf_adaptive_sparse.runtime.free_memory import available_bytes

SMALL_BYTES = 256 << 20
"""Dense bytes of all compressed weights below which the dense runtime is taken, unmeasured."""

_COMPUTED_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_TIMED_ELEMENTS = 1 << 24  # of the layer that is timed, at most
_TIMED_COPIES = 4  # so that one layer's tensors are not in the cache when they are used again
_ROUNDS = 5


@dataclass(frozen=True)
class RuntimeChoice:
    """A runtime, and why.

    Attributes:
        runtime: ``"dense"`` or ``"sparse"``.
        reason: A clause that completes "because".
    """

    runtime: str
    reason: str


@dataclass(frozen=True)
class CompressedWeights:
    """The weights that may be kept compressed, before they are loaded.

    Attributes:
        shapes: Module name -> ``(out, in)``.
        formats: Module name -> how its values are stored.
        ratios: Module name -> fraction of its weights removed.
        dtype: Dtype of the weights.
        rewritten: Whether the model's own forward changes weights.
    """

    shapes: Mapping[str, tuple[int, ...]]
    formats: Mapping[str, ValueFormat]
    ratios: Mapping[str, float]
    dtype: torch.dtype
    rewritten: bool = False

    @property
    def dense_bytes(self) -> int:
        """Bytes of all of them, decompressed."""
        return sum(rows * columns for rows, columns in self.shapes.values()) * self.dtype.itemsize

    def sparse_bytes(self, device: torch.device) -> int:
        """Return the bytes of all of them, compressed in the memory of a device."""
        return sum(self._sparse_bytes(name, device.type == "cuda") for name in self.shapes)

    def _sparse_bytes(self, name: str, blocks: bool) -> int:
        (rows, columns), (bits, group_size) = self.shapes[name], self.formats[name]
        nnz = rows * columns - round(self.ratios.get(name, 0.0) * rows * columns)
        bits = _bits_held(bits, self.dtype, on_gpu=blocks)
        groups = group_count(columns, group_size) if bits in CODE_BITS else 0
        return size_bytes(rows, columns, nnz, bits, groups, self.dtype.itemsize, blocks=blocks)

    @property
    def largest(self) -> str:
        """The module with the largest weight, which is the one to time."""
        return max(self.shapes, key=lambda name: self.shapes[name][0] * self.shapes[name][1])


def main_device(device_map: Any) -> torch.device:
    """Return the device that most of a model goes to, from ``from_pretrained``'s ``device_map``.

    An accelerator if any part goes to one or the map is computed later (``"auto"``), else the CPU.
    """
    for place in _places(device_map):
        if place in _COMPUTED_MAPS:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(place, int):
            return torch.device("cuda", place)
        if place not in (None, "disk") and torch.device(place).type != "cpu":
            return torch.device(place)
    return torch.device("cpu")


def may_offload_to_disk(device_map: Any) -> bool:
    """Whether ``from_pretrained``'s ``device_map`` may put a part of the model on the disk."""
    return any(place in ("disk", *_COMPUTED_MAPS) for place in _places(device_map))


def _places(device_map: Any) -> list[Any]:
    return list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]


def check_multiplies(dtype: torch.dtype) -> None:
    """Refuse the sparse runtime for weights that it cannot multiply with.

    Raises:
        ValueError: If it cannot in this dtype.
    """
    if dtype not in SCALE_DTYPES:
        raise ValueError(
            f"runtime='sparse' multiplies in float32, bfloat16 or float16, got {dtype}. "
            "Load the model with another dtype, or pass runtime='dense'."
        )


def check_only_read(rewritten: bool) -> None:
    """Refuse the sparse runtime for a model whose own forward changes weights.

    Args:
        rewritten: Whether it does.

    Raises:
        ValueError: If so.
    """
    if rewritten:
        raise ValueError(
            "runtime='sparse' keeps weights that can only be read, and this model's forward "
            "rescales its own (rescale_every in its config). Pass runtime='dense'."
        )


def choose_runtime(
    asked: str, weights: CompressedWeights, device: torch.device | None
) -> RuntimeChoice:
    """Choose the runtime of a model that is being loaded.

    Args:
        asked: ``"dense"``, ``"sparse"`` or ``"auto"``.
        weights: Its compressed weights.
        device: Where it goes; ``None``: the CPU.

    Returns:
        The runtime, and why.

    Raises:
        ValueError: If the sparse runtime was asked for and cannot multiply in the weights' dtype,
            or the model changes its weights.
    """
    device = device or torch.device("cpu")
    if not weights.shapes:
        return RuntimeChoice("dense", "no weight is stored compressed")
    if asked == "sparse":
        check_multiplies(weights.dtype)
        check_only_read(weights.rewritten)
    if asked != "auto":
        return RuntimeChoice(asked, "it was asked for")
    if weights.rewritten:
        return RuntimeChoice("dense", "the model's own forward changes its weights")
    if weights.dtype not in SCALE_DTYPES:
        return RuntimeChoice("dense", f"sparse weights do not multiply in {weights.dtype}")
    dense, sparse = weights.dense_bytes, weights.sparse_bytes(device)
    free = available_bytes(device)
    if free is not None and sparse < free < dense:
        return RuntimeChoice(
            "sparse",
            f"the dense weights take {_mib(dense)} and {_mib(free)} are free on {device}",
        )
    if dense < SMALL_BYTES:
        return RuntimeChoice(
            "dense", f"its compressed weights are small ({_mib(dense)} when decompressed)"
        )
    name = weights.largest
    rows, columns = weights.shapes[name]
    shape = (max(1, min(rows, _TIMED_ELEMENTS // columns)), columns)
    ratio = round(weights.ratios.get(name, 0.0), 2)
    seconds = time_layer(shape, *weights.formats[name], ratio, weights.dtype, device)
    told = (
        f"a token takes {seconds[1] * 1e6:.0f} µs in a layer of {shape[0]} x {shape[1]} on {device}"
        f", {seconds[0] * 1e6:.0f} µs with dense weights, and the weights take {_mib(sparse)} "
        f"instead of {_mib(dense)}"
    )
    return RuntimeChoice("sparse" if seconds[1] <= seconds[0] else "dense", told)


@functools.cache
def time_layer(
    shape: tuple[int, int],
    bits: int,
    group_size: int | None,
    ratio: float,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[float, float]:
    """Time the product of one token with one random layer, dense and sparse; once per process.

    Args:
        shape: ``(out, in)``.
        bits: Bits of the values.
        group_size: Columns per scale, of codes.
        ratio: Fraction of the weights removed.
        dtype: Dtype of weights and activations.
        device: Where.

    Returns:
        Seconds with dense weights, and with sparse ones; each the best of some rounds.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    dense = torch.rand(shape, generator=generator, device="cpu")
    dense[torch.rand(shape, generator=generator, device="cpu") < ratio] = 0.0
    weight = dense.to(dtype)
    sparse = SparseWeight.from_dense(weight, _bits_held(bits, dtype), group_size)
    x = torch.rand((1, shape[1]), generator=generator, device="cpu").to(device, dtype)
    plain = [weight.to(device, copy=True) for _ in range(_TIMED_COPIES)]
    packed = [_copy(sparse, device) for _ in range(_TIMED_COPIES)]
    with torch.no_grad():
        return (
            _best_seconds([functools.partial(functional.linear, x, w) for w in plain], device),
            _best_seconds([functools.partial(sparse_linear.linear, x, w) for w in packed], device),
        )


def _bits_held(bits: int, dtype: torch.dtype, on_gpu: bool = False) -> int:
    """Return the bits that values take in memory: 12 are for bfloat16 on a CPU."""
    return 16 if bits == UPPER_BYTE_BITS and (dtype != torch.bfloat16 or on_gpu) else bits


def _copy(weight: SparseWeight, device: torch.device) -> SparseWeight:
    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, copy=True)

    if device.type != "cpu":
        weight = weight.plain()
    copied = replace(
        weight,
        bitmask=copy(weight.bitmask),
        values=copy(weight.values),
        row_offsets=copy(weight.row_offsets),
        scales=None if weight.scales is None else copy(weight.scales),
        codebook=None if weight.codebook is None else copy(weight.codebook),
    )
    return replace(copied, block_offsets=sparse_linear.block_offsets_for(copied))


def _best_seconds(calls: list[Callable[[], torch.Tensor]], device: torch.device) -> float:
    """Return the seconds of one call: the least over rounds of their mean."""
    best = float("inf")
    for _ in range(_ROUNDS):
        _wait(device)
        started = time.perf_counter()
        for call in calls:
            call()
        _wait(device)
        best = min(best, (time.perf_counter() - started) / len(calls))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"
