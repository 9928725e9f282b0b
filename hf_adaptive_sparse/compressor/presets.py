"""The presets of ``--quality``: the best method known here, or the paper's as published.

A preset says how weights are chosen and updated and how far profiles are searched. What the caller
gives (a metric, a number of trials, a space) overrides it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.search.space import SearchSpace


@dataclass(frozen=True)
class Preset:
    """A preset.

    Attributes:
        name: Its name on the command line.
        summary: What it is, for ``--help``.
        metric: Metric of the final prune; the search ranks with it where it only scores weights,
            else with ``lognorm``.
        n_trials: Trials of the search.
        blocks: Groups of consecutive layers that share a ratio.
        sparsity_range: How far a ratio may lie from the target.
        step: Distance of the sampled ratios.
    """

    name: str
    summary: str
    metric: str
    n_trials: int
    blocks: int
    sparsity_range: float
    step: float

    def config(self, asked: SparsityConfig | None = None) -> SparsityConfig:
        """Return the config of the final prune: the caller's, with this method if it names none.

        Args:
            asked: The caller's config; if it was given neither a metric nor a weight update, it
                gets the preset's.
        """
        if asked is None:
            return SparsityConfig(metric=self.metric)
        if asked.passed & {"metric", "weight_update"}:
            return asked
        completed: SparsityConfig = SparsityConfig.from_dict(
            {**asked.to_dict(), "metric": self.metric}
        )
        return completed

    def space(self, config: SparsityConfig) -> SearchSpace:
        """Return the space at the config's target; with a pattern n:m only KV bits are searched."""
        fixed = config.pattern != "unstructured"
        return SearchSpace(
            target_sparsity=None if fixed else config.target_sparsity,
            blocks=self.blocks,
            sparsity_range=self.sparsity_range,
            step=self.step,
        )


PRESETS = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset(
                name="best",
                summary="a searched profile, mask and weights together by ALPS",
                metric="alps",
                n_trials=50,
                blocks=8,
                sparsity_range=0.05,
                step=0.025,
            ),
            Preset(
                name="paper",
                summary="arXiv 2507.20613: lognorm, weights as they are, 8 blocks within 0.05",
                metric="lognorm",
                n_trials=50,
                blocks=8,
                sparsity_range=0.05,
                step=0.025,
            ),
        )
    }
)
"""The presets by name."""

DEFAULT_QUALITY = "best"


def get_preset(name: str) -> Preset:
    """Return the preset of a name.

    Raises:
        ValueError: If there is none; the known names are listed.
    """
    if name not in PRESETS:
        raise ValueError(f"quality must be one of {', '.join(PRESETS)}; got {name!r}.")
    return PRESETS[name]
