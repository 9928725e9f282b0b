"""Quantised layers that hold the states of a linear attention beside keys and values.

Falcon-H1, Zamba and their like run attention and a state-space model in one decoder layer, whose
cache is both. The states are transformers' own, as in a `DynamicCache`; keys and values are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer
from hf_adaptive_sparse.kvcache.sliding import AdaptiveSlidingWindowLayer


class AdaptiveHybridLayer(LinearAttentionLayer, AdaptiveQuantizedLayer):
    """Cache layer for full attention and a linear attention side by side.

    Args:
        *args: Those of the attention's layer.
        number_of_states: Of the linear attention.
        **kwargs: Those of the attention's layer.
    """

    attention: ClassVar[type[AdaptiveQuantizedLayer]] = AdaptiveQuantizedLayer
    is_compileable = False
    beside = (
        "conv_states",
        "recurrent_states",
        "is_conv_states_initialized",
        "is_recurrent_states_initialized",
        "has_previous_state",
        "conv_kernel_size",
    )

    def __init__(self, *args: Any, number_of_states: int = 1, **kwargs: Any) -> None:
        self.attention.__init__(self, *args, **kwargs)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: torch.Tensor, **kwargs: Any) -> None:
        """Prepare for keys and values, given by position, or for states, given by name."""
        if args:
            self.attention.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Empty the layer."""
        LinearAttentionLayer.reset(self)
        self.attention.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, which a linear attention can only where no state recurs.

        Raises:
            RuntimeError: If the past was not recorded, see ``activate_past_recording``.
        """
        LinearAttentionLayer.crop(self, tokens_to_remove)
        self.attention.crop(self, tokens_to_remove)

    def get_max_length(self) -> int:
        """Return the window of the attention; -1: there is none."""
        length: int = self.attention.get_max_length(self)
        return length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequence ``i`` continue sequence ``beam_idx[i]``, int64 ``(batch,)``."""
        self.attention.reorder_cache(self, beam_idx)  # and of the states, see `_transform`

    def offload(self) -> None:
        """Move what is stored to CPU memory."""
        LinearAttentionLayer.offload(self)
        self.attention.offload(self)

    def prefetch(self) -> None:
        """Move what is stored back to the device of the model."""
        LinearAttentionLayer.prefetch(self)
        self.attention.prefetch(self)

    def _transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Choose among the sequences of the batch."""
        self.attention._transform(self, function)
        for states, exist in (
            (self.conv_states, self.is_conv_states_initialized),
            (self.recurrent_states, self.is_recurrent_states_initialized),
        ):
            for index, state in states.items():
                if exist[index]:
                    states[index] = function(state)


class AdaptiveSlidingHybridLayer(AdaptiveHybridLayer, AdaptiveSlidingWindowLayer):
    """The same for attention in a sliding window."""

    attention = AdaptiveSlidingWindowLayer


# Up to transformers 5.23 a cache asks for this class to know a layer that has keys and values, too.
LinearAttentionAndFullAttentionLayer.register(AdaptiveHybridLayer)
