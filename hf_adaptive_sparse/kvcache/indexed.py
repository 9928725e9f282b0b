"""Quantised layers of sparse attention, which hold an indexer's keys beside keys and values.

DeepSeek V3.2, GLM-5 and their like choose by an indexer which tokens a query attends to. Its keys
stay in full precision, as in a `DynamicCache`: they are small, and they decide what is read.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicIndexedLayer

from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer


class AdaptiveIndexedLayer(DynamicIndexedLayer, AdaptiveQuantizedLayer):
    """Cache layer for attention to the tokens that an indexer chooses.

    Args:
        *args: Those of the attention's layer.
        **kwargs: Those of the attention's layer.
    """

    beside = ("indexer_keys", "indexer_position_ids", "is_indexer_initialized")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        AdaptiveQuantizedLayer.__init__(self, *args, **kwargs)
        self.indexer_keys = None
        self.indexer_position_ids = None
        self.is_indexer_initialized = False
