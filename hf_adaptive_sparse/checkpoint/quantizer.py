"""The part that transformers calls: compressed tensors to a model on load, and back on save.

In transformers' terms the plugin is a quantizer. In the dense runtime the loaded model consists of
plain ``nn.Linear``; only `hf_quantizer` stays on it, which compresses what ``save_pretrained``
writes, and the flags by which transformers refuses casts are taken off again. In the sparse runtime
the weights are replaced while they are empty, and the files' tensors go straight into them, but for
experts of a layout that no kernel reads, which are decompressed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from hf_adaptive_sparse.architecture import parameter_name, rewrites_weights
from hf_adaptive_sparse.checkpoint.applying import check_before_loading, prune_and_resolve
from hf_adaptive_sparse.checkpoint.changed_weights import store_cast_weights_plain_
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.decompression import (
    DecompressWeight,
    decompresses,
    keep_saved_conversions_,
    taken_as_stored,
)
from hf_adaptive_sparse.checkpoint.headers import CheckpointError, read_file_header
from hf_adaptive_sparse.checkpoint.reloading import take_compressed_
from hf_adaptive_sparse.checkpoint.resolving import (
    parameter_formats,
    per_layer_kv_cache,
    rename_for_model,
    runtime_formats,
    storable_weights,
)
from hf_adaptive_sparse.checkpoint.state_dict import stored_state_dict
from hf_adaptive_sparse.checkpoint.validation import validate_checkpoint
from hf_adaptive_sparse.kvcache.carrying import share_profile
from hf_adaptive_sparse.packing.bitmask import BitmaskError
from hf_adaptive_sparse.packing.stored_names import leaf_names, parse_tensor_name
from hf_adaptive_sparse.packing.stored_weight import StoredWeight, ValueFormat
from hf_adaptive_sparse.packing.weight_codes import CODE_BITS
from hf_adaptive_sparse.profiles import QUANT_METHOD
from hf_adaptive_sparse.runtime.choice import (
    CompressedWeights,
    RuntimeChoice,
    choose_runtime,
    main_device,
    may_offload_to_disk,
)
from hf_adaptive_sparse.runtime.conversion import (
    compress_,
    decompress_,
    replace_by_empty_,
    sparse_weights,
)
from hf_adaptive_sparse.runtime.sparse_experts import sparse_stacks

logger = logging.getLogger(__name__)

arguments_in_progress: ContextVar[Mapping[str, Any]] = ContextVar("arguments", default={})  # noqa: B039
"""What the ``from_pretrained`` in progress was given; transformers tells its quantizer a part."""

_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")
_DISTRIBUTING_ARGUMENTS = ("distributed_config", "tp_plan", "tp_size", "device_mesh")


class AdaptiveSparseQuantizer(HfQuantizer):
    """Loads, prunes and saves models with a `SparsityConfig`."""

    serialized_names = {"weight": leaf_names("weight")}  # noqa: RUF012

    def __init__(self, quantization_config: SparsityConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: SparsityConfig = quantization_config
        self.checkpoint_files: Sequence[str] = ()
        self.consumes_model = False
        """Let go of each weight when it is compressed to be saved: the model is of no use after,
        and never in memory twice."""
        self.device: torch.device | None = None
        self.may_offload_to_disk = False
        self.row_offsets: Mapping[str, torch.Tensor] = {}
        """Of weights that are being loaded, by module name: counted when the files are checked."""
        self.rounded_in: dict[str, torch.dtype] = {}
        """Of plain weights that codes made: the dtype they had then, by parameter name."""
        self.runtime_choice = RuntimeChoice("dense", "the model was pruned in memory")

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works: yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: in the sparse runtime, by adapters on top of it."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether all weights may be trained: only where they are plain."""
        return self.runtime_choice.runtime == "dense"

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` may see the model: it is plain, or made of one operator."""
        return True

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Return the op that transformers runs on ``serialized_names``."""
        if self.quantization_config.checkpoint_format != "bitmask":
            return {}
        return {"deserialize": DecompressWeight}

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Cast stored values as any weight is cast; never the bitmask."""
        floating = (
            param.get_dtype().startswith(("F", "BF"))
            if hasattr(param, "get_dtype")
            else param.is_floating_point()
        )
        return dtype if floating else None

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        device_map: Any = None,
        **kwargs: Any,  # transformers passes what it knows; the rest is not needed
    ) -> PreTrainedModel:
        # A copy: the config may be that of another model, which a caller passed as config=.
        config = self.quantization_config = copy.deepcopy(self.quantization_config)
        _check_whole_weights(config, self.pre_quantized)
        self.checkpoint_files = checkpoint_files or ()
        self.device = main_device(device_map)
        self.may_offload_to_disk = may_offload_to_disk(device_map)
        if self.pre_quantized:
            rename_for_model(model, config)
            # Besides linears, the stacks of experts that are compressed, by the parameters' names.
            leaves = {key.rpartition(".")[2] for key in parameter_formats(model, config)}
            self.serialized_names = {leaf: leaf_names(leaf) for leaf in sorted({"weight", *leaves})}
            config.kv_cache = per_layer_kv_cache(model, config)
        else:
            check_before_loading(model, config)
            _check_not_packed(self.checkpoint_files)
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel
    ) -> list[Any]:
        """Add our conversion to the model's, check the files against both, and choose the runtime.

        This is the last call before devices are assigned, and the first at which a model's own
        renamings are known; so it is here that linears become sparse ones, still empty.
        """
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, model)
        files, formats = self.checkpoint_files, parameter_formats(model, self.quantization_config)
        if not (self.pre_quantized and files and all(f.endswith(".safetensors") for f in files)):
            return conversions
        checked = validate_checkpoint(
            model,
            files,
            formats,
            conversions,
            ignore_mismatched_sizes=bool(
                arguments_in_progress.get().get("ignore_mismatched_sizes")
            ),
        )
        kept = runtime_formats(model, self.quantization_config)
        if not self._runs_sparse(model, kept):
            return conversions
        found = {name: checked.get(name) or checked[f"{name}.weight"] for name in kept}
        with torch._C.DisableTorchFunction():  # the context of a device looks at every call
            empty = {
                name: StoredWeight(
                    int(found[name].row_offsets[-1]), bits, group, found[name].exceptions
                )
                for name, (bits, group) in kept.items()
            }
            replace_by_empty_(model, empty)
        self.row_offsets = {name: weight.row_offsets for name, weight in found.items()}
        direct = {"weight", *(name.rpartition(".")[2] for name in sparse_stacks(model))}
        others = [
            c for c in conversions if not (decompresses(c) and direct.issuperset(c.target_patterns))
        ]
        if self.may_offload_to_disk:  # what is converted would be written there once more
            return others
        return others + taken_as_stored(sorted(direct))

    def _process_model_after_weight_loading(
        self,
        model: PreTrainedModel,
        **kwargs: Any,  # transformers' signature
    ) -> PreTrainedModel:
        config = self.quantization_config
        if not self.pre_quantized:
            given = arguments_in_progress.get()
            of_hub = {key: given[key] for key in _HUB_ARGUMENTS if given.get(key) is not None}
            _, config = prune_and_resolve(model, config, hub_arguments=of_hub)
            config.runtime = self.quantization_config.runtime
            self.quantization_config = config
        loaded = sparse_weights(model)
        for name, weight in loaded.items():
            try:
                weight.settle(self.row_offsets.get(name))
            except BitmaskError as error:
                raise CheckpointError(f"{parameter_name(name, weight)}: {error}") from error
        if self.pre_quantized:
            store_cast_weights_plain_(model, config)
        if not loaded:
            formats = runtime_formats(model, config)
            if self._runs_sparse(model, formats):
                compress_(model, formats)
        choice = self.runtime_choice
        attach(model, config)
        model.hf_quantizer.runtime_choice = choice
        return model

    def _runs_sparse(self, model: PreTrainedModel, formats: Mapping[str, ValueFormat]) -> bool:
        """Decide the runtime of a model with these `runtime_formats`, once, and say why."""
        config = self.quantization_config
        parameters = dict(model.named_parameters(remove_duplicate=False))
        held = {n: parameters[n if n in parameters else f"{n}.weight"] for n in formats}
        shapes = {n: (w.shape[:-1].numel(), w.shape[-1]) for n, w in held.items()}
        dtype = next(iter(held.values())).dtype if held else model.dtype
        ratios = config.sparsity or {}
        weights = CompressedWeights(shapes, formats, ratios, dtype, rewrites_weights(model))
        self.runtime_choice = choose_runtime(config.runtime, weights, self.device)
        logger.info("Runtime: %s, because %s.", *astuple(self.runtime_choice))
        sparse = self.runtime_choice.runtime == "sparse"
        dense_experts = len(config.value_formats) - len(formats)
        if sparse and dense_experts:
            logger.warning(
                "The sparse runtime has no kernel for the layout of this model's experts; %d of "
                "their weights are decompressed and take their dense size in memory.",
                dense_experts,
            )
        return sparse

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> Any:
        """Make every weight plain: what ``model.dequantize()`` asks for."""
        if isinstance(dtype, str):  # what save_pretrained leaves in the model's config
            dtype = getattr(torch, dtype)
        decompress_(model)
        return model.to(dtype) if dtype is not None else model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Return what ``save_pretrained`` writes: see `stored_state_dict`."""
        return stored_state_dict(model, self.rounded_in, consume=self.consumes_model), {}


def _check_not_packed(files: Sequence[str]) -> None:
    """Refuse compressed weights that a config says nothing of: all of them would be random.

    Raises:
        CheckpointError: If there are any in the files.
    """
    for file in files:
        if not file.endswith(".safetensors"):
            continue
        parsed = map(parse_tensor_name, read_file_header(Path(file)))
        packed = next((name for name, kind in filter(None, parsed) if kind == "bitmask"), None)
        if packed is not None:
            raise CheckpointError(
                f"{file} holds compressed weights, such as {packed!r}, but the config has no "
                f"quantization_config of quant_method {QUANT_METHOD!r} to read them by. Restore "
                "config.json as it was saved beside them, or download it again."
            )


def _check_whole_weights(config: SparsityConfig, pre_quantized: bool) -> None:
    """Refuse what shards tensors as they are read: a part of packed values is no part of a weight.

    Raises:
        ValueError: If ``from_pretrained`` was asked for it.
    """
    given = arguments_in_progress.get()
    asked = [name for name in _DISTRIBUTING_ARGUMENTS if given.get(name) is not None]
    if not asked:
        return
    prunes = config.removes_weights or config.quantises_weights
    if not (config.compressed_modules if pre_quantized else prunes):
        return
    raise ValueError(
        f"{asked[0]}= shards weights over processes, which is not possible with compressed weights "
        "or while a model is pruned. Leave it out: device_map='auto' puts whole layers on several "
        "devices. Or save the model with checkpoint_format='dense', and load that."
    )


def attach(model: PreTrainedModel, config: SparsityConfig) -> None:
    """Make a model in memory carry ``config``, so that it saves in that config's form.

    The model's weights are not touched, and it stays as castable and trainable as it was.

    Args:
        model: A model with plain weights.
        config: A config whose ``sparsity`` names modules of the model, each with its ratio.

    Raises:
        ValueError: If ``sparsity`` is missing or names a module that cannot be stored compressed.
    """
    if config.sparsity is None:
        raise ValueError(
            "To attach a config, its sparsity must name the pruned modules and their ratios; it is "
            "None. hf_adaptive_sparse.prune(model, config) prunes and fills it in."
        )
    sparse = sparse_weights(model)
    weights = {**storable_weights(model), **sparse}
    for name in config.sparsity:
        if name not in weights:
            raise ValueError(
                f"sparsity names {name!r}, which is no nn.Linear with a weight of its own in "
                f"{type(model).__name__}. Names look like: {', '.join(list(weights)[:3])}."
            )
    model.config.quantization_config = config
    share_profile(model)
    model.hf_quantizer = AdaptiveSparseQuantizer(config, pre_quantized=True)
    formats = parameter_formats(model, config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    model.hf_quantizer.rounded_in = {
        key: parameters[key].dtype
        for key, form in formats.items()
        if form.bits in CODE_BITS and key in parameters
    }
    take_compressed_(model)
    keep_saved_conversions_(model, formats)
    if sparse:
        # By these transformers' Trainer refuses to train the model without adapters.
        model.hf_quantizer.runtime_choice = RuntimeChoice("sparse", "it was asked for")
        model.is_quantized = True
        for part in model.modules():
            # One with a config of its own is saved by itself as a plain model.
            own = isinstance(part, PreTrainedModel) and part.config is not model.config
            if own and sparse_weights(part):
                part.hf_quantizer = model.hf_quantizer
        return
    # What marks a model as quantized makes transformers refuse .half(), .float() and training.
    for flag in ("is_quantized", "quantization_method"):
        model.__dict__.pop(flag, None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)
