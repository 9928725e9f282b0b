"""What a search has to know of a model: what shares a ratio, and its cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_adaptive_sparse.architecture import (
    decoder_layers,
    kv_widths,
    layer_index,
    linear_role,
    prunable_linears,
)
from hf_adaptive_sparse.search.kv_plan import KVPlan, kv_plan
from hf_adaptive_sparse.search.space import SearchSpace


@dataclass(frozen=True)
class Group:
    """Linears that share a choice.

    Attributes:
        label: Its name in a trial's parameters: ``block_2``, ``layer_7``, ``block_2_mlp.up_proj``.
        names: The linears.
        span: First and last decoder layer.
    """

    label: str
    names: tuple[str, ...]
    span: tuple[int, int]


@dataclass(frozen=True)
class ModelShape:
    """A search space laid over a model.

    Attributes:
        groups: What shares a ratio, in layer order; groups without prunable linears are left out.
            Empty if nothing is pruned.
        numel: Weights per prunable linear, in the order of ``groups``. Empty if nothing is pruned.
        kv: The KV bits to be shared out; ``None`` if the cache is left alone.
        num_layers: Decoder layers.
    """

    groups: tuple[Group, ...]
    numel: dict[str, int]
    kv: KVPlan | None
    num_layers: int

    def to_dict(self) -> dict[str, Any]:
        """Return what a report has to know of the model, in plain JSON types."""
        return {
            "blocks": [list(span) for span in self.block_layers],
            "num_layers": self.num_layers,
            "numel": dict(self.numel),
        }

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
            ValueError: If the model has no decoder layers, nothing to prune, no KV cache where the
                space asks for them, or an exact mean cannot be reached.
        """
        layers_name, layers = decoder_layers(model)
        kv = None
        if space.kv_bits is not None:
            widths = kv_widths(model)
            if len(widths) != len(layers):
                raise ValueError(
                    f"The config must name as many layers as the decoder has: it names "
                    f"{len(widths)}, {layers_name!r} holds {len(layers)}."
                )
            kv = kv_plan(widths, space)
        if not space.prunes:
            return cls((), {}, kv, len(layers))
        linears = prunable_linears(model, modules_to_not_convert)
        if not linears:
            raise ValueError(
                "No linear is left to prune: modules_to_not_convert excludes all of them. Exclude "
                "fewer, or search the KV bits alone (target_sparsity=None)."
            )
        numel = {name: linear.weight.numel() for name, linear in linears.items()}
        blocks = _blocks(linears, layers_name, space, len(layers))
        groups = blocks
        if space.granularity.endswith("-projection"):
            groups = tuple(part for block in blocks for part in _by_role(block, layers_name))
        ordered = {name: numel[name] for group in groups for name in group.names}
        return cls(groups, ordered, kv, len(layers))

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
