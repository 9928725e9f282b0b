"""Merging the config passed to ``from_pretrained`` with a compressed checkpoint's own."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from hf_adaptive_sparse.architecture import match_names
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.resolving import resolve_weight_bits

_RATIO_TOLERANCE = 1e-4


def merge_configs(checkpoint: SparsityConfig, passed: SparsityConfig) -> SparsityConfig:
    """Return the checkpoint's config with the loading options of ``passed``.

    ``runtime`` and ``kv_cache`` may differ from the checkpoint; ``kv_cache=False`` switches the
    adaptive cache off, ``None`` keeps the checkpoint's. All else that was passed must agree, since
    a compressed checkpoint is only read.

    Args:
        checkpoint: The config in the checkpoint's ``config.json``.
        passed: The config given to ``from_pretrained``.

    Returns:
        A new config.

    Raises:
        ValueError: If a passed field disagrees with the checkpoint; names it and both values.
    """
    for name in ("target_sparsity", "metric", "weight_update", "pattern", "checkpoint_format"):
        _compare(name, getattr(checkpoint, name), getattr(passed, name), passed)
    mine, theirs = (sorted(c.modules_to_not_convert) for c in (checkpoint, passed))
    _compare("modules_to_not_convert", mine, theirs, passed)
    _compare_weights(checkpoint, passed)
    if "sparsity" in passed.passed and passed.sparsity is not None:
        _compare_ratios(checkpoint.sparsity or {}, passed.sparsity)
    recorded = checkpoint.provenance.get("calibration")
    comparable = isinstance(recorded, dict) and "batches" not in recorded
    if passed.calibration is not None and comparable:
        given = passed.calibration.to_dict()
        # A local file is recorded by its name alone.
        file_name = Path(given["dataset"]).name if given["dataset"] else None
        if recorded not in (given, {**given, "dataset": file_name}):
            _compare("calibration", recorded, given, passed)
    if passed.runtime == "sparse" and checkpoint.checkpoint_format == "dense":
        raise ValueError(
            "runtime='sparse' reads the format 'bitmask', and this checkpoint is stored in the "
            "format 'dense'. Load it with runtime='dense', or compress the original model anew."
        )
    merged = copy.deepcopy(checkpoint)
    merged.runtime = passed.runtime
    if passed.kv_cache is not None:
        merged.kv_cache = None if passed.kv_cache is False else passed.kv_cache
    return merged


def _compare(name: str, checkpoint: Any, value: Any, passed: SparsityConfig) -> None:
    if name not in passed.passed:
        return
    if isinstance(checkpoint, float) and isinstance(value, float):
        agree = math.isclose(checkpoint, value, abs_tol=1e-9)
    else:
        agree = checkpoint == value
    if not agree:
        raise _disagreement(name, checkpoint, value)


def _compare_weights(checkpoint: SparsityConfig, passed: SparsityConfig) -> None:
    """Compare weight bits and their groups, as they come to stand for each module."""
    modules = checkpoint.sparsity or {}
    mine = resolve_weight_bits(checkpoint, modules)
    if "weight_bits" in passed.passed:
        try:
            theirs = resolve_weight_bits(passed, modules)
        except ValueError as error:
            raise _disagreement("weight_bits", mine or 16, passed.weight_bits) from error
        if mine != theirs:
            raise _disagreement("weight_bits", mine or 16, passed.weight_bits)
    if mine and "weight_group_size" in passed.passed:
        _compare(
            "weight_group_size", checkpoint.weight_group_size, passed.weight_group_size, passed
        )


def _compare_ratios(profile: dict[str, float], wanted: dict[str, float]) -> None:
    """Compare names and globs with the explicit profile; a name outranks a glob that holds it."""
    for pattern, ratio in wanted.items():
        try:
            matched = match_names(pattern, profile, "sparsity")
        except ValueError as error:
            raise _disagreement("sparsity", f"no module {pattern!r}", {pattern: ratio}) from error
        for name in matched:
            if name != pattern and name in wanted:
                continue
            if abs(profile[name] - ratio) > _RATIO_TOLERANCE:
                raise _disagreement("sparsity", {name: profile[name]}, {pattern: ratio})


def _disagreement(name: str, checkpoint: Any, value: Any) -> ValueError:
    return ValueError(
        f"{name} of a compressed checkpoint cannot be changed while it is loaded: the checkpoint "
        f"says {checkpoint!r}, sparsity_config says {value!r}. Leave {name} out (only runtime and "
        "kv_cache may be overridden), or compress the original model anew."
    )
