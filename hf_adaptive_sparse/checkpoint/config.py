"""`SparsityConfig`: what a user asks for, and what ``config.json`` of a compressed model says.

Both are one class because transformers wants it so. A config remembers which of its fields were
passed: one that was not passed never disagrees with a checkpoint.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, cast

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_adaptive_sparse.checkpoint.fields import (
    calibration_config,
    choice,
    kv_cache_config,
    module_names,
    plain_json,
    ratios,
)
from hf_adaptive_sparse.checkpoint.fields import weight_bits as _weight_bits
from hf_adaptive_sparse.checkpoint.fields import weight_group_size as _weight_group_size
from hf_adaptive_sparse.packing.stored_weight import ValueFormat
from hf_adaptive_sparse.packing.weight_codes import default_group_size
from hf_adaptive_sparse.profiles import (
    FORMAT_VERSION,
    LOSSLESS_BITS,
    LOSSLESS_BITS_VERSION,
    QUANT_METHOD,
    CalibrationConfig,
    KVCacheConfig,
    check_format_version,
    check_keys,
    check_ratio,
    weight_bits_version,
)
from hf_adaptive_sparse.pruning.method import PruningMethod
from hf_adaptive_sparse.pruning.patterns import parse_pattern

CHECKPOINT_FORMATS = ("bitmask", "dense")
RUNTIMES = ("auto", "dense", "sparse")

CHECKPOINT_FIELDS = (
    "target_sparsity",
    "metric",
    "pattern",
    "checkpoint_format",
    "sparsity",
    "modules_to_not_convert",
    "kv_cache",
)
"""The fields a checkpoint's ``config.json`` holds, besides versions and provenance."""

WEIGHT_FIELDS = ("weight_bits", "weight_group_size")
"""Fields that ``config.json`` holds only where they say something; bits make it version 2 or 3."""

METHOD_FIELDS = ("weight_update",)
"""Fields that ``config.json`` holds only where they were passed: later additions to version 1."""

LOADING_FIELDS = ("calibration", "runtime")
"""The fields that say how a model is made or loaded; a checkpoint does not hold them."""

_P = ParamSpec("_P")


def _remembers_passed(
    init: Callable[Concatenate[SparsityConfig, _P], None],
) -> Callable[Concatenate[SparsityConfig, _P], None]:
    """Make ``__init__`` record the names of the fields that the caller gave."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def recording(self: SparsityConfig, *args: _P.args, **kwargs: _P.kwargs) -> None:
        bound = signature.bind(self, *args, **kwargs)
        init(self, *args, **kwargs)
        given = set(bound.arguments) & {
            *CHECKPOINT_FIELDS,
            *WEIGHT_FIELDS,
            *METHOD_FIELDS,
            *LOADING_FIELDS,
        }
        self._passed = frozenset(given - set(bound.arguments.get("defaulted") or ()))
        self._settle_target()

    return cast("Callable[Concatenate[SparsityConfig, _P], None]", recording)


class SparsityConfig(QuantizationConfigMixin):
    """How a model is pruned, stored and run.

    Args:
        target_sparsity: Fraction of the prunable weights that is removed, in [0, 1). With a
            pattern n:m the pattern fixes it.
        metric: Name of the pruning metric.
        sparsity: ``None`` for the same ratio everywhere, or module name or glob -> ratio.
        pattern: ``"unstructured"``, or ``"n:m"``: n of every m weights are kept.
        calibration: Dataset name, path, or `CalibrationConfig`; ``None`` for metrics that need
            no data.
        kv_cache: KV profile: a `KVCacheConfig`, its dict, or a number of bits. ``None``: none of
            its own (on a compressed checkpoint: the checkpoint's). ``False``: none at all.
        modules_to_not_convert: Names or globs of modules that stay dense.
        checkpoint_format: ``"bitmask"``, or ``"dense"``: zeros stored, loads without the plugin.
        runtime: ``"dense"``: weights are plain after loading. ``"sparse"``: pruned weights stay
            compressed in memory. ``"auto"``: whichever is faster on the device at hand.
        weight_bits: Bits of the kept values: 16 (the model's own dtype), 12 (bfloat16 without
            loss), 8 or 4, one number for all pruned linears or module name or glob -> bits. A
            linear that no name matches keeps 16.
        weight_group_size: Columns that share a scale at 8 and 4 bits, a multiple of 32. ``None``:
            at 8 bits one scale per row, at 4 bits one per 64 columns.
        weight_update: What the kept weights do once a metric has chosen the others: ``None``
            (nothing), ``"obs"`` or ``"least_squares"`` (see `pruning.solvers`). The metrics
            sparsegpt and alps update the weights themselves and take ``None``.
        format_version: Version of the checkpoint's form; ``None``: the one that it takes.
        provenance: Where a compressed model came from: plain JSON types.
        quant_method: Always ``"adaptive_sparse"``; present in ``config.json``.
        defaulted: Names of fields whose values below were not chosen by anyone; written by
            `to_dict`.

    Attributes:
        passed: Names of the fields that were given, not defaulted.

    Raises:
        ValueError: If a value is invalid; the message names the valid ones.
    """

    @_remembers_passed
    def __init__(
        self,
        target_sparsity: float = 0.5,
        metric: str = "lognorm",
        sparsity: Mapping[str, float] | None = None,
        pattern: str = "unstructured",
        calibration: str | os.PathLike[str] | CalibrationConfig | Mapping[str, Any] | None = None,
        kv_cache: KVCacheConfig | Mapping[str, Any] | int | bool | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        checkpoint_format: str = "bitmask",
        runtime: str = "auto",
        weight_bits: int | Mapping[str, int] = 16,
        weight_group_size: int | None = None,
        weight_update: str | None = None,
        *,
        format_version: int | None = None,
        provenance: Mapping[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        defaulted: Sequence[str] = (),
    ) -> None:
        if format_version is not None:
            check_format_version(format_version, "the sparsity config", LOSSLESS_BITS_VERSION)
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method must be {QUANT_METHOD!r}, got {quant_method!r}.")
        if not isinstance(defaulted, Sequence) or any(
            name not in (*CHECKPOINT_FIELDS, *LOADING_FIELDS) for name in defaulted
        ):
            raise ValueError(f"defaulted must name fields of the config, got {defaulted!r}.")
        self._passed: frozenset[str] = frozenset()
        self.quant_method = QUANT_METHOD
        self.target_sparsity = check_ratio(target_sparsity, "target_sparsity")
        self.weight_update = PruningMethod.of(metric, weight_update).weight_update
        self.metric = metric
        parse_pattern(pattern)
        self.pattern = pattern
        self.checkpoint_format = choice(checkpoint_format, CHECKPOINT_FORMATS, "checkpoint_format")
        self.runtime = choice(runtime, RUNTIMES, "runtime")
        self.sparsity = ratios(sparsity)
        self.modules_to_not_convert = module_names(modules_to_not_convert)
        self.calibration = calibration_config(calibration)
        self.kv_cache = kv_cache_config(kv_cache)
        self.provenance = plain_json(provenance)
        self.weight_bits = _weight_bits(weight_bits)
        self.weight_group_size = _weight_group_size(weight_group_size)
        if self.quantises_weights and self.checkpoint_format == "dense":
            raise ValueError(
                "weight_bits below 16 need checkpoint_format='bitmask': the format 'dense' stores "
                "whole weights, which quantising them would not make smaller."
            )
        if self.runtime == "sparse" and self.checkpoint_format == "dense":
            raise ValueError(
                "runtime='sparse' needs checkpoint_format='bitmask': a model whose weights are "
                "compressed in memory is saved as it is."
            )
        if format_version is not None and format_version < self.format_version:
            raise ValueError(
                f"weight_bits below 16 need format_version {self.format_version}, got "
                f"{format_version}."
            )

    def _settle_target(self) -> None:
        """Take the ratio that a pattern n:m fixes, or refuse a target that differs from it."""
        pattern = parse_pattern(self.pattern)
        if "target_sparsity" in self._passed:
            pattern.check(self.target_sparsity, "target_sparsity")
        elif pattern.ratio is not None:
            self.target_sparsity = pattern.ratio

    @property
    def passed(self) -> frozenset[str]:
        """Names of the fields that were given, not defaulted."""
        return self._passed

    @property
    def method(self) -> str:
        """Metric and weight update, in words: ``"lognorm"``, ``"lognorm + obs"``."""
        return str(PruningMethod.of(self.metric, self.weight_update))

    @property
    def needs_calibration(self) -> bool:
        """Whether pruning as this config says needs calibration data."""
        return PruningMethod.of(self.metric, self.weight_update).needs_calibration

    @property
    def removes_weights(self) -> bool:
        """Whether any ratio is above 0."""
        if self.sparsity is None:
            return bool(self.target_sparsity > 0.0)
        return any(self.sparsity.values())

    @property
    def quantises_weights(self) -> bool:
        """Whether any weight is stored in fewer than 16 bits, 12 without loss among them."""
        return any(bits < 16 for bits in self.widths)

    @property
    def kv_profile(self) -> KVCacheConfig | None:
        """The KV profile, if there is one."""
        return self.kv_cache if isinstance(self.kv_cache, KVCacheConfig) else None

    @property
    def widths(self) -> Collection[int]:
        """The bits that are named, of whichever modules."""
        bits = self.weight_bits
        return (bits,) if isinstance(bits, int) else bits.values()

    @property
    def format_version(self) -> int:
        """Version of the JSON form and of the checkpoint: see `profiles.weight_bits_version`."""
        return weight_bits_version(self.widths)

    @property
    def compressed_modules(self) -> list[str]:
        """Modules whose weights the bitmask format stores compressed.

        Those with a ratio above 0, and those whose values take fewer than 16 bits.
        """
        if self.checkpoint_format != "bitmask":
            return []
        return [
            name
            for name, ratio in (self.sparsity or {}).items()
            if ratio > 0 or self.value_bits(name) < 16
        ]

    @property
    def value_formats(self) -> dict[str, ValueFormat]:
        """How the values of every compressed module are stored."""
        return {name: self.value_format(name) for name in self.compressed_modules}

    def value_bits(self, name: str) -> int:
        """Return the bits of a module's values, of a config that names each module by itself."""
        return (
            self.weight_bits
            if isinstance(self.weight_bits, int)
            else (self.weight_bits.get(name, 16))
        )

    def store_plain(self, names: Collection[str]) -> None:
        """Set the bits of the values of modules to 16.

        A ``weight_group_size`` stays: files of an earlier step may have codes by it.

        Args:
            names: Modules that ``sparsity`` names.
        """
        if not names:
            return
        bits = {name: self.value_bits(name) for name in self.sparsity or {}}
        bits |= dict.fromkeys(names, 16)
        self.weight_bits = bits if any(width < 16 for width in bits.values()) else 16
        if self.weight_bits == 16:  # which says nothing, nor does no group size
            said = {"weight_bits"} if self.weight_group_size else set(WEIGHT_FIELDS)
            self._passed -= said

    def value_format(self, name: str) -> ValueFormat:
        """Return how a module's values are stored, of a config that names each module by itself."""
        return self.format_at(self.value_bits(name))

    def format_at(self, bits: int) -> ValueFormat:
        """Return how this config stores values of so many bits."""
        if bits in LOSSLESS_BITS:
            return ValueFormat(bits)
        return ValueFormat(bits, self.weight_group_size or default_group_size(bits))

    @classmethod
    def from_dict(
        cls,
        config_dict: Mapping[str, Any],
        return_unused_kwargs: bool = False,
        **kwargs: Any,  # transformers' signature
    ) -> Any:
        """Read the JSON form.

        Args:
            config_dict: What `to_dict` wrote.
            return_unused_kwargs: Also return the keyword arguments that name no field.
            kwargs: Fields that replace those of ``config_dict``.

        Raises:
            ValueError: If the version is from the future, a key unknown or a value invalid.
        """
        version = config_dict.get("format_version", FORMAT_VERSION)
        check_format_version(version, "the checkpoint", LOSSLESS_BITS_VERSION)
        known = list(inspect.signature(cls).parameters)
        check_keys(config_dict, known, "A sparsity config")
        stored = dict(config_dict)
        if "format_version" in stored and isinstance(stored.get("kv_cache"), Mapping):
            # Only what was saved names its version; a user's dict has no form of an old one.
            stored["kv_cache"] = KVCacheConfig.from_dict(stored["kv_cache"])
        used = {key: value for key, value in kwargs.items() if key in known}
        config = cls(**{**stored, **used})
        rest = {key: value for key, value in kwargs.items() if key not in known}
        return (config, rest) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: plain types only, from which `from_dict` makes an equal config.

        ``weight_bits``, ``weight_group_size``, ``weight_update``, ``calibration`` and ``runtime``
        appear where they were passed, ``defaulted`` where some field of every checkpoint was not;
        the config of a compressed model has the first three only where they say something, and no
        other.
        """
        data: dict[str, Any] = {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "target_sparsity": self.target_sparsity,
            "metric": self.metric,
            "pattern": self.pattern,
            "checkpoint_format": self.checkpoint_format,
            "sparsity": None if self.sparsity is None else dict(self.sparsity),
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "kv_cache": self.kv_cache if self.kv_profile is None else self.kv_profile.to_dict(),
            "provenance": plain_json(self.provenance),
        }
        if "weight_bits" in self._passed:
            bits = self.weight_bits
            data["weight_bits"] = bits if isinstance(bits, int) else dict(bits)
        if "weight_group_size" in self._passed:
            data["weight_group_size"] = self.weight_group_size
        if "weight_update" in self._passed:
            data["weight_update"] = self.weight_update
        if "calibration" in self._passed:
            data["calibration"] = None if self.calibration is None else self.calibration.to_dict()
        if "runtime" in self._passed:
            data["runtime"] = self.runtime
        defaulted = [name for name in CHECKPOINT_FIELDS if name not in self._passed]
        if defaulted:
            data["defaulted"] = defaulted
        return data

    def get(self, key: str, default: Any = None) -> Any:
        """Read a key of the JSON form; transformers takes a model config's entry for a dict."""
        return self.to_dict().get(key, default)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.to_dict().items())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparsityConfig):
            return NotImplemented
        return self.to_dict() == other.to_dict() and self.runtime == other.runtime

    __hash__ = None  # type: ignore[assignment]


def our_config(carrier: Any) -> SparsityConfig | None:
    """Return the `SparsityConfig` that something carries; ``None`` if it carries none.

    Args:
        carrier: A model, a model's config, or the dict of a ``config.json``.

    Raises:
        ValueError: If it is ours and invalid.
    """
    config = getattr(carrier, "config", carrier)
    if isinstance(config, Mapping):
        return as_our_config(config.get("quantization_config"))
    return as_our_config(getattr(config, "quantization_config", None))


def as_our_config(quantization_config: Any) -> SparsityConfig | None:
    """Return a ``quantization_config`` as a `SparsityConfig`; ``None`` if it is not ours.

    Raises:
        ValueError: If it is ours and invalid.
    """
    if isinstance(quantization_config, SparsityConfig):
        return quantization_config
    if isinstance(quantization_config, Mapping):
        if quantization_config.get("quant_method") != QUANT_METHOD:
            return None
        made: SparsityConfig = SparsityConfig.from_dict(quantization_config)
        return made
    return None
