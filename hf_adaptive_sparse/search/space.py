"""The search space: which ratios, weight bits and KV bits may be tried, under which budget."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields
from typing import Any

from hf_adaptive_sparse.profiles import (
    KV_BITS,
    SEARCHED_WEIGHT_BITS,
    Bits,
    KVCacheConfig,
    check_count,
    check_ratio,
)
from hf_adaptive_sparse.search.byte_sizes import parse_bytes
from hf_adaptive_sparse.search.space_rules import (
    GRANULARITIES,
    KV_SPLITS,
    check_choice,
    check_fit,
    check_kv,
    check_number,
    check_palette,
    check_sparsity,
    check_weight_palette,
)

FREE = "free"
"""As ``target_sparsity``: the mean ratio is what a budget in bytes makes it."""

OWN_DTYPE = 16
"""Bits of weights, keys or values that stand for the model's own dtype."""

FREE_RANGE = (0.0, 0.75)
"""Ratios that a block may take where the mean is free and no range is given."""

_FIRST_FIELDS = frozenset(
    {
        "target_sparsity",
        "sparsity_range",
        "step",
        "blocks",
        "kv_bits",
        "kv_group_size",
        "kv_residual_length",
        "kv_key_mode",
        "kv_tolerance_bits",
        "pattern",
    }
)
"""Fields that the JSON form always has. Later ones are in it where they differ from their default,
so that studies made before they existed are resumed."""


@dataclass(frozen=True)
class SearchSpace:
    """What a search may choose; the defaults are the paper's.

    The budget is part of the space, and every profile that is evaluated meets it. It is a mean
    ratio ``target_sparsity`` (weighted by parameters) and mean KV bits (weighted by cache width),
    both exact; or a limit in bytes, which the profiles come as near to as their choices allow and
    never pass. The grid of ``step`` is where profiles are sampled; what is evaluated is their
    projection onto the budget, which may lie off the grid.

    Attributes:
        target_sparsity: Mean ratio of weights removed. ``None`` or 0: the weights are left alone.
            ``"free"``: whatever mean a budget in bytes leads to, or the bound of `search_within`.
        sparsity_range: How far a ratio may lie from the target, both ways. 0: every block takes
            the target. Ratios below 0 are cut off. Of no meaning where the mean is free.
        step: Distance of the sampled ratios.
        blocks: Groups of consecutive decoder layers that share a ratio and weight bits, as even as
            possible; a model with fewer layers has one block per layer.
        kv_bits: Widths of keys and values, from 2, 3, 4, 6, 8 and 16. A single width: every layer
            takes it. ``None``: the KV cache is left alone.
        kv_group_size: Neighbouring elements of a head that share a scale, see `KVCacheConfig`.
        kv_residual_length: Tokens per packed block, see `KVCacheConfig`.
        kv_key_mode: How keys share scales, see `KVCacheConfig`.
        kv_tolerance_bits: How far the mean KV bits of an equal split may lie from the palette's
            mean where none reaches it (an odd number of layers whose keys and values differ in
            width). 0: such a model is refused.
        pattern: Only ``"unstructured"``: n:m fixes every ratio, which leaves nothing to search.
        granularity: What shares a ratio: ``"block"``, ``"layer"``, or the linears of one role (q,
            k, v, o, gate, up, down, as the model names them) of a block, ``"block-projection"``,
            or of a layer, ``"layer-projection"``.
        sparsity_low: Lowest ratio, instead of the target less ``sparsity_range``.
        sparsity_high: Highest ratio, instead of the target plus ``sparsity_range``.
        kv_split: ``"equal"``: the widths are shared out equally, whose mean is the palette's.
            ``"free"``: any width at any layer, with the mean ``kv_mean_bits`` exactly; under
            ``fit_bytes`` without one, within the bytes. ``None``: free where there is a
            ``kv_mean_bits`` or ``fit_bytes``, else equal.
        kv_apart: Whether keys and values of a layer may differ in width. Together is the paper's.
        kv_mean_bits: Mean of a free split, weighted by cache width. ``None``: the palette's mean.
        weight_bits: Widths of the kept weights, one per block (per layer with a granularity by
            layer), from 4, 8 and 16. A single width: every block takes it. ``None``: 16, the
            model's dtype.
        weight_mean_bits: Exact mean of the weights' widths, weighted by the prunable weights.
            Several widths without a mean and without a budget in bytes leave the size open: for
            ``max_loss`` alone.
        fit_bytes: Most memory that weights and KV cache may take together: the weights as the
            sparse runtime holds them, all other parameters and buffers, and the cache of
            ``batch_size`` sequences of up to ``context_length`` tokens. What a forward computes
            with in between is not in it. As on the kind of device that the model is searched on: a
            GPU holds a quarter of a bit more per weight. Bytes, or text such as ``"6GiB"``.
        context_length: Tokens per sequence for ``fit_bytes``.
        batch_size: Sequences for ``fit_bytes``.
        size_bytes: Most bytes that the checkpoint's safetensors files may take on disk. Bytes, or
            text such as ``"4GiB"``.

    Raises:
        ValueError: If a value is out of range, values contradict each other, or nothing is left to
            choose or to fix.
    """

    target_sparsity: float | str | None = 0.5
    sparsity_range: float = 0.05
    step: float = 0.025
    blocks: int = 8
    kv_bits: tuple[int, ...] | None = (6, 8)
    kv_group_size: int = 64
    kv_residual_length: int = 128
    kv_key_mode: str = "channel"
    kv_tolerance_bits: float = 0.0
    pattern: str = "unstructured"
    granularity: str = "block"
    sparsity_low: float | None = None
    sparsity_high: float | None = None
    kv_split: str | None = None
    kv_apart: bool = False
    kv_mean_bits: float | None = None
    weight_bits: tuple[int, ...] | None = None
    weight_mean_bits: float | None = None
    fit_bytes: int | str | None = None
    context_length: int | None = None
    batch_size: int = 1
    size_bytes: int | str | None = None

    def __post_init__(self) -> None:
        if not self.is_free:
            target = 0.0 if self.target_sparsity is None else self.target_sparsity
            self._set("target_sparsity", check_ratio(target, "target_sparsity"))
        for name in ("sparsity_range", "kv_tolerance_bits"):
            self._set(name, check_number(getattr(self, name), name))
        for name in ("sparsity_low", "sparsity_high"):
            if getattr(self, name) is not None:
                self._set(name, check_ratio(getattr(self, name), name))
        step = check_number(self.step, "step")
        if step <= 0.0:
            raise ValueError(f"step must be > 0, got {self.step!r}.")
        self._set("step", step)
        self._set("blocks", check_count(self.blocks, "blocks"))
        check_choice(self.granularity, GRANULARITIES, "granularity")
        self._set("kv_bits", check_palette(self.kv_bits, KV_BITS, "kv_bits"))
        widths = check_palette(self.weight_bits, SEARCHED_WEIGHT_BITS, "weight_bits")
        self._set("weight_bits", widths)
        for name in ("kv_mean_bits", "weight_mean_bits"):
            if getattr(self, name) is not None:
                self._set(name, check_number(getattr(self, name), name))
        for name in ("fit_bytes", "size_bytes"):
            if getattr(self, name) is not None:
                self._set(name, parse_bytes(getattr(self, name), name))
        if self.context_length is not None:
            self._set("context_length", check_count(self.context_length, "context_length"))
        self._set("batch_size", check_count(self.batch_size, "batch_size"))
        if self.kv_split is None:
            free = self.kv_mean_bits is not None or self.fit_bytes is not None
            self._set("kv_split", "free" if free else "equal")
        check_choice(self.kv_split, KV_SPLITS, "kv_split")
        # Checks the cache's other settings by the same rules and texts.
        self.kv_config(8, 8)
        check_fit(self)
        check_sparsity(self)
        check_kv(self)
        check_weight_palette(self)
        if not self.prunes and self.kv_bits is None and self.weight_bits is None:
            raise ValueError(
                "The space is empty: target_sparsity is 0, kv_bits and weight_bits are None. Set "
                "at least one, for example target_sparsity=0.5 or kv_bits=(6, 8)."
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def kv_config(self, key_bits: Bits, value_bits: Bits) -> KVCacheConfig:
        """Return the KV profile of these bits, with the space's other settings."""
        return KVCacheConfig(
            key_bits=key_bits,
            value_bits=value_bits,
            group_size=self.kv_group_size,
            residual_length=self.kv_residual_length,
            key_mode=self.kv_key_mode,
        )

    @property
    def is_free(self) -> bool:
        """Whether the mean ratio is left to a budget in bytes."""
        return self.target_sparsity == FREE

    @property
    def in_bytes(self) -> bool:
        """Whether there is a budget in bytes."""
        return self.fit_bytes is not None or self.size_bytes is not None

    @property
    def target(self) -> float:
        """The target mean ratio; 0 where the weights are left alone or the mean is free."""
        return self.target_sparsity if isinstance(self.target_sparsity, float) else 0.0

    @property
    def prunes(self) -> bool:
        """Whether weights are removed."""
        return self.is_free or self.target > 0.0

    @property
    def searches_sparsity(self) -> bool:
        """Whether the space leaves ratios to choose."""
        return self.prunes and self.low < self.high

    @property
    def searches_kv(self) -> bool:
        """Whether the space leaves KV bits to choose."""
        return self.kv_bits is not None and len(self.kv_bits) > 1

    @property
    def searches_weight_bits(self) -> bool:
        """Whether the space leaves weight bits to choose."""
        return self.weight_bits is not None and len(self.weight_bits) > 1

    @property
    def searches(self) -> bool:
        """Whether the space leaves anything to choose."""
        return self.searches_sparsity or self.searches_kv or self.searches_weight_bits

    @property
    def low(self) -> float:
        """The lowest ratio a block may take."""
        if self.sparsity_low is not None:
            return self.sparsity_low
        if self.is_free:
            return FREE_RANGE[0]
        return max(0.0, self._off_target(-self.sparsity_range))

    @property
    def high(self) -> float:
        """The highest ratio a block may take."""
        if self.sparsity_high is not None:
            return self.sparsity_high
        if self.is_free:
            return max(FREE_RANGE[1], self.low)
        return self._off_target(self.sparsity_range)

    def _off_target(self, distance: float) -> float:
        # The target itself may have more digits.
        return round(self.target + distance, 12) if distance else self.target

    @property
    def grid(self) -> tuple[float, float]:
        """Lowest and highest ratio that are sampled: the target plus multiples of ``step``.

        Where the mean is free: the lowest ratio plus multiples of ``step``.
        """
        start = self.low if self.is_free else self.target
        # The allowance keeps 0.05 / 0.025 at two steps whatever the rounding of the quotient.
        up = math.floor((self.high - start) / self.step + 1e-9)
        down = math.floor((start - self.low) / self.step + 1e-9)
        return round(start - down * self.step, 12), round(start + up * self.step, 12)

    @property
    def held_kv_mean(self) -> float | None:
        """The mean KV bits that every profile has; ``None`` if they differ or there are none."""
        if self.kv_bits is None:
            return None
        if self.kv_mean_bits is not None:
            return self.kv_mean_bits
        bounded = self.fit_bytes is not None and len(self.kv_bits) > 1
        if self.kv_split == "free" and bounded:
            return None
        return sum(self.kv_bits) / len(self.kv_bits)

    def layer_blocks(self, num_layers: int) -> list[range]:
        """Return the decoder layers of each block: consecutive, sizes differing by at most one.

        With a granularity by layer every layer is a block of its own.

        Raises:
            ValueError: If there is no layer.
        """
        if num_layers < 1:
            raise ValueError(f"num_layers must be >= 1, got {num_layers}.")
        by_layer = self.granularity.startswith("layer")
        blocks = num_layers if by_layer else min(self.blocks, num_layers)
        edges = [index * num_layers // blocks for index in range(blocks + 1)]
        return [range(start, end) for start, end in itertools.pairwise(edges)]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; what came after the first version and is default is left out."""
        form: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            default = "equal" if field.name == "kv_split" else field.default
            if field.name in _FIRST_FIELDS or value != default:
                form[field.name] = list(value) if isinstance(value, tuple) else value
        return form
