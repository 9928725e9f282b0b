"""A dense checkpoint's tensors under a model's names, read a few at a time."""

from __future__ import annotations

import copy
import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from hf_adaptive_sparse.checkpoint.empty_weights import cast_floating
from hf_adaptive_sparse.checkpoint.headers import CheckpointError, TensorHeader, read_headers


@dataclass(frozen=True)
class _Assembly:
    """A parameter that transformers makes of several tensors, or by a conversion of one.

    Attributes:
        converter: How.
        parts: The tensors, each with the pattern of the converter that it matches.
    """

    converter: WeightConverter
    parts: list[tuple[TensorHeader, str]] = field(default_factory=list)


class WeightFiles:
    """The safetensors files of a dense checkpoint.

    Tensors that no parameter takes are left alone, as transformers leaves them when it loads.

    Attributes:
        stored: Runtime name -> where its tensor lies, and what it is called there; of parameters
            that are stored as they are.
        twins: Runtime name of a tied parameter that is in no file -> one it is tied to that is.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        """Read the headers.

        Args:
            model: The model, possibly on the meta device.
            folder: Folder of the checkpoint.

        Raises:
            CheckpointError: If there are no safetensors files, one is damaged, a parameter is not
                in them or has another shape there, or transformers assembles one that is no stack
                of experts.
        """
        self._model, self._folder = model, folder
        self._assembled: dict[str, _Assembly] = {}
        self.stored: dict[str, TensorHeader] = {}
        expected = model.state_dict()
        self._shapes = {name: tensor.shape for name, tensor in expected.items()}
        self._dtypes = {name: tensor.dtype for name, tensor in expected.items()}
        conversions = get_model_conversion_mapping(model)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        by_source = {source: c for c in converters for source in c.source_patterns}
        prefix = model.base_model_prefix
        for key, header in read_headers(folder).items():
            name, source = rename_source_key(key, renamings, converters, prefix, expected)
            if name not in expected and key in expected:
                name, source = key, None
            if source is not None and not self._can_assemble(name, by_source[source]):
                raise CheckpointError(
                    f"{header.file}: transformers makes {name!r} of {key!r} by a conversion, which "
                    "reading layer by layer supports of experts alone. Prune this model "
                    "without offload=True (--offload), or load it and save it as it is in memory "
                    "first: "
                    "model.save_pretrained(folder, save_original_format=False)."
                )
            if source is not None:
                assembly = self._assembled.setdefault(name, _Assembly(by_source[source]))
                assembly.parts.append((header, source))
            elif name in expected:
                self.stored[name] = header
        self.twins = _twins(model, set(self.names))
        missing = expected.keys() - {*self.names, *self.twins}
        if missing:
            raise missing_tensors(folder, missing, model)
        self._check_shapes()

        # What a converter would take for its own when it is loaded under its runtime name.
        self._converted_again = {
            name
            for name in self._assembled
            if rename_source_key(name, renamings, converters, prefix, expected) != (name, None)
        }

    def _check_shapes(self) -> None:
        for name, header in self.stored.items():
            shape = tuple(self._shapes[name])
            if header.shape != shape:
                raise CheckpointError(
                    f"{header.file}: tensor {header.name!r} must have the shape of the model's "
                    f"{name!r}, {list(shape)}; it has {list(header.shape)}. The checkpoint and its "
                    "config.json do not belong together."
                )

    def _can_assemble(self, name: str, converter: WeightConverter) -> bool:
        shape = self._shapes.get(name)
        return shape is not None and len(shape) == 3 and len(converter.target_patterns) == 1

    def assembled(self, name: str) -> bool:
        """Return whether a parameter is made by a conversion."""
        return name in self._assembled

    def check_own_name(self, name: str) -> None:
        """Refuse an assembled parameter that could not be stored as it is, under its own name.

        Raises:
            CheckpointError: If a conversion would be applied to it when it is loaded.
        """
        if name in self._converted_again:
            raise CheckpointError(
                f"{name!r} cannot be written in the dense format layer by layer: transformers "
                "would convert it again when it is loaded. Use checkpoint_format='bitmask', or "
                "prune without offload=True (--offload)."
            )

    @property
    def names(self) -> list[str]:
        """Runtime names of all parameters that the files hold."""
        return [*self.stored, *self._assembled]

    def headers(self, name: str) -> list[TensorHeader]:
        """Return the tensors that a parameter is stored as."""
        if name in self.stored:
            return [self.stored[name]]
        return [header for header, _ in self._assembled[name].parts]

    def digest(self) -> str:
        """Return a digest of what the files hold, by their headers, sizes and times of change."""
        summary = hashlib.sha256()
        for name in sorted(self.names):
            for header in self.headers(name):
                summary.update(f"{name} {header.name} {header.dtype} {header.shape}".encode())
        held = [header for name in self.names for header in self.headers(name)]
        for file in sorted({Path(header.file).name for header in held}):
            status = (self._folder / file).stat()
            summary.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode())
        return summary.hexdigest()

    def read(self, headers: Iterable[TensorHeader]) -> dict[str, torch.Tensor]:
        """Return tensors by their names in the files; nothing of the files stays mapped."""
        by_file: dict[str, list[TensorHeader]] = defaultdict(list)
        for header in headers:
            by_file[header.file].append(header)
        found: dict[str, torch.Tensor] = {}
        for file, wanted in by_file.items():
            with safe_open(self._folder / Path(file).name, framework="pt") as handle:
                for header in wanted:
                    # A copy: what the file is mapped to goes away with the handle.
                    found[header.name] = handle.get_tensor(header.name).clone()
        return found

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the stored tensors of parameters, by their names there, in the model's dtypes."""
        names = list(names)
        found = self.read(header for name in names for header in self.headers(name))
        for name in names:
            for header in self.headers(name):
                found[header.name] = cast_floating(found[header.name], self._dtypes[name])
        return found

    def parameters(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return parameters by their runtime names, as the model holds them.

        Raises:
            CheckpointError: If what is assembled has another shape than the model's parameter.
        """
        held = {name: self.twins.get(name, name) for name in names}
        plain = self.read(self.stored[name] for name in held.values() if name in self.stored)
        found = {n: plain[self.stored[h].name] for n, h in held.items() if h in self.stored}
        for name in held:
            if name in self._assembled:
                found[name] = self._assemble(name)
        return found

    def _assemble(self, name: str) -> torch.Tensor:
        assembly, read = self._assembled[name], self.read(self.headers(name))
        converter = copy.deepcopy(assembly.converter)
        # The order in which transformers stacks experts: by number.
        for header, source in sorted(assembly.parts, key=lambda part: _natural(part[0].name)):
            converter.add_tensor(name, header.name, source, read.pop(header.name))
        made = converter.convert(name, model=self._model, config=self._model.config)
        found = made.get(name)
        tensor: torch.Tensor | None = found[0] if isinstance(found, list) else found
        shape = self._shapes[name]
        if tensor is None or tensor.shape != shape:
            raise CheckpointError(
                f"{self._folder}: what transformers makes of {assembly.parts[0][0].name!r} and "
                f"{len(assembly.parts) - 1} others must be {name!r} {list(shape)}, got "
                f"{list(made) if tensor is None else list(tensor.shape)}."
            )
        return tensor


def _twins(model: PreTrainedModel, names: Collection[str]) -> dict[str, str]:
    """Return name -> one it is tied to among ``names``, of tied parameters that are not."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    groups: dict[str, list[str]] = defaultdict(list)
    for target, source in tied.items():
        groups[source].append(target)
    found: dict[str, str] = {}
    for source, targets in groups.items():
        held = [name for name in (source, *targets) if name in names]
        if held:
            found |= {name: held[0] for name in (source, *targets) if name not in names}
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts names by the numbers in them."""
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in name.split(".")]


def missing_tensors(
    where: str | os.PathLike[str], names: Collection[str], model: PreTrainedModel
) -> CheckpointError:
    """Return the error of a checkpoint that lacks tensors of the model."""
    return CheckpointError(
        f"{where} lacks {len(names)} of the model's tensors, such as {min(names)!r}. They would be "
        f"random numbers: give a complete {type(model).__name__}."
    )
