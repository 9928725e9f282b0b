"""Which tensors of a checkpoint make which parameters of a model, by their names.

transformers gives missing tensors random values, and lists them in the log. Here they are refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from hf_adaptive_sparse.checkpoint.headers import CheckpointError, TensorHeader
from hf_adaptive_sparse.packing.stored_names import KINDS, parse_tensor_name, tensor_name
from hf_adaptive_sparse.packing.stored_weight import ValueFormat, stored_kinds

Formats = Mapping[str, ValueFormat]
"""Parameter name -> how its values are stored."""


@dataclass(frozen=True)
class StoredTensors:
    """How a checkpoint stores the model: by runtime name.

    Attributes:
        plain: Parameter -> its tensor.
        kinds: Of compressed weights, kind of tensor (`stored_names.KINDS`) -> parameter -> tensor.
        converted: Parameters that transformers assembles from several tensors.
        surplus: Tensors that no parameter takes.
    """

    plain: dict[str, TensorHeader]
    kinds: dict[str, dict[str, TensorHeader]]
    converted: set[str]
    surplus: list[TensorHeader]

    @property
    def names(self) -> set[str]:
        """All parameters of which there is a tensor."""
        return {*self.plain, *self.converted}.union(*self.kinds.values())


def assign_tensors(
    model: Any,
    expected: Mapping[str, torch.Tensor],
    headers: Mapping[str, TensorHeader],
    conversions: Sequence[Any],
) -> StoredTensors:
    """Find which parameter each tensor belongs to, by transformers' own renaming.

    Args:
        model: The skeleton that the tensors will be loaded into.
        expected: Its state dict.
        headers: All tensors of the checkpoint, by their names there.
        conversions: transformers' renamings and converters for this load; they keep note of what
            they were used for.
    """
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    stored = StoredTensors({}, {kind: {} for kind in KINDS}, set(), [])
    prefix = model.base_model_prefix
    targets = {s: c.target_patterns for c in converters for s in c.source_patterns}
    for key, header in headers.items():
        name, source = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, source = rename_source_key(key, [], [], prefix, expected)
        if name not in expected:
            stored.surplus.append(header)
        elif source is None:
            stored.plain[name] = header
        elif (parsed := parse_tensor_name(key)) is not None:
            stored.kinds[parsed[1]][name] = header
        else:
            first = targets[source][0]
            stored.converted.update(name.replace(first, target) for target in targets[source])
    return stored


def check_compressed(stored: StoredTensors, formats: Formats, where: Path) -> None:
    """Refuse weights that are not stored as the config says.

    Args:
        stored: Which tensors there are.
        formats: Runtime names of the parameters that are stored compressed, and how.
        where: The checkpoint, for the message.

    Raises:
        CheckpointError: If one is stored otherwise, or twice.
    """
    wanted = {name: form.bits for name, form in formats.items()}
    for name in sorted(wanted):
        for kind in stored_kinds(wanted[name]):
            if name in stored.kinds[kind]:
                continue
            plain = stored.plain.get(name)
            seen = f"{plain.file} stores it dense" if plain else f"{where} does not hold it"
            way_out = ""
            if plain and not stored.kinds["bitmask"]:
                way_out = (
                    " Nothing here is compressed, as when a model was made by from_config, or a "
                    "part of one was pruned or saved by itself: remove 'quantization_config' from "
                    "its config.json to load it."
                )
            raise CheckpointError(
                f"The config says that {name!r} is compressed, so {tensor_name(name, kind)} is "
                f"needed, but {seen}.{way_out}"
            )
        if name in stored.plain or name in stored.converted:
            header = stored.plain.get(name, stored.kinds["values"][name])
            raise CheckpointError(f"{header.file}: {name!r} is stored both dense and compressed.")
    for name, header in {**stored.kinds["values"], **stored.kinds["bitmask"]}.items():
        if name not in wanted:
            raise CheckpointError(
                f"{header.file}: {header.name!r} is compressed, but the config's sparsity does "
                "not name its module."
            )
    for kind, what in (("scales", "scales"), ("codebook", "a codebook")):
        for name, header in stored.kinds[kind].items():
            if kind not in stored_kinds(wanted.get(name, 16)):
                raise CheckpointError(
                    f"{header.file}: {header.name!r} holds {what}, but the config's weight_bits "
                    f"say {wanted.get(name, 16)} for its module, which has none."
                )


def check_names(
    model: Any,
    expected: Mapping[str, torch.Tensor],
    stored: StoredTensors,
    headers: Iterable[TensorHeader],
    where: Path,
) -> None:
    """Refuse missing and surplus tensors.

    Another class than the one that was saved (a bare decoder, another head) may lack some and
    have others; then only what would be made up must not exceed what is stored.

    Args:
        model: The skeleton that the tensors will be loaded into.
        expected: Its state dict.
        stored: Which tensors there are.
        headers: All tensors of the checkpoint.
        where: The checkpoint, for the message.

    Raises:
        CheckpointError: If tensors are missing, or belong to no part of the model.
    """
    missing = _missing(model, expected, stored.names)
    architectures = model.config.architectures or []
    if type(model).__name__ in architectures:
        surplus = [h for h in stored.surplus if not _ignored(h.name, model, "unexpected")]
        if missing:
            raise CheckpointError(
                f"{where} lacks {len(missing)} of the model's tensors: {_listing(missing)}."
            )
        if surplus:
            raise CheckpointError(
                f"{surplus[0].file}: {len(surplus)} tensors belong to no part of "
                f"{type(model).__name__}: {_listing(h.name for h in surplus)}."
            )
        return
    made_up = sum(expected[name].numel() for name in missing)
    declared = sum(h.size_bytes * (8 if h.name.endswith("_bitmask") else 1) for h in headers)
    if made_up > declared:
        raise CheckpointError(
            f"{where} lacks tensors of {made_up} elements that {type(model).__name__} needs, more "
            f"than all it stores: {_listing(missing)}."
        )


def _missing(model: Any, expected: Iterable[str], found: set[str]) -> list[str]:
    """Return the parameters that neither the files hold nor a tied parameter provides."""
    tied: dict[str, set[str]] = defaultdict(set)
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        tied[target].add(source)
        tied[source].add(target)
    return [
        name
        for name in expected
        if name not in found and not tied[name] & found and not _ignored(name, model, "missing")
    ]


def _ignored(name: str, model: Any, kind: str) -> bool:
    patterns = getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _listing(names: Iterable[str], at_most: int = 3) -> str:
    shown = sorted(names)
    rest = len(shown) - at_most
    return ", ".join(shown[:at_most]) + (f" and {rest} more" if rest > 0 else "")
