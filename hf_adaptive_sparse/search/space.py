"""The search space: which ratios and KV bits may be tried, under which budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any

from hf_adaptive_sparse.profiles import KV_BITS, Bits, KVCacheConfig, check_ratio


@dataclass(frozen=True)
class SearchSpace:
    """What a search may choose; the defaults are the paper's.

    The budget is part of the space: every profile that is evaluated has the mean ratio
    ``target_sparsity`` (weighted by parameters) and the mean KV bits ``mean_kv_bits`` (weighted by
    cache width). The grid of ``step`` is where profiles are sampled; what is evaluated is their
    projection onto the budget, which may lie off the grid.

    Attributes:
        target_sparsity: Mean ratio of weights removed. ``None`` or 0: the weights are left alone.
        sparsity_range: How far a block's ratio may lie from the target, both ways. 0: every block
            takes the target. Ratios below 0 are cut off.
        step: Distance of the sampled ratios.
        blocks: Groups of consecutive decoder layers that share a ratio, as even as possible; a
            model with fewer layers has one block per layer.
        kv_bits: Widths that the layers' keys and values share out equally, from 2, 3, 4, 6, 8 and
            16. A single width: every layer takes it. ``None``: the KV cache is left alone.
        kv_group_size: Neighbouring elements of a head that share a scale, see `KVCacheConfig`.
        kv_residual_length: Tokens per packed block, see `KVCacheConfig`.
        kv_key_mode: How keys share scales, see `KVCacheConfig`.
        kv_tolerance_bits: How far the mean KV bits may lie from the palette's mean where no split
            of the layers reaches it (an odd number of layers whose keys and values differ in
            width). 0: such a model is refused.
        pattern: Only ``"unstructured"``: n:m fixes every ratio, which leaves nothing to search.

    Raises:
        ValueError: If a value is out of range, or nothing is left to choose or to fix.
    """

    target_sparsity: float | None = 0.5
    sparsity_range: float = 0.05
    step: float = 0.025
    blocks: int = 8
    kv_bits: tuple[int, ...] | None = (6, 8)
    kv_group_size: int = 64
    kv_residual_length: int = 128
    kv_key_mode: str = "channel"
    kv_tolerance_bits: float = 0.0
    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        target = 0.0 if self.target_sparsity is None else self.target_sparsity
        object.__setattr__(self, "target_sparsity", check_ratio(target, "target_sparsity"))
        for name in ("sparsity_range", "kv_tolerance_bits"):
            object.__setattr__(self, name, _check_number(getattr(self, name), name))
        step = _check_number(self.step, "step")
        if step <= 0.0:
            raise ValueError(f"step must be > 0, got {self.step!r}.")
        object.__setattr__(self, "step", step)
        blocks = self.blocks
        if not isinstance(blocks, Integral) or isinstance(blocks, bool) or blocks < 1:
            raise ValueError(f"blocks must be a whole number >= 1, got {blocks!r}.")
        object.__setattr__(self, "kv_bits", _check_palette(self.kv_bits))
        # Checks the cache's other settings by the same rules and texts.
        self.kv_config(8, 8)
        if self.prunes:
            self._check_sparsity()
        elif self.kv_bits is None:
            raise ValueError(
                "The space is empty: target_sparsity is 0 and kv_bits is None. Set at least one, "
                "for example target_sparsity=0.5 or kv_bits=(6, 8)."
            )

    def _check_sparsity(self) -> None:
        if self.pattern != "unstructured":
            raise ValueError(
                f"pattern must be 'unstructured' in a sparsity search, got {self.pattern!r}: n:m "
                "fixes every ratio. Prune with it first (has.prune), then search the KV bits alone "
                "(target_sparsity=None)."
            )
        if 0.0 < self.sparsity_range < self.step:
            raise ValueError(
                f"sparsity_range must be 0 or at least step, got sparsity_range="
                f"{self.sparsity_range} and step={self.step}: no ratio but the target would be "
                "tried."
            )
        if self.high >= 1.0:
            raise ValueError(
                f"target_sparsity + sparsity_range must be below 1, got {self.target} + "
                f"{self.sparsity_range}. Lower one of them."
            )

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
    def target(self) -> float:
        """The target mean ratio; 0 where the weights are left alone."""
        return self.target_sparsity or 0.0

    @property
    def prunes(self) -> bool:
        """Whether weights are removed."""
        return self.target > 0.0

    @property
    def searches_sparsity(self) -> bool:
        """Whether the space leaves ratios to choose."""
        return self.prunes and self.sparsity_range > 0.0

    @property
    def searches_kv(self) -> bool:
        """Whether the space leaves KV bits to choose."""
        return self.kv_bits is not None and len(self.kv_bits) > 1

    @property
    def low(self) -> float:
        """The lowest ratio a block may take."""
        return max(0.0, round(self.target - self.sparsity_range, 12))

    @property
    def high(self) -> float:
        """The highest ratio a block may take."""
        return round(self.target + self.sparsity_range, 12)

    @property
    def grid(self) -> tuple[float, float]:
        """Lowest and highest ratio that are sampled: the target plus multiples of ``step``."""
        # The allowance keeps 0.05 / 0.025 at two steps whatever the rounding of the quotient.
        up = math.floor(self.sparsity_range / self.step + 1e-9)
        down = min(up, math.floor(self.target / self.step + 1e-9))
        return round(self.target - down * self.step, 12), round(self.target + up * self.step, 12)

    @property
    def mean_kv_bits(self) -> float | None:
        """The mean KV bits that every profile has: the mean of the palette."""
        return None if self.kv_bits is None else sum(self.kv_bits) / len(self.kv_bits)

    def layer_blocks(self, num_layers: int) -> list[range]:
        """Return the decoder layers of each block: consecutive, sizes differing by at most one.

        Raises:
            ValueError: If there is no layer.
        """
        if num_layers < 1:
            raise ValueError(f"num_layers must be >= 1, got {num_layers}.")
        blocks = min(self.blocks, num_layers)
        edges = [index * num_layers // blocks for index in range(blocks + 1)]
        return [range(start, end) for start, end in itertools.pairwise(edges)]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        form = asdict(self)
        form["kv_bits"] = None if self.kv_bits is None else list(self.kv_bits)
        return form


def _check_number(value: object, what: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0.0 <= float(value) < 1e6:
        raise ValueError(f"{what} must be a number >= 0, got {value!r}.")
    return float(value)


def _check_palette(kv_bits: object) -> tuple[int, ...] | None:
    if kv_bits is None:
        return None
    widths = [kv_bits] if isinstance(kv_bits, Integral) else kv_bits
    known = ", ".join(map(str, KV_BITS))
    if not isinstance(widths, Sequence) or isinstance(widths, str) or not widths:
        raise ValueError(f"kv_bits must be None or widths from {known}, got {kv_bits!r}.")
    for width in widths:
        if not isinstance(width, Integral) or isinstance(width, bool) or width not in KV_BITS:
            raise ValueError(f"kv_bits must be None or widths from {known}, got {kv_bits!r}.")
    if len(set(widths)) != len(widths):
        raise ValueError(f"kv_bits must name each width once, got {kv_bits!r}.")
    return tuple(sorted(int(width) for width in widths))
