"""The check of a model in memory, before it is pruned."""

from __future__ import annotations

from transformers import PreTrainedModel

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.runtime.conversion import sparse_weights


def check_plain(model: PreTrainedModel) -> None:
    """Refuse what is no model by itself, and a model whose weights are not plain tensors.

    Raises:
        TypeError: If it is no model of transformers, but, say, a wrapper of one.
        ValueError: If another quantizer holds it, or its weights are compressed in memory.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a PreTrainedModel of transformers, got {type(model).__name__}. Of a "
            "wrapper pass the model inside; of a PEFT model what merge_and_unload() returns."
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer.quantization_config, SparsityConfig):
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"The model is quantized with {getattr(method, 'value', method)!r}; "
            "hf_adaptive_sparse works on plain weights. Load it unquantized. (For its KV cache "
            "alone, pass an AdaptiveQuantizedCache to generate().)"
        )
    for name in sparse_weights(model):
        raise ValueError(
            f"The model must have plain weights; that of {name!r} is compressed in memory (sparse "
            "runtime). Load it with sparsity_config=SparsityConfig(runtime='dense')."
        )
