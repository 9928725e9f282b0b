"""A checkpoint's tensors under a model's names, read a few at a time, and written as shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from hf_adaptive_sparse.checkpoint.headers import (
    INDEX_NAME,
    CheckpointError,
    TensorHeader,
    read_headers,
)


class WeightFiles:
    """The safetensors files of a dense checkpoint.

    Attributes:
        stored: Runtime name -> where its tensor lies, and what it is called there.
        others: Tensors that no parameter of the model takes.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        """Read the headers.

        Args:
            model: The model, possibly on the meta device.
            folder: Folder of the checkpoint.

        Raises:
            CheckpointError: If there are no safetensors files, one is damaged, a parameter is not
                in them, or transformers assembles a parameter from several tensors.
        """
        self._folder = folder
        self.stored: dict[str, TensorHeader] = {}
        self.others: list[TensorHeader] = []
        expected = model.state_dict()
        conversions = get_model_conversion_mapping(model)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        prefix = model.base_model_prefix
        for key, header in read_headers(folder).items():
            name, source = rename_source_key(key, renamings, converters, prefix, expected)
            if name not in expected and key in expected:
                name, source = key, None
            if source is not None:
                raise CheckpointError(
                    f"{header.file}: transformers assembles {name!r} from several tensors, such as "
                    f"{key!r}, which reading layer by layer does not support. Prune this model "
                    "without --offload, or load it and save it as it is in memory first: "
                    "model.save_pretrained(folder, save_original_format=False)."
                )
            if name in expected:
                self.stored[name] = header
            else:
                self.others.append(header)
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        missing = sorted(expected.keys() - self.stored.keys() - {*tied, *tied.values()})
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of the model's tensors, such as {missing[0]!r}."
            )

    def digest(self) -> str:
        """Return a digest of what the files hold, by their headers, sizes and times of change."""
        summary = hashlib.sha256()
        for name, header in sorted(self.stored.items()):
            summary.update(f"{name} {header.name} {header.dtype} {header.shape}".encode())
        for file in sorted({Path(h.file).name for h in (*self.stored.values(), *self.others)}):
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


def fill_(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors in the place of parameters and buffers, in the dtype those have.

    Args:
        model: The model, possibly on the meta device.
        tensors: Runtime name -> tensor.
    """
    for name, tensor in tensors.items():
        owner_name, _, key = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if key in owner._parameters:
            old = owner.get_parameter(key)
            new = tensor.to(old.dtype) if tensor.is_floating_point() else tensor
            owner._parameters[key] = nn.Parameter(new, requires_grad=False)
        else:
            owner._buffers[key] = tensor


def empty_(model: nn.Module, names: Iterable[str]) -> None:
    """Leave only the shapes of parameters in memory."""
    for name in names:
        owner_name, _, key = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if key in owner._parameters:
            meta = owner.get_parameter(key).to("meta")
            owner._parameters[key] = nn.Parameter(meta, requires_grad=False)


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Write one safetensors file, complete or not at all.

    Returns:
        Name of each tensor -> its bytes.
    """
    partial = path.with_name(path.name + ".partial")
    save_file({k: t.contiguous() for k, t in tensors.items()}, partial, {"format": "pt"})
    partial.replace(path)
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def write_json(path: Path, data: object) -> None:
    """Write a JSON file, complete or not at all, and onto the disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_index(folder: Path, shards: Mapping[str, Mapping[str, int]]) -> None:
    """Write the index of a sharded checkpoint: file -> its tensors' names and bytes."""
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    total = sum(size for tensors in shards.values() for size in tensors.values())
    write_json(
        folder / INDEX_NAME,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
