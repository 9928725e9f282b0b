"""Where a model's decoder layers and prunable weights are: the only place that knows families.

Nearly everything is found by what transformers guarantees for every model (``get_decoder()``,
``get_text_config()``, module lists), so that a family needs an entry here only where its config
says something in words of its own (`config_facts`).
"""

from hf_adaptive_sparse.architecture.adapters import check_no_adapters
from hf_adaptive_sparse.architecture.config_facts import (
    UNLIMITED_CONTEXT,
    accepts_audio,
    accepts_images,
    cache_argument,
    context_length,
    cross_attention_layers,
    image_token_id,
    kv_heads,
    kv_widths,
    media_token_ids,
    num_decoder_layers,
    rewrites_weights,
)
from hf_adaptive_sparse.architecture.layers import (
    decoder_layers,
    generating_parts,
    layer_index,
    layer_of,
    linear_role,
)
from hf_adaptive_sparse.architecture.names import match_names, spread_by_name
from hf_adaptive_sparse.architecture.weights import (
    Prunable,
    dense_expert_weights,
    expert_linears,
    fused_rows,
    parameter_name,
    prunable_weights,
    stack_names,
    weight_place,
)

__all__ = [
    "UNLIMITED_CONTEXT",
    "Prunable",
    "accepts_audio",
    "accepts_images",
    "cache_argument",
    "check_no_adapters",
    "context_length",
    "cross_attention_layers",
    "decoder_layers",
    "dense_expert_weights",
    "expert_linears",
    "fused_rows",
    "generating_parts",
    "image_token_id",
    "kv_heads",
    "kv_widths",
    "layer_index",
    "layer_of",
    "linear_role",
    "match_names",
    "media_token_ids",
    "num_decoder_layers",
    "parameter_name",
    "prunable_weights",
    "rewrites_weights",
    "spread_by_name",
    "stack_names",
    "weight_place",
]
