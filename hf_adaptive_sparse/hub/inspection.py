"""The description of a compressed checkpoint, to print or to write as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_adaptive_sparse.packing.upper_bytes import UPPER_BYTE_BITS
from hf_adaptive_sparse.profiles import KVCacheConfig
from hf_adaptive_sparse.report.layers import largest_stack, mean_by_layer
from hf_adaptive_sparse.report.tables import format_bytes, text_table


@dataclass(frozen=True)
class ModuleInspection:
    """One pruned linear.

    Attributes:
        name: Module name as the config records it, or the name in the files where it does not.
        rows: Output features.
        columns: Least and greatest possible number of input features; equal where it is known.
        nnz: Weights kept, without those that were rounded to zero; None where zeros are stored.
        recorded_ratio: Ratio in the config.
        stored_bytes: Bytes of its weight in the files.
        dense_bytes: Bytes that the dense weight would take in the same dtype, at least.
        rounded: Whether values were rounded to 8 or 4 bits, some of them to zero.
    """

    name: str
    rows: int
    columns: tuple[int, int]
    nnz: int | None
    recorded_ratio: float | None
    stored_bytes: int
    dense_bytes: int
    rounded: bool = False

    @property
    def removed(self) -> tuple[float, float]:
        """Least and greatest possible number of weights removed."""
        low, high = (self._removed_of(self.rows * columns) for columns in self.columns)
        return low, high

    def _removed_of(self, numel: int) -> float:
        recorded = float(round((self.recorded_ratio or 0.0) * numel))
        if self.nnz is None:
            return recorded
        zeros = float(numel - self.nnz)
        # Bitmasks do not tell removed weights from those that were rounded to zero. Of codes of
        # 4 bits there may be one less than is counted.
        known = self.rounded and self.recorded_ratio is not None
        return min(recorded, zeros + 1) if known else zeros

    @property
    def ratio(self) -> tuple[float, float]:
        """Least and greatest possible fraction removed."""
        (low, high), (fewest, most) = self.removed, self.columns
        return low / max(1, self.rows * fewest), high / max(1, self.rows * most)


@dataclass(frozen=True)
class Inspection:
    """A compressed checkpoint as its config and headers describe it.

    Attributes:
        source: Folder or repo id.
        revision: Commit sha of a repo.
        model_type: transformers' name of the architecture.
        base_model: The dense model it was made from, where recorded.
        format_version: Version of the checkpoint's format.
        checkpoint_format: "bitmask" or "dense".
        metric: Pruning metric, and the weight update that followed it.
        pattern: "unstructured" or "n:m".
        target_sparsity: Mean ratio that was asked for.
        sparsity: Least and greatest possible mean ratio over ``modules``; equal where exact. Read
            from the shapes in the bitmask format, from the config's record in the dense one and
            where values were rounded to 8 or 4 bits.
        modules: The pruned linears, in order of their names' layers.
        kv_cache: KV profile.
        size_bytes: Bytes of data by kind: "kept values", "bitmasks", "scales" (where values are
            quantised), "codebooks" (where they take 12 bits), "other weights".
        tensors: Tensors in the files.
        provenance: What the config records about how it was made.
        weight_bits: Bits of the values of each module whose values take fewer than 16.
    """

    source: str
    revision: str | None
    model_type: str | None
    base_model: str | None
    format_version: int
    checkpoint_format: str
    metric: str
    pattern: str
    target_sparsity: float
    sparsity: tuple[float, float]
    modules: tuple[ModuleInspection, ...]
    kv_cache: KVCacheConfig | None
    size_bytes: Mapping[str, int]
    tensors: int
    provenance: Mapping[str, Any]
    weight_bits: Mapping[str, int] = field(default_factory=dict)

    def layer_ratios(self) -> dict[int, float]:
        """Return the mean ratio of each decoder layer (the lower bound where it is not exact)."""
        ratios = {module.name: module.ratio[0] for module in self.modules}
        numel = {module.name: module.rows * module.columns[0] for module in self.modules}
        stacks = mean_by_layer(ratios, numel)
        return stacks[largest_stack(stacks, ratios)] if stacks else {}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        data = asdict(self)
        data["kv_cache"] = None if self.kv_cache is None else self.kv_cache.to_dict()
        data["sparsity"] = _span(self.sparsity)
        data["modules"] = [
            {**asdict(module), "columns": list(module.columns), "ratio": _span(module.ratio)}
            for module in self.modules
        ]
        data["layer_ratios"] = {str(layer): ratio for layer, ratio in self.layer_ratios().items()}
        return data

    def __str__(self) -> str:
        stored = sum(module.stored_bytes for module in self.modules)
        dense = sum(module.dense_bytes for module in self.modules)
        share = f", {stored / dense:.1%} of dense" if dense else ""
        target = f" (target {self.target_sparsity:.2%})"
        revision = f" at {self.revision[:12]}" if self.revision else ""
        prunes = any(module.recorded_ratio != 0 for module in self.modules)
        sizes = (f"{kind} {format_bytes(n)}" for kind, n in self.size_bytes.items() if n)
        facts = {
            "checkpoint": f"{self.source}{revision}",
            "base model": self.base_model or "not recorded",
            "architecture": self.model_type or "not recorded",
            "format": f"{self.checkpoint_format}, version {self.format_version}",
            "metric": f"{self.metric}, {self.pattern}" if prunes else "none, nothing was pruned",
        }
        if self.modules:
            linears = f"{_percent(self.sparsity)} of {len(self.modules)} linears{target}"
            weights = "pruned weights" if prunes else "quantised weights"
            facts |= {"sparsity": linears, weights: f"{format_bytes(stored)}{share}"}
        facts |= {
            "all weights": f"{format_bytes(sum(self.size_bytes.values()))} ({', '.join(sizes)})",
            "values": self._values_text(),
            "KV cache": self._kv_text(),
        }
        width = max(map(len, facts))
        lines = [f"{name.ljust(width)}  {_printable(text)}" for name, text in facts.items()]
        rows = self._layer_rows()
        return "\n".join([*lines, "", text_table(rows)] if rows else lines)

    def _values_text(self) -> str:
        counts = Counter(self.weight_bits.get(module.name, 16) for module in self.modules)
        exact = {bits: ", without loss" if bits == UPPER_BYTE_BITS else "" for bits in counts}
        parts = (
            f"{bits} bits{exact[bits]} in {count} linears" for bits, count in sorted(counts.items())
        )
        return ", ".join(parts) if self.weight_bits else "not quantised"

    def _kv_text(self) -> str:
        if self.kv_cache is None:
            return "not quantised"
        cache = self.kv_cache
        keys, values = (_bits_text(cache.to_dict()[name]) for name in ("key_bits", "value_bits"))
        return (
            f"keys of {keys} bits, values of {values}, groups of {cache.group_size}, "
            f"{cache.residual_length} tokens per block"
        )

    def _layer_rows(self) -> list[dict[str, object]]:
        """Return a row per layer: its ratio if it has linears, its KV bits if there is a list."""
        ratios = self.layer_ratios()
        profile = {} if self.kv_cache is None else self.kv_cache.to_dict()
        bits = {
            column: value if isinstance(value, list) else [value] * (max(ratios, default=-1) + 1)
            for column, value in (
                ("key bits", profile.get("key_bits", [])),
                ("value bits", profile.get("value_bits", [])),
            )
        }
        layers = sorted({*ratios, *(n for column in bits.values() for n in range(len(column)))})
        rows: list[dict[str, object]] = []
        for layer in layers:
            row: dict[str, object] = {"layer": layer}
            if ratios:
                row["removed"] = f"{ratios[layer]:.2%}" if layer in ratios else None
            row |= {c: column[layer] for c, column in bits.items() if layer < len(column)}
            rows.append(row)
        return rows


def _bits_text(bits: int | list[int]) -> str:
    """Return the numbers of bits that occur, in words: ``"6 or 8"``."""
    return str(bits) if isinstance(bits, int) else " or ".join(map(str, sorted(set(bits))))


def _span(bounds: tuple[float, float]) -> float | list[float]:
    return bounds[0] if bounds[0] == bounds[1] else list(bounds)


def _percent(bounds: tuple[float, float]) -> str:
    low, high = (f"{bound:.2%}" for bound in bounds)
    return low if low == high else f"{low} to {high}"


def _printable(text: str) -> str:
    """Return text from a repo without what would steer a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)
