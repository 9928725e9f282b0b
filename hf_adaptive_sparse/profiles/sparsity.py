"""The ratio of weights removed from each linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_adaptive_sparse.profiles.checks import check_form, check_keys, check_mapping, check_ratio
from hf_adaptive_sparse.profiles.versions import FORMAT_VERSION, check_format_version


@dataclass(frozen=True)
class SparsityProfile:
    """The ratio of weights removed from each prunable linear.

    Attributes:
        ratios: Module name -> fraction of its weights removed, in [0, 1).
    """

    ratios: Mapping[str, float]

    def __post_init__(self) -> None:
        ratios = check_mapping(self.ratios, "The ratios of a sparsity profile")
        checked = {
            name: check_ratio(ratio, f"sparsity of {name!r}") for name, ratio in ratios.items()
        }
        object.__setattr__(self, "ratios", checked)

    def mean(self, numel: Mapping[str, int]) -> float:
        """Return the parameter-weighted mean ratio.

        Args:
            numel: Module name -> number of weights. Modules the profile does not name count as
                dense (ratio 0).

        Raises:
            ValueError: If there are no weights.
        """
        total = sum(numel.values())
        if total == 0:
            raise ValueError(f"numel must count at least one weight, got {dict(numel)!r}.")
        return sum(self.ratios.get(name, 0.0) * n for name, n in numel.items()) / total

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"format_version": FORMAT_VERSION, "ratios": dict(self.ratios)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsityProfile:
        """Read the JSON form.

        Raises:
            ValueError: If the version, a key or a ratio is invalid.
        """
        data = check_form(data, "A sparsity profile")
        check_format_version(data.get("format_version"), "the sparsity profile")
        check_keys(data, ("format_version", "ratios"), "A sparsity profile")
        if "ratios" not in data:
            raise ValueError(f"A sparsity profile has the key ratios; got {', '.join(data)}.")
        return cls(ratios=data["ratios"])
