"""The verbs: what the command line and a script call to do a whole job.

Each joins the layers below: data, pruning, search, evaluation, checkpoint, Hub.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.plugin import Calibration, apply_config
from hf_adaptive_sparse.compressor.benching import BenchResult, bench
from hf_adaptive_sparse.compressor.compression import CompressionResult
from hf_adaptive_sparse.compressor.data_source import DataSource
from hf_adaptive_sparse.compressor.jobs import (
    evaluate,
    search_study,
    search_to_folder,
    search_within_to_folder,
)
from hf_adaptive_sparse.compressor.measuring import Measurement, measure
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.compressor.pipeline import PushError, compress
from hf_adaptive_sparse.compressor.pruned_folder import prune_to_folder
from hf_adaptive_sparse.compressor.search_plan import SearchPlan
from hf_adaptive_sparse.compressor.tasks import evaluate_tasks
from hf_adaptive_sparse.pruning.report import PruningReport

__all__ = [
    "BenchResult",
    "CompressionResult",
    "DataSource",
    "Measurement",
    "ModelSource",
    "PushError",
    "SearchPlan",
    "bench",
    "compress",
    "evaluate",
    "evaluate_tasks",
    "measure",
    "prune",
    "prune_to_folder",
    "search_study",
    "search_to_folder",
    "search_within_to_folder",
]


def prune(
    model: PreTrainedModel,
    config: SparsityConfig,
    calibration: Calibration = None,
    *,
    processor: Any = None,
    progress: bool = True,
) -> PruningReport:
    """Prune ``model`` in place, decoder layer by decoder layer.

    Afterwards the model consists of plain dense ``nn.Linear`` with zeros; it saves, reloads and
    generates exactly as one loaded with ``sparsity_config=config``.

    Args:
        model: A causal language model or vision-language model of transformers: all of it that
            will be saved, without adapters.
        config: Ratio, metric, pattern, and the KV profile the model shall carry.
        calibration: List of batches, dataset name, path or `datasets.Dataset`; ``None``:
            ``config.calibration``.
        processor: Processor or tokenizer for data that are not batches yet. ``None``: the one
            stored with the model.
        progress: Show a progress bar on stderr.

    Returns:
        What was removed from each linear.

    Raises:
        TypeError: If ``model`` is a wrapper of a model.
        ValueError: If the metric needs calibration and there is none, if a name or glob matches no
            prunable linear, if the model has adapters, or if weights or activations are not finite.
    """
    return apply_config(model, config, calibration, processor, progress=progress)
