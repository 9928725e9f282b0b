"""Writing the files of a sharded checkpoint: each whole or not at all, and flushed to the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_adaptive_sparse.checkpoint.headers import INDEX_NAME
from hf_adaptive_sparse.files import replacing
from hf_adaptive_sparse.staging import writing


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Write one safetensors file, whole or not at all, and flush it to the disk.

    Returns:
        Name of each tensor -> its bytes.

    Raises:
        OutputError: If it cannot be written, for example because the disk is full.
    """
    with replacing(path) as partial:
        with writing("The weights", path.parent):
            save_file({k: t.contiguous() for k, t in tensors.items()}, partial, {"format": "pt"})
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def write_json(path: Path, data: object) -> None:
    """Write a JSON file, whole or not at all, and flush it to the disk."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def write_index(folder: Path, shards: Mapping[str, Mapping[str, int]]) -> None:
    """Write the index of a sharded checkpoint: file -> its tensors' names and bytes."""
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    total = sum(size for tensors in shards.values() for size in tensors.values())
    write_json(
        folder / INDEX_NAME,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
