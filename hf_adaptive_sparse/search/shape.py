"""The parts of a model that a search chooses for: what shares a ratio, a weight width, KV bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import (
    decoder_layers,
    kv_widths,
    layer_index,
    linear_role,
    prunable_weights,
)
from hf_adaptive_sparse.kvcache.generation import check_takes_profile
from hf_adaptive_sparse.search.bit_allocation import BitAllocation
from hf_adaptive_sparse.search.byte_budget import ByteBudget
from hf_adaptive_sparse.search.kv_plan import KVPlan, kv_plan
from hf_adaptive_sparse.search.space import SearchSpace


@dataclass(frozen=True)
class Group:
    """Linears and stacks of experts that share a choice.

    Attributes:
        label: Its name in a trial's parameters: ``block_2``, ``layer_7``, ``block_2_mlp.up_proj``.
        names: Their names.
        span: First and last decoder layer.
    """

    label: str
    names: tuple[str, ...]
    span: tuple[int, int]


@dataclass(frozen=True)
class ModelShape:
    """A search space applied to a model.

    Attributes:
        groups: What shares a ratio, in layer order; groups without prunable linears are left out.
            Empty if nothing is pruned.
        weight_groups: What shares a weight width. Empty if the weights keep their dtype.
        weight_allocation: Holds the mean of the weight widths; ``None`` if there is none to hold.
        numel: Weights per prunable linear, in the order of ``groups``. Empty if the weights are
            left alone.
        kv: The KV bits to be shared out; ``None`` if the cache is left alone.
        kv_widths: Elements that one token adds to the keys and to the values, per decoder layer;
            empty if the cache is left alone.
        budget: The limits in bytes; ``None`` if there are none.
        num_layers: Decoder layers.
    """

    groups: tuple[Group, ...]
    weight_groups: tuple[Group, ...]
    weight_allocation: BitAllocation | None
    numel: dict[str, int]
    kv: KVPlan | None
    kv_widths: tuple[tuple[int, int], ...]
    budget: ByteBudget | None
    num_layers: int

    def to_dict(self) -> dict[str, Any]:
        """Return what a report needs to know about the model, in plain JSON types."""
        return {
            "blocks": [list(span) for span in self.block_layers],
            "num_layers": self.num_layers,
            "numel": dict(self.numel),
        }

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        space: SearchSpace,
        modules_to_not_convert: Iterable[str] | None = None,
    ) -> ModelShape:
        """Apply ``space`` to ``model``.

        Args:
            model: The model to be compressed.
            space: The search space.
            modules_to_not_convert: Names or globs of linears to leave dense.

        Raises:
            ValueError: If the model has no decoder layers, nothing to prune, no KV cache that takes
                a profile where the space asks for them, or an exact mean cannot be reached.
        """
        layers_name, layers = decoder_layers(model)
        kv, widths = None, []
        if space.kv_bits is not None:
            check_takes_profile(model)
            widths = kv_widths(model)
            if len(widths) != len(layers):
                raise ValueError(
                    f"The config must name as many layers as the decoder has: it names "
                    f"{len(widths)}, {layers_name!r} holds {len(layers)}."
                )
            kv = kv_plan(widths, space)
        excluded = tuple(modules_to_not_convert or ())
        budget = ByteBudget.of(model, space, excluded) if space.in_bytes else None
        if not space.prunes and space.weight_bits is None:
            return cls((), (), None, {}, kv, tuple(widths), budget, len(layers))
        weights = prunable_weights(model, excluded)
        if not weights:
            raise ValueError(
                "No linear is left to prune: modules_to_not_convert excludes all of them. Exclude "
                "fewer, or search the KV bits alone (target_sparsity=None)."
            )
        numel = {name: weight.weight.numel() for name, weight in weights.items()}
        blocks = _blocks(weights, layers_name, space, len(layers))
        groups = blocks
        if space.granularity.endswith("-projection"):
            groups = tuple(part for block in blocks for part in _by_role(block, layers_name))
        quantised = blocks if space.weight_bits is not None else ()
        return cls(
            groups if space.prunes else (),
            quantised,
            _weight_allocation(quantised, numel, space),
            {name: numel[name] for group in groups for name in group.names},
            kv,
            tuple(widths),
            budget,
            len(layers),
        )

    @property
    def blocks(self) -> tuple[tuple[str, ...], ...]:
        """Names of the linears of each group that shares a ratio."""
        return tuple(group.names for group in self.groups)

    @property
    def block_layers(self) -> tuple[tuple[int, int], ...]:
        """First and last decoder layer of each group that shares a ratio."""
        return tuple(group.span for group in self.groups)


def _blocks(
    linears: Iterable[str], layers_name: str, space: SearchSpace, num_layers: int
) -> tuple[Group, ...]:
    per_layer: list[list[str]] = [[] for _ in range(num_layers)]
    for name in linears:
        per_layer[layer_index(name, layers_name)].append(name)
    kind = "layer" if space.granularity.startswith("layer") else "block"
    spans = space.layer_blocks(num_layers)
    members = [tuple(name for layer in span for name in per_layer[layer]) for span in spans]
    filled = [(span, names) for span, names in zip(spans, members, strict=True) if names]
    return tuple(
        Group(f"{kind}_{index}", names, (span[0], span[-1]))
        for index, (span, names) in enumerate(filled)
    )


def _by_role(block: Group, layers_name: str) -> list[Group]:
    roles: dict[str, list[str]] = {}
    for name in block.names:
        roles.setdefault(linear_role(name, layers_name), []).append(name)
    return [
        Group(f"{block.label}_{role}", tuple(names), block.span) for role, names in roles.items()
    ]


def _weight_allocation(
    groups: tuple[Group, ...], numel: dict[str, int], space: SearchSpace
) -> BitAllocation | None:
    palette = space.weight_bits
    if palette is None or (space.weight_mean_bits is None and len(palette) > 1):
        return None
    mean = palette[0] if space.weight_mean_bits is None else space.weight_mean_bits
    sizes = tuple(sum(numel[name] for name in group.names) for group in groups)
    return BitAllocation(sizes, palette, Fraction(repr(mean)), "weight_mean_bits")
