"""Whether a bitmask is still the one that row offsets were counted from.

Offsets follow from a bitmask and lie beside it, where nothing tells them that another has taken its
place: ``functional_call`` and an assignment put another tensor there, ``.data = ...`` other memory,
and ``copy_`` other bits. What is written through ``.data`` or NumPy leaves no trace; kernels on the
CPU notice that while they multiply.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from hf_adaptive_sparse.runtime.parameters import FrozenParameter

_PLAIN = (FrozenParameter, nn.Parameter, torch.Tensor)


class Counted:
    """The bitmask that offsets were counted from, and what it was then. Copies of it are ``None``.

    Args:
        bitmask: The tensor. It is not kept in memory.
    """

    __slots__ = ("_bitmask", "address", "version")

    def __init__(self, bitmask: torch.Tensor) -> None:
        self._bitmask = weakref.ref(bitmask)
        self.address = bitmask.data_ptr() if type(bitmask) in _PLAIN else 0
        # Tensors made in inference mode do not count what is written to them.
        self.version = None if bitmask.is_inference() else bitmask._version

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def is_as_it_was(self, bitmask: torch.Tensor) -> bool:
        """Return whether that tensor has still the same memory and bits."""
        return bitmask.data_ptr() == self.address and (
            self.version is None or bitmask._version == self.version
        )


def is_counted(counted: Counted | None, bitmask: torch.Tensor) -> bool:
    """Return whether offsets are those of a tensor, whichever it is.

    A tensor that is not just its numbers (traced, batched) cannot be asked, and is believed.

    Args:
        counted: What the offsets were counted from; ``None`` if that is not known.
        bitmask: The tensor.
    """
    if type(bitmask) not in _PLAIN or torch._C._functorch.is_functorch_wrapped_tensor(bitmask):
        return True
    return counted is not None and counted._bitmask() is bitmask and counted.is_as_it_was(bitmask)
