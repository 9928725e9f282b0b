"""All that a search finds, in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_adaptive_sparse.files import replacing
from hf_adaptive_sparse.profiles.checks import check_form, check_keys, check_mapping
from hf_adaptive_sparse.profiles.kv_cache import KVCacheConfig
from hf_adaptive_sparse.profiles.sparsity import SparsityProfile
from hf_adaptive_sparse.profiles.versions import (
    FORMAT_VERSION,
    LOSSLESS_BITS_VERSION,
    WEIGHT_BITS_VERSION,
    check_format_version,
    weight_bits_version,
)
from hf_adaptive_sparse.profiles.widths import check_weight_bits

_FIELDS = ("sparsity", "kv_cache", "weight_bits")


@dataclass(frozen=True)
class CompressionProfile:
    """What a search returns: a sparsity profile, a KV profile and weight bits, each optional.

    Attributes:
        sparsity: Ratio per prunable linear.
        kv_cache: Bits per layer of the KV cache.
        weight_bits: Module name -> bits of its kept values, one of ``WEIGHT_BITS``. A module that
            is not named keeps 16.
    """

    sparsity: SparsityProfile | None = None
    kv_cache: KVCacheConfig | None = None
    weight_bits: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.weight_bits is None:
            return
        weight_bits = check_mapping(self.weight_bits, "The weight bits of a compression profile")
        checked = {
            name: check_weight_bits(bits, f"weight_bits of {name!r}")
            for name, bits in weight_bits.items()
        }
        object.__setattr__(self, "weight_bits", checked)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: of version 1 where it names no weight bits."""
        data: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "sparsity": None if self.sparsity is None else dict(self.sparsity.ratios),
            "kv_cache": None if self.kv_cache is None else self.kv_cache.to_dict(),
        }
        if self.weight_bits is not None:
            widths = self.weight_bits.values()
            data["format_version"] = max(WEIGHT_BITS_VERSION, weight_bits_version(widths))
            data["weight_bits"] = dict(self.weight_bits)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressionProfile:
        """Read the JSON form.

        Raises:
            ValueError: If the version, a key or a value is invalid.
        """
        data = check_form(data, "A compression profile")
        version = data.get("format_version")
        check_format_version(version, "the compression profile", LOSSLESS_BITS_VERSION)
        check_keys(data, ("format_version", *_FIELDS), "A compression profile")
        sparsity, kv_cache = data.get("sparsity"), data.get("kv_cache")
        return cls(
            sparsity=None if sparsity is None else SparsityProfile(sparsity),
            kv_cache=None if kv_cache is None else KVCacheConfig.from_dict(kv_cache),
            weight_bits=data.get("weight_bits"),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form to ``path``, whole or not at all."""
        with replacing(path) as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CompressionProfile:
        """Read the JSON form from ``path``.

        Raises:
            ValueError: If the file is not a valid profile; names it.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:  # the latter: lists within lists
            raise ValueError(f"{os.fspath(path)} is no compression profile: {error}") from error
