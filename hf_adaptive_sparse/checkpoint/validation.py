"""Checking a compressed checkpoint against its model, before any of it is loaded.

transformers turns a failing conversion into a table in the log and gives missing tensors random
values. What is wrong is found here instead, from the files' headers and the bitmasks, while the
model is still an empty skeleton; the error names file and tensor, and nothing has been allocated.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from hf_adaptive_sparse.checkpoint.headers import (
    CheckpointError,
    TensorHeader,
    merge_headers,
    read_file_header,
)
from hf_adaptive_sparse.kernels.sparse_linear import count_row_offsets
from hf_adaptive_sparse.packing.bitmask import BitmaskError, check_bitmask, row_bytes
from hf_adaptive_sparse.packing.sparse_weight import stored_count
from hf_adaptive_sparse.packing.stored_names import parse_tensor_name, tensor_name
from hf_adaptive_sparse.packing.stored_weight import ValueFormat, stored_kinds
from hf_adaptive_sparse.packing.upper_bytes import (
    BOOK_WORDS,
    UPPER_BYTE_BITS,
    check_book,
    value_count,
)
from hf_adaptive_sparse.packing.weight_codes import are_scales, group_count

Formats = Mapping[str, ValueFormat]
"""Parameter name -> how its values are stored."""

_CODES = {UPPER_BYTE_BITS: "U8", 8: "I8", 4: "U8"}
_UNITS = {UPPER_BYTE_BITS: " bytes, three for two", 4: " bytes of two"}
_SCALES = ("F32", "F16", "BF16")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class _Stored:
    """How a checkpoint stores the model: by runtime name.

    Attributes:
        plain: Parameter -> its tensor.
        values: Parameter -> the kept values of a compressed weight.
        bitmasks: Parameter -> the bitmask of a compressed weight.
        scales: Parameter -> the scales of a compressed weight with quantised values.
        codebooks: Parameter -> the codebook of a compressed weight with values of 12 bits.
        converted: Parameters that transformers assembles from several tensors.
        surplus: Tensors that no parameter takes.
    """

    plain: dict[str, TensorHeader]
    values: dict[str, TensorHeader]
    bitmasks: dict[str, TensorHeader]
    scales: dict[str, TensorHeader]
    codebooks: dict[str, TensorHeader]
    converted: set[str]
    surplus: list[TensorHeader]

    @property
    def names(self) -> set[str]:
        return {*self.plain, *self.converted}.union(*self.kinds.values())

    @property
    def kinds(self) -> dict[str, dict[str, TensorHeader]]:
        """Those of compressed weights, by their kind."""
        return {
            "values": self.values,
            "bitmask": self.bitmasks,
            "scales": self.scales,
            "codebook": self.codebooks,
        }


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
    stored = _assign(model, expected, headers, copy.deepcopy(list(conversions)))
    where = Path(files[0]).parent
    _check_compressed(stored, formats, where)
    _check_names(model, expected, stored, headers.values(), where)
    if not ignore_mismatched_sizes:
        _check_plain_shapes(expected, stored)
    _check_compressed_shapes(expected, stored, formats)
    offsets = _check_bitmasks(expected, stored, formats)
    _check_scales(stored)
    _check_codebooks(stored)
    books = {name: header.numel - BOOK_WORDS for name, header in stored.codebooks.items()}
    return {name: CheckedWeight(offsets[name], books.get(name, 0)) for name in stored.values}


def _assign(
    model: Any,
    expected: Mapping[str, torch.Tensor],
    headers: Mapping[str, TensorHeader],
    conversions: Sequence[Any],
) -> _Stored:
    """Find which parameter each tensor belongs to, by transformers' own renaming."""
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    stored = _Stored({}, {}, {}, {}, {}, set(), [])
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


def _check_compressed(stored: _Stored, formats: Formats, where: Path) -> None:
    wanted = {name: form.bits for name, form in formats.items()}
    for name in sorted(wanted):
        for kind in stored_kinds(wanted[name]):
            if name in stored.kinds[kind]:
                continue
            plain = stored.plain.get(name)
            seen = f"{plain.file} stores it dense" if plain else f"{where} does not hold it"
            way_out = ""
            if plain and not stored.bitmasks:
                way_out = (
                    " Nothing here is compressed, as when a model was made by from_config and "
                    "saved: remove 'quantization_config' from its config.json to load it."
                )
            raise CheckpointError(
                f"The config says that {name!r} is compressed, so {tensor_name(name, kind)} is "
                f"needed, but {seen}.{way_out}"
            )
        if name in stored.plain or name in stored.converted:
            header = stored.plain.get(name, stored.values[name])
            raise CheckpointError(f"{header.file}: {name!r} is stored both dense and compressed.")
    for name, header in {**stored.values, **stored.bitmasks}.items():
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


def _check_names(
    model: Any,
    expected: Mapping[str, torch.Tensor],
    stored: _Stored,
    headers: Iterable[TensorHeader],
    where: Path,
) -> None:
    """Refuse missing and surplus tensors.

    Another class than the one that was saved (a bare decoder, another head) may lack some and
    have others; then only what would be made up must not exceed what is stored.
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


def _check_plain_shapes(expected: Mapping[str, torch.Tensor], stored: _Stored) -> None:
    for name, header in stored.plain.items():
        shape = tuple(expected[name].shape)
        if header.shape != shape:
            raise CheckpointError(
                f"{header.file}: tensor {header.name!r} has the shape {list(header.shape)}, the "
                f"model's {name!r} is {list(shape)}. A new head of another size takes "
                "ignore_mismatched_sizes=True."
            )


def _check_compressed_shapes(
    expected: Mapping[str, torch.Tensor], stored: _Stored, formats: Formats
) -> None:
    for name, mask in stored.bitmasks.items():
        *leading, columns = expected[name].shape
        numel = expected[name].numel()
        values = stored.values[name]
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
        if name in stored.codebooks:
            _check_codebook_header(stored.codebooks[name], numel)
        if name not in stored.scales:
            continue
        scales, groups = stored.scales[name], group_count(columns, group_size)
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
    expected: Mapping[str, torch.Tensor], stored: _Stored, formats: Formats
) -> dict[str, torch.Tensor]:
    """Count the bitmasks' bits: values before each row, by the parameter's name."""
    offsets: dict[str, torch.Tensor] = {}

    def check(name: str, header: TensorHeader, bitmask: torch.Tensor) -> None:
        bitmask, values = bitmask.flatten(0, -2), stored.values[name]
        offsets[name] = count_row_offsets(bitmask)
        kept = int(offsets[name][-1])
        bits = formats[name].bits
        if stored_count(kept, bits) != values.numel:
            raise CheckpointError(
                f"{header.file}: tensor {header.name!r} keeps {kept} weights, but {values.name!r} "
                f"in {values.file} holds {values.numel}{_UNITS.get(bits, '')}; the two must agree."
            )
        check_bitmask(bitmask, expected[name].shape[-1])

    _check_each(stored.bitmasks, check)
    return offsets


def _check_scales(stored: _Stored) -> None:
    """Refuse scales that cannot scale."""

    def check(name: str, header: TensorHeader, scales: torch.Tensor) -> None:
        if not are_scales(scales):
            raise CheckpointError(
                f"{header.file}: tensor {header.name!r} holds scales that are negative, infinite "
                "or NaN; the file is damaged."
            )

    _check_each(stored.scales, check)


def _check_codebooks(stored: _Stored) -> None:
    """Refuse codebooks that do not belong to their values."""

    def check(name: str, header: TensorHeader, book: torch.Tensor) -> None:
        count = value_count(stored.values[name].numel)
        assert count is not None  # of as many weights as the bitmask keeps
        check_book(book, count)

    _check_each(stored.codebooks, check)


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


def _listing(names: Iterable[str], at_most: int = 3) -> str:
    shown = sorted(names)
    rest = len(shown) - at_most
    return ", ".join(shown[:at_most]) + (f" and {rest} more" if rest > 0 else "")
