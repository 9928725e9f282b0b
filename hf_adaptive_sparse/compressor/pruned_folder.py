"""Prune a dense model into a folder: loaded whole, or from disk to disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_adaptive_sparse.calibration.data import Batch
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.offloaded import STATE_NAME
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.checkpoint.weight_files import WeightFiles
from hf_adaptive_sparse.compressor.checks import on_cpu
from hf_adaptive_sparse.compressor.data_source import DataSource
from hf_adaptive_sparse.compressor.model_source import ModelSource, parameter_bytes
from hf_adaptive_sparse.compressor.offload import prune_into, weight_files
from hf_adaptive_sparse.compressor.saving import (
    Recipe,
    copy_processor,
    save_model,
    save_report,
)
from hf_adaptive_sparse.compressor.targets import checked_target
from hf_adaptive_sparse.evaluation.resources import weight_bytes_on_disk
from hf_adaptive_sparse.pruning.report import PruningReport
from hf_adaptive_sparse.staging import resumable_folder, staged_folder


@dataclass(frozen=True)
class PrunedFolder:
    """What :func:`prune_to_folder` wrote.

    Attributes:
        output: The folder.
        report: What was pruned.
        dense_bytes: Bytes of the dense weights.
        weight_bytes: Bytes of the weights in the folder.
    """

    output: Path
    report: PruningReport
    dense_bytes: int
    weight_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "output": str(self.output),
            "dense_bytes": self.dense_bytes,
            "weight_bytes": self.weight_bytes,
            **self.report.to_dict(),
        }


def prune_to_folder(
    model: ModelSource,
    output: str | os.PathLike[str],
    config: SparsityConfig,
    *,
    calibration: DataSource | None = None,
    seed: int = 0,
    offload: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> PrunedFolder:
    """Prune a dense model as ``config`` says, and write it to ``output``.

    Args:
        model: The dense model.
        output: Folder to write, complete or not at all.
        config: How to prune.
        calibration: Data to calibrate on. ``None``: WikiText-2, training split.
        seed: Seed recorded in the model card.
        offload: Prune from disk to disk with one decoder layer in memory at a time. The result is
            the same, bit for bit, in shards of one layer each; only models whose decoder receives
            further visual features between layers (Qwen3-VL) may differ by rounding. An interrupted
            run leaves its finished layers in a partial folder beside ``output``; the same call
            goes on with the layer it had reached.
        overwrite: Replace what is in ``output`` when the job is done.
        progress: Show progress bars on stderr.

    Raises:
        ValueError: If the config does not fit the model, the data do not suffice, or an offloaded
            model has a ``device_map``.
        CheckpointError: If an offloaded checkpoint has no safetensors files, or transformers makes
            weights of it, other than experts, by a conversion.
        OSError: If the model cannot be found, or the output cannot be written.
    """
    target = checked_target(output, (model, calibration), overwrite=overwrite)
    source = on_cpu(model) if offload else model
    processor = source.load_processor()
    dense = source.load_empty() if offload else source.load_dense()
    files = weight_files(source, dense) if offload else None
    dense_bytes = parameter_bytes(dense)
    data = calibration or DataSource()
    batches = None
    if config.removes_weights and config.needs_calibration:
        batches = data.batches(processor, dense.config, "train")
    with output_folder(target, offload=offload, overwrite=overwrite) as folder:
        report = prune_and_save(
            dense, config, batches, processor, folder, files=files, consume=True, progress=progress
        )
        copy_processor(model, folder)
        recipe = Recipe(model, None if batches is None else data.label, None, seed)
        save_report(folder, dense, report, recipe, processor=processor)
        weight_bytes = weight_bytes_on_disk(folder)
    return PrunedFolder(target, report, dense_bytes, weight_bytes)


@contextmanager
def output_folder(
    target: Path, *, offload: bool, overwrite: bool, keep: tuple[str, ...] = ()
) -> Iterator[Path]:
    """Yield the folder of the job; a failed job leaves files there from which the next resumes.

    Args:
        target: What the folder becomes.
        offload: Whether the model is pruned from disk to disk, which leaves its finished layers.
        overwrite: Replace what is in ``target``.
        keep: Names of further files to go on from.
    """
    if not offload:
        with staged_folder(target, overwrite=overwrite, keep=keep) as folder:
            yield folder
        return
    states = (*keep, STATE_NAME)
    with resumable_folder(target, states, parts="*.safetensors", overwrite=overwrite) as folder:
        yield folder
        (folder / STATE_NAME).unlink()  # not before all else is written, or the layers were lost


def prune_and_save(
    model: PreTrainedModel,
    config: SparsityConfig,
    batches: list[Batch] | None,
    processor: Any,
    folder: Path,
    *,
    files: WeightFiles | None = None,
    consume: bool = False,
    progress: bool,
) -> PruningReport:
    """Prune a dense model; write weights, configs and processor into ``folder``.

    Args:
        model: The loaded model, pruned in place; or with ``files`` that of
            `ModelSource.load_empty`. Afterwards it carries the resolved config.
        config: How to prune.
        batches: Calibration batches, if it needs any.
        processor: The processor, or ``None``.
        folder: Where to; with ``files`` it may hold an interrupted run of the same.
        files: The model's files, to be pruned one decoder layer at a time.
        consume: As for `save_model`.
        progress: Show a progress bar on stderr.
    """
    if files is not None:
        return prune_into(
            folder, files, model, config, batches, processor=processor, progress=progress
        )
    report = apply_config(model, config, batches, processor, progress=progress)
    save_model(model, processor, folder, consume=consume)
    return report
