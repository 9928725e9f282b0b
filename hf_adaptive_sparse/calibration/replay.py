"""Runs the decoder one layer at a time over all calibration batches.

One forward per batch through the model as it stands records what each layer is called with; after
that, layers are run alone, each on the output of the one before it, so that a layer can be pruned
before the next one sees anything. What is held besides the model: one set of hidden states, and the
other arguments of the layers (masks, rotary embeddings), which layers and batches mostly share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from hf_adaptive_sparse.architecture import decoder_layers
from hf_adaptive_sparse.calibration.forward import evaluation_mode, execution_device, run_decoder
from hf_adaptive_sparse.calibration.stand_in import standing_in

_POOL_DEPTH = 8
"""How many tensors of one shape are compared with a new one before it is kept as well."""


@dataclass
class _Change:
    """What the model adds to some tokens between two layers (deep visual features)."""

    places: torch.Tensor  # (changed, dims - 1), int64
    difference: torch.Tensor  # (changed, hidden), float64: exact for the dtypes of models

    @classmethod
    def between(cls, previous: torch.Tensor, hidden: torch.Tensor) -> _Change | None:
        """Return what turned one into the other, ``None`` where they are equal."""
        previous = previous.to(hidden.device)
        if torch.equal(previous, hidden):
            return None
        places = (previous != hidden).any(dim=-1).nonzero()
        index = tuple(places.unbind(1))
        difference = hidden[index].double() - previous[index].double()
        return cls(places.cpu(), difference.cpu())

    def applied(self, hidden: torch.Tensor) -> torch.Tensor:
        index = tuple(self.places.to(hidden.device).unbind(1))
        changed = hidden.clone()
        rows = hidden[index].double() + self.difference.to(hidden.device)
        changed[index] = rows.to(hidden.dtype)
        return changed


@dataclass
class _Call:
    """The arguments of one layer for one batch, without the hidden states.

    Attributes:
        args: By position.
        kwargs: By name.
        keyword: Whether the hidden states are passed by name.
        carried: Position or name of an argument -> place in the output of the layer before, where
            it comes from there (T5's position bias, the router's states of ZAYA).
        change: What the model adds to the hidden states before the layer.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: bool
    carried: dict[int | str, int] = field(default_factory=dict)
    change: _Change | None = None

    def carry(self, output: Any, kept: Callable[[Any], Any]) -> None:
        """Take over what the layer before returned."""
        args = list(self.args)
        for key, place in self.carried.items():
            if isinstance(key, int):
                args[key] = kept(output[place])
            else:
                self.kwargs[key] = kept(output[place])
        self.args = tuple(args)


@dataclass
class _Record:
    """What the forward of one batch showed."""

    calls: list[_Call | None]
    first_input: torch.Tensor | None = None
    previous: torch.Tensor | None = field(default=None, repr=False)
    output: Any = field(default=None, repr=False)


class DecoderReplay:
    """The decoder of a model, run layer by layer over all batches.

    Attributes:
        hidden_states: Per batch, the hidden states ``(batch, seq, hidden)`` that the next layer
            takes, in CPU memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Mapping[str, torch.Tensor]],
        on_batch: Callable[[int], None] | None = None,
        *,
        stand_ins: bool = False,
    ) -> None:
        """Run every batch once and record what the layers are called with.

        Args:
            model: The model; it is put into evaluation mode while it runs.
            batches: Inputs of its forward.
            on_batch: Called with the index of a batch before it is run.
            stand_ins: Let stand-ins run in place of the layers, of which only the first is in
                memory (`standing_in`).

        Raises:
            ValueError: If there are no batches, or a layer runs more than once per forward.
            DataError: As for `run_decoder`.
        """
        if not batches:
            raise ValueError("Calibration needs at least one batch, got none.")
        self._name, self._layers = decoder_layers(model)
        self._pool: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        self._calls: list[list[_Call | None]] = []
        self.hidden_states: list[torch.Tensor] = []
        with standing_in(self._layers) if stand_ins else nullcontext():
            for index, batch in enumerate(batches):
                if on_batch is not None:
                    on_batch(index)
                record = self._record(model, batch)
                if record.first_input is None:
                    raise ValueError(
                        f"The forward of batch {index} ran no decoder layer of {self._name!r}."
                    )
                self._calls.append(record.calls)
                self.hidden_states.append(record.first_input)

    def _record(self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> _Record:
        record = _Record([None] * len(self._layers))

        def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keyword = "hidden_states" in kwargs
            hidden = kwargs["hidden_states"] if keyword else args[0]
            if record.calls[index] is not None:
                raise ValueError(
                    f"Decoder layer {index} of {self._name!r} runs more than once per forward; "
                    "layer-by-layer calibration needs each to run once. Use a data-free metric."
                )
            named = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            rest = args if keyword else args[1:]
            call = record.calls[index] = _Call(
                tuple(map(self._kept, rest)),
                {k: self._kept(v) for k, v in named.items()},
                keyword,
                _carried([*enumerate(rest), *named.items()], record.output),
            )
            if record.first_input is None:
                record.first_input = hidden.detach().to("cpu", copy=True)
            elif record.previous is not None:
                call.change = _Change.between(record.previous, hidden)

        def after(output: Any) -> None:
            # A copy: some models add to the hidden states in place between layers.
            record.previous = _hidden(output).detach().clone()
            record.output = output

        with _layer_hooks(self._layers, before, after), evaluation_mode(model):
            run_decoder(model, batch, stop_after=self._layers)
        record.previous = record.output = None
        return record

    def _kept(self, value: Any) -> Any:
        """Return ``value`` with tensors replaced by equal ones that are held already."""
        if isinstance(value, torch.Tensor):
            pool = self._pool.setdefault((value.shape, value.dtype, value.device), [])
            for known in pool:
                if known is value or torch.equal(known, value):
                    return known
            if len(pool) < _POOL_DEPTH:
                pool.append(value)
            return value
        if type(value) in (tuple, list):
            return type(value)(self._kept(v) for v in value)
        # A cache that is filled would make a second run of the layer see its own past.
        return None if isinstance(value, Cache) else value

    def run_layer(
        self, index: int, *, advance: bool, on_batch: Callable[[int], None] | None = None
    ) -> None:
        """Run one layer, as it is now, over all batches.

        Args:
            index: The layer; layers are to be advanced in order.
            advance: Replace the hidden states by the layer's output.
            on_batch: Called with the index of a batch before it is run.
        """
        layer = self._layers[index]
        device = execution_device(layer)
        with torch.no_grad(), evaluation_mode(layer):
            for batch, calls in enumerate(self._calls):
                call = calls[index]
                if call is None:  # this batch passes the layer by (cross-attention, no image)
                    continue
                if on_batch is not None:
                    on_batch(batch)
                hidden = self.hidden_states[batch].to(device)
                if call.change is not None:
                    hidden = call.change.applied(hidden)
                if call.keyword:
                    output = layer(*call.args, hidden_states=hidden, **call.kwargs)
                else:
                    output = layer(hidden, *call.args, **call.kwargs)
                if advance:
                    self.hidden_states[batch] = _hidden(output).cpu()
                    following = next((c for c in calls[index + 1 :] if c is not None), None)
                    if following is not None:
                        following.carry(output, self._kept)
        if advance:
            for calls in self._calls:
                calls[index] = None


def _carried(arguments: Sequence[tuple[int | str, Any]], output: Any) -> dict[int | str, int]:
    """Return which arguments are tensors that the layer before returned, and their places there."""
    if not isinstance(output, tuple | list):
        return {}
    places = {id(v): p for p, v in enumerate(output) if p and isinstance(v, torch.Tensor)}
    return {key: places[id(value)] for key, value in arguments if id(value) in places}


def _hidden(output: Any) -> torch.Tensor:
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, torch.Tensor):
        raise ValueError(
            "A decoder layer must return its hidden states as a tensor, alone or first of a "
            f"tuple; got {type(output).__name__}."
        )
    return hidden


@contextmanager
def _layer_hooks(
    layers: nn.ModuleList,
    before: Callable[[int, tuple[Any, ...], dict[str, Any]], None],
    after: Callable[[Any], None],
) -> Iterator[None]:
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def pre_hook(index: int) -> Callable[..., None]:
        return lambda module, args, kwargs: before(index, args, kwargs)

    try:
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(pre_hook(index), with_kwargs=True))
            handles.append(layer.register_forward_hook(lambda module, args, out: after(out)))
        yield
    finally:
        for handle in handles:
            handle.remove()
