"""Adaptive sparsity and KV-cache compression for vision-language models.

Importing this package registers the plugin with transformers, once: from then on every
``from_pretrained`` takes ``sparsity_config=`` and reads compressed checkpoints, and ``generate``
uses the quantised KV cache of a model that has a KV profile. The public names below are imported
when first used, so that optuna, matplotlib and datasets are only loaded by what needs them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from inspect import Signature, signature
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from hf_adaptive_sparse.checkpoint.plugin import register
from hf_adaptive_sparse.version import __version__

if TYPE_CHECKING:
    from hf_adaptive_sparse.calibration.data import load_batches
    from hf_adaptive_sparse.calibration.tables import DataError
    from hf_adaptive_sparse.checkpoint.config import SparsityConfig
    from hf_adaptive_sparse.checkpoint.headers import CheckpointError
    from hf_adaptive_sparse.checkpoint.plugin import AutoModelForVision2Seq
    from hf_adaptive_sparse.compressor import compress, prune
    from hf_adaptive_sparse.compressor.pipeline import PushError
    from hf_adaptive_sparse.errors import AdaptiveSparseError, NonFiniteError
    from hf_adaptive_sparse.evaluation.perplexity import perplexity
    from hf_adaptive_sparse.evaluation.resources import sparsity_report
    from hf_adaptive_sparse.evaluation.vqa import vqa_accuracy
    from hf_adaptive_sparse.hub import inspect, push_folder
    from hf_adaptive_sparse.hub.errors import HubError
    from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
    from hf_adaptive_sparse.profiles import (
        CalibrationConfig,
        CompressionProfile,
        KVCacheConfig,
        SparsityProfile,
    )
    from hf_adaptive_sparse.runtime.weight_view import FrozenWeightError
    from hf_adaptive_sparse.search.errors import SearchError, StorageError
    from hf_adaptive_sparse.search.result import SearchResult
    from hf_adaptive_sparse.search.space import SearchSpace
    from hf_adaptive_sparse.search.study import search
    from hf_adaptive_sparse.staging import OutputError

_HOMES = {
    "AdaptiveQuantizedCache": "kvcache.cache",
    "AdaptiveSparseError": "errors",
    "AutoModelForVision2Seq": "checkpoint.plugin",
    "CalibrationConfig": "profiles",
    "CheckpointError": "checkpoint.headers",
    "CompressionProfile": "profiles",
    "DataError": "calibration.tables",
    "FrozenWeightError": "runtime.weight_view",
    "HubError": "hub.errors",
    "KVCacheConfig": "profiles",
    "NonFiniteError": "errors",
    "OutputError": "staging",
    "PushError": "compressor.pipeline",
    "SearchError": "search.errors",
    "SearchResult": "search.result",
    "SearchSpace": "search.space",
    "SparsityConfig": "checkpoint.config",
    "SparsityProfile": "profiles",
    "StorageError": "search.errors",
    "compress": "compressor",
    "inspect": "hub",
    "load_batches": "calibration.data",
    "perplexity": "evaluation.perplexity",
    "prune": "compressor",
    "push_folder": "hub",
    "sparsity_report": "evaluation.resources",
    "vqa_accuracy": "evaluation.vqa",
}
"""Public name -> the module below this package that defines it."""

__all__ = [
    "AdaptiveQuantizedCache",
    "AdaptiveSparseError",
    "AutoModelForVision2Seq",
    "CalibrationConfig",
    "CheckpointError",
    "CompressionProfile",
    "DataError",
    "FrozenWeightError",
    "HubError",
    "KVCacheConfig",
    "NonFiniteError",
    "OutputError",
    "PushError",
    "SearchError",
    "SearchResult",
    "SearchSpace",
    "SparsityConfig",
    "SparsityProfile",
    "StorageError",
    "__version__",
    "compress",
    "inspect",
    "load_batches",
    "perplexity",
    "prune",
    "push_folder",
    "register",
    "search",
    "sparsity_report",
    "vqa_accuracy",
]


class _Package(ModuleType):
    """This package, in which ``search`` is both a function and the subpackage that holds it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "search" and isinstance(value, ModuleType):
            # The import system binds a subpackage to its parent under its name.
            value.__class__ = _CallableSearch
        super().__setattr__(name, value)


class _CallableSearch(ModuleType):
    """The subpackage ``search``, which is called like the function of that name."""

    @property
    def __signature__(self) -> Signature:
        return signature(_search_function())

    def __call__(self, *args: Any, **kwargs: Any) -> SearchResult:
        """Call `hf_adaptive_sparse.search.study.search`."""
        return _search_function()(*args, **kwargs)


def _search_function() -> Callable[..., SearchResult]:
    return cast(
        "Callable[..., SearchResult]",
        importlib.import_module(f"{__name__}.search.study").search,
    )


sys.modules[__name__].__class__ = _Package
register()


def __getattr__(name: str) -> object:
    if name == "search":
        return importlib.import_module(f"{__name__}.search")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
