"""What ``SparseLinear.weight`` returns: it looks like the dense weight, and holds no values.

Code around a linear asks its weight for dtype, device and shape (PEFT places its adapters by
them), and now and then computes with it. The first costs nothing here; the second decompresses,
for the moment of that operation. Writing is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from hf_adaptive_sparse.errors import AdaptiveSparseError
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight

_SAME = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class FrozenWeightError(AdaptiveSparseError, RuntimeError):
    """Something tried to train or to change a weight that is compressed in memory."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: this weight is kept compressed in memory (sparse runtime), where it can only "
            "be read. Load the model with sparsity_config=SparsityConfig(runtime='dense') to train "
            "or change its weights or merge an adapter into them; an adapter on top of it (PEFT "
            "LoRA) can be trained as it is."
        )


class SparseWeightView(torch.Tensor):
    """A read-only tensor ``(out_features, in_features)`` over a `SparseWeight`."""

    _sparse: SparseWeight

    _is_hf_initialized = True
    """What transformers asks before it fills a weight with random numbers."""

    @staticmethod
    def __new__(cls, weight: SparseWeight) -> SparseWeightView:
        """Wrap a weight; nothing is decompressed."""
        view: SparseWeightView = torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device
        )
        view._sparse = weight
        return view

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = tuple(self.shape)
        return f"SparseWeightView(shape={shape}, dtype={self.dtype}, device={self.device})"

    def requires_grad_(self, requires_grad: bool = True) -> SparseWeightView:
        """Refuse a gradient.

        Raises:
            FrozenWeightError: If one is asked for.
        """
        if requires_grad:
            raise FrozenWeightError("requires_grad_()")
        return self

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is wanted: never."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    @property
    def data(self) -> torch.Tensor:
        """The same view; what is assigned here would be lost with it, so that is refused.

        Raises:
            FrozenWeightError: If other values are assigned.
        """
        same: torch.Tensor = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return same

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise FrozenWeightError("weight.data = ...")

    # Every operation goes to __torch_dispatch__ as it is.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation on the decompressed weight."""
        if func in _SAME:
            return cls(args[0]._sparse)
        if func._schema.is_mutable:
            raise FrozenWeightError(f"{func.name()} would write to the weight")
        dense: Callable[[SparseWeightView], torch.Tensor] = lambda view: view._sparse.to_dense()  # noqa: E731
        given = tree_map_only(cls, dense, (args, dict(kwargs or {})))
        return func(*given[0], **given[1])
