"""Registration with transformers, and pruning a model that is already in memory.

`register` is what importing the package does. It uses transformers' own registries, and wraps three
of its functions once: ``PreTrainedModel.from_pretrained`` takes ``sparsity_config=``, a passed
config is merged into a compressed checkpoint's, and ``generate`` finds its cache.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)

from hf_adaptive_sparse.checkpoint.applying import Calibration, prune_and_resolve
from hf_adaptive_sparse.checkpoint.config import SparsityConfig, as_our_config
from hf_adaptive_sparse.checkpoint.merging import merge_configs
from hf_adaptive_sparse.checkpoint.plain_models import check_plain
from hf_adaptive_sparse.checkpoint.quantizer import (
    AdaptiveSparseQuantizer,
    arguments_in_progress,
    attach,
)
from hf_adaptive_sparse.checkpoint.resolving import runtime_formats
from hf_adaptive_sparse.kvcache.generation import install
from hf_adaptive_sparse.profiles import QUANT_METHOD
from hf_adaptive_sparse.pruning.apply import PruningReport
from hf_adaptive_sparse.runtime.conversion import compress_

__all__ = ["AutoModelForVision2Seq", "Calibration", "apply_config", "attach", "register"]

logger = logging.getLogger(__name__)

_WRAPPED = "_hf_adaptive_sparse_wrapped"


class AutoModelForVision2Seq(_BaseAutoModelClass):
    """The auto class that transformers 5 dropped: the mapping of `AutoModelForImageTextToText`."""

    _model_mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def apply_config(
    model: PreTrainedModel,
    config: SparsityConfig,
    calibration: Calibration = None,
    processor: Any = None,
    progress: bool = True,
) -> PruningReport:
    """Prune a model in place, layer by layer, and attach a config that describes the result.

    The model then consists of plain weights as before (with ``runtime="sparse"`` of linears and
    experts that are compressed in memory), saves in the config's form, and reloads and generates
    exactly as one loaded with ``sparsity_config=config``. A config that it carried before is
    replaced; by one that asks nothing of the weights, its KV profile alone.

    Args:
        model: A `transformers` model with plain weights: all of it that will be saved, not its
            language model alone.
        config: How to prune it.
        calibration: Batches, a dataset's name, a path, a `datasets.Dataset` or a
            `CalibrationConfig`; ``None``: what the config names. Metrics that need no data take
            none.
        processor: Processor or tokenizer, for data that are not batches yet. ``None``: the one in
            the model's own repository.
        progress: Show a progress bar.

    Returns:
        What was removed from each module.

    Raises:
        TypeError: If the model is a wrapper of one.
        ValueError: If the config does not fit the model, or calibration data are needed and
            missing or unusable.
    """
    check_plain(model)
    report, resolved = prune_and_resolve(model, config, calibration, processor, progress=progress)
    if config.runtime == "sparse":
        compress_(model, runtime_formats(model, resolved))
    attach(model, resolved)
    return report


def register() -> None:
    """Register the plugin with transformers; calling it again does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(SparsityConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(AdaptiveSparseQuantizer)
    _wrap_classmethod(PreTrainedModel, "from_pretrained", _from_pretrained)
    _wrap_classmethod(AutoHfQuantizer, "merge_quantization_configs", _merge_quantization_configs)
    install()
    if not hasattr(transformers, "AutoModelForVision2Seq"):
        type(transformers).AutoModelForVision2Seq = _TopLevelName()


class _TopLevelName:
    """Attribute of transformers' lazy modules that only the top one has.

    It cannot sit on the module itself: transformers executes its ``__init__`` a second time when
    ``processing_utils`` is first imported, which may be after this plugin, and makes a new one.
    """

    def __get__(self, module: ModuleType | None, owner: type) -> type[AutoModelForVision2Seq]:
        if module is not None and module.__name__ != "transformers":
            raise AttributeError(
                f"module {module.__name__!r} has no attribute 'AutoModelForVision2Seq'"
            )
        return AutoModelForVision2Seq


def _wrap_classmethod(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace a classmethod by ``around(original, cls, ...)``, once."""
    original = owner.__dict__[name].__func__
    if getattr(original, _WRAPPED, False):
        return

    @functools.wraps(original)
    def wrapped(cls: type, *args: Any, **kwargs: Any) -> Any:
        return around(original, cls, *args, **kwargs)

    setattr(wrapped, _WRAPPED, True)
    setattr(owner, name, classmethod(wrapped))


def _from_pretrained(
    original: Callable[..., Any],
    cls: type,
    *args: Any,
    sparsity_config: SparsityConfig | Mapping[str, Any] | None = None,
    quantization_config: Any = None,
    **kwargs: Any,  # everything else is transformers' own
) -> Any:
    if sparsity_config is not None and quantization_config is not None:
        raise ValueError(
            "Pass either sparsity_config or quantization_config, not both: a model takes one of "
            "them, and sparsity_config is passed on as quantization_config."
        )
    if sparsity_config is not None:
        quantization_config = _as_config(sparsity_config)
    else:
        quantization_config = as_our_config(quantization_config) or quantization_config
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    token = arguments_in_progress.set(kwargs)
    try:
        return original(cls, *args, **kwargs)
    finally:
        arguments_in_progress.reset(token)


def _as_config(config: SparsityConfig | Mapping[str, Any]) -> SparsityConfig:
    if isinstance(config, SparsityConfig):
        return config
    if isinstance(config, Mapping):
        made: SparsityConfig = SparsityConfig.from_dict(config)
        return made
    raise TypeError(
        f"sparsity_config must be a SparsityConfig or its dict, got {type(config).__name__}."
    )


def _merge_quantization_configs(
    original: Callable[..., Any],
    cls: type,
    quantization_config: Any,
    quantization_config_from_args: Any,
) -> Any:
    """Merge a passed `SparsityConfig` into a checkpoint's; transformers would drop it."""
    passed = quantization_config_from_args
    if isinstance(passed, SparsityConfig):
        checkpoint = as_our_config(quantization_config)
        if checkpoint is not None:
            return merge_configs(checkpoint, passed)
    return original(cls, quantization_config, passed)
