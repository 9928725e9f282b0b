"""How the KV cache of each layer is quantised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any

from hf_adaptive_sparse.profiles.checks import check_count, check_form, check_keys
from hf_adaptive_sparse.profiles.widths import KV_BITS, KV_KEY_MODES

Bits = int | tuple[int, ...]

_FIRST_KV_FORM = {"key_bits", "value_bits", "group_size", "residual_length"}


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
        """Read the JSON form from a file.

        ``to_dict`` of version 0.1 wrote exactly key_bits, value_bits, group_size and
        residual_length, and keys were quantised per token then: such a form gets
        ``key_mode="token"``. In any other one a missing key takes its default.

        Raises:
            ValueError: If a key is unknown or a value invalid.
        """
        config = cls.from_fields(data)
        if set(data) == _FIRST_KV_FORM:
            return replace(config, key_mode="token")
        return config

    @classmethod
    def from_fields(cls, data: Mapping[str, Any]) -> KVCacheConfig:
        """Make a config of fields that a user gave by name; a missing one takes its default.

        Raises:
            ValueError: If a key is unknown or a value invalid.
        """
        data = check_form(data, "A KV cache config")
        check_keys(data, [field.name for field in fields(cls)], "A KV cache config")
        return cls(**data)


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
