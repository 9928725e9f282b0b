"""What the tensors of a compressed weight are called in a checkpoint.

Of a linear's ``X.weight``: ``X.weight_values``, ``X.weight_bitmask`` and, with codes,
``X.weight_scales``, or with values of 12 bits ``X.weight_codebook``. Of a stack of experts
``X.gate_up_proj``: ``X.sparse_gate_up_proj_values`` and so on. The prefix keeps them out of reach
of the patterns by which transformers merges and splits ``experts.gate_up_proj``: some of its
versions find those anywhere in a name.
"""

from __future__ import annotations

KINDS = ("values", "bitmask", "scales", "codebook")
"""The tensors of a compressed weight, of which none has more than one of the last two."""

BY_ROW = ("bitmask", "scales")
"""Those whose leading dimensions are the weight's own, those of experts among them."""

_PREFIX = "sparse_"
_LINEAR = "weight"


def leaf_names(leaf: str) -> list[str]:
    """Return the names of all tensors of a parameter, by the last part of its name."""
    stem = leaf if leaf == _LINEAR else _PREFIX + leaf
    return [f"{stem}_{kind}" for kind in KINDS]


def tensor_name(parameter: str, kind: str) -> str:
    """Return the name of one tensor of a compressed parameter.

    Args:
        parameter: Name of the parameter.
        kind: One of `KINDS`.
    """
    owner, dot, leaf = parameter.rpartition(".")
    return owner + dot + leaf_names(leaf)[KINDS.index(kind)]


def parse_tensor_name(name: str) -> tuple[str, str] | None:
    """Return parameter and kind of a tensor's name; ``None`` if it is no compressed weight's."""
    owner, dot, leaf = name.rpartition(".")
    stem, _, kind = leaf.rpartition("_")
    if kind not in KINDS or not (stem == _LINEAR or stem.startswith(_PREFIX)):
        return None
    return owner + dot + stem.removeprefix(_PREFIX), kind


def weight_name(parameter: str) -> str:
    """Return the name that a parameter's weight goes by: its module's, or a stack's own."""
    return parameter.removesuffix(f".{_LINEAR}")
