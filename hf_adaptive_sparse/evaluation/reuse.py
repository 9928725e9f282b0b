"""Forward passes that start at the first layer that differs from an earlier pass.

A decoder layer's input is decided by the layers in front of it. Where a batch has been run through
the same front layers already, their output is still known: those layers pass their input through,
and the first one that differs is handed the hidden states kept for it. All the rest of the forward
(embeddings, masks, positions, what is added between layers, norm, head) is the model's own code on
the same numbers, so the logits are those of a plain forward bit for bit. Where that does not hold
(later layers that read an earlier one's keys and values, layers that return more than hidden
states) is found out by a comparison at the first start from each layer; from those that fail it,
and from all behind them, no forward begins.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import decoder_layers
from hf_adaptive_sparse.evaluation.forward import KVCacheChoice
from hf_adaptive_sparse.evaluation.scoring import Predictions, predict

logger = logging.getLogger(__name__)

DEFAULT_BYTES = 1 << 30
"""Bytes of hidden states kept unless told otherwise."""


class HiddenStateStore:
    """A cache of hidden states by what they follow from, which drops the least recently used.

    Attributes:
        limit_bytes: Bytes of tensors held at most.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._kept: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of tensors held."""
        return self._nbytes

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable) -> torch.Tensor:
        """Return what is kept under ``key``, which counts as used now."""
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: Hashable, hidden: torch.Tensor) -> None:
        """Keep a copy under ``key``; what could never fit is not kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        size = hidden.nbytes
        if size > self.limit_bytes:
            return
        while self._nbytes + size > self.limit_bytes:
            self._nbytes -= self._kept.popitem(last=False)[1].nbytes
        # A copy: nothing that the model does to its own tensor later may reach it.
        self._kept[key] = hidden.detach().clone(memory_format=torch.contiguous_format)
        self._nbytes += size


class ReusingModel:
    """Runs batches through a model, skipping front layers whose outcome is known.

    Args:
        model: The model.
        limit_bytes: Bytes of hidden states kept at most, beside the model; 0: nothing is reused.
            One boundary of one batch takes ``batch · seq · hidden`` elements of the model's dtype.
        boundaries: Layers in front of which hidden states are kept; ``None``: all but the first.

    Attributes:
        layers_run: Decoder layers run so far; what is run for comparison does not count.
        layers_skipped: Decoder layers passed through so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        limit_bytes: int = DEFAULT_BYTES,
        boundaries: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self._layers = list(decoder_layers(model)[1])
        chosen = range(len(self._layers)) if boundaries is None else boundaries
        self._boundaries = sorted({b for b in chosen if 0 < b < len(self._layers)})
        self.store = HiddenStateStore(limit_bytes)
        self._trusted: set[int] = set()
        self.layers_run = self.layers_skipped = 0

    def predict(
        self,
        index: int,
        batch: Mapping[str, torch.Tensor],
        kv_cache: KVCacheChoice,
        settings: Sequence[Hashable],
    ) -> Predictions | None:
        """Do what `predict` does for the batch ``index``.

        Args:
            index: Tells batches apart: the same index is always the same batch.
            batch: The batch.
            kv_cache: The KV profile.
            settings: Per decoder layer, whatever its output depends on besides its input: its
                masks and its bits.
        """
        if not self._boundaries or not self.store.limit_bytes:
            self.layers_run += len(self._layers)
            return predict(self.model, batch, kv_cache)
        keys = self._keys(index, settings)
        start = max((b for b, key in keys.items() if key in self.store), default=0)
        if start and start not in self._trusted:
            found = self._compared(batch, kv_cache, keys, start)
            start = start if start in self._trusted else 0
        else:
            found = self._run(batch, kv_cache, keys, start)
        if found is not None:
            self.layers_skipped += start
            self.layers_run += len(self._layers) - start
        return found

    def _keys(self, index: int, settings: Sequence[Hashable]) -> dict[int, Hashable]:
        keys: dict[int, Hashable] = {}
        so_far: Hashable = index
        for layer, setting in enumerate(settings):
            if layer in self._boundaries:
                keys[layer] = so_far
            # Nested pairs: the key of a boundary holds everything in front of it, exactly.
            so_far = (so_far, setting)
        return keys

    def _run(
        self,
        batch: Mapping[str, torch.Tensor],
        kv_cache: KVCacheChoice,
        keys: Mapping[int, Hashable],
        start: int,
    ) -> Predictions | None:
        hidden = self.store.get(keys[start]) if start else None
        keep = {b: key for b, key in keys.items() if b > start}
        with contextlib.ExitStack() as stack:
            if hidden is not None:
                stack.enter_context(starting_at(self._layers, start, hidden))
            for boundary, key in keep.items():
                keeping = functools.partial(self.store.put, key)
                stack.enter_context(_watching(self._layers[boundary], keeping))
            return predict(self.model, batch, kv_cache)

    def _compared(
        self,
        batch: Mapping[str, torch.Tensor],
        kv_cache: KVCacheChoice,
        keys: Mapping[int, Hashable],
        start: int,
    ) -> Predictions | None:
        """Do a plain forward, and trust one from ``start`` if it equals that, bit for bit."""
        plain = predict(self.model, batch, kv_cache)
        if plain is None:
            return None
        try:
            reused = self._run(batch, kv_cache, keys, start)
            difference = "the logits differ"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            reused, difference = None, f"{type(error).__name__}: {error}"
        if reused is not None and torch.equal(plain.logits, reused.logits):
            self._trusted.add(start)
            return plain
        logger.info("No forward of this model can begin at layer %d: %s.", start, difference)
        self._boundaries = [b for b in self._boundaries if b < start]
        return plain


@contextlib.contextmanager
def starting_at(layers: Sequence[nn.Module], start: int, hidden: torch.Tensor) -> Iterator[None]:
    """Let the layers before ``start`` pass their input through, and hand ``hidden`` to that layer.

    Args:
        layers: The decoder layers.
        start: The first layer that runs.
        hidden: Its hidden states ``(batch, seq, hidden)``, in the model's dtype.
    """
    own = [vars(layer).get("forward") for layer in layers[:start]]

    def passed(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    def replaced(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # A copy: a model may add to its hidden states in place.
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": hidden.clone()}
        return (hidden.clone(), *args[1:]), kwargs

    handle = layers[start].register_forward_pre_hook(replaced, with_kwargs=True, prepend=True)
    try:
        for layer in layers[:start]:
            vars(layer)["forward"] = passed
        yield
    finally:
        handle.remove()
        for layer, former in zip(layers[:start], own, strict=True):
            vars(layer).pop("forward", None)
            if former is not None:  # accelerate's hooks wrap forward on the instance
                vars(layer)["forward"] = former


@contextlib.contextmanager
def _watching(layer: nn.Module, seen: Callable[[torch.Tensor], None]) -> Iterator[None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    handle = layer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
