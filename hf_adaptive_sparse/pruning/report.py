"""What a prune did: per linear and stack of experts, how many weights went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModuleReport:
    """One linear, or one stack of experts.

    Attributes:
        name: Runtime name of the module, or of the experts' parameter.
        numel: Its weights.
        removed: Weights set to zero.
        target: The ratio that was asked for.
    """

    name: str
    numel: int
    removed: int
    target: float

    @property
    def ratio(self) -> float:
        """Fraction removed."""
        return self.removed / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class PruningReport:
    """All weights that were given a ratio, 0 included: they are the denominator.

    Attributes:
        modules: One report per linear or stack of experts, in layer order.
        metric: Name of the metric.
        pattern: ``"unstructured"`` or ``"n:m"``.
        seconds: Wall-clock time.
        weight_update: Name of the update of the kept weights, if there was one.
        experts_without_data: Module of experts -> those of them that saw too few calibration tokens
            and were scored without.
        linears_without_data: Linears scored without data: those that no calibration token reached,
            and those of an expert that too few did.
    """

    modules: tuple[ModuleReport, ...]
    metric: str
    pattern: str
    seconds: float
    weight_update: str | None = None
    experts_without_data: Mapping[str, Sequence[int]] = field(default_factory=dict)
    linears_without_data: Sequence[str] = ()

    @property
    def numel(self) -> int:
        """Weights of all linears."""
        return sum(module.numel for module in self.modules)

    @property
    def removed(self) -> int:
        """Weights removed from all linears."""
        return sum(module.removed for module in self.modules)

    @property
    def mean_sparsity(self) -> float:
        """Parameter-weighted mean ratio over the reported linears."""
        return self.removed / self.numel if self.numel else 0.0

    @property
    def target_sparsity(self) -> float:
        """Parameter-weighted mean of the ratios that were asked for."""
        asked = sum(module.target * module.numel for module in self.modules)
        return asked / self.numel if self.numel else 0.0

    @property
    def ratios(self) -> dict[str, float]:
        """Module name -> the ratio that was asked for."""
        return {module.name: module.target for module in self.modules}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "metric": self.metric,
            "weight_update": self.weight_update,
            "pattern": self.pattern,
            "seconds": self.seconds,
            "numel": self.numel,
            "removed": self.removed,
            "mean_sparsity": self.mean_sparsity,
            "target_sparsity": self.target_sparsity,
            "experts_without_data": {n: list(e) for n, e in self.experts_without_data.items()},
            "linears_without_data": list(self.linears_without_data),
            "modules": [asdict(module) | {"ratio": module.ratio} for module in self.modules],
        }
