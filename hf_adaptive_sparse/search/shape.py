"""What a search has to know of a model: its blocks, their weights, and its cache's layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from hf_adaptive_sparse.architecture import (
    decoder_layers,
    kv_widths,
    layer_index,
    prunable_linears,
)
from hf_adaptive_sparse.search.kv_split import KVSplit, split_equally
from hf_adaptive_sparse.search.space import SearchSpace


@dataclass(frozen=True)
class ModelShape:
    """A search space laid over a model.

    Attributes:
        blocks: Names of the prunable linears of each block; blocks without any are left out.
        block_layers: First and last decoder layer of each block in ``blocks``.
        numel: Weights per prunable linear, in the order of ``blocks``. Empty if nothing is pruned.
        kv_split: The KV bits to be shared out; ``None`` if the cache is left alone.
        num_layers: Decoder layers.
    """

    blocks: tuple[tuple[str, ...], ...]
    block_layers: tuple[tuple[int, int], ...]
    numel: dict[str, int]
    kv_split: KVSplit | None
    num_layers: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        space: SearchSpace,
        modules_to_not_convert: Iterable[str] | None = None,
    ) -> ModelShape:
        """Lay ``space`` over ``model``.

        Args:
            model: The model to be compressed.
            space: The search space.
            modules_to_not_convert: Names or globs of linears to leave dense.

        Raises:
            ValueError: If the model has no decoder layers, nothing to prune, or no KV cache where
                the space asks for them.
        """
        layers_name, layers = decoder_layers(model)
        split = None
        if space.kv_bits is not None:
            split = split_equally(kv_widths(model), space.kv_bits, space.kv_tolerance_bits)
            if split.num_layers != len(layers):
                raise ValueError(
                    f"The config must name as many layers as the decoder has: it names "
                    f"{split.num_layers}, {layers_name!r} holds {len(layers)}."
                )
        if not space.prunes:
            return cls((), (), {}, split, len(layers))
        linears = prunable_linears(model, modules_to_not_convert)
        per_layer: list[list[str]] = [[] for _ in layers]
        for name in linears:
            per_layer[layer_index(name, layers_name)].append(name)
        blocks, spans = [], []
        for span in space.layer_blocks(len(layers)):
            names = tuple(name for layer in span for name in per_layer[layer])
            if names:
                blocks.append(names)
                spans.append((span[0], span[-1]))
        if not blocks:
            raise ValueError(
                "No linear is left to prune: modules_to_not_convert excludes all of them. Exclude "
                "fewer, or search the KV bits alone (target_sparsity=None)."
            )
        numel = {name: linears[name].weight.numel() for names in blocks for name in names}
        return cls(tuple(blocks), tuple(spans), numel, split, len(layers))
