"""The final prune of a searched model, and its files: in memory, or from disk to disk."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.data import Batch
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.loading import apply_config
from hf_adaptive_sparse.checkpoint.offloaded import STATE_NAME
from hf_adaptive_sparse.compressor.offload import prune_into, weight_files
from hf_adaptive_sparse.compressor.saving import save_model
from hf_adaptive_sparse.compressor.sources import ModelSource
from hf_adaptive_sparse.pruning.report import PruningReport
from hf_adaptive_sparse.search.storage import JOURNAL
from hf_adaptive_sparse.staging import resumable_folder, staged_folder


class Finished(NamedTuple):
    """A pruned model and its files.

    ``described`` has the modules and the config of the model, but not always its weights; ``model``
    is what is measured.
    """

    model: PreTrainedModel
    described: PreTrainedModel
    report: PruningReport


def output_folder(target: Path, *, offload: bool, overwrite: bool) -> AbstractContextManager[Path]:
    """Return the folder of the job; a failed one leaves there what the next goes on from."""
    if offload:
        return resumable_folder(target, (JOURNAL, STATE_NAME), overwrite=overwrite)
    return staged_folder(target, overwrite=overwrite, keep=(JOURNAL,))


def finish_in_memory(
    model: PreTrainedModel,
    config: SparsityConfig,
    calibration: list[Batch] | None,
    processor: Any,
    folder: Path,
    *,
    progress: bool,
) -> Finished:
    """Prune a loaded model in place, and save it."""
    report = apply_config(model, config, calibration, processor, progress=progress)
    save_model(model, processor, folder)
    return Finished(model, model, report)


def finish_from_disk(
    source: ModelSource,
    config: SparsityConfig,
    calibration: list[Batch] | None,
    processor: Any,
    folder: Path,
    *,
    progress: bool,
) -> Finished:
    """Prune a model's files one layer at a time; what is measured runs as it is stored."""
    empty = source.load_empty()
    files = weight_files(source, empty)
    report = prune_into(
        folder, files, empty, config, calibration, processor=processor, progress=progress
    )
    runtime = SparsityConfig(runtime="sparse") if config.checkpoint_format == "bitmask" else None
    return Finished(ModelSource(folder, device_map="cpu").load(runtime), empty, report)
