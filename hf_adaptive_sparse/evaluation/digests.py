"""Digests that tell one model, one set of batches, one source of data from another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from hf_adaptive_sparse.architecture import parameter_name
from hf_adaptive_sparse.calibration.hub_datasets import dataset_table, is_dataset
from hf_adaptive_sparse.calibration.local_files import data_files
from hf_adaptive_sparse.naming import expanded
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.packing.stored_names import BY_ROW, KINDS, tensor_name
from hf_adaptive_sparse.runtime.conversion import sparse_weights
from hf_adaptive_sparse.runtime.sparse_experts import SparseStack
from hf_adaptive_sparse.runtime.sparse_linear import SparseLinear

SAMPLED_ROWS = 8
"""Rows of each weight that enter the digest of a model's weights."""

SAMPLED_ELEMENTS = 1 << 10
"""Elements of each weight that enter it at least, where rows are short."""

_ENDS_BYTES = 1 << 20
"""Bytes at either end of a data file that tell it from another of its name and size."""


def weights_digest(model: PreTrainedModel) -> str:
    """Return a digest of name, shape, dtype and some rows of every parameter.

    Rows are whole, so that every column counts. A weight that is compressed in memory counts as the
    plain one that it stands for: a checkpoint has one digest in both runtimes. Offloaded ones are
    read from where they lie; tied ones, which offloading parts, count once.
    """
    found = {}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, held in sparse_weights(model).items():
            name = parameter_name(key, held)
            names = {kind: tensor_name(name, kind) for kind in KINDS}
            stored = {k: n for k, n in names.items() if parameters.pop(n, None) is not None}
            weight = _sparse_weight(model, held, stored)
            sampled = [weight.dense_rows(row, row + 1) for row in _sampled_rows(*weight.shape)]
            shape = held.shape if isinstance(held, SparseStack) else weight.shape
            found[name] = _rows_digest(shape, torch.cat(sampled).to(held.dtype))
        for name, parameter in _in_memory(model, parameters):
            rows = torch.atleast_2d(parameter.detach()).flatten(0, -2)
            found[name] = _rows_digest(parameter.shape, rows[_sampled_rows(*rows.shape)])
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def _in_memory(
    model: PreTrainedModel, parameters: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and data of parameters, one at a time, those that are offloaded read in."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    seen = set()
    for name, parameter in parameters.items():
        target = tied.get(name, name)
        if not parameter.is_meta:
            yield name, parameter
        elif target not in seen:
            yield name, load_offloaded_parameter(model, name)
        seen.add(target)


def _sparse_weight(
    model: PreTrainedModel, held: SparseLinear | SparseStack, stored: Mapping[str, str]
) -> SparseWeight:
    """Return a compressed weight, all experts of a stack as one, also where it is offloaded.

    Args:
        model: The model.
        held: What holds the weight.
        stored: Kind -> name of the parameters that it consists of.
    """
    if isinstance(held, SparseLinear):
        if not held.weight_bitmask.is_meta:
            return held.sparse_weight
        columns = held.in_features
    else:
        if held.device.type != "meta":
            return held.weight
        columns = held.shape[2]
    parts = {kind: load_offloaded_parameter(model, name) for kind, name in stored.items()}
    parts = {k: part.flatten(0, -2) if k in BY_ROW else part for k, part in parts.items()}
    return SparseWeight.from_tensors(columns, group_size=held.group_size, **parts)


def _sampled_rows(rows: int, columns: int) -> list[int]:
    """Return the rows of a weight that enter its digest, evenly spaced."""
    count = min(rows, max(SAMPLED_ROWS, -(-SAMPLED_ELEMENTS // max(1, columns))))
    return [index * rows // count for index in range(count)]


def _rows_digest(shape: Sequence[int], rows: torch.Tensor) -> str:
    """Return a digest of rows ``(rows, columns)`` of a weight of some shape."""
    digest = hashlib.sha256(f"{tuple(shape)} {rows.dtype}".encode())
    digest.update(rows.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def batches_digest(batches: Iterable[Mapping[str, torch.Tensor]]) -> str:
    """Return a digest of every tensor of every batch."""
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            tensor = batch[key].detach().cpu().contiguous()
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def source_digest(data: object, split: str) -> str | None:
    """Return a digest that tells data of one name apart; ``None`` for those on the Hub.

    Of local files those that `open_table` reads rows from, by size, beginning and end; of rows in
    memory all that they hold.

    Args:
        data: A Hub dataset, a local file or folder, a list of rows or a dataset in memory.
        split: As for `open_table`.
    """
    digest = hashlib.sha256()
    if isinstance(data, str | os.PathLike):
        source = expanded(data)
        if not source.exists():
            return None
        folder = source if source.is_dir() else source.parent
        for path in data_files(source, split):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder).as_posix()} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_ENDS_BYTES))
                file.seek(max(0, size - _ENDS_BYTES))
                digest.update(file.read())
    elif isinstance(data, list):
        for row in data:
            digest.update(_content_digest(row))
    elif is_dataset(data):
        table = dataset_table(data)
        for row in table.scan(table.columns):
            digest.update(_content_digest(row))
    else:
        return None
    return digest.hexdigest()


def _content_digest(value: object) -> bytes:
    """Return a digest of a cell's content; of a type that is not known, of its name alone."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        value = value.tolist()
    parts: list[bytes] = []
    if isinstance(value, Mapping):
        parts = [_content_digest(item) for item in value.items()]
    elif isinstance(value, list | tuple):
        parts = [_content_digest(item) for item in value]
    elif isinstance(value, Image.Image):
        about = (value.mode, value.size, value.getpalette())
        parts = [repr(about).encode(), value.tobytes()]
    elif isinstance(value, np.ndarray):
        parts = [f"{value.dtype} {value.shape}".encode(), value.tobytes()]
    elif isinstance(value, bytes | str | int | float | os.PathLike | None):
        parts = [repr(value).encode()]
    digest = hashlib.sha256(f"{type(value).__name__} {len(parts)}".encode())
    for part in parts:
        digest.update(part)
    return digest.digest()
