"""The bytes of a profile, and the limits it is held to.

Every figure comes from the size formula of its format: `LinearBytes` for the weights, the codecs'
own block sizes for the KV cache. Nothing is allocated to compute it.

A figure is what a profile takes at most, on the kind of device that the model is searched on: on a
GPU a weight has a quarter of a bit more. Weights that 8 or 4 bits round to 0 are not
stored either, which is not counted: they are rare among pruned weights, of which the smallest are
gone already, and up to a tenth of unpruned ones at 4 bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import Prunable, parameter_name, prunable_weights
from hf_adaptive_sparse.packing.stored_names import tensor_name
from hf_adaptive_sparse.packing.stored_weight import stored_kinds
from hf_adaptive_sparse.runtime.sparse_experts import compressible_stacks
from hf_adaptive_sparse.search.byte_sizes import exact_bytes
from hf_adaptive_sparse.search.cache_bytes import CacheBytes
from hf_adaptive_sparse.search.kv_split import LayerBits
from hf_adaptive_sparse.search.linear_bytes import LinearBytes
from hf_adaptive_sparse.search.space import OWN_DTYPE, SearchSpace

_NAME_SLACK = 8
"""Characters that a tensor's name in the file may be longer than at run time."""

_SHARD_BYTES = 5 * 10**9
"""The smallest shards that transformers writes by default; each has a header of its own."""


@dataclass(frozen=True)
class Spent:
    """The bytes of a profile.

    Attributes:
        fit_bytes: Memory of weights and KV cache; ``None`` where no limit is on it.
        size_bytes: The checkpoint's safetensors files; ``None`` likewise.
    """

    fit_bytes: int | None
    size_bytes: int | None

    def to_dict(self) -> dict[str, int]:
        """Return the bytes that are limited."""
        pairs = (("fit_bytes", self.fit_bytes), ("size_bytes", self.size_bytes))
        return {name: count for name, count in pairs if count is not None}


@dataclass(frozen=True)
class ByteBudget:
    """Limits in bytes, and the sizes needed to compute the bytes of a profile.

    Attributes:
        linears: Prunable linear -> its formats.
        other_memory: Bytes of all other parameters and buffers.
        other_disk: Bytes of all other tensors in the files, and of the files' headers.
        cache: The KV cache; ``None`` where no limit is on memory.
        fit_bytes: Limit on memory.
        size_bytes: Limit on the files.
    """

    linears: Mapping[str, LinearBytes]
    other_memory: int
    other_disk: int
    cache: CacheBytes | None
    fit_bytes: int | None
    size_bytes: int | None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        space: SearchSpace,
        modules_to_not_convert: Sequence[str] | None = None,
    ) -> ByteBudget:
        """Return the limits of a space for a model.

        Args:
            model: The dense model, in the dtype that it will be saved in.
            space: The search space.
            modules_to_not_convert: Names or globs of linears that stay dense.
        """
        weights = prunable_weights(model, modules_to_not_convert)
        counted = {id(weight.weight) for weight in weights.values()}
        memory = [t for t in _tensors(model, persistent=False).values() if id(t) not in counted]
        stored = _tensors(model, persistent=True)
        disk = [t for t in stored.values() if id(t) not in counted]
        fit = _limit(space.fit_bytes)
        stacks = [name for name, weight in weights.items() if not isinstance(weight, nn.Linear)]
        plain = set(stacks) - compressible_stacks(model, stacks).keys()
        return cls(
            linears={
                name: LinearBytes.of(weight.weight, plain_in_memory=name in plain)
                for name, weight in weights.items()
            },
            other_memory=sum(t.numel() * t.element_size() for t in memory),
            other_disk=sum(t.numel() * t.element_size() for t in disk)
            + _header_bytes(stored, weights, quantised=space.weight_bits is not None),
            cache=None if fit is None else CacheBytes.of(model, space),
            fit_bytes=fit,
            size_bytes=_limit(space.size_bytes),
        )

    def spent(
        self,
        removed: Mapping[str, int],
        weight_bits: Mapping[str, int],
        kv_bits: Sequence[LayerBits] | None,
    ) -> Spent:
        """Return the bytes of a profile.

        Args:
            removed: Linear -> weights that it loses; those not named lose none.
            weight_bits: Linear -> bits of its weights; those not named keep their dtype.
            kv_bits: ``(key bits, value bits)`` per decoder layer; ``None``: a plain cache.
        """
        fit = size = None
        if self.cache is not None:
            kept = self._kept(removed, weight_bits)
            weights = sum(linear.in_memory(count, bits) for linear, count, bits in kept)
            fit = self.other_memory + weights + self.cache.at_most(kv_bits)
        if self.size_bytes is not None:
            size = self.on_disk(removed, weight_bits)
        return Spent(fit, size)

    def on_disk(self, removed: Mapping[str, int], weight_bits: Mapping[str, int]) -> int:
        """Return the bytes of the files, whether there is a limit on them or not.

        Args:
            removed: As for `spent`.
            weight_bits: As for `spent`.
        """
        kept = self._kept(removed, weight_bits)
        return self.other_disk + sum(linear.on_disk(count, bits) for linear, count, bits in kept)

    def _kept(
        self, removed: Mapping[str, int], weight_bits: Mapping[str, int]
    ) -> Iterator[tuple[LinearBytes, int, int]]:
        """Yield each linear with the weights that it keeps and their bits."""
        for name, linear in self.linears.items():
            kept = linear.numel - removed.get(name, 0)
            yield linear, kept, weight_bits.get(name, OWN_DTYPE)

    def holds(self, spent: Spent) -> bool:
        """Return whether a profile's bytes are within all limits."""
        return all(
            limit is None or count is None or count <= limit
            for limit, count in (
                (self.fit_bytes, spent.fit_bytes),
                (self.size_bytes, spent.size_bytes),
            )
        )

    def refuse(self, smallest: Spent) -> ValueError:
        """Return the error for limits that even the smallest profile exceeds."""
        exceeded, in_memory = [], False
        for name in ("fit_bytes", "size_bytes"):
            limit, count = getattr(self, name), getattr(smallest, name)
            if limit is not None and count > limit:
                least = exact_bytes(count)
                exceeded.append(f"{name} is {exact_bytes(limit)}, the smallest reachable {least}")
                in_memory |= name == "fit_bytes"
        # The cache takes memory but no space in the files.
        smaller = "narrower weight_bits (--search-weight-bits)"
        if in_memory:
            smaller += " or kv_bits (--kv-bits), or a shorter context"
        return ValueError(
            f"No profile of this space meets the budget: {' and '.join(exceeded)}. Allow higher "
            f"ratios (target_sparsity='free', sparsity_high; --sparsity-high), {smaller}; or raise "
            "the limit."
        )


def _limit(size: int | str | None) -> int | None:
    # The space has already parsed the text.
    return None if size is None else int(size)


def _tensors(model: nn.Module, *, persistent: bool) -> dict[str, torch.Tensor]:
    """Return parameters and buffers, shared ones once; if ``persistent``, only what is saved."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    saved = model.state_dict(keep_vars=True) if persistent else {}
    buffers = model.named_buffers()
    return found | {name: b for name, b in buffers if not persistent or name in saved}


def _header_bytes(
    stored: Mapping[str, torch.Tensor], weights: Mapping[str, Prunable], *, quantised: bool
) -> int:
    """Return the most bytes that the files' headers take."""
    total = sum(t.numel() * t.element_size() for t in stored.values())
    digits = len(str(total))
    kinds = stored_kinds(8 if quantised else 16)

    def entries() -> Iterator[int]:
        compressed = {parameter_name(name, weight) for name, weight in weights.items()}
        for name, tensor in stored.items():
            names = [tensor_name(name, kind) for kind in kinds] if name in compressed else [name]
            if name in compressed and tensor.ndim == 3:
                # Where nothing is removed, transformers writes each expert's gate and up alone.
                names += [f"{name}.{len(tensor)}.weight"] * (2 * len(tensor))
            shape = list(tensor.shape) or [1]
            for stored_name in names:
                value = {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
                text = json.dumps({stored_name: value}, separators=(",", ":"))
                yield len(text) + 2 * digits + _NAME_SLACK

    shards = 1 + math.ceil(total / _SHARD_BYTES)
    return sum(entries()) + shards * 128
