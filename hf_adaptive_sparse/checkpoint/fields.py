"""Validation and normalisation of the fields of `SparsityConfig`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from hf_adaptive_sparse.packing.weight_codes import (
    GROUP_MULTIPLE,
    MAX_GROUP_SIZE,
    default_group_size,
)
from hf_adaptive_sparse.profiles import (
    CalibrationConfig,
    KVCacheConfig,
    check_keys,
    check_ratio,
    check_weight_bits,
)


def choice(value: object, valid: tuple[str, ...], what: str) -> str:
    """Return ``value`` if it is one of ``valid``.

    Raises:
        ValueError: If it is not valid.
    """
    if value not in valid:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, valid))}, got {value!r}.")
    return str(value)


def ratios(sparsity: object) -> dict[str, float] | None:
    """Return a profile or globs as a dict of checked ratios.

    Raises:
        ValueError: If it is not valid.
    """
    if sparsity is None:
        return None
    if not isinstance(sparsity, Mapping) or not all(isinstance(name, str) for name in sparsity):
        raise ValueError(
            "sparsity must be None (the same ratio everywhere) or a mapping from module name or "
            f"glob to ratio, got {sparsity!r}. A single ratio is target_sparsity."
        )
    return {name: check_ratio(ratio, f"sparsity of {name!r}") for name, ratio in sparsity.items()}


def weight_bits(bits: object) -> int | dict[str, int]:
    """Return weight bits, one number or one by module name or glob, checked.

    Raises:
        ValueError: If they are not valid.
    """
    if not isinstance(bits, Mapping):
        return check_weight_bits(bits, "weight_bits (a number, or a dict from module name or glob)")
    if not all(isinstance(name, str) for name in bits):
        raise ValueError(f"weight_bits must map module names or globs to bits, got {bits!r}.")
    return {name: check_weight_bits(b, f"weight_bits of {name!r}") for name, b in bits.items()}


def weight_group_size(size: object) -> int | None:
    """Return the columns that share a scale, or ``None``.

    Raises:
        ValueError: If it is neither ``None`` nor a multiple of ``GROUP_MULTIPLE`` above 0, at most
            ``MAX_GROUP_SIZE``.
    """
    if size is None:
        return None
    if (
        not isinstance(size, int)
        or isinstance(size, bool)
        or not 0 < size <= MAX_GROUP_SIZE
        or size % GROUP_MULTIPLE
    ):
        raise ValueError(
            "weight_group_size must be None (8 bits: one scale per row; 4 bits: one per "
            f"{default_group_size(4)} columns) or a multiple of {GROUP_MULTIPLE} above 0, at most "
            f"{MAX_GROUP_SIZE}, got {size!r}."
        )
    return size


def module_names(names: object) -> list[str]:
    """Return a list of names or globs.

    Raises:
        ValueError: If it is not valid.
    """
    if names is None:
        return []
    if (
        isinstance(names, str)
        or not isinstance(names, Sequence)
        or not all(isinstance(name, str) for name in names)
    ):
        raise ValueError(
            f"modules_to_not_convert must be a list of module names or globs, got {names!r}."
        )
    return list(names)


def calibration_config(calibration: object) -> CalibrationConfig | None:
    """Return what was given for calibration as a config.

    Raises:
        ValueError: If it is not valid.
    """
    if calibration is None or isinstance(calibration, CalibrationConfig):
        return calibration
    if isinstance(calibration, str | os.PathLike):
        return CalibrationConfig(dataset=os.fspath(calibration))
    if isinstance(calibration, Mapping):
        known = [field.name for field in fields(CalibrationConfig)]
        check_keys(calibration, known, "A calibration config")
        return CalibrationConfig(**calibration)
    raise ValueError(
        "calibration must be None, a dataset name, a path or a CalibrationConfig, got "
        f"{type(calibration).__name__}. Batches and datasets in memory go to "
        "hf_adaptive_sparse.prune(model, config, batches)."
    )


def kv_cache_config(kv_cache: object) -> KVCacheConfig | bool | None:
    """Return what was given for the KV cache as a config; ``False`` stays.

    Raises:
        ValueError: If it is not valid.
    """
    if kv_cache is None or kv_cache is False or isinstance(kv_cache, KVCacheConfig):
        return kv_cache
    if isinstance(kv_cache, int) and not isinstance(kv_cache, bool):
        return KVCacheConfig(bits=kv_cache)
    if isinstance(kv_cache, Mapping):
        return KVCacheConfig.from_fields(kv_cache)
    raise ValueError(
        "kv_cache must be None, False, a KVCacheConfig, its dict or a number of bits, got "
        f"{kv_cache!r}."
    )


def plain_json(provenance: object) -> dict[str, Any]:
    """Return a copy in plain JSON types.

    Raises:
        ValueError: If it holds anything else.
    """
    if provenance is None:
        return {}
    if not isinstance(provenance, Mapping):
        raise ValueError(f"provenance must be a mapping, got {type(provenance).__name__}.")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(provenance)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"provenance must hold plain JSON types only: {error}.") from error
    return plain
