"""Write what belongs into a job's folder: model, processor, profile, plots and model card."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

from hf_adaptive_sparse.architecture import (
    accepts_audio,
    accepts_images,
    kv_widths,
    prunable_weights,
)
from hf_adaptive_sparse.calibration.media import takes
from hf_adaptive_sparse.calibration.processors import PROCESSOR_CONFIGS
from hf_adaptive_sparse.calibration.questions import format_question
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.compressor.measuring import Measurement
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.hub.license import license_of
from hf_adaptive_sparse.hub.source import local_folder
from hf_adaptive_sparse.profiles import CompressionProfile, SparsityProfile
from hf_adaptive_sparse.pruning.report import PruningReport
from hf_adaptive_sparse.report import (
    CardFacts,
    facts_of,
    plot_history,
    plot_profile,
    write_model_card,
)
from hf_adaptive_sparse.report.tables import format_bytes
from hf_adaptive_sparse.search.max_loss_result import WithinLoss
from hf_adaptive_sparse.search.result import PROFILE_FILE, SearchResult
from hf_adaptive_sparse.search.trials import evaluated
from hf_adaptive_sparse.staging import writing
from hf_adaptive_sparse.version import library_versions

BOUND_FILE = "max_loss.json"
HISTORY_PLOT, PROFILE_PLOT = "search.png", "profile.png"


@dataclass(frozen=True)
class Recipe:
    """What the model card says about how the model was made.

    Attributes:
        model: The dense model; the path of a local one is not published.
        calibration: Calibration data, in words.
        evaluation: Evaluation data, in words; ``None`` where nothing was measured.
        seed: Seed of the run.
        questions: Visual questions, in words, where some were answered.
        repo_id: Where the model is going to be, if known.
    """

    model: ModelSource
    calibration: str | None
    evaluation: str | None
    seed: int
    questions: str | None = None
    repo_id: str | None = None


def table_rows(measurements: Sequence[Measurement]) -> list[dict[str, object]]:
    """Return measurements as rows for a person to read: percent, and bytes with units."""
    rows = []
    for one in measurements:
        row: dict[str, object] = {
            "model": one.name,
            "sparsity": f"{one.sparsity:.2%}",
            "perplexity": f"{one.perplexity:.3f}",
        }
        if one.accuracy is not None:
            row["accuracy"] = f"{one.accuracy:.1%}"
        row["weights on disk"] = format_bytes(one.weight_bytes)
        row["KV bytes per token"] = f"{one.kv_bytes_per_token:,.1f}"
        if any(other.seconds is not None for other in measurements):
            row["seconds to compress"] = "" if one.seconds is None else f"{one.seconds:.1f}"
        rows.append(row)
    return rows


def save_model(
    model: PreTrainedModel, processor: Any, folder: Path, *, consume: bool = False
) -> None:
    """Write weights, config, generation config and processor into ``folder``.

    Args:
        model: The model, which carries its config.
        processor: Its processor, or ``None``.
        folder: The folder.
        consume: Free each weight once it is written; only its shape is left in the model.

    Raises:
        OutputError: If the files cannot be written, for example because the disk is full.
    """
    if consume:
        model.hf_quantizer.consumes_model = True
    with writing("The weights", folder):
        model.save_pretrained(folder)
    save_processor(processor, folder)


def save_processor(processor: Any, folder: Path) -> None:
    """Write a processor into ``folder``; ``None`` is none.

    Raises:
        OutputError: If its files cannot be written, for example because the disk is full.
    """
    if processor is None:
        return
    with writing("The processor", folder):
        processor.save_pretrained(folder)


def copy_processor(model: ModelSource, folder: Path) -> None:
    """Copy the configs of a processor of which only the tokenizer was loaded, and saved.

    What it needs and this machine lacks may be there where the folder is used. Configs that name
    code of the repo stay away, as the code does.
    """
    if any((folder / file).is_file() for file in PROCESSOR_CONFIGS):
        return
    held, name = local_folder(model.name), os.fspath(model.name)
    for file in (*PROCESSOR_CONFIGS, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE):
        with suppress(FileNotFoundError, EntryNotFoundError):
            path = held / file if held else hf_hub_download(name, file, revision=model.revision)
            text = Path(path).read_text(encoding="utf-8")
            if '"auto_map"' not in text:
                (folder / file).write_text(text, encoding="utf-8")


def save_search(result: SearchResult, folder: Path) -> None:
    """Write profile, history and plots of a search into ``folder``."""
    result.save(folder)
    plot_history(facts_of(result.study), folder / HISTORY_PLOT)
    plot_profile(result.best_profile, folder / PROFILE_PLOT, target_sparsity=result.target_sparsity)


def save_bound(found: WithinLoss, folder: Path) -> None:
    """Write what a search within a loss found into ``max_loss.json``."""
    text = json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n"
    (folder / BOUND_FILE).write_text(text, encoding="utf-8")


def save_report(
    folder: Path,
    model: PreTrainedModel,
    report: PruningReport,
    recipe: Recipe,
    *,
    processor: Any,
    measurements: Sequence[Measurement] = (),
    result: SearchResult | None = None,
    within: WithinLoss | None = None,
) -> None:
    """Write profile, history, plots, bound and model card of a pruned model into ``folder``.

    Args:
        folder: The model's folder.
        model: The pruned model, which carries its config.
        report: What was pruned.
        recipe: How it was made.
        processor: Processor, for the card's example prompt.
        measurements: Measured rows, dense first.
        result: The search, if there was one.
        within: The search within a loss, if a bound on it was asked for.
    """
    config: SparsityConfig = model.config.quantization_config
    kv_cache = config.kv_profile
    sparsity = SparsityProfile(config.sparsity) if config.sparsity else None
    # A carried config names each quantised module; one that quantises none says 16.
    bits = None if isinstance(config.weight_bits, int) else config.weight_bits
    profile = CompressionProfile(sparsity, kv_cache, bits)
    profile.save(folder / PROFILE_FILE)
    if within is not None:
        save_bound(within, folder)
    plots = {}
    if result is not None:
        result.save(folder)
        plot_history(facts_of(result.study), folder / HISTORY_PLOT)
        plots["Search history"] = HISTORY_PLOT
    widths = kv_widths(model)
    if sparsity is not None or kv_cache is not None:
        weights = {} if sparsity is None else prunable_weights(model)
        plot_profile(
            profile,
            folder / PROFILE_PLOT,
            numel={name: weight.weight.numel() for name, weight in weights.items()},
            target_sparsity=config.target_sparsity,
            num_layers=len(widths),
        )
        plots["Ratio and KV bits per layer"] = PROFILE_PLOT
    write_model_card(
        folder,
        facts=CardFacts(
            base_model=str(recipe.model.name),
            license=license_of(recipe.model.name, recipe.model.revision),
            accepts_images=accepts_images(model),
            accepts_audio=accepts_audio(model),
            text_class=_text_class(model),
            repo_id=recipe.repo_id,
            prompt=_example_prompt(model, processor),
            checkpoint_format=config.checkpoint_format,
            target_sparsity=config.target_sparsity,
            achieved_sparsity=report.mean_sparsity,
            metric=config.method,
            pattern=config.pattern,
            kv_cache=kv_cache,
            kv_mean_bits=None if kv_cache is None else kv_cache.mean_bits(widths),
            weight_bits=bits or {},
            calibration=recipe.calibration,
            evaluation=recipe.evaluation,
            questions=recipe.questions,
            seed=recipe.seed,
            trials=None if result is None else len(evaluated(result.history)),
            versions={**library_versions(), "python": platform.python_version()},
            measurements=table_rows(measurements),
            plots=plots,
            bound=None if within is None else str(within),
        ),
    )


def _text_class(model: PreTrainedModel) -> str:
    """Return the class that loads all of a model; the causal one has no encoder."""
    whole = model.config.is_encoder_decoder
    return type(model).__name__ if whole else AutoModelForCausalLM.__name__


def _example_prompt(model: PreTrainedModel, processor: Any) -> str | None:
    """Return a question as the model reads it, ``None`` where it takes text alone."""
    if accepts_images(model):
        return format_question(processor, "What is in the picture?")
    if accepts_audio(model) and takes(processor, "audio"):
        return format_question(processor, "What do you hear?", medium="audio")
    return None
