"""Inspect a checkpoint, local or on the Hub, from its config and headers alone.

A bitmask of ``b`` bytes per row has between ``8 (b - 1) + 1`` and ``8 b`` columns. Which of them is
told by the recorded ratio (``nnz = numel - round(ratio * numel)`` holds for one width only) or by
the widths in the model's config; where neither tells, the ratio is given as bounds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hf_adaptive_sparse.checkpoint.config import SparsityConfig, our_config
from hf_adaptive_sparse.checkpoint.headers import (
    CompressedModule,
    TensorHeader,
    compressed_summary,
)
from hf_adaptive_sparse.checkpoint.resolving import resolve_weight_bits
from hf_adaptive_sparse.hub.inspection import Inspection, ModuleInspection
from hf_adaptive_sparse.hub.source import (
    CONFIG_NAME,
    Source,
    open_source,
    read_config,
    read_tensors,
)
from hf_adaptive_sparse.packing.stored_names import parse_tensor_name, weight_name
from hf_adaptive_sparse.profiles import QUANT_METHOD


def inspect(
    repo_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Inspection:
    """Describe a compressed checkpoint without reading or downloading its weights.

    Args:
        repo_or_folder: A local folder, or a repo on the Hub.
        revision: Branch, tag or commit of a repo.
        token: Access token for private and gated repos.
        endpoint: Address of the Hub; None: HF_ENDPOINT, or the public one.

    Raises:
        ValueError: If it is not a complete compressed checkpoint of a format version that this
            version reads; says what is wrong with which file.
        HubError: If the Hub cannot be reached or refuses.
    """
    source = open_source(repo_or_folder, revision, token, endpoint)
    model_config = read_config(source)
    config = _read_our_config(model_config, source)
    tensors = read_tensors(source)
    modules = _modules(tensors, config, frozenset(_widths(model_config)), source)
    return Inspection(
        source=source.name,
        revision=source.revision,
        model_type=_text(model_config.get("model_type")),
        base_model=_text(config.provenance.get("base_model")),
        format_version=config.format_version,
        checkpoint_format=config.checkpoint_format,
        metric=config.method,
        pattern=config.pattern,
        target_sparsity=config.target_sparsity,
        sparsity=_mean(modules),
        modules=modules,
        kv_cache=config.kv_profile,
        size_bytes=_size_by_kind(tensors),
        tensors=len(tensors),
        provenance=config.provenance,
        weight_bits=resolve_weight_bits(config, config.sparsity or {}),
    )


def _read_our_config(model_config: Mapping[str, Any], source: Source) -> SparsityConfig:
    try:
        config = our_config(model_config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{CONFIG_NAME} of {source.name}: {error}") from error
    if config is None:
        raise ValueError(
            f"{source.name} was not compressed by hf_adaptive_sparse: its {CONFIG_NAME} has no "
            f"quantization_config with quant_method {QUANT_METHOD!r}."
        )
    return config


def _modules(
    tensors: Mapping[str, TensorHeader],
    config: SparsityConfig,
    widths: frozenset[int],
    source: Source,
) -> tuple[ModuleInspection, ...]:
    """Return the linears whose ratio the config records, those of ratio 0 included."""
    recorded = config.sparsity or {}
    stored_packed = set(config.compressed_modules)
    compressed = compressed_summary(tensors)
    for name in tensors:
        parsed = parse_tensor_name(name)
        if parsed and parsed[1] == "values" and weight_name(parsed[0]) not in compressed:
            raise ValueError(f"{source.name} is damaged: the tensor {name!r} has no bitmask.")
    plain = {weight_name(n): h for n, h in tensors.items() if len(h.shape) in (2, 3)}
    by_ending = {True: _by_ending(compressed), False: _by_ending(plain)}
    unclaimed, modules = dict(compressed), []
    for name, ratio in recorded.items():
        packed = name in stored_packed
        stem = _stored_name(name, by_ending[packed])
        if packed and stem in unclaimed:
            module = unclaimed.pop(stem)
            modules.append(_compressed_module(name, module, ratio, widths, source))
        elif packed:
            raise ValueError(
                f"{source.name} is incomplete: {CONFIG_NAME} records that {name!r} is compressed, "
                "but the files hold no bitmask of it."
            )
        elif stem is not None:
            modules.append(_plain_module(name, plain[stem], ratio))
    modules += [
        _compressed_module(name, module, None, widths, source) for name, module in unclaimed.items()
    ]
    return tuple(modules)


def _plain_module(name: str, header: TensorHeader, ratio: float) -> ModuleInspection:
    *leading, columns = header.shape
    return ModuleInspection(
        name=name,
        rows=math.prod(leading),
        columns=(columns, columns),
        nnz=None,
        recorded_ratio=ratio,
        stored_bytes=header.size_bytes,
        dense_bytes=header.size_bytes,
    )


def _compressed_module(
    name: str,
    stored: CompressedModule,
    ratio: float | None,
    widths: frozenset[int],
    source: Source,
) -> ModuleInspection:
    bits = stored.rows * stored.columns_at_most
    if stored.nnz > bits + stored.quantised:
        raise ValueError(
            f"{source.name} is damaged: {name!r} has {stored.nnz} values for a bitmask of {bits} "
            "bits."
        )
    columns = _columns(stored, ratio, widths)
    return ModuleInspection(
        name=name,
        rows=stored.rows,
        columns=columns,
        nnz=stored.nnz,
        recorded_ratio=ratio,
        stored_bytes=stored.size_bytes,
        dense_bytes=stored.rows * columns[0] * stored.weight_bytes,
        rounded=stored.quantised,
    )


def _columns(
    stored: CompressedModule, ratio: float | None, widths: frozenset[int]
) -> tuple[int, int]:
    """Return the least and greatest number of columns that bitmask, values and config allow."""
    rows, nnz, most = stored.rows, stored.nnz, stored.columns_at_most
    if not rows or not most:
        return 0, 0
    candidates: Sequence[int] = range(max(most - 7, -(-nnz // rows)), most + 1)
    if ratio is not None:
        kept = {c: rows * c - round(ratio * rows * c) for c in candidates}
        # Weights that were rounded to zero are not stored, and nnz may be one more with 4 bits.
        matching = [c for c, n in kept.items() if n == nnz or (stored.quantised and n + 1 >= nnz)]
        if stored.quantised:
            candidates = matching or candidates
        elif len(matching) == 1:
            return matching[0], matching[0]
    known = [columns for columns in candidates if columns in widths]
    if len(known) == 1:
        return known[0], known[0]
    return candidates[0], candidates[-1]


def _widths(config: object, depth: int = 0) -> Iterator[int]:
    """Yield the layer widths that a model's config names: its sizes, and heads times head size."""
    if not isinstance(config, dict) or depth > 4:
        return
    for key, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool) and key.endswith("_size"):
            yield value
        elif key != "quantization_config":
            yield from _widths(value, depth + 1)
    heads, head_dim = config.get("num_attention_heads"), config.get("head_dim")
    if isinstance(heads, int) and isinstance(head_dim, int):
        yield heads * head_dim


def _by_ending(names: Iterable[str]) -> dict[tuple[str, ...], list[str]]:
    """Return ending -> names, for every run of last parts of every name."""
    endings: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            endings.setdefault(tuple(parts[start:]), []).append(name)
    return endings


def _stored_name(name: str, by_ending: Mapping[tuple[str, ...], list[str]]) -> str | None:
    """Return the name in the files of a module, as some models rename their weights when saved.

    Of the stored names that share the longest run of last parts, the one that shares most of the
    other parts too: a vision tower's layers end like the language model's. Where that run does not
    reach back to the layer (Mixtral's experts), it has two parts and the layer's number is shared.
    """
    parts = name.split(".")
    for start in range(len(parts)):
        found = by_ending.get(tuple(parts[start:]))
        if found is not None:
            numbers = [part for part in parts if part.isdecimal()]
            reaches_layer = any(part.isdecimal() for part in parts[start:])
            if start and not reaches_layer:
                same = [n for n in found if [p for p in n.split(".") if p.isdecimal()] == numbers]
                found = same if len(parts) - start > 1 else []
            if not found:
                return None
            return max(found, key=lambda stored: len({*stored.split(".")} & {*parts}))
    return None


def _size_by_kind(tensors: Mapping[str, TensorHeader]) -> dict[str, int]:
    optional = {"scales": "scales", "codebook": "codebooks"}
    kinds = {"values": "kept values", "bitmask": "bitmasks", **optional}
    sizes = dict.fromkeys((*kinds.values(), "other weights"), 0)
    for name, header in tensors.items():
        parsed = parse_tensor_name(name)
        sizes["other weights" if parsed is None else kinds[parsed[1]]] += header.size_bytes
    return {kind: size for kind, size in sizes.items() if size or kind not in optional.values()}


def _mean(modules: tuple[ModuleInspection, ...]) -> tuple[float, float]:
    bounds = []
    for side in (0, 1):
        numel = sum(module.rows * module.columns[side] for module in modules)
        bounds.append(sum(module.removed[side] for module in modules) / max(1, numel))
    return bounds[0], bounds[1]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
