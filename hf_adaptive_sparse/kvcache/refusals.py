"""What a GPU's kernels refused to quantise, which the host learns of once per forward pass.

To wait for every layer's kernel would leave the device idle for as long as the next layer takes to
be launched.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_adaptive_sparse.errors import NonFiniteError
from hf_adaptive_sparse.kvcache.affine import refusal

_FLAGS = 512  # of a device: keys and values of more layers than models have
_APART = 4  # so that each lies at a multiple of 16 bytes, for which kernels are compiled anyway


@dataclass(slots=True)
class _Flags:
    """The flags of a device, zero but for what was refused, and whose the first of them are."""

    tensor: torch.Tensor
    asked: list[tuple[str, torch.dtype]] = field(default_factory=list)


class Refusals:
    """Flags that kernels set, one for the keys or values of a layer that are being encoded.

    The layers of a cache share one of these for as long as it is not emptied. The flags are read
    when the last layer has been updated, or before a layer encodes again; what was refused until
    then is stored, and means nothing.

    Args:
        last: Number of the last layer that quantises.
    """

    def __init__(self, last: int) -> None:
        self._last, self._latest = last, -1
        self._flags: dict[torch.device, _Flags] = {}
        self._are_unread = False
        self._refusal: str | None = None

    def begin(self, layer_idx: int) -> None:
        """Say which layer encodes from now on. If it is no later one, another pass has begun.

        Raises:
            NonFiniteError: As ``check``.
        """
        if layer_idx <= self._latest:
            self.check()
        self._latest = layer_idx

    def end(self, layer_idx: int) -> None:
        """Say which layer was updated: behind the last one, the flags of all are read.

        Raises:
            NonFiniteError: As ``check``.
        """
        if self._are_unread and layer_idx == self._last:
            self.check()

    def flag(self, states: torch.Tensor, what: str) -> torch.Tensor:
        """Return what a kernel sets to 1 if it refuses states: int32 ``(1,)``, zero.

        Args:
            states: On the device in question.
            what: What they are, for error messages.
        """
        flags = self._flags.get(states.device)
        if flags is None:
            with torch.inference_mode(False):
                zeros = torch.zeros(_FLAGS * _APART, dtype=torch.int32, device=states.device)
            flags = self._flags[states.device] = _Flags(zeros)
        elif len(flags.asked) == _FLAGS:
            self.check()
        flags.asked.append((what, states.dtype))
        self._are_unread = True
        return flags.tensor.narrow(0, _APART * (len(flags.asked) - 1), 1)

    def check(self) -> None:
        """Wait for the devices, and raise if one of their kernels ever refused what it was given.

        Raises:
            NonFiniteError: Naming the first of them. The cache can no longer be used then.
        """
        found = [refused for flags in self._flags.values() for refused in _read(flags)]
        if found and self._refusal is None:
            why = refusal(*found[0], got="others")  # of which the flag says no more
            self._refusal = f"{why} The cache can no longer be used: call its reset()."
        self._are_unread = self._refusal is not None
        if self._refusal is not None:
            raise NonFiniteError(self._refusal)


def _read(flags: _Flags) -> list[tuple[str, torch.dtype]]:
    """Return what was refused, and forget what was asked."""
    asked, flags.asked = flags.asked, []
    if not asked:
        return []
    refused = flags.tensor[: _APART * len(asked) : _APART].tolist()
    return [what for what, flag in zip(asked, refused, strict=True) if flag]
