"""What a search found: the best profile, everything that was tried, and how to use it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.files import replacing
from hf_adaptive_sparse.profiles import CalibrationConfig, CompressionProfile, check_format_version
from hf_adaptive_sparse.pruning.apply import PruningReport
from hf_adaptive_sparse.search.comparison import (
    HELD_OUT,
    held_out_of,
    held_out_text,
    held_out_verdict,
)
from hf_adaptive_sparse.search.fingerprint import STUDY_FORMAT, study_versions
from hf_adaptive_sparse.search.front import MEAN
from hf_adaptive_sparse.search.narrowing_result import NARROWER, Narrowing, narrowing_of
from hf_adaptive_sparse.search.objectives import Goal
from hf_adaptive_sparse.search.resolution import Gain, gain_over_uniform
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.storage import detached_study
from hf_adaptive_sparse.search.trials import DUPLICATE_OF, history, tally

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

PROFILE_FILE = "profile.json"
HISTORY_FILE = "search.json"


@dataclass(frozen=True)
class ParetoPoint:
    """One profile of a front.

    Attributes:
        trial: Number of its trial.
        values: Its figures by the name of the objective.
        profile: The profile.
        config: The profile as the config that prunes a model with it.
    """

    trial: int
    values: Mapping[str, float]
    profile: CompressionProfile
    config: SparsityConfig


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    The values, perplexities unless another objective was asked for, are of *one-shot* masks: all
    weights are ranked once, on the activations of the dense model, which is what makes a trial
    cheap. `apply` prunes anew, layer by layer, each layer calibrated on the output of the pruned
    ones before it, so the final masks and value differ a little from those of the trial.

    Attributes:
        study: The Optuna study, with every trial.
        space: The space that was searched.
        metric: Metric that ranked the weights.
        seed: Seed of the search.
        blocks: First and last decoder layer of each block.
        modules_to_not_convert: Names or globs of linears that stay dense.
        calibration_config: How the calibration data were made, where they were named.
        calibration: The calibration batches, kept for `apply`.
        fingerprint: What the study was made for.
        goal: What was minimised.
    """

    study: Study
    space: SearchSpace
    metric: str
    seed: int
    blocks: tuple[tuple[int, int], ...]
    modules_to_not_convert: tuple[str, ...]
    calibration_config: CalibrationConfig | None
    calibration: Sequence[Mapping[str, torch.Tensor]] | None = field(repr=False)
    fingerprint: Mapping[str, Any] = field(repr=False)
    goal: Goal = field(default_factory=lambda: Goal.of("perplexity"))

    @property
    def best_trial(self) -> FrozenTrial:
        """The trial of lowest value; the earliest of equals, so uniform wins a tie.

        Of a Pareto front, the lowest first value.
        """
        best = tally(self.study).best
        if best is None:
            raise ValueError("The study holds no completed trial; run search() again to resume it.")
        return best

    @property
    def best_value(self) -> float:
        """Lowest value, with one-shot masks."""
        return float(self.best_trial.values[0])

    @property
    def baseline(self) -> float | None:
        """Value of the uniform profile, ``None`` if its trial failed."""
        trial = tally(self.study).baseline
        return None if trial is None else float(trial.values[0])

    @property
    def gain(self) -> Gain | None:
        """The best profile's gain over uniform with its standard error, on the evaluation data.

        ``None`` where the uniform profile is the best, or of a front.
        """
        return None if self.goal.is_front else gain_over_uniform(tally(self.study))

    @property
    def best_profile(self) -> CompressionProfile:
        """The best profile; the narrower one that took its place, see `narrowing`."""
        return self._profile(self.best_trial)

    @property
    def narrowing(self) -> Narrowing | None:
        """Which of the best profile's widths make no measurable difference; ``None``: not compared.

        Its ``lines`` say it in words.
        """
        return narrowing_of(self.study.user_attrs, tally(self.study).best_number)

    @property
    def lines(self) -> list[str]:
        """What was measured of the best profile after the trials, in words."""
        held_out = held_out_of(self.study.user_attrs, self.best_trial.number)
        lines = [] if self.narrowing is None else list(self.narrowing.lines)
        if held_out is not None and held_out["change_percent"] != 0.0:  # of another profile
            told = (f"On held-out data: {held_out_text(held_out)}.", held_out_verdict(held_out))
            lines[:0] = filter(None, told)
        return lines

    @property
    def target_sparsity(self) -> float:
        """The mean ratio of the best profile: the space's, or what its trial came to."""
        return self._target(self.best_trial)

    @property
    def best_config(self) -> SparsityConfig:
        """The best profile as the config that prunes a model with it."""
        return self._config(self.best_trial)

    @property
    def pareto(self) -> tuple[ParetoPoint, ...]:
        """The profiles that no other beats in every value, by their first value.

        Of a search for one objective, the best profile alone.
        """
        if not self.goal.is_front:
            front = [self.best_trial]
        else:
            distinct = (t for t in self.study.best_trials if DUPLICATE_OF not in t.user_attrs)
            front = sorted(distinct, key=lambda trial: trial.values)
        return tuple(
            ParetoPoint(
                trial=trial.number,
                values=dict(zip(self.goal.names, trial.values, strict=True)),
                profile=self._profile(trial),
                config=self._config(trial),
            )
            for trial in front
        )

    def _target(self, trial: FrozenTrial) -> float:
        if self.goal.sweeps_budget:
            return float(trial.params[MEAN])
        return float(trial.user_attrs["mean_sparsity"]) if self.space.is_free else self.space.target

    def _profile(self, trial: FrozenTrial) -> CompressionProfile:
        narrowing = self.narrowing
        if narrowing is not None and narrowing.taken and narrowing.trial == trial.number:
            narrower = narrowing.profile
            if narrower is not None:
                return narrower
        return CompressionProfile.from_dict(trial.user_attrs["profile"])

    def _config(self, trial: FrozenTrial) -> SparsityConfig:
        profile = self._profile(trial)
        ratios = None if profile.sparsity is None else dict(profile.sparsity.ratios)
        weights: dict[str, Any] = {}
        if profile.weight_bits:
            weights = {"weight_bits": dict(profile.weight_bits)}
            # Linears are named by their ratios; one that is only quantised has ratio 0.
            ratios = ratios or dict.fromkeys(profile.weight_bits, 0.0)
        return SparsityConfig(
            target_sparsity=self._target(trial),
            metric=self.metric,
            sparsity=ratios,
            **weights,
            kv_cache=profile.kv_cache,
            calibration=self.calibration_config,
            modules_to_not_convert=list(self.modules_to_not_convert),
            provenance=self._provenance(trial),
        )

    def _provenance(self, trial: FrozenTrial) -> dict[str, Any]:
        figure = f"one_shot_{self.goal.labels[0].replace(' ', '_')}"
        return {
            "search": {
                "trials": tally(self.study).attempts,
                "seed": self.seed,
                "best_trial": trial.number,
                figure: float(trial.values[0]),
                f"{figure}_uniform": self.baseline,
            },
        }

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict per trial, in order; keys as in `trials.history`."""
        return history(self.study)

    def detached(self) -> SearchResult:
        """Return the same result with its study copied into memory, free of its storage."""
        return replace(self, study=detached_study(self.study))

    def apply(
        self,
        model: PreTrainedModel,
        calibration: Any = None,
        processor: Any = None,
        *,
        progress: bool = True,
    ) -> PruningReport:
        """Prune ``model`` in place with the best profile, by sequential calibration.

        Args:
            model: The model that was searched, or a fresh copy of it.
            calibration: Batches, dataset name, path or `CalibrationConfig`; ``None`` takes the
                batches of the search.
            processor: Needed where ``calibration`` is a name or a path.
            progress: Show a progress bar.

        Returns:
            What was removed from each linear.

        Raises:
            ValueError: If the profile names linears that the model does not have.
        """
        data = self.calibration if calibration is None else calibration
        return apply_config(model, self.best_config, data, processor, progress=progress)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form written to ``search.json``."""
        return {
            "format_version": STUDY_FORMAT,
            "study_name": self.study.study_name,
            "space": self.space.to_dict(),
            "metric": self.metric,
            "seed": self.seed,
            "blocks": [list(span) for span in self.blocks],
            "fingerprint": dict(self.fingerprint),
            "versions": study_versions(),
            "objective": self.goal.to_json(),
            "uniform_value": self.baseline,
            "best_value": self.best_value,
            "best_trial": self.best_trial.number,
            HELD_OUT: held_out_of(self.study.user_attrs, self.best_trial.number),
            NARROWER: None if self.narrowing is None else self.narrowing.to_dict(),
            "history": self.history,
        }

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``profile.json`` and ``search.json``, each whole or not at all.

        Args:
            directory: Folder; made if it does not exist.

        Raises:
            OSError: If it cannot be written.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        self.best_profile.save(folder / PROFILE_FILE)
        with replacing(folder / HISTORY_FILE) as partial:
            partial.write_text(text, encoding="utf-8")

    @staticmethod
    def load_profile(directory: str | os.PathLike[str]) -> CompressionProfile:
        """Read the best profile from a folder written by `save`."""
        return CompressionProfile.load(Path(directory) / PROFILE_FILE)

    @staticmethod
    def load_history(directory: str | os.PathLike[str]) -> dict[str, Any]:
        """Read ``search.json`` from a folder written by `save`.

        Raises:
            ValueError: If it was written by a later version.
        """
        data = json.loads((Path(directory) / HISTORY_FILE).read_text(encoding="utf-8"))
        check_format_version(data.get("format_version"), HISTORY_FILE, STUDY_FORMAT)
        return dict(data)
