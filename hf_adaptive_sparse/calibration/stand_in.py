"""Stand-ins for decoder layers: a forward that needs no layer's weights but the first's.

What a layer is called with besides its hidden states (masks, rotary embeddings) does not depend on
the weights of the layers before it, but for what these return besides theirs. So a forward with
stand-ins shows all of it, while the layers themselves may still lie on disk. What a layer would
return besides its hidden states is stood in for by empty tensors, which show where it is passed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class _Form:
    """The form of a layer's output: hidden states alone, or first of a tuple of some length."""

    def __init__(self) -> None:
        self.known = False
        self._others: tuple[torch.Tensor | None, ...] | None = None

    def learn(self, output: Any) -> None:
        self.known = True
        if isinstance(output, tuple | list):
            self._others = tuple(
                other.new_empty(0) if isinstance(other, torch.Tensor) else None
                for other in output[1:]
            )

    def of(self, hidden: torch.Tensor) -> Any:
        if self._others is None:
            return hidden
        return hidden, *(None if other is None else other.clone() for other in self._others)


@contextmanager
def standing_in(layers: nn.ModuleList) -> Iterator[None]:
    """Let all layers pass their hidden states on unchanged while the context is open.

    Only the first call of the first layer that runs is a real one, to see the form of its output:
    its weights must be in memory then.
    """
    form = _Form()
    own = {layer: layer.__dict__.get("forward") for layer in layers}

    def stand_in(real: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not form.known:
                form.learn(real(*args, **kwargs))
            return form.of(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        return forward

    try:
        for layer in layers:
            layer.forward = stand_in(layer.forward)
        yield
    finally:
        for layer, before in own.items():
            layer.__dict__.pop("forward", None)
            if before is not None:  # accelerate places its own on the instance, too
                layer.forward = before
