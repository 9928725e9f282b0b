"""Stacks of experts that stay compressed in memory; each matrix multiplies as it is stored.

A module of experts asks for ``self.gate_up_proj[expert]`` and hands that to ``linear``. A
`SparseStack` stands in the place of the 3-D parameter: indexing it gives a view of one expert's
compressed matrix, and ``linear`` with such a view goes to the kernels of sparse weights, which read
where the expert's rows lie. So a token reads the experts that it is sent to, compressed, and no
others.

The module keeps its class and its forward. Its parameters are then the tensors that a checkpoint
stores (`packing.stored_names`), so that saving needs nothing of its own. Loading a state dict and
casting do: what follows from the tensors is made anew.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from hf_adaptive_sparse.experts import PARAMETERS, ExpertStack, expert_stacks
from hf_adaptive_sparse.kernels import sparse_linear
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight, stored_bits
from hf_adaptive_sparse.packing.stored_names import BY_ROW, KINDS, leaf_names, tensor_name
from hf_adaptive_sparse.runtime import operator
from hf_adaptive_sparse.runtime.counted import Counted, is_counted
from hf_adaptive_sparse.runtime.parameters import can_load, given_parts, hold_parts_, make_room_
from hf_adaptive_sparse.runtime.sparse_linear import in_dtype, is_for_one_forward
from hf_adaptive_sparse.runtime.weight_view import FrozenWeightError, SparseWeightView

EAGER = "eager"
"""transformers' experts implementation that takes one expert after the other."""

HELD = "_sparse_stacks"
"""Where a module of experts lists its compressed stacks, by the parameter's name."""

_ONE_BY_ONE = (
    "These experts are kept compressed in memory (sparse runtime), and give one matrix at a time: "
    "leave the model's experts implementation 'eager', or load it with "
    "sparsity_config=SparsityConfig(runtime='dense')."
)


class ExpertView(SparseWeightView):
    """One expert's matrix ``(out, in)``, compressed; ``linear`` multiplies with it as it is."""

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Send ``linear`` to the kernels of sparse weights; all else decompresses this matrix."""
        given = dict(kwargs or {})
        if func is functional.linear:
            x, weight, bias = _linear_arguments(*args, **given)
            if isinstance(weight, cls) and not isinstance(x, cls):
                return operator.linear(x, weight._sparse, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **given)


def _linear_arguments(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return input, weight, bias


class SparseStack:
    """What stands in a module of experts for a parameter ``(experts, out, in)``.

    The module holds, under the names that a checkpoint has, the kept values, the bitmask
    ``(experts, out, ceil(in / 8))`` and, with codes, the scales ``(experts, out, groups)``, or with
    values of 12 bits their codebook.

    Args:
        owner: The module.
        key: Name of the parameter that this stands for.
        shape: Of the parameter.
        group_size: Columns per scale, of codes; ``None``: one per row.
        dtype: Of the parameter.

    Attributes:
        implementation: How transformers ran the model's experts before, if this stack changed that.
    """

    _is_hf_initialized = True
    """What transformers asks before it fills a weight with random numbers."""

    def __init__(
        self,
        owner: nn.Module,
        key: str,
        shape: tuple[int, int, int],
        group_size: int | None,
        dtype: torch.dtype,
    ) -> None:
        self.owner, self.key, self.shape = owner, key, torch.Size(shape)
        self.group_size, self._dtype = group_size, dtype
        self.implementation: str | None = None
        # Every product with an expert asks for the tensors.
        self._names = {kind: tensor_name(key, kind) for kind in KINDS}
        self._state: object = None
        self._counted: Counted | None = None
        self._weight: SparseWeight | None = None
        self._views: dict[int, ExpertView] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave views out of copies: they are of the original's tensors."""
        return self.__dict__ | {"_state": None, "_counted": None, "_weight": None, "_views": {}}

    def __repr__(self) -> str:
        return f"SparseStack(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __len__(self) -> int:
        return self.shape[0]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __getitem__(self, expert: Any) -> ExpertView:
        """Return one expert's matrix.

        Args:
            expert: Its number, or a tensor that holds one.

        Raises:
            TypeError: If more is asked for than one expert.
        """
        if isinstance(expert, slice | tuple) or (
            isinstance(expert, torch.Tensor) and expert.numel() != 1
        ):
            raise TypeError(f"More than one expert was asked for. {_ONE_BY_ONE}")
        number = range(len(self))[int(expert)]
        weight, rows = self.weight, self.shape[1]
        view = self._views.get(number)
        if view is None:
            view = ExpertView(weight.part(number * rows, (number + 1) * rows))
            if self._weight is weight:  # else its tensors are here for one forward
                self._views[number] = view
        return view

    def __getattr__(self, name: str) -> Any:
        """Refuse what a tensor would have, and what copies ask for."""
        raise AttributeError(f"There is no {name!r}. {_ONE_BY_ONE}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse other values, which would be lost: nothing computes with a tensor put here."""
        if name == "data":
            raise FrozenWeightError(f"{self.key}.data = ...")
        super().__setattr__(name, value)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights as they multiply."""
        if self._part("codebook") is not None:
            return self._dtype
        scales = self._part("scales")
        return self._held("values").dtype if scales is None else scales.dtype

    @property
    def bits(self) -> int:
        """Bits per kept value: 12, 8, 4, or 16 for those in the weights' own dtype."""
        return stored_bits(self._held("values"), self._part("codebook"))

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._held("bitmask").device

    @property
    def weight(self) -> SparseWeight:
        """The matrices of all experts as one, ``(experts * out, in)``; no tensor is copied."""
        parts = [self._part(kind) for kind in KINDS]
        state: list[object] = [None if p is None else (p.data_ptr(), p.dtype) for p in parts]
        state.append(id(self.row_offsets))
        stays = not is_for_one_forward(self.owner)  # else, what is here is here for one forward
        counted = self.is_counted
        if stays and counted and self._weight is not None and self._state == state:
            return self._weight
        self._weight, self._views = None, {}
        if stays and not counted:
            # Made in inference mode, offsets could not be saved for a gradient outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._take_offsets(self._checked())
            state[-1] = id(self.row_offsets)
        weight = in_dtype(self._over(self.row_offsets), self._dtype)
        weight = replace(weight, block_offsets=sparse_linear.block_offsets_for(weight))
        if stays and all(part is None or part.is_contiguous() for part in parts):
            self._state, self._weight = state, weight
        return weight

    @property
    def row_offsets(self) -> torch.Tensor | None:
        """Values before each row of all experts: ``(experts * out + 1,)``."""
        return cast("torch.Tensor | None", getattr(self.owner, offsets_name(self.key)))

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint stores, by their kind."""
        found = {kind: self._part(kind) for kind in KINDS}
        return {kind: part for kind, part in found.items() if part is not None}

    @property
    def memory_bytes(self) -> int:
        """Bytes of values, bitmask, scales and offsets."""
        return sum(part.nbytes for part in self.parts.values()) + self.offset_bytes

    @property
    def offset_bytes(self) -> int:
        """Bytes of the offsets, which a checkpoint does not store."""
        offsets = self.row_offsets
        blocks = None if self._weight is None else self._weight.block_offsets
        return sum(tensor.nbytes for tensor in (offsets, blocks) if tensor is not None)

    def settle(self, row_offsets: torch.Tensor | None = None) -> None:
        """Check what was loaded, and keep the offsets that follow from it.

        Args:
            row_offsets: The offsets, where the bitmask has been counted already.

        Raises:
            BitmaskError: If the tensors do not make the experts' weights.
        """
        if any(part.is_meta for part in self.parts.values()):
            return
        weight = self._checked(row_offsets)
        self._hold(in_dtype(weight, self._dtype))
        self._take_offsets(weight)

    @property
    def is_counted(self) -> bool:
        """Whether the row offsets are those of the bitmask that is here."""
        return is_counted(self._counted, self._held("bitmask"))

    def follow(self, dtype: torch.dtype, were_counted: bool) -> None:
        """Make values of 12 bits plain where the module was cast or moved to needs that.

        Args:
            dtype: Of the weights as they multiply.
            were_counted: Whether the row offsets were those of the bitmask before.
        """
        self._dtype, self._weight, self._views = dtype, None, {}
        has_codebook = self._part("codebook") is not None
        if has_codebook and self.row_offsets is not None and not self._held("bitmask").is_meta:
            self._hold(in_dtype(self._over(self.row_offsets), dtype))
        self._counted = Counted(self._held("bitmask")) if were_counted else None

    def to_dense(self) -> torch.Tensor:
        """Return the parameter ``(experts, out, in)``, decompressed."""
        return self.weight.to_dense().view(self.shape)

    def is_in(self, state_dict: Mapping[str, torch.Tensor], prefix: str) -> bool:
        """Return whether a state dict has one of the tensors."""
        return bool(given_parts(self._names, state_dict, prefix))

    def can_load(
        self,
        state_dict: Mapping[str, torch.Tensor],
        prefix: str,
        missing_keys: list[str],
        error_msgs: list[str],
    ) -> bool:
        """Return whether what a state dict has can be loaded; see `parameters.can_load`."""
        form, took = (self.shape[2], self.group_size), (missing_keys, error_msgs)
        return can_load(self.owner, self._names, *form, state_dict, prefix, *took)

    def make_room(self, state_dict: Mapping[str, torch.Tensor], prefix: str) -> None:
        """Resize the tensors to those of a state dict."""
        make_room_(self.owner, self._names, state_dict, prefix)

    def _rows(self) -> dict[str, torch.Tensor]:
        """Return the parts as those of one matrix, contiguous, by kind."""
        parts = {kind: part.detach().contiguous() for kind, part in self.parts.items()}
        return {kind: p.flatten(0, 1) if kind in BY_ROW else p for kind, p in parts.items()}

    def _checked(self, row_offsets: torch.Tensor | None = None) -> SparseWeight:
        rows = self._rows()
        if row_offsets is None:
            row_offsets = sparse_linear.count_row_offsets(rows["bitmask"])
        offsets = row_offsets.to(rows["bitmask"].device)
        columns, size = self.shape[2], self.group_size
        return SparseWeight.from_tensors(columns, group_size=size, row_offsets=offsets, **rows)

    def _over(self, offsets: torch.Tensor | None) -> SparseWeight:
        if offsets is None or offsets.device != self.device:  # offloaded to disk
            return self._checked()
        shape = (self.shape[0] * self.shape[1], self.shape[2])
        return SparseWeight(shape, row_offsets=offsets, group_size=self.group_size, **self._rows())

    def _take_offsets(self, weight: SparseWeight) -> None:
        """Take the offsets of a weight over the module's bitmask."""
        setattr(self.owner, offsets_name(self.key), weight.row_offsets)
        self._counted = Counted(self._held("bitmask"))

    def _hold(self, weight: SparseWeight) -> None:
        hold_parts_(self.owner, self._names, by_expert(weight, self.shape[0]))
        self._weight, self._views = None, {}

    def _part(self, kind: str) -> torch.Tensor | None:
        return cast("torch.Tensor | None", getattr(self.owner, self._names[kind]))

    def _held(self, kind: str) -> torch.Tensor:
        part = self._part(kind)
        assert part is not None
        return part


def sparse_stacks(model: nn.Module) -> dict[str, SparseStack]:
    """Return the stacks of experts that are compressed in memory, by the parameter's name."""
    return {
        f"{name}.{held.key}" if name else held.key: held
        for name, module in model.named_modules()
        for held in stacks_of(module)
    }


def compressible_stacks(model: nn.Module, names: Collection[str]) -> dict[str, ExpertStack]:
    """Return the stacks among some parameters that the sparse runtime can keep compressed.

    Those of modules whose eager forward multiplies with one ``(out, in)`` matrix after the other.
    It is all of them or none: one conversion reads the tensors of all stacks of a name.

    Args:
        model: The model, possibly on the meta device.
        names: Names of the parameters.
    """
    found = {}
    for name, module in model.named_modules():
        for stack in expert_stacks(module):
            key = f"{name}.{stack.key}" if name else stack.key
            if key in names:
                found[key] = stack
    fits = found.keys() == set(names) and all(_fits(stack) for stack in found.values())
    return found if fits else {}


def _fits(stack: ExpertStack) -> bool:
    experts, module = stack.experts, stack.experts.module
    # What transformers' `use_experts_implementation` leaves on a class and its modules.
    chosen = hasattr(type(module).forward, "__wrapped__") and hasattr(module, "config")
    return experts.routed and not experts.transposed and chosen


def by_expert(weight: SparseWeight, count: int) -> dict[str, torch.Tensor]:
    """Return what a checkpoint stores of so many experts' matrices, by kind."""
    return {
        kind: part.unflatten(0, (count, -1)) if kind in BY_ROW else part
        for kind, part in weight.tensors().items()
    }


def stacks_of(module: nn.Module) -> list[SparseStack]:
    """Return the stacks that one module holds compressed."""
    held: dict[str, SparseStack] = module.__dict__.get(HELD, {})
    return [held[key] for key in PARAMETERS if key in held]


def offsets_name(key: str) -> str:
    """Return the name of the buffer with a parameter's row offsets."""
    return leaf_names(key)[0].removesuffix("values") + "row_offsets"
