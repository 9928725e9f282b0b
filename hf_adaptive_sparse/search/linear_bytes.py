"""The bytes of one prunable weight, in a checkpoint and in the sparse runtime's memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_adaptive_sparse.packing.sparse_weight import size_bytes
from hf_adaptive_sparse.packing.stored_weight import ValueFormat, checkpoint_bytes
from hf_adaptive_sparse.packing.weight_codes import default_group_size, group_count
from hf_adaptive_sparse.search.space import OWN_DTYPE


@dataclass(frozen=True)
class LinearBytes:
    """The formats of one prunable weight.

    Attributes:
        rows: Its outputs; of experts, the rows of all of them.
        columns: Its inputs; of transposed experts, their outputs.
        value_bytes: Bytes of an element in the model's dtype, which the scales have, too.
        plain_in_memory: The sparse runtime holds it decompressed: experts that it cannot read.
        on_gpu: The sparse runtime has block offsets there, too.
    """

    rows: int
    columns: int
    value_bytes: int
    plain_in_memory: bool = False
    on_gpu: bool = False

    @classmethod
    def of(cls, weight: torch.Tensor, *, plain_in_memory: bool = False) -> LinearBytes:
        """Return the formats of a weight ``(out, in)``, or of experts ``(experts, ...)``."""
        return cls(
            weight.shape[:-1].numel(),
            weight.shape[-1],
            weight.element_size(),
            plain_in_memory=plain_in_memory,
            on_gpu=weight.device.type == "cuda",
        )

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    def in_memory(self, kept: int, bits: int) -> int:
        """Return the bytes the sparse runtime holds: a plain weight where nothing is removed."""
        if self.plain_in_memory or self._is_plain(kept, bits):
            return self.numel * self.value_bytes
        is_coded = bits != OWN_DTYPE
        groups = group_count(self.columns, default_group_size(bits)) if is_coded else 0
        return size_bytes(
            *(self.rows, self.columns, kept, bits, groups, self.value_bytes), blocks=self.on_gpu
        )

    def on_disk(self, kept: int, bits: int) -> int:
        """Return the bytes in a checkpoint: a plain weight where nothing is removed."""
        if self._is_plain(kept, bits):
            return self.numel * self.value_bytes
        form = ValueFormat(bits, default_group_size(bits))
        return checkpoint_bytes(self.rows, self.columns, kept, form, self.value_bytes)

    def _is_plain(self, kept: int, bits: int) -> bool:
        return kept == self.numel and bits == OWN_DTYPE
