"""Value objects that describe a compression: sparsity, KV bits, and how to calibrate.

Frozen dataclasses, validated when made, with a versioned JSON form. Nothing here imports torch, so
profiles can be read, compared and written anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from hf_adaptive_sparse.files import replacing

QUANT_METHOD = "adaptive_sparse"
"""``quant_method`` of the ``quantization_config`` of a model that carries our config."""

FORMAT_VERSION = 1
"""Version of the JSON forms in this module and of the checkpoint's config, where none is named."""

WEIGHT_BITS_VERSION = 2
"""Version of a compression profile, and of a checkpoint, that quantises values of weights.

What does not quantise them keeps version 1, so that earlier releases go on reading it.
"""

LOSSLESS_BITS_VERSION = 3
"""Version of the same with values of 12 bits."""

WEIGHT_BITS = (4, 8, 12, 16)
"""Bit widths the kept values of a weight may be stored in; 16 keeps the model's own dtype, 12 is
bfloat16 without loss."""

LOSSLESS_BITS = (12, 16)
"""Those that change no weight."""

SEARCHED_WEIGHT_BITS = (4, 8, 16)
"""Those that a search chooses from, by bytes that are known beforehand."""

KV_BITS = (2, 3, 4, 6, 8, 16)
"""Bit widths a key or value may be stored in; 16 keeps the model's own dtype."""

KV_KEY_MODES = ("channel", "token")
"""How keys may share scales: per channel over the tokens of a block, or per token in groups."""

MIN_EXPERT_TOKENS = 32
"""Calibration tokens that an expert must have seen to be pruned by them: with so many, the norm of
an input feature is known to about an eighth of itself."""

Bits = int | tuple[int, ...]

_FIRST_KV_FORM = {"key_bits", "value_bits", "group_size", "residual_length"}


def check_format_version(found: object, what: str, newest: int = FORMAT_VERSION) -> None:
    """Refuse a serialised form that this version cannot read.

    Args:
        found: The version read from the file.
        what: Name of the thing that was read, for the message.
        newest: The newest version of that thing.

    Raises:
        ValueError: If ``found`` is not a version between 1 and ``newest``.
    """
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"format_version of {what} must be a whole number >= 1, got {found!r}.")
    if found > newest:
        raise ValueError(
            f"{what} has format_version {found}; this version of hf_adaptive_sparse reads up to "
            f"{newest}. Upgrade it: pip install --upgrade hf-adaptive-sparse."
        )


def check_ratio(ratio: Any, what: str) -> float:
    """Return ``ratio`` as a float in [0, 1).

    Raises:
        ValueError: If it is not a real number in [0, 1).
    """
    is_number = isinstance(ratio, Real) and not isinstance(ratio, bool)
    # Compared before it is converted: a whole number of any size is a Real, and no float.
    if not (is_number and 0 <= ratio < 1):
        raise ValueError(
            f"{what} must be a number in [0, 1) (the fraction of weights removed), got {ratio!r}."
        )
    return float(ratio)


def weight_bits_version(widths: Iterable[int]) -> int:
    """Return the version of a checkpoint, or profile, with values of these bits."""
    narrowest = set(widths) - {16}
    if narrowest & set(LOSSLESS_BITS):
        return LOSSLESS_BITS_VERSION
    return WEIGHT_BITS_VERSION if narrowest else FORMAT_VERSION


def check_weight_bits(bits: object, what: str) -> int:
    """Return ``bits`` as one of ``WEIGHT_BITS``.

    Raises:
        ValueError: If it is none of them.
    """
    if not isinstance(bits, Integral) or isinstance(bits, bool) or int(bits) not in WEIGHT_BITS:
        raise ValueError(
            f"{what} must be one of {', '.join(map(str, WEIGHT_BITS))} (bits per kept weight), "
            f"got {bits!r}."
        )
    return int(bits)


def check_count(value: object, what: str, least: int = 1, also: str = "") -> int:
    """Return a whole number that is not below ``least``.

    Args:
        value: What was given.
        what: Its name, for the message.
        least: The lowest number.
        also: What else may be given, for the message.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{what} must be a whole number >= {least}{also}, got {value!r}.")
    return int(value)


def _check_bits(bits: object, what: str) -> Bits:
    if isinstance(bits, Sequence) and not isinstance(bits, str):
        if not bits:
            raise ValueError(f"{what} must name at least one layer, got an empty list.")
        return tuple(_check_one_width(b, what) for b in bits)
    return _check_one_width(bits, what)


def _check_one_width(bits: object, what: str) -> int:
    if not isinstance(bits, Integral) or isinstance(bits, bool) or int(bits) not in KV_BITS:
        raise ValueError(
            f"{what} must be one of {', '.join(map(str, KV_BITS))} (or one such number per "
            f"decoder layer), got {bits!r}."
        )
    return int(bits)


def _check_mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{what} must be a mapping from module names, got {value!r}.")
    return value


def _check_form(data: object, what: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} must be a JSON object, got {data!r}.")
    return data


@dataclass(frozen=True)
class SparsityProfile:
    """The ratio of weights removed from each prunable linear.

    Attributes:
        ratios: Module name -> fraction of its weights removed, in [0, 1).
    """

    ratios: Mapping[str, float]

    def __post_init__(self) -> None:
        ratios = _check_mapping(self.ratios, "The ratios of a sparsity profile")
        checked = {
            name: check_ratio(ratio, f"sparsity of {name!r}") for name, ratio in ratios.items()
        }
        object.__setattr__(self, "ratios", checked)

    def mean(self, numel: Mapping[str, int]) -> float:
        """Return the parameter-weighted mean ratio.

        Args:
            numel: Module name -> number of weights. Modules the profile does not name count as
                dense (ratio 0).
        """
        total = sum(numel.values())
        return sum(self.ratios.get(name, 0.0) * n for name, n in numel.items()) / total

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"format_version": FORMAT_VERSION, "ratios": dict(self.ratios)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsityProfile:
        """Read the JSON form.

        Raises:
            ValueError: If the version or a ratio is invalid.
        """
        data = _check_form(data, "A sparsity profile")
        check_format_version(data.get("format_version"), "the sparsity profile")
        if "ratios" not in data:
            raise ValueError(f"A sparsity profile has the key ratios; got {', '.join(data)}.")
        return cls(ratios=data["ratios"])


@dataclass(frozen=True, eq=False)
class KVCacheConfig:
    """How many bits each decoder layer's keys and values take in the cache: the KV profile.

    Attributes:
        bits: Bits of keys and values alike: one number for all layers, or one per layer. 16 keeps
            the model's own dtype.
        key_bits: Bits of the keys; overrides ``bits``.
        value_bits: Bits of the values; overrides ``bits``.
        group_size: Neighbouring elements of one head and token that share a scale and a minimum:
            of the values, and of the keys in the mode "token". Heads smaller than this take one
            group each.
        residual_length: Tokens per packed block. The newest 0 to ``residual_length - 1`` tokens
            stay unquantised until their block is full. Above 1,024, no CPU kernel reads the blocks:
            every step decodes all of them.
        key_mode: "channel": a channel's keys share a scale and a minimum over the tokens of a
            block, which large key biases (Qwen2.5) survive at low bits; "token": ``group_size``
            channels of one token do.
        sink_length: First tokens of the sequence that stay unquantised (attention sinks), in
            full-attention layers.
    """

    bits: Bits = 8
    key_bits: Bits | None = None
    value_bits: Bits | None = None
    group_size: int = 64
    residual_length: int = 128
    key_mode: str = "channel"
    sink_length: int = 0

    def __post_init__(self) -> None:
        for name in ("bits", "key_bits", "value_bits"):
            value = getattr(self, name)
            if value is not None or name == "bits":
                object.__setattr__(self, name, _check_bits(value, name))
        for name in ("group_size", "residual_length"):
            object.__setattr__(self, name, check_count(getattr(self, name), name))
        sinks = check_count(self.sink_length, "sink_length", least=0)
        object.__setattr__(self, "sink_length", sinks)
        if not isinstance(self.key_mode, str) or self.key_mode not in KV_KEY_MODES:
            raise ValueError(
                f"key_mode must be one of {', '.join(KV_KEY_MODES)}, got {self.key_mode!r}."
            )

    def __eq__(self, other: object) -> bool:
        # 6 bits for both are the same said as bits=6 or as key_bits=6, value_bits=6.
        if not isinstance(other, KVCacheConfig):
            return NotImplemented
        return self._effective == other._effective

    def __hash__(self) -> int:
        return hash(self._effective)

    @property
    def _effective(self) -> tuple[Bits | str, ...]:
        keys = self.bits if self.key_bits is None else self.key_bits
        values = self.bits if self.value_bits is None else self.value_bits
        others = (self.group_size, self.residual_length, self.key_mode, self.sink_length)
        return (keys, values, *others)

    def layer_bits(self, num_layers: int) -> tuple[tuple[int, int], ...]:
        """Return ``(key bits, value bits)`` of each of ``num_layers`` decoder layers.

        Raises:
            ValueError: If a list of bits has another length than ``num_layers``.
        """

        def spread(bits: Bits, name: str) -> tuple[int, ...]:
            if isinstance(bits, int):
                return (bits,) * num_layers
            if len(bits) != num_layers:
                raise ValueError(
                    f"{name} must be one number or one per decoder layer: the model has "
                    f"{num_layers} layers, the list has {len(bits)} entries."
                )
            return bits

        keys = (self.bits, "bits") if self.key_bits is None else (self.key_bits, "key_bits")
        values = (self.bits, "bits") if self.value_bits is None else (self.value_bits, "value_bits")
        return tuple(zip(spread(*keys), spread(*values), strict=True))

    def mean_bits(self, widths: Sequence[tuple[int, int]]) -> float:
        """Return the mean bits per cached element, weighted by width.

        Args:
            widths: Per layer, the elements one token adds to the keys and to the values
                (``kv_heads * head_dim`` each).
        """
        bits = self.layer_bits(len(widths))
        weighted = sum(k * kw + v * vw for (k, v), (kw, vw) in zip(bits, widths, strict=True))
        return weighted / sum(kw + vw for kw, vw in widths)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form used in checkpoints: plain types, keys and values apart."""

        def plain(bits: Bits) -> int | list[int]:
            return bits if isinstance(bits, int) else list(bits)

        return {
            "key_bits": plain(self.bits if self.key_bits is None else self.key_bits),
            "value_bits": plain(self.bits if self.value_bits is None else self.value_bits),
            "group_size": self.group_size,
            "residual_length": self.residual_length,
            "key_mode": self.key_mode,
            "sink_length": self.sink_length,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KVCacheConfig:
        """Read the JSON form.

        ``to_dict`` of version 0.1 wrote exactly key_bits, value_bits, group_size and
        residual_length, and keys were quantised per token then: such a form gets
        ``key_mode="token"``. In any other one a missing key takes its default.

        Raises:
            ValueError: If a key is unknown or a value invalid.
        """
        data = _check_form(data, "A KV cache config")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(
                f"KV cache config knows the keys {', '.join(known)}; got {', '.join(unknown)}."
            )
        values = dict(data)
        if set(values) == _FIRST_KV_FORM:
            values["key_mode"] = "token"
        return cls(**values)


@dataclass(frozen=True)
class CalibrationConfig:
    """Where calibration data come from and how much of them is used.

    Attributes:
        dataset: Hub dataset as ``name``, ``name:config`` or ``name:config:split``, or the path of
            a local parquet, jsonl or text file. ``None``: WikiText-2's training split.
        num_samples: Windows of text, or questions, that are used at most.
        sequence_length: Tokens per window of text. ``None``: ``min(2048, the model's context)``.
        batch_size: Windows or questions per batch.
        sequential: Each layer is calibrated on the output of the pruned layers before it
            (``True``) or of the dense ones (``False``, "one-shot").
        image_weight: Weight of an image token in the activation statistics; text tokens weigh 1.
        seed: Seed of the choice of samples.
        min_expert_tokens: Experts that saw fewer calibration tokens are scored without data, and
            named in the report.
    """

    dataset: str | None = None
    num_samples: int = 128
    sequence_length: int | None = None
    batch_size: int = 1
    sequential: bool = True
    image_weight: float = 1.0
    seed: int = 0
    min_expert_tokens: int = MIN_EXPERT_TOKENS

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "min_expert_tokens"):
            object.__setattr__(self, name, check_count(getattr(self, name), name))
        if self.sequence_length is not None:
            length = check_count(self.sequence_length, "sequence_length")
            object.__setattr__(self, "sequence_length", length)
        weight = self.image_weight
        if not isinstance(weight, Real) or isinstance(weight, bool) or not float(weight) >= 0.0:
            raise ValueError(f"image_weight must be a number >= 0, got {weight!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


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
        weight_bits = _check_mapping(self.weight_bits, "The weight bits of a compression profile")
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
            ValueError: If the version or a value is invalid.
        """
        data = _check_form(data, "A compression profile")
        version = data.get("format_version")
        check_format_version(version, "the compression profile", LOSSLESS_BITS_VERSION)
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
            ValueError: If the file is not a valid profile.
        """
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
