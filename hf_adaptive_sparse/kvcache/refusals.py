"""What a GPU's kernels refused to quantise, which the host learns of once per forward pass.

To wait for every layer's kernel would leave the device idle for as long as the next layer takes to
be launched.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_adaptive_sparse.kvcache.rounding import NonFiniteError, metadata_dtype

_FLAGS = 512  # of a device: keys and values of more layers than models have


@dataclass(slots=True)
class _Flags:
    """The flags of a device, zero but for what was refused, and whose the first of them are."""

    tensor: torch.Tensor
    asked: list[tuple[str, torch.dtype]] = field(default_factory=list)


class Refusals:
    """Flags that kernels set, one for the keys or values of a layer that are being encoded.

    The layers of a cache share one of these. The flags are read when the last layer has been
    updated, or before a layer encodes again; what was refused until then is stored, and means
    nothing.
    """

    def __init__(self) -> None:
        self._flags: dict[torch.device, _Flags] = {}
        self._latest = -1
        self.are_unread = False

    def __reduce__(self) -> tuple[type[Refusals], tuple[()]]:
        """Read the flags, and leave them out of copies."""
        self.check()
        return type(self), ()

    def begin(self, layer_idx: int) -> None:
        """Say which layer encodes from now on. If it is no later one, another pass has begun.

        Raises:
            NonFiniteError: As ``check``.
        """
        if layer_idx <= self._latest:
            self.check()
        self._latest = layer_idx

    def flag(self, states: torch.Tensor, what: str) -> torch.Tensor:
        """Return what a kernel sets to 1 if it refuses states: int32 ``(1,)``, zero.

        Args:
            states: On the device in question.
            what: What they are, for error messages.
        """
        flags = self._flags.get(states.device)
        if flags is None:
            with torch.inference_mode(False):
                zeros = torch.zeros(_FLAGS, dtype=torch.int32, device=states.device)
            flags = self._flags[states.device] = _Flags(zeros)
        elif len(flags.asked) == _FLAGS:
            self.check()
        flags.asked.append((what, states.dtype))
        self.are_unread = True
        return flags.tensor.narrow(0, len(flags.asked) - 1, 1)

    def check(self) -> None:
        """Wait for the devices, and raise if one of their kernels refused what it was given.

        Raises:
            NonFiniteError: Naming the first of it. The cache is of no use any more then.
        """
        self.are_unread = False
        found = [refused for flags in self._flags.values() for refused in _read(flags)]
        if found:
            what, dtype = found[0]
            kind = metadata_dtype(dtype)
            raise NonFiniteError(
                f"The {what} must be finite to be quantised, and span no more than "
                f"{torch.finfo(kind).max:.6g}, which {str(kind).removeprefix('torch.')} can hold; "
                "the model produced others (float16 overflow is a common cause: try bfloat16). At "
                "16 bits they are kept as is. The cache is of no use any more: call its reset()."
            )


def _read(flags: _Flags) -> list[tuple[str, torch.dtype]]:
    """Return what was refused, and forget all that was asked."""
    asked, flags.asked = flags.asked, []
    refused = flags.tensor[: len(asked)].tolist() if asked else []
    if any(refused):
        with torch.inference_mode(False):
            flags.tensor = torch.zeros_like(flags.tensor)
    return [what for what, flag in zip(asked, refused, strict=True) if flag]
