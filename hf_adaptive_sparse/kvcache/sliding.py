"""A quantised layer for sliding-window and chunked attention: a ring of blocks."""

from __future__ import annotations

import torch

from hf_adaptive_sparse.kvcache.attention import PinnedPair, pin_pair
from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer


class AdaptiveSlidingWindowLayer(AdaptiveQuantizedLayer):
    """Cache layer that keeps the newest ``sliding_window - 1`` tokens, quantised.

    ``update`` returns what transformers' ``DynamicSlidingWindowLayer`` returns: the tokens kept
    before it, at most ``sliding_window - 1``, and the new ones, a whole prompt included. Blocks
    that lie outside the window are dropped, so that less than one block is held beyond it. The
    blocks are of ``min(residual_length, sliding_window // 4)`` tokens (1 at least), else the
    unquantised tail would be as large as the window. First tokens leave the window like others:
    there are no sinks.

    After ``activate_past_recording`` nothing is dropped until ``crop`` is called, which takes
    tokens back and drops what left the window; without it tokens that left the window are gone and
    ``crop`` is refused once the window is full.

    Args:
        key_bits: Bits per element of the keys: 2, 3, 4, 6, 8 or 16.
        value_bits: The same for the values.
        sliding_window: Tokens that a query sees, itself included; 2 at least.
        group_size: Neighbouring elements of one head and token that share a step and a minimum.
        residual_length: Tokens per block at most.
        layer_idx: Number of the decoder layer, for error messages.
        key_mode: See ``AdaptiveQuantizedLayer``.
    """

    is_sliding = True

    def __init__(
        self,
        key_bits: int,
        value_bits: int,
        sliding_window: int,
        group_size: int = 64,
        residual_length: int = 128,
        layer_idx: int = 0,
        *,
        key_mode: str = "channel",
    ) -> None:
        block_length = max(1, min(residual_length, sliding_window // 4))
        super().__init__(
            key_bits, value_bits, group_size, block_length, layer_idx, key_mode=key_mode
        )
        self.sliding_window = sliding_window
        self._sliding_window_tensor = torch.tensor(sliding_window, dtype=torch.long)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Prepare for states of this shape, dtype and device; see the base class."""
        super().lazy_initialization(key_states, value_states)
        self._sliding_window_tensor = self._sliding_window_tensor.to(self.device)

    def _update(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._store_states(key_states, value_states)
        view = self._view(self.sliding_window - 1 + key_states.shape[-2])
        if not self.record_past:
            self._drop_oldest()
        return view

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens ``update`` will return, and how many of the sequence precede."""
        offset = max(self.cumulative_length - self.sliding_window + 1, 0)
        return self.cumulative_length - offset + query_length, offset

    def get_max_length(self) -> int:
        """Return the window."""
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens and drop what has left the window.

        Args:
            tokens_to_remove: Their number as a negative one, as transformers asks; 0 removes none.

        Raises:
            ValueError: If it is positive.
            RuntimeError: If the window is full and the past was not recorded.
        """
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError(
                f"Layer {self.layer_idx} of the cache has dropped tokens that left its window of "
                f"{self.sliding_window}, so that none can be taken back. Call "
                "activate_past_recording() before the tokens to be taken back are fed."
            )
        super().crop(tokens_to_remove)
        self._drop_oldest()

    def _held(self) -> PinnedPair:
        """Return the newest ``sliding_window - 1`` tokens.

        While the past is recorded, these and all since the last ``crop``.
        """
        keys, values = self.stores()
        return pin_pair(keys, values, None if self.record_past else self.sliding_window - 1)

    def _drop_oldest(self) -> None:
        for store in self.stores():
            store.drop_oldest(self.sliding_window - 1)
