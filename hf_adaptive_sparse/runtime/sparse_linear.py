"""`SparseLinear`: a linear whose weight stays compressed in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_adaptive_sparse.kernels import sparse_linear
from hf_adaptive_sparse.packing.offsets import block_offset_dtype
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight, stored_bits
from hf_adaptive_sparse.packing.stored_names import KINDS, leaf_names
from hf_adaptive_sparse.packing.stored_weight import StoredWeight
from hf_adaptive_sparse.packing.weight_codes import SCALE_DTYPES
from hf_adaptive_sparse.runtime import operator
from hf_adaptive_sparse.runtime.counted import Counted, is_counted
from hf_adaptive_sparse.runtime.parameters import can_load, given_parts, hold_parts_, make_room_
from hf_adaptive_sparse.runtime.weight_view import FrozenWeightError, SparseWeightView

_OFFSETS = ("row_offsets", "block_offsets")
_STORED = dict(zip(KINDS, leaf_names("weight"), strict=True))
"""The parameters that a checkpoint has, by their kind."""


class SparseLinear(nn.Linear):
    """``nn.Linear`` over a weight that is stored as bitmask and kept values.

    It is an ``nn.Linear`` to what asks for one (PEFT), with the same forward. Its parameters bear
    the names that a checkpoint has: ``weight_values``, ``weight_bitmask`` and, with values of 8 or
    4 bits, ``weight_scales``, of 12 bits ``weight_codebook``. ``weight`` is a read-only view for
    code that asks for shape, dtype and device.

    Values of 12 bits stay so in bfloat16 on the CPU; cast, or on another device, they are plain.

    Gradients flow through to the input and to the bias. The weight takes none.

    Args:
        in_features: Columns.
        out_features: Rows.
        nnz: Weights that are kept.
        bias: Whether there is a bias.
        bits: 16 for values in ``dtype``; 12 for bfloat16 by a codebook; 8 or 4 for codes.
        group_size: Columns per scale, of codes; ``None``: one scale per row.
        exceptions: With 12 bits: values that the codebook holds.
        dtype: Dtype of the weight, whichever bits its values take.
        device: Where its (uninitialised) tensors lie.

    Raises:
        ValueError: If ``bits`` or ``group_size`` are invalid.
    """

    # What a model's initialisation would do to a linear has no meaning here.
    _is_hf_initialized = True

    weight_values: nn.Parameter
    weight_bitmask: nn.Parameter
    weight_scales: nn.Parameter | None
    weight_codebook: nn.Parameter | None
    row_offsets: torch.Tensor | None
    block_offsets: torch.Tensor | None
    _counted: Counted | None = None
    _over_parameters: SparseWeight | None = None
    _over_blocks: torch.Tensor | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nnz: int,
        *,
        bias: bool = True,
        bits: int = 16,
        group_size: int | None = None,
        exceptions: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        dtype = dtype or torch.get_default_dtype()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self._dtype = dtype
        parts = StoredWeight(nnz, bits, group_size, exceptions).empty(
            out_features, in_features, dtype=dtype, device=device
        )
        hold_parts_(self, _STORED, parts)
        given = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )
        self.register_parameter("bias", given)
        self.register_buffer("row_offsets", None, persistent=False)
        self.register_buffer("block_offsets", None, persistent=False)

    @classmethod
    def from_weight(cls, weight: SparseWeight, bias: torch.Tensor | None = None) -> SparseLinear:
        """Return a linear over ``weight``; no tensor is copied.

        Args:
            weight: ``(out_features, in_features)``.
            bias: ``(out_features,)`` or ``None``; a parameter stays the one it is.
        """
        made = cls(
            weight.shape[1],
            weight.shape[0],
            weight.nnz,
            bias=False,
            bits=weight.bits,
            group_size=weight.group_size,
            dtype=weight.dtype,
            device="meta",
        )
        made.set_weight(weight)
        if bias is not None:
            made.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return made

    def set_weight(self, weight: SparseWeight) -> None:
        """Take another weight of the same shape, as it is.

        Raises:
            ValueError: If its shape or its groups are another's.
        """
        expected = (self.out_features, self.in_features)
        if weight.shape != expected or weight.group_size != self.group_size:
            raise ValueError(
                f"A weight of shape {expected} with group_size {self.group_size} is needed, got "
                f"{weight.shape} with {weight.group_size}."
            )
        hold_parts_(self, _STORED, weight.tensors())
        self._dtype = weight.dtype
        self._take_offsets(weight)

    def settle(self, row_offsets: torch.Tensor | None = None) -> None:
        """Check what was loaded into the parameters, and make the offsets that follow from it.

        Args:
            row_offsets: The offsets, where the bitmask has been counted already.

        Raises:
            BitmaskError: If they do not make one weight.
        """
        if not self.weight_bitmask.is_meta and not self.weight_values.is_meta:
            self.set_weight(in_dtype(self._checked(row_offsets), self._dtype))

    @property
    def sparse_weight(self) -> SparseWeight:
        """The weight, over this module's tensors."""
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling:  # what is compiled is so anew when something that it looks at changes
            kept, counted = self._over_parameters, self._counted
            # Every product asks: attributes of modules are looked up in three places.
            parameters, buffers = self._parameters, self._buffers
            if (  # the same tensors, whatever the data of all but the bitmask is by now
                kept is not None
                and counted is not None
                and kept.bitmask is parameters.get("weight_bitmask")  # replicas have no parameters
                and kept.bitmask.data_ptr() == counted.address
                and (counted.version is None or kept.bitmask._version == counted.version)
                and kept.values is parameters["weight_values"]
                and kept.row_offsets is buffers["row_offsets"]
                and kept.scales is parameters.get("weight_scales")
                and kept.codebook is parameters.get("weight_codebook")
                and self._over_blocks is buffers["block_offsets"]
            ):
                return kept
        offsets = self.row_offsets
        if offsets is None or offsets.device != self.weight_bitmask.device:
            # Offloaded to disk: the parts are here for the length of one forward.
            weight = in_dtype(self._checked(), self._dtype)
            return replace(weight, block_offsets=sparse_linear.block_offsets_for(weight))
        return self._over(offsets) if is_compiling else self._over_counted(offsets)

    def _over_counted(self, offsets: torch.Tensor) -> SparseWeight:
        """Return the weight over this module's tensors, once its offsets are the bitmask's."""
        stays = not is_for_one_forward(self)  # else, what is here is here for one forward
        if stays and not is_counted(self._counted, self.weight_bitmask):
            # Made in inference mode, offsets could not be saved for a gradient outside of it.
            with torch.inference_mode(False), torch.no_grad():
                offsets = self._take_offsets(self._checked())
        weight = self._over(offsets)
        if weight.block_offsets is None:
            # Where parts were moved one by one; else they came with `set_weight` or `to`.
            self._index(weight)
            weight = self._over(offsets)
        if stays:
            self._over_parameters, self._over_blocks = weight, self.block_offsets
        return weight

    def _take_offsets(self, weight: SparseWeight) -> torch.Tensor:
        """Take the offsets of a weight over this module's bitmask, and return them."""
        self.row_offsets = offsets = weight.row_offsets
        self._index(weight)
        self._counted = Counted(self.weight_bitmask)
        return offsets

    def _index(self, weight: SparseWeight) -> None:
        """Take the block offsets that the weight's device needs: as bytes, which NCCL can send."""
        blocks = sparse_linear.block_offsets_for(weight)
        self.block_offsets = None if blocks is None else blocks.view(torch.uint8)

    def _over(self, offsets: torch.Tensor) -> SparseWeight:
        parts = {kind: part.contiguous() for kind, part in self.parts.items()}
        bitmask, blocks = parts["bitmask"], self.block_offsets
        if blocks is not None:
            same = blocks.device == bitmask.device
            blocks = blocks.view(block_offset_dtype(self.in_features)) if same else None
        shape = (self.out_features, self.in_features)
        coded = (parts.get("scales"), self.group_size, blocks, parts.get("codebook"))
        return SparseWeight(shape, bitmask, parts["values"], offsets, *coded)

    @property
    def weight(self) -> SparseWeightView:
        """A read-only view, decompressed where something computes with it.

        Raises:
            FrozenWeightError: If another weight is assigned.
        """
        offsets = self.row_offsets
        if offsets is None:
            offsets = torch.empty(0, dtype=torch.int32, device="meta")
        shape, parts = (self.out_features, self.in_features), self._detached()
        return SparseWeightView(
            SparseWeight(shape, row_offsets=offsets, group_size=self.group_size, **parts)
        )

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        raise FrozenWeightError("weight = ...")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter, as ``nn.Module`` does wherever one is assigned.

        Raises:
            FrozenWeightError: If it would be the weight.
        """
        if name == "weight":
            raise FrozenWeightError("weight = ...")
        super().register_parameter(name, param)

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint stores, by their kind."""
        found = {kind: getattr(self, name) for kind, name in _STORED.items()}
        return {kind: part for kind, part in found.items() if part is not None}

    def _detached(self) -> dict[str, torch.Tensor]:
        return {kind: part.detach() for kind, part in self.parts.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight as it multiplies."""
        if self.weight_codebook is not None:
            return self._dtype  # bfloat16, and before it is settled what it will be
        scales = self.weight_scales
        return self.weight_values.dtype if scales is None else scales.dtype

    @property
    def bits(self) -> int:
        """Bits per kept value: 12, 8, 4, or 16 for those in the weight's own dtype."""
        return stored_bits(self.weight_values, self.weight_codebook)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the weight: values, bitmask, scales and offsets."""
        return sum(part.nbytes for part in self.parts.values()) + self.offset_bytes

    @property
    def offset_bytes(self) -> int:
        """Bytes of the offsets, which a checkpoint does not store."""
        tensors = (getattr(self, name) for name in _OFFSETS)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ W.T + bias``: ``(..., out_features)`` of ``x`` ``(..., in_features)``.

        Raises:
            FrozenWeightError: If the weight was made to require a gradient.
        """
        weight = self.sparse_weight
        if weight.values.requires_grad:
            raise FrozenWeightError("weight_values requires a gradient")
        parameters = self._parameters  # `self.bias` itself is looked up in three places
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        return operator.linear(x, weight, bias)

    def to_dense(self) -> torch.Tensor:
        """Return the weight ``(out_features, in_features)``, decompressed."""
        return self.sparse_weight.to_dense()

    def to_linear(self) -> nn.Linear:
        """Return a plain ``nn.Linear`` with the decompressed weight and the same bias."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(self.to_dense())
        made.bias = self.bias
        return made.train(self.training)

    def reset_parameters(self) -> None:
        """Refuse: a compressed weight has no random form.

        Raises:
            FrozenWeightError: Always.
        """
        raise FrozenWeightError("reset_parameters()")

    def extra_repr(self) -> str:
        """Describe the linear, with what is kept of it."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}"
        )

    def _checked(self, row_offsets: torch.Tensor | None = None) -> SparseWeight:
        if row_offsets is None:
            row_offsets = sparse_linear.count_row_offsets(self.weight_bitmask.detach())
        return SparseWeight.from_tensors(
            self.in_features,
            group_size=self.group_size,
            row_offsets=row_offsets.to(self.weight_bitmask.device),
            **self._detached(),
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        dtype = dtype_after(fn, self.dtype)
        were_counted = is_counted(self._counted, self.weight_bitmask)
        self._over_parameters = self._counted = None
        super()._apply(keeping_integers(fn), recurse)
        self._dtype = dtype
        if self.row_offsets is not None and not self.weight_bitmask.is_meta:
            held = self._over(self.row_offsets)  # which may be uninitialised
            weight = in_dtype(held, dtype)
            if weight is not held:
                self.set_weight(weight)
            # Devices differ in what they need.
            self._index(self._over(self.row_offsets))
        self._counted = Counted(self.weight_bitmask) if were_counted else None
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load, another number of kept weights included; what does not fit changes nothing."""
        form = (self.in_features, self.group_size)
        if not can_load(self, _STORED, *form, state_dict, prefix, missing_keys, error_msgs):
            return
        make_room_(self, _STORED, state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if given_parts(_STORED, state_dict, prefix):
            self.settle()


def in_dtype(weight: SparseWeight, dtype: torch.dtype) -> SparseWeight:
    """Return the weight as it multiplies in a dtype, which codes with scales are cast to already.

    Kernels read values of 12 bits in bfloat16 and on the CPU only: elsewhere they become plain.
    """
    if weight.codebook is None or (dtype == torch.bfloat16 and weight.device.type == "cpu"):
        return weight
    plain = weight.plain()
    return replace(plain, values=plain.values.to(dtype))


def dtype_after(fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> torch.dtype:
    """Return what a weight multiplies in once its module was moved or cast.

    Args:
        fn: What `nn.Module._apply` is called with.
        dtype: What it multiplies in before.

    Raises:
        ValueError: If no sparse weight multiplies in that dtype.
    """
    after = fn(torch.empty(0, dtype=dtype)).dtype
    if after not in SCALE_DTYPES:
        raise ValueError(
            f"A sparse weight multiplies in float32, bfloat16 or float16, got {after}. Other parts "
            "of the model may be cast by now. Load it again; with "
            "sparsity_config=SparsityConfig(runtime='dense') it takes any dtype."
        )
    return after


def keeping_integers(
    fn: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``fn`` without the casts of integers: ``Module.type`` casts bitmasks and codes, too.

    Args:
        fn: What `nn.Module._apply` is called with.
    """

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        after = fn(tensor)
        if not (tensor.is_floating_point() or after.dtype == tensor.dtype):
            after = tensor.to(after.device)
        # nn.Module may make a parameter of it, which nothing can make of a FrozenParameter.
        return after.detach() if after is tensor else after

    return kept


def is_for_one_forward(module: nn.Module) -> bool:
    """Return whether the module's tensors are put in place for one forward at a time.

    That is what accelerate does where it offloads them, and ``nn.DataParallel`` with its replicas.
    """
    hook = getattr(module, "_hf_hook", None)
    is_offloaded = any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))
    return is_offloaded or getattr(module, "_is_replica", False)
