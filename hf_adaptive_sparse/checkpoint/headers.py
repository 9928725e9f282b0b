"""Headers of safetensors files: names, dtypes and shapes of tensors, without reading the tensors.

A file is ``u64 length | JSON header of that length | data``; the header names each tensor's dtype,
shape and place in the data. Everything read here is untrusted: lengths are bounded by the file's
size before anything is allocated, and the declared places must tile the data exactly.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_adaptive_sparse.errors import AdaptiveSparseError
from hf_adaptive_sparse.packing.stored_names import parse_tensor_name, tensor_name, weight_name
from hf_adaptive_sparse.packing.upper_bytes import value_count

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

MAX_HEADER_BYTES = 100_000_000
"""Longest header that is read; the safetensors library has the same limit."""

LENGTH_BYTES = 8
"""Bytes of a file before its header, which hold the length of that."""

_DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


class CheckpointError(AdaptiveSparseError, ValueError):
    """A checkpoint is truncated, tampered with, or not what its config says."""


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor.

    Attributes:
        name: Its name in the file.
        dtype: safetensors' name of its dtype, ``"BF16"``.
        shape: Its shape.
        size_bytes: Bytes it takes in the file.
        file: The file it lies in.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    file: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class CompressedModule:
    """What the headers alone say about one compressed weight.

    Attributes:
        name: The name in the file of a linear, or of a stack of experts.
        rows: Rows of the weight, of all experts.
        columns_at_most: Columns of the weight, or up to 7 more: whole bytes of the bitmask.
        nnz: Weights that are kept; with codes of 4 bits this, or one less.
        size_bytes: Bytes of values, bitmask, scales and codebook together.
        weight_bytes: Bytes of one weight, decompressed.
        quantised: Whether its values are codes.
    """

    name: str
    rows: int
    columns_at_most: int
    nnz: int
    size_bytes: int
    weight_bytes: int
    quantised: bool


def parse_header(header: bytes, data_bytes: int, file: str) -> dict[str, TensorHeader]:
    """Read the JSON header of one safetensors file.

    Args:
        header: The JSON itself, without the eight bytes of its length.
        data_bytes: Bytes that follow the header in the file.
        file: Name of the file, for messages.

    Returns:
        Tensor name -> its header.

    Raises:
        CheckpointError: If the header is not valid or does not tile ``data_bytes`` exactly.
    """
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the safetensors header is not valid JSON.") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: the safetensors header must be a JSON object.")
    entries.pop("__metadata__", None)
    tensors, places = {}, []
    for name, entry in entries.items():
        dtype, shape, start, end = _entry_fields(entry, name, file)
        tensor = TensorHeader(name, dtype, shape, end - start, file)
        width = _DTYPE_BYTES.get(dtype)
        if width is not None and tensor.numel * width != tensor.size_bytes:
            raise CheckpointError(
                f"{file}: tensor {name!r} is {dtype} {list(shape)}, which takes "
                f"{tensor.numel * width} bytes, but {tensor.size_bytes} are declared."
            )
        tensors[name] = tensor
        places.append((start, end))
    position = 0
    for start, end in sorted(places):
        if start != position:
            raise CheckpointError(f"{file}: the tensors overlap or leave a gap at byte {position}.")
        position = end
    if position != data_bytes:
        raise CheckpointError(
            f"{file}: the header declares {position} bytes of tensors, the file holds "
            f"{data_bytes}. It is truncated or damaged; download or save it again."
        )
    return tensors


def _entry_fields(entry: Any, name: str, file: str) -> tuple[str, tuple[int, ...], int, int]:
    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)

    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("dtype"), str)
        or not sizes(entry.get("shape"))
        or not sizes(entry.get("data_offsets"))
        or len(entry["data_offsets"]) != 2
        or entry["data_offsets"][0] > entry["data_offsets"][1]
    ):
        raise CheckpointError(f"{file}: the header entry of tensor {name!r} is not valid.")
    start, end = entry["data_offsets"]
    return entry["dtype"], tuple(entry["shape"]), start, end


def header_length(prefix: bytes, file_bytes: int, file: str) -> int:
    """Return the length of the JSON header from a file's first eight bytes.

    Raises:
        CheckpointError: If the file is too short for it, or it exceeds ``MAX_HEADER_BYTES``.
    """
    if len(prefix) < LENGTH_BYTES:
        raise CheckpointError(f"{file}: truncated, {file_bytes} bytes are no safetensors file.")
    length = int(struct.unpack("<Q", prefix[:LENGTH_BYTES])[0])
    if length > min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise CheckpointError(
            f"{file}: the header claims {length} bytes of a file of {file_bytes} (at most "
            f"{MAX_HEADER_BYTES} are read). It is truncated or no safetensors file."
        )
    return length


def read_file_header(path: Path) -> dict[str, TensorHeader]:
    """Read the header of one safetensors file.

    Raises:
        CheckpointError: If it is truncated or not valid.
        OSError: If it cannot be read.
    """
    with path.open("rb") as handle:
        size = path.stat().st_size
        length = header_length(handle.read(LENGTH_BYTES), size, str(path))
        header = handle.read(length)
    return parse_header(header, size - LENGTH_BYTES - length, str(path))


def merge_headers(files: Iterable[Mapping[str, TensorHeader]]) -> dict[str, TensorHeader]:
    """Join the headers of the shards of one checkpoint.

    Raises:
        CheckpointError: If two shards hold a tensor of one name.
    """
    merged: dict[str, TensorHeader] = {}
    for tensors in files:
        for name, tensor in tensors.items():
            if name in merged:
                raise CheckpointError(
                    f"{tensor.file}: tensor {name!r} is also stored in {merged[name].file}."
                )
            merged[name] = tensor
    return merged


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Read all headers of a checkpoint.

    Args:
        path: A safetensors file, or a folder with ``model.safetensors`` or the shards that
            ``model.safetensors.index.json`` names; of both, the former, as in transformers.

    Returns:
        Tensor name -> its header.

    Raises:
        CheckpointError: If there is no checkpoint, or a file is truncated or not valid.
    """
    if path.is_file():
        return read_file_header(path)
    if (path / WEIGHTS_NAME).is_file():
        return read_file_header(path / WEIGHTS_NAME)
    if (path / INDEX_NAME).is_file():
        index_file = path / INDEX_NAME
        shards = shard_names(index_file.read_bytes(), str(index_file))
        for shard in shards:
            if not (path / shard).is_file():
                raise CheckpointError(f"{index_file} names {shard}, which is not there.")
        return merge_headers(read_file_header(path / shard) for shard in shards)
    raise CheckpointError(
        f"{path} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}. Weights in other files, such as "
        "pytorch_model.bin, become such a file by loading the model and model.save_pretrained()."
    )


def shard_names(index: bytes, file: str) -> list[str]:
    """Return the file names in a shard index, sorted.

    Raises:
        CheckpointError: If the index is not valid or names a file outside its folder.
    """
    try:
        weight_map = json.loads(index)["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a valid index of shards.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{file}: {name!r} is not the name of a file beside the index.")
    return names


def compressed_summary(headers: Mapping[str, TensorHeader]) -> dict[str, CompressedModule]:
    """Return what the headers say about each compressed weight, by its name in the file.

    Raises:
        CheckpointError: If values, bitmask or scales are missing or of the wrong kind.
    """
    summary = {}
    for key, mask in headers.items():
        parsed = parse_tensor_name(key)
        if parsed is None or parsed[1] != "bitmask":
            continue
        keys = [tensor_name(parsed[0], kind) for kind in ("values", "scales", "codebook")]
        values_key, scales_key, book_key = keys
        values, scales, book = (headers.get(name) for name in keys)
        if values is None:
            raise CheckpointError(f"{mask.file}: {key!r} has no {values_key!r}.")
        if mask.dtype != "U8" or len(mask.shape) not in (2, 3) or len(values.shape) != 1:
            raise CheckpointError(
                f"{mask.file}: {key!r} must be U8 (out, bytes), or (experts, out, bytes), and its "
                f"values (nnz,), got {mask.dtype} {list(mask.shape)} and {list(values.shape)}."
            )
        codes = values.dtype in ("I8", "U8") and book is None
        if codes != (scales is not None):
            raise CheckpointError(
                f"{values.file}: {values.name!r} is {values.dtype}, which "
                f"{'needs' if codes else 'has no'} {scales_key!r}."
            )
        nnz = values.numel * (2 if values.dtype == "U8" else 1)
        if book is not None:
            count = value_count(values.numel)
            if values.dtype != "U8" or count is None:
                raise CheckpointError(
                    f"{values.file}: {values.name!r} must be U8 (nnz + ceil(nnz / 2),), as there "
                    f"is {book_key!r}, got {values.dtype} {list(values.shape)}."
                )
            nnz = count
        *leading, row_bytes = mask.shape
        name = weight_name(parsed[0])
        summary[name] = CompressedModule(
            name=name,
            rows=math.prod(leading),
            columns_at_most=row_bytes * 8,
            nnz=nnz,
            size_bytes=sum(part.size_bytes for part in (mask, values, scales, book) if part),
            weight_bytes=2 if book else _DTYPE_BYTES.get((scales or values).dtype, 0),
            quantised=codes,
        )
    return summary
