"""Bytes, counted and not estimated: of weights (in memory, stored, on disk) and of the KV cache."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hf_adaptive_sparse.architecture import (
    Prunable,
    kv_heads,
    kv_widths,
    parameter_name,
    prunable_weights,
)
from hf_adaptive_sparse.checkpoint.config import SparsityConfig, our_config
from hf_adaptive_sparse.checkpoint.headers import INDEX_NAME, WEIGHTS_NAME, shard_names
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice, resolve_kv_cache
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.packing.bitmask import integer_view
from hf_adaptive_sparse.packing.stored_weight import ValueFormat, checkpoint_bytes, stored_tensors
from hf_adaptive_sparse.packing.upper_bytes import UPPER_BYTE_BITS
from hf_adaptive_sparse.profiles import check_count
from hf_adaptive_sparse.runtime.conversion import sparse_weights
from hf_adaptive_sparse.runtime.sparse_experts import SparseStack
from hf_adaptive_sparse.runtime.sparse_linear import SparseLinear


@dataclass(frozen=True)
class WeightReport:
    """One prunable weight.

    Attributes:
        name: Runtime name of its module.
        numel: Number of weights.
        zeros: How many of them are zero.
        stored_bytes: Bytes in a checkpoint of the model's format: values and bitmask, or all.
        memory_bytes: Bytes it takes in memory now.
    """

    name: str
    numel: int
    zeros: int
    stored_bytes: int
    memory_bytes: int

    @property
    def ratio(self) -> float:
        """Fraction of the weights that are zero."""
        return self.zeros / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class SparsityReport:
    """All prunable weights of a model.

    Attributes:
        modules: One report per prunable linear, in layer order.
        checkpoint_format: ``"bitmask"`` or ``"dense"``: what ``stored_bytes`` refers to.
        other_bytes: Bytes of all other parameters (embeddings, vision tower, norms, output head,
            modules that were excluded), shared ones counted once.
    """

    modules: tuple[WeightReport, ...]
    checkpoint_format: str
    other_bytes: int

    @property
    def total(self) -> WeightReport:
        """The sum over the prunable weights: the denominator of every sparsity."""
        return WeightReport(
            "total",
            *(
                sum(getattr(module, field) for module in self.modules)
                for field in ("numel", "zeros", "stored_bytes", "memory_bytes")
            ),
        )

    @property
    def mean_sparsity(self) -> float:
        """Parameter-weighted mean ratio over the prunable weights."""
        return self.total.ratio

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        return {
            "checkpoint_format": self.checkpoint_format,
            "other_bytes": self.other_bytes,
            "total": asdict(self.total) | {"ratio": self.mean_sparsity},
            "modules": [asdict(module) | {"ratio": module.ratio} for module in self.modules],
        }

    def __str__(self) -> str:
        rows = [*self.modules, self.total]
        width = max(len(row.name) for row in rows)
        head = f"{'module':<{width}} {'weights':>14} {'ratio':>8} {'stored B':>15} {'memory B':>15}"
        lines = [head, "-" * len(head)]
        lines += [
            f"{row.name:<{width}} {row.numel:>14,} {row.ratio:>8.4f} {row.stored_bytes:>15,} "
            f"{row.memory_bytes:>15,}"
            for row in rows
        ]
        lines.insert(-1, "-" * len(head))
        lines.append(
            f"Ratio: fraction of the prunable weights that is zero. Stored as "
            f"{self.checkpoint_format}. Other parameters: {self.other_bytes:,} bytes."
        )
        return "\n".join(lines)


def sparsity_report(model: PreTrainedModel) -> SparsityReport:
    """Count zeros and bytes of the prunable weights.

    Args:
        model: Any model, pruned or not. What its checkpoint format stores is taken from the
            config it carries; a model without one is stored dense.

    Raises:
        ValueError: If the model has no prunable linears, or weights that are not in memory.
    """
    config = our_config(model)
    formats = {} if config is None else config.value_formats
    reports, counted = [], set()
    for name, module in _counted_weights(model, config).items():
        if isinstance(module, SparseLinear | SparseStack):
            _check_in_memory(module.parts["bitmask"], parameter_name(name, module))
            weight = module.to_dense()
            memory, stored = module.memory_bytes, module.memory_bytes - module.offset_bytes
            counted |= {id(part) for part in module.parts.values()}
        else:
            _check_in_memory(module.weight, parameter_name(name, module))
            weight = module.weight.detach()
            memory = weight.nbytes
            stored = _stored_bytes(weight, formats[name]) if name in formats else memory
            counted.add(id(module.weight))
        zeros = weight.numel() - int(weight.count_nonzero())
        reports.append(WeightReport(name, weight.numel(), zeros, stored, memory))
    other = sum(p.nbytes for p in model.parameters() if id(p) not in counted)
    return SparsityReport(tuple(reports), "bitmask" if formats else "dense", other)


def _counted_weights(
    model: nn.Module, config: SparsityConfig | None
) -> dict[str, Prunable | SparseStack]:
    """Return the prunable weights, plain or compressed in memory, in the model's order."""
    sparse = sparse_weights(model)
    try:
        plain = prunable_weights(model, config.modules_to_not_convert if config else ())
    except ValueError:
        if not sparse:
            raise
        plain = {}  # all of them are compressed
    known: dict[str, Prunable | SparseStack] = {**plain, **sparse}
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}

    def place(name: str) -> int:
        # A stack of experts lies where its module does.
        return places[name] if name in places else places[name.rpartition(".")[0]]

    return {name: known[name] for name in sorted(known, key=place)}


def _check_in_memory(tensor: torch.Tensor, name: str) -> None:
    if tensor.device.type == "meta":
        raise ValueError(
            f"Zeros can only be counted in weights that are in memory; {name} is "
            "offloaded. Load the model without offloading."
        )


def _stored_bytes(weight: torch.Tensor, form: ValueFormat) -> int:
    """Return the bytes that a plain weight takes in a checkpoint of the bitmask format."""
    if form.bits == UPPER_BYTE_BITS:  # how many exceptions there are only encoding tells
        return sum(t.nbytes for t in stored_tensors("weight", weight, form).values())
    rows, columns = weight.shape[:-1].numel(), weight.shape[-1]
    # A bit pattern that is not all zero is stored, so -0.0 is a zero that costs a value.
    nnz = int(weight.view(integer_view(weight.dtype)).count_nonzero())
    return checkpoint_bytes(rows, columns, nnz, form, weight.itemsize)


def weight_bytes_on_disk(folder: str | os.PathLike[str]) -> int:
    """Return the size of a checkpoint's safetensors files in bytes.

    Args:
        folder: A folder written by ``save_pretrained``. Of a sharded checkpoint, the shards that
            its index names are counted.

    Raises:
        FileNotFoundError: If there are no such files, or a shard is missing.
        CheckpointError: If the index is not valid.
    """
    path = Path(folder)
    index, single = path / INDEX_NAME, path / WEIGHTS_NAME
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = [path / name for name in shard_names(index.read_bytes(), str(index))]
    else:
        files = sorted(path.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise FileNotFoundError(
            f"A checkpoint must hold its safetensors files; {path} lacks "
            f"{', '.join(missing) or 'any'}."
        )
    return sum(file.stat().st_size for file in files)


def kv_bytes_per_token(
    config: PretrainedConfig,
    kv_cache: KVCacheChoice = None,
    *,
    length: int = 2048,
    dtype: torch.dtype | None = None,
) -> float:
    """Measure the bytes that one token of one sequence takes in the KV cache, all layers together.

    A real cache is filled with ``length`` random tokens of the model's shapes, one layer at a
    time so that a large model costs one layer's memory, and what it has allocated is read.

    Args:
        config: The model's config.
        kv_cache: ``None``: the KV profile of the config, if any. ``False``: a plain
            ``DynamicCache``. A `KVCacheConfig`: that one.
        length: Tokens in the cache.
        dtype: Dtype of the unquantised keys and values; ``None``: the config's, else bfloat16.

    Returns:
        Bytes per token: allocated bytes / ``length``.

    Raises:
        ValueError: If ``length`` is below 1, or the profile does not fit the model.
        TypeError: If ``kv_cache`` is none of these.
    """
    check_count(length, "length")
    profile = resolve_kv_cache(config, kv_cache)
    text = config.get_text_config(decoder=True)
    if dtype is None:
        own = getattr(config, "dtype", None) or getattr(text, "dtype", None)
        dtype = own if isinstance(own, torch.dtype) else torch.bfloat16
    cache: Cache
    if profile is not None:
        cache = AdaptiveQuantizedCache(config, profile)
    else:
        cache = DynamicCache(config=config)
    generator = torch.Generator().manual_seed(0)
    total = 0
    # Layers that share the keys and values of others have no place in the cache.
    for index, (keys, values) in enumerate(kv_widths(config)[: len(cache.layers)]):
        if keys == 0:
            continue
        heads = kv_heads(config, keys)
        shapes = [(1, heads, length, width // heads) for width in (keys, values)]
        cache.update(*(torch.randn(s, generator=generator).to(dtype) for s in shapes), index)
        total += _layer_bytes(cache.layers[index])
        cache.layers[index] = DynamicLayer()  # drops what was measured
    return total / length


def _layer_bytes(layer: Any) -> int:
    if hasattr(layer, "nbytes"):
        return int(layer.nbytes)
    states = (layer.keys, layer.values)
    return sum(t.nbytes for t in states if isinstance(t, torch.Tensor))
