"""Checking a compressed checkpoint against its model, before any of it is loaded.

transformers turns a failing conversion into a table in the log and gives missing tensors random
values. What is wrong is found here instead, from the files' headers and the bitmasks, while the
model is still an empty skeleton; the error names file and tensor, and nothing has been allocated.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from hf_adaptive_sparse.checkpoint.headers import (
    CheckpointError,
    TensorHeader,
    merge_headers,
    read_file_header,
)
from hf_adaptive_sparse.checkpoint.stored_tensors import (
    Formats,
    StoredTensors,
    assign_tensors,
    check_compressed,
    check_names,
)
from hf_adaptive_sparse.kernels.sparse_linear import count_row_offsets
from hf_adaptive_sparse.packing.bitmask import BitmaskError, check_bitmask, row_bytes
from hf_adaptive_sparse.packing.sparse_weight import stored_count
from hf_adaptive_sparse.packing.upper_bytes import (
    BOOK_WORDS,
    UPPER_BYTE_BITS,
    check_book,
    value_count,
)
from hf_adaptive_sparse.packing.weight_codes import are_scales, group_count

_CODES = {UPPER_BYTE_BITS: "U8", 8: "I8", 4: "U8"}
_UNITS = {UPPER_BYTE_BITS: " bytes, three for two", 4: " bytes of two"}
_SCALES = ("F32", "F16", "BF16")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class CheckedWeight:
    """A compressed weight in the files.

    Attributes:
        row_offsets: Values before each row, from its bitmask: ``(rows + 1,)``.
        exceptions: Values that its codebook holds, if it has one.
    """

    row_offsets: torch.Tensor
    exceptions: int


def validate_checkpoint(
    model: nn.Module,
    files: Sequence[str],
    formats: Formats,
    conversions: Iterable[Any],
    *,
    ignore_mismatched_sizes: bool = False,
) -> dict[str, CheckedWeight]:
    """Check that safetensors files hold exactly the model, compressed where its config says so.

    Args:
        model: The skeleton the files will be loaded into, on the meta device.
        files: The safetensors files.
        formats: Runtime names of the parameters that are stored compressed, and how.
        conversions: transformers' renamings and converters for this load.
        ignore_mismatched_sizes: Let plain tensors have another shape than the model's.

    Returns:
        Runtime name of each compressed parameter -> what was found out about it.

    Raises:
        CheckpointError: If a file is damaged, a tensor is missing, surplus or of another shape, a
            bitmask and its values disagree, or a scale or a codebook is none; names file and
            tensor.
    """
    headers = merge_headers(read_file_header(Path(file)) for file in files)
    expected = model.state_dict()
    stored = assign_tensors(model, expected, headers, copy.deepcopy(list(conversions)))
    where = Path(files[0]).parent
    check_compressed(stored, formats, where)
    check_names(model, expected, stored, headers.values(), where)
    if not ignore_mismatched_sizes:
        _check_plain_shapes(expected, stored)
    _check_compressed_shapes(expected, stored, formats)
    offsets = _check_bitmasks(expected, stored, formats)
    _check_scales(stored)
    _check_codebooks(stored)
    books = {name: header.numel - BOOK_WORDS for name, header in stored.kinds["codebook"].items()}
    return {name: CheckedWeight(rows, books.get(name, 0)) for name, rows in offsets.items()}


def _check_plain_shapes(expected: Mapping[str, torch.Tensor], stored: StoredTensors) -> None:
    for name, header in stored.plain.items():
        shape = tuple(expected[name].shape)
        if header.shape != shape:
            raise CheckpointError(
                f"{header.file}: tensor {header.name!r} has the shape {list(header.shape)}, the "
                f"model's {name!r} is {list(shape)}. A new head of another size takes "
                "ignore_mismatched_sizes=True."
            )


def _check_compressed_shapes(
    expected: Mapping[str, torch.Tensor], stored: StoredTensors, formats: Formats
) -> None:
    for name, mask in stored.kinds["bitmask"].items():
        *leading, columns = expected[name].shape
        numel = expected[name].numel()
        values = stored.kinds["values"][name]
        if mask.dtype != "U8" or list(mask.shape) != [*leading, row_bytes(columns)]:
            raise CheckpointError(
                f"{mask.file}: tensor {mask.name!r} must be U8 {[*leading, row_bytes(columns)]} "
                f"for a weight {[*leading, columns]}, got {mask.dtype} {list(mask.shape)}."
            )
        bits, group_size = formats[name]
        most = stored_count(numel, bits)
        wanted = _FLOATS if bits == 16 else (_CODES[bits],)
        if values.dtype not in wanted or len(values.shape) != 1 or values.numel > most:
            kind = "floating point" if bits == 16 else f"{_CODES[bits]} ({bits} bits per value)"
            raise CheckpointError(
                f"{values.file}: tensor {values.name!r} must be {kind} [n] with n <= {most}, got "
                f"{values.dtype} {list(values.shape)}."
            )
        if name in stored.kinds["codebook"]:
            _check_codebook_header(stored.kinds["codebook"][name], numel)
        if name not in stored.kinds["scales"]:
            continue
        scales, groups = stored.kinds["scales"][name], group_count(columns, group_size)
        if scales.dtype not in _SCALES or list(scales.shape) != [*leading, groups]:
            raise CheckpointError(
                f"{scales.file}: tensor {scales.name!r} must be floating point "
                f"{[*leading, groups]}, got {scales.dtype} {list(scales.shape)}."
            )


def _check_codebook_header(book: TensorHeader, numel: int) -> None:
    most = BOOK_WORDS + numel
    if book.dtype != "I64" or len(book.shape) != 1 or not BOOK_WORDS <= book.numel <= most:
        raise CheckpointError(
            f"{book.file}: tensor {book.name!r} must be I64 [n] with {BOOK_WORDS} <= n <= {most}, "
            f"got {book.dtype} {list(book.shape)}."
        )


def _check_bitmasks(
    expected: Mapping[str, torch.Tensor], stored: StoredTensors, formats: Formats
) -> dict[str, torch.Tensor]:
    """Count the bitmasks' bits: values before each row, by the parameter's name."""
    offsets: dict[str, torch.Tensor] = {}

    def check(name: str, header: TensorHeader, bitmask: torch.Tensor) -> None:
        bitmask, values = bitmask.flatten(0, -2), stored.kinds["values"][name]
        offsets[name] = count_row_offsets(bitmask)
        kept = int(offsets[name][-1])
        bits = formats[name].bits
        if stored_count(kept, bits) != values.numel:
            raise CheckpointError(
                f"{header.file}: tensor {header.name!r} keeps {kept} weights, but {values.name!r} "
                f"in {values.file} holds {values.numel}{_UNITS.get(bits, '')}; the two must agree."
            )
        check_bitmask(bitmask, expected[name].shape[-1])

    _check_each(stored.kinds["bitmask"], check)
    return offsets


def _check_scales(stored: StoredTensors) -> None:
    """Refuse scales that cannot scale."""

    def check(name: str, header: TensorHeader, scales: torch.Tensor) -> None:
        if not are_scales(scales):
            raise CheckpointError(
                f"{header.file}: tensor {header.name!r} holds scales that are negative, infinite "
                "or NaN; the file is damaged."
            )

    _check_each(stored.kinds["scales"], check)


def _check_codebooks(stored: StoredTensors) -> None:
    """Refuse codebooks that do not belong to their values."""

    def check(name: str, header: TensorHeader, book: torch.Tensor) -> None:
        count = value_count(stored.kinds["values"][name].numel)
        assert count is not None  # of as many weights as the bitmask keeps
        check_book(book, count)

    _check_each(stored.kinds["codebook"], check)


def _check_each(
    headers: Mapping[str, TensorHeader], check: Callable[[str, TensorHeader, torch.Tensor], None]
) -> None:
    """Read tensors one at a time, file by file, and give them to ``check``.

    Raises:
        CheckpointError: As ``check`` does, or of the BitmaskError that it raises.
    """
    by_file: dict[str, list[str]] = defaultdict(list)
    for name, header in headers.items():
        by_file[header.file].append(name)
    # The skeleton is made under torch.device("meta"); what is read is real. That context would look
    # at each call of torch, of which there are thousands.
    with torch._C.DisableTorchFunction():
        for file, names in by_file.items():
            with safe_open(file, framework="pt") as handle:
                for name in names:
                    header = headers[name]
                    try:
                        check(name, header, handle.get_tensor(header.name))
                    except BitmaskError as error:
                        raise CheckpointError(f"{file}: tensor {header.name!r}: {error}") from error
