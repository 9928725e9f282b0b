"""One sparse weight in memory: what kernels read, with the offsets that let them start at any row.

    bitmask      uint8 (rows, ceil(columns / 8))   which weights are kept, see bitmask.py
    values       (nnz,)                            the kept weights, row by row:
                   float32, bfloat16, float16      as they are
                   int8                            codes of 8 bits, see weight_codes.py
                   uint8 (ceil(nnz / 2),)          codes of 4 bits, the same
                   uint8 (nnz + ceil(nnz / 2),)    bfloat16 in 12 bits, see upper_bytes.py
    scales       (rows, groups)                    with codes only, in the weight's dtype
    codebook     int64 (2 + exceptions,)           with 12 bits only
    row_offsets  int32 or int64 (rows + 1,)        number of values before each row
    block_offsets  int16 or int32 (rows, ceil(columns / 64))   on GPUs only: the same within a row,
                                                   before each block of 64 columns

    size_bytes = ceil(nnz * value_bits / 8) + rows * ceil(columns / 8)
               + rows * groups * value_bytes + (rows + 1) * offset_bytes
               + 16 + 8 * exceptions, with 12 bits
               + rows * ceil(columns / 64) * block_offset_bytes, on GPUs

Per weight of a large matrix of which half is kept that is 9 bits with 16-bit values, 7 with the
same values in 12 bits, 5 with codes of 8 bits and 3 with codes of 4, plus ``16 / group_size`` for
the scales: 0.5625, 0.4375, 0.3125 and 0.1875 of a 16-bit weight. Block offsets add a quarter of a
bit: 0.578, 0.328 and 0.203 (no GPU has values of 12 bits). With them each thread of a GPU finds its
values by itself; counting them anew took threads that wait for another.

The offsets are computed, never stored in a checkpoint: they follow from the bitmask. Values carry
no padding, so that a tensor that was mapped from a file serves as it is; kernels mind the end.

n:m patterns use the same bitmask. Tighter indices exist and were weighed: 2 of 4 has six cases,
which is 3 bits for 4 weights instead of 4, and saves 2.8 % of the whole with 16-bit values, 5 %
with 8 and 8.3 % with 4; 4 of 8 has 70, which is 7 bits instead of 8 and saves half as much. In
return a kernel looks up every group where it now reads the mask as it lies. NVIDIA's own index of
2:4 takes 4 bits for 4 weights, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_adaptive_sparse.packing import upper_bytes, weight_codes
from hf_adaptive_sparse.packing.bitmask import (
    BitmaskError,
    check_bitmask,
    compress,
    decompress,
    kept_mask,
    pack_mask,
    row_bytes,
    row_chunks,
)
from hf_adaptive_sparse.packing.offsets import (
    block_count,
    block_offset_dtype,
    count_row_offsets,
    offset_dtype,
)
from hf_adaptive_sparse.packing.stored_names import KINDS

_VALUE_DTYPES = (*weight_codes.SCALE_DTYPES, *weight_codes.CODE_DTYPES.values())


def stored_bits(values: torch.Tensor, codebook: torch.Tensor | None) -> int:
    """Return the bits that values are stored in: 12 with a codebook, 8 or 4 for codes, else 16."""
    if codebook is not None:
        return upper_bytes.UPPER_BYTE_BITS
    codes = weight_codes.CODE_DTYPES.items()
    return next((bits for bits, dtype in codes if dtype == values.dtype), 16)


def stored_count(nnz: int, bits: int) -> int:
    """Return the elements of the tensor that stores ``nnz`` values of so many bits."""
    if bits == upper_bytes.UPPER_BYTE_BITS:
        return upper_bytes.stored_bytes(nnz)
    return (nnz + 1) // 2 if bits == 4 else nnz


def size_bytes(
    rows: int,
    columns: int,
    nnz: int,
    bits: int,
    groups: int = 0,
    value_bytes: int = 2,
    *,
    blocks: bool = False,
) -> int:
    """Return the bytes of a sparse weight in memory, by the formula at the head of this module.

    Args:
        rows: Rows of the weight.
        columns: Columns of the weight.
        nnz: Weights that are kept.
        bits: Bits per value: 16 (the weight's own dtype), 12 (the exceptions are not counted), 8
            or 4.
        groups: Scales per row, 0 without codes.
        value_bytes: Bytes of an element of the weight's own dtype, which the scales have, too.
        blocks: Whether there are block offsets.
    """
    index = rows * row_bytes(columns) + (rows + 1) * offset_dtype(nnz).itemsize
    if blocks:
        index += rows * block_count(columns) * block_offset_dtype(columns).itemsize
    if bits == upper_bytes.UPPER_BYTE_BITS:
        index += upper_bytes.BOOK_WORDS * 8
    value_bits = 8 * value_bytes if bits == 16 else bits
    return (nnz * value_bits + 7) // 8 + rows * groups * value_bytes + index


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """One weight, sparse.

    Made by ``from_dense`` or, checked, by ``from_tensors``; the constructor believes its arguments,
    so that wrapping tensors for one call of a kernel costs nothing.

    Attributes:
        shape: ``(rows, columns)``, as ``nn.Linear`` has ``(out_features, in_features)``.
        bitmask: uint8 ``(rows, ceil(columns / 8))``, contiguous like all tensors here.
        values: The kept weights, or their codes.
        row_offsets: ``(rows + 1,)``, int32 or int64: values before each row, and all of them.
        scales: ``(rows, groups)``, None without codes.
        group_size: Columns per scale; None: one per row.
        block_offsets: What ``count_block_offsets`` returns; None: kernels that need it count.
        codebook: With values of 12 bits: what their codes stand for, and the exceptions.
        prepared: What kernels worked out about this weight for their next calls.
    """

    shape: tuple[int, int]
    bitmask: torch.Tensor
    values: torch.Tensor
    row_offsets: torch.Tensor
    scales: torch.Tensor | None = None
    group_size: int | None = None
    block_offsets: torch.Tensor | None = None
    codebook: torch.Tensor | None = None
    prepared: dict[object, Any] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies what holds for the original."""
        return self.__dict__ | {"prepared": {}}

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, bits: int = 16, group_size: int | None = None
    ) -> SparseWeight:
        """Compress a weight; what is not bitwise zero is kept.

        Args:
            weight: ``(rows, columns)``, float32, bfloat16 or float16.
            bits: Bits per value: 16 (the weight's own dtype), 12 (of bfloat16), 8 or 4.
            group_size: With 8 or 4 bits: columns per scale, a multiple of 32; None: one per row.

        Raises:
            ValueError: If the weight, ``bits`` or ``group_size`` are not as above, or a weight to
                be quantised is not finite.
        """
        if weight.dim() != 2 or weight.dtype not in weight_codes.SCALE_DTYPES:
            raise BitmaskError(
                "A sparse weight is made from (rows, columns) in float32, bfloat16 or float16, got "
                f"{weight.dtype} {tuple(weight.shape)}."
            )
        shape = (weight.shape[0], weight.shape[1])
        if bits in (16, upper_bytes.UPPER_BYTE_BITS):
            if group_size is not None:
                raise BitmaskError(
                    f"group_size={group_size} needs values of 8 or 4 bits; values of {bits} bits "
                    "have no scales."
                )
            values, bitmask = compress(weight)
            offsets, codebook = count_row_offsets(bitmask), None
            if bits != 16:
                values, codebook = upper_bytes.encode(values)
            return cls(shape, bitmask, values, offsets, codebook=codebook)
        pieces = [
            _encode_rows(weight[start:stop], bits, group_size)
            for start, stop in row_chunks(*weight.shape)
        ]
        masks, codes, scales = (torch.cat(part) for part in zip(*pieces, strict=True))
        values = weight_codes.pack_codes(codes, bits)
        return cls(shape, masks, values, count_row_offsets(masks), scales, group_size)

    @classmethod
    def from_tensors(
        cls,
        columns: int,
        *,
        bitmask: torch.Tensor,
        values: torch.Tensor,
        scales: torch.Tensor | None = None,
        group_size: int | None = None,
        row_offsets: torch.Tensor | None = None,
        codebook: torch.Tensor | None = None,
    ) -> SparseWeight:
        """Take the tensors of ``tensors()``, checked.

        Args:
            columns: Columns of the weight.
            bitmask: uint8 ``(rows, ceil(columns / 8))``.
            values: ``(nnz,)`` in float32, bfloat16 or float16, or int8 codes; or uint8
                ``(ceil(nnz / 2),)``, codes of 4 bits; or, with a codebook, uint8
                ``(nnz + ceil(nnz / 2),)``.
            scales: With codes: ``(rows, groups)`` in float32, bfloat16 or float16.
            group_size: With codes: columns per scale; None: one per row.
            row_offsets: What ``count_row_offsets`` returned for this bitmask, which is believed;
                None: it is called here.
            codebook: With values of 12 bits: int64 ``(2 + exceptions,)``.

        Raises:
            BitmaskError: If shapes, dtypes or devices do not fit, the bitmask sets a bit after the
                last column or another number of bits than there are values, a scale is negative,
                infinite or NaN, or the codebook is damaged.
        """
        check_bitmask(bitmask, columns)
        if values.dim() != 1 or values.dtype not in _VALUE_DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _VALUE_DTYPES)
            raise BitmaskError(
                f"values must be of shape (n,) in one of {known}, got {values.dtype} "
                f"{tuple(values.shape)}."
            )
        shape = (bitmask.shape[0], columns)
        offsets = count_row_offsets(bitmask) if row_offsets is None else row_offsets
        if scales is not None:
            scales = scales.contiguous()
        if codebook is not None:
            codebook = codebook.contiguous()
            upper_bytes.check(values, codebook)
        parts = (bitmask.contiguous(), values.contiguous(), offsets.contiguous())
        weight = cls(shape, *parts, scales, group_size, codebook=codebook)
        _check_count(weight)
        _check_scales(weight)
        devices = {tensor.device for tensor in weight.tensors().values()}
        if len(devices) > 1:
            raise BitmaskError(f"The tensors of one weight must share a device, got {devices}.")
        return weight

    @property
    def bits(self) -> int:
        """Bits per value: 16 (the weight's own dtype), 12, 8 or 4."""
        return stored_bits(self.values, self.codebook)

    @property
    def value_bits(self) -> int:
        """Bits that a value takes: 32 where the weight's own dtype is float32, else ``bits``."""
        return 8 * self.values.element_size() if self.bits == 16 else self.bits

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight when it is decompressed."""
        if self.codebook is not None:
            return torch.bfloat16
        return self.values.dtype if self.scales is None else self.scales.dtype

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.bitmask.device

    @property
    def nnz(self) -> int:
        """Weights that are kept; reads the device."""
        return int(self.row_offsets[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, the offsets included."""
        blocks = 0 if self.block_offsets is None else self.block_offsets.nbytes
        stored = (*self.tensors().values(), self.row_offsets)
        return sum(tensor.nbytes for tensor in stored) + blocks

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint stores.

        That is ``values`` and ``bitmask``, and ``scales`` or a ``codebook`` where there is one.
        """
        parts = (self.values, self.bitmask, self.scales, self.codebook)
        stored = zip(KINDS, parts, strict=True)
        return {kind: part for kind, part in stored if part is not None}

    def to(self, device: torch.device | str) -> SparseWeight:
        """Return the weight on a device: itself if it is there.

        Block offsets go along to another GPU; those that one needs are not counted here. Values of
        12 bits, which no kernel reads outside of the CPU, become plain there.
        """
        if torch.device(device) == self.device:
            return self
        if self.codebook is not None and torch.device(device).type not in ("cpu", "meta"):
            return self.plain().to(device)
        return SparseWeight(
            self.shape,
            self.bitmask.to(device),
            self.values.to(device),
            self.row_offsets.to(device),
            None if self.scales is None else self.scales.to(device),
            self.group_size,
            self._blocks_on(torch.device(device)),
            None if self.codebook is None else self.codebook.to(device),
        )

    def plain(self) -> SparseWeight:
        """Return the weight with values of 12 bits as bfloat16; itself if it has none."""
        if self.codebook is None:
            return self
        values = upper_bytes.decode(self.values, self.codebook)
        return replace(self, values=values, codebook=None)

    def _blocks_on(self, device: torch.device) -> torch.Tensor | None:
        if self.block_offsets is None or device.type == "cpu":
            return None
        return self.block_offsets.to(device)

    def part(self, start: int, stop: int) -> SparseWeight:
        """Return rows ``start`` to ``stop - 1`` as a weight for kernels; no tensor is copied.

        It keeps all values: its offsets go on counting from the first of them. So its ``nnz``,
        ``nbytes`` and ``tensors()`` say nothing of it alone.
        """
        scales, blocks = self.scales, self.block_offsets
        return SparseWeight(
            (stop - start, self.shape[1]),
            self.bitmask[start:stop],
            self.values,
            self.row_offsets[start : stop + 1],
            None if scales is None else scales[start:stop],
            self.group_size,
            None if blocks is None else blocks[start:stop],
            self.codebook,
        )

    def to_dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decompress: ``shape`` in ``dtype``, by default the weight's own; zero where pruned."""
        dense = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        for start, stop in row_chunks(*self.shape):
            dense[start:stop] = self.dense_rows(start, stop)
        return dense

    def dense_rows(self, start: int, stop: int) -> torch.Tensor:
        """Decompress rows ``start`` to ``stop - 1``; codes times scales are left in float32."""
        first, last = int(self.row_offsets[start]), int(self.row_offsets[stop])
        bitmask, columns = self.bitmask[start:stop], self.shape[1]
        if self.codebook is not None:
            plain = upper_bytes.decode(self.values, self.codebook, first, last)
            return decompress(plain, bitmask, columns)
        if self.scales is None:
            return decompress(self.values[first:last], bitmask, columns)
        if self.bits == 4:
            # A row may begin in the upper half of a byte.
            stored = self.values[first // 2 : (last + 1) // 2]
            codes = weight_codes.unpack_codes(stored, 4, stored.numel() * 2)
            codes = codes[first % 2 : first % 2 + last - first]
        else:
            codes = self.values[first:last]
        dense = decompress(codes, bitmask, columns)
        return weight_codes.decode(dense, self.scales[start:stop], self.bits, self.group_size)


def _encode_rows(
    weight: torch.Tensor, bits: int, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return bitmask, kept codes int8 and scales of some rows."""
    mask = kept_mask(weight)
    codes, scales = weight_codes.encode(weight, bits, group_size)
    return pack_mask(mask), codes[mask], scales


def _check_count(weight: SparseWeight) -> None:
    kept = weight.nnz
    stored = weight.values.numel()
    if stored != stored_count(kept, weight.bits):
        units = {
            upper_bytes.UPPER_BYTE_BITS: "bytes, three for two values,",
            4: "bytes, two values each,",
        }
        unit = units.get(weight.bits, "values")
        raise BitmaskError(
            f"the bitmask keeps {kept} weights but {stored} {unit} are stored; the two must agree."
        )


def _check_scales(weight: SparseWeight) -> None:
    scales, group_size = weight.scales, weight.group_size
    if weight.bits > 8:
        if scales is not None or group_size is not None:
            raise BitmaskError(f"values of {weight.bits} bits have no scales, but some were given.")
        return
    expected = (weight.shape[0], weight_codes.group_count(weight.shape[1], group_size))
    if scales is None or scales.dtype not in weight_codes.SCALE_DTYPES or scales.shape != expected:
        got = "none" if scales is None else f"{scales.dtype} {tuple(scales.shape)}"
        raise BitmaskError(
            f"codes of {weight.bits} bits need scales {expected} in float32, bfloat16 or float16, "
            f"got {got}."
        )
    if not weight_codes.are_scales(scales):
        raise BitmaskError("scales must be finite and >= 0; the file is damaged.")
