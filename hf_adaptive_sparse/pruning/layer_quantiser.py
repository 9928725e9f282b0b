"""Rounding weights to what their codes of 8 or 4 bits decode to, each layer when it is pruned."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import (
    decoder_layers,
    layer_index,
    parameter_name,
    prunable_weights,
)
from hf_adaptive_sparse.packing.stored_weight import ValueFormat
from hf_adaptive_sparse.pruning.storage import check_finite, stored_weight
from hf_adaptive_sparse.runtime.conversion import quantise_


class LayerQuantiser:
    """Rounds the weights of a model in place, each once.

    A layer is rounded when it is pruned, so that the layers after it are calibrated on what they
    will be given.
    """

    def __init__(self, model: PreTrainedModel, formats: Mapping[str, ValueFormat]) -> None:
        """Prepare to round; nothing is rounded yet.

        Args:
            model: The model.
            formats: Name of a weight -> how its values of 8 or 4 bits are stored.
        """
        self._weights = prunable_weights(model) if formats else {}
        self._layers_name, _ = decoder_layers(model)
        self._waiting = dict(formats)

    def layer_(self, index: int) -> None:
        """Round the weights of one layer.

        Raises:
            ValueError: If a weight is NaN or infinite, or cannot be modified in place.
        """
        for name in [n for n in self._waiting if layer_index(n, self._layers_name) == index]:
            self._round(name)

    def rest_(self) -> None:
        """Round the weights that `layer_` has not; a weight that is not in memory is left out.

        Raises:
            ValueError: As `layer_`.
        """
        for name in list(self._waiting):
            weight = self._weights[name]
            owner = weight if isinstance(weight, nn.Linear) else weight.experts.module
            if not weight.weight.is_meta or hasattr(owner, "_hf_hook"):
                self._round(name)

    def _round(self, name: str) -> None:
        weight = self._weights[name]
        stored = stored_weight(weight, name)
        check_finite(stored, parameter_name(name, weight))
        form = self._waiting.pop(name)
        for matrix in stored if stored.ndim == 3 else (stored,):
            quantise_(matrix, form)
