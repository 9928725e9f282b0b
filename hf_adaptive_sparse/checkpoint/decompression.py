"""What transformers does with the stored tensors of a weight while it loads."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter
from transformers.quantizers.base import HfQuantizer

from hf_adaptive_sparse.checkpoint.headers import CheckpointError
from hf_adaptive_sparse.packing.bitmask import BitmaskError
from hf_adaptive_sparse.packing.stored_names import KINDS, leaf_names, tensor_name, weight_name
from hf_adaptive_sparse.packing.stored_weight import restored_weight, stored_kinds


class _LoadingOp(ConversionOps):
    """What is done while loading alone: saving has no use for it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _LoadingOp:
        # transformers copies the converter for every tensor; the quantizer need not be.
        return self

    @property
    def reverse_op(self) -> ConversionOps:
        """Never asked for: `attach` takes the conversion off, and the state dict is saved."""
        raise NotImplementedError


class DecompressWeight(_LoadingOp):
    """Values, bitmask, scales or codebook to the weight; `packing.stored_names` names them."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,  # transformers passes what it knows; name and model are needed
    ) -> dict[str, torch.Tensor]:
        """Decompress one weight.

        Args:
            input_dict: Values, bitmask and scales or codebook, if any, one tensor each.
            source_patterns: Their names.
            target_patterns: The name of the weight.
            kwargs: ``full_layer_name``, the weight's runtime name, and ``model``.

        Raises:
            CheckpointError: If one is missing, or they do not make this weight.
        """
        name: str = kwargs["full_layer_name"]
        empty = kwargs["model"].get_parameter(name)
        config, module = self.hf_quantizer.quantization_config, weight_name(name)
        form = config.value_format(module)
        try:
            tensors = {
                kind: _only(input_dict[tensor_name(name.rpartition(".")[2], kind)])
                for kind in stored_kinds(form.bits)
            }
            weight = restored_weight(tensors, empty.shape, form)
            # transformers casts what it reads; bfloat16 that it read as bytes is not cast yet.
            return {name: weight.to(empty.dtype) if "codebook" in tensors else weight}
        except KeyError as missing:
            raise CheckpointError(f"{name}: {missing} is missing.") from missing
        except BitmaskError as error:
            raise CheckpointError(f"{name}: {error}") from error


class TakeTensor(_LoadingOp):
    """A stored tensor to the parameter of its name, as it is.

    transformers needs no conversion for that, but without one it compiles a regular expression of
    each tensor's whole name: 0.2 ms for each of three tensors per weight.
    """

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Return what there is."""
        return input_dict


def taken_as_stored(leaves: Iterable[str]) -> list[WeightConverter]:
    """Return conversions for the tensors of compressed parameters that stay so in memory.

    Args:
        leaves: Last parts of the parameters' names.
    """
    names = [name for leaf in leaves for name in leaf_names(leaf)]
    return [WeightConverter(name, name, operations=[TakeTensor()]) for name in names]


def decompresses(conversion: Any) -> bool:
    """Whether one of a model's weight conversions is `DecompressWeight`."""
    return _does(conversion, DecompressWeight)


def keep_saved_conversions_(model: PreTrainedModel, compressed: Collection[str]) -> None:
    """Leave a model those weight conversions that saving it may revert: none of compressed weights.

    One that fuses linears or permutes their rows would do so to values and bitmasks, each for
    itself. Without it, its linears are stored under their runtime names, and loaded by these.

    Args:
        model: The model.
        compressed: Names of the parameters that are stored compressed.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # then transformers reverts those of its model type
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    tensors = [tensor_name(key, kind) for key in compressed for kind in KINDS]
    kept = [c for c in conversions if not (_does(c, _LoadingOp) or _reverts(c, tensors))]
    if len(kept) < len(conversions):
        model._weight_conversions = kept


def _reverts(conversion: Any, names: Iterable[str]) -> bool:
    """Whether saving a model would change one of these tensors, beyond its name."""
    if not isinstance(conversion, WeightConverter):
        return False
    reverse = conversion.reverse_transform()
    return any(reverse.rename_source_key(name)[1] is not None for name in names)


def _does(conversion: Any, kind: type[ConversionOps]) -> bool:
    return any(isinstance(op, kind) for op in getattr(conversion, "operations", ()))


def _only(tensors: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if isinstance(tensors, list) else tensors
