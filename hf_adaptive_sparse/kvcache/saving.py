"""A cache as plain tensors and numbers, and back: for files, not for copies.

A cache may be pickled and deep-copied like any object. The form made here holds nothing but
tensors, numbers, text, None and lists and dicts of them, so that ``torch.load`` reads it with
``weights_only=True``; packed blocks are written packed, without the slack of their buffers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from hf_adaptive_sparse.kvcache.coding import empty_parts
from hf_adaptive_sparse.kvcache.layer import AdaptiveQuantizedLayer
from hf_adaptive_sparse.kvcache.store import TokenStore

_PLAIN = (torch.Tensor, int, float, bool, str, torch.dtype, type(None))


def layer_state(layer: Any) -> dict[str, Any]:
    """Return what a layer holds.

    Args:
        layer: One of ours, or one of transformers' dynamic layers.

    Raises:
        TypeError: If a layer of transformers holds something that is not plain.
    """
    if not isinstance(layer, AdaptiveQuantizedLayer):
        return {name: _plain(value, name) for name, value in vars(layer).items()}
    return {
        "cumulative_length": layer.cumulative_length,
        "record_past": layer.record_past,
        "stores": [_store_state(store) for store in layer.stores()],
    }


def restored_layer(layer: Any, state: Mapping[str, Any]) -> Any:
    """Return a layer like ``layer`` that holds what ``layer_state`` returned, in copies.

    Raises:
        KeyError: If a part of it is missing.
        ValueError: If it does not fit the layer.
    """
    if not isinstance(layer, AdaptiveQuantizedLayer):
        made = copy.copy(layer)
        for name, value in state.items():
            own = _plain(value, name)
            setattr(made, name, torch.device(own) if name == "device" and own else own)
        return made
    made = object.__new__(type(layer))  # no copy, which would be refused where contents are
    made.__dict__.update(layer.__dict__)
    made.is_initialized = False  # so that nothing is zeroed of what it shares with the layer
    made.reset()
    made.record_past = bool(state["record_past"])
    if state["stores"]:
        keys, values = state["stores"]
        made.lazy_initialization(keys["raw"], values["raw"])
        for store, stored in zip(made.stores(), (keys, values), strict=True):
            _restore_store(store, stored, made.layer_idx)
        _check_pair(made.stores(), made.layer_idx)
        made.set_length(int(state["cumulative_length"]))
    return made


def _store_state(store: TokenStore) -> dict[str, Any]:
    return {
        "raw": store.raw.clone(),
        "sinks": store.sinks,
        "lengths": list(store.lengths),
        "parts": [part.clone(memory_format=torch.contiguous_format) for part in store.parts],
    }


def _restore_store(store: TokenStore, state: Mapping[str, Any], layer_idx: int) -> None:
    lengths, raw = tuple(state["lengths"]), state["raw"]
    if lengths:
        if store.codec is None:
            raise ValueError(f"Layer {layer_idx} keeps 16 bits, the saved one has packed blocks.")
        blocks = raw.new_empty((*raw.shape[:2], 0, store.block_length, raw.shape[-1]))
        expected = empty_parts(store.codec, blocks)
        found = [(tuple(part.shape[:2]), part.dtype, part.shape[3:]) for part in state["parts"]]
        wanted = [(tuple(part.shape[:2]), part.dtype, part.shape[3:]) for part in expected]
        if found != wanted:
            raise ValueError(
                f"The saved blocks of layer {layer_idx} do not fit its codec: expected "
                f"{wanted}, got {found}. A cache is loaded into one of the same profile."
            )
    _check_lengths(state, store.block_length, layer_idx)
    store.restore(state["parts"], lengths, raw, int(state["sinks"]))


def _check_lengths(state: Mapping[str, Any], block_length: int, layer_idx: int) -> None:
    """Refuse blocks and tokens that the tensors do not hold: kernels believe these numbers."""
    lengths, sinks, raw = state["lengths"], state["sinks"], state["raw"]
    blocks = {part.shape[2] for part in state["parts"]}
    if blocks - {len(lengths)} or any(not 1 <= length <= block_length for length in lengths):
        raise ValueError(
            f"The saved blocks of layer {layer_idx} must hold 1 to {block_length} tokens each, got "
            f"lengths {list(lengths)[:8]} for {sorted(blocks)} blocks; the file is damaged."
        )
    if not 0 <= sinks <= raw.shape[2]:
        raise ValueError(
            f"The saved layer {layer_idx} must have 0 to {raw.shape[2]} sinks, got {sinks}; the "
            "file is damaged."
        )


def _check_pair(stores: tuple[TokenStore, ...], layer_idx: int) -> None:
    """Refuse keys and values that are not of the same sequences: kernels believe the keys."""
    sizes = [(store.batch_size, store.kv_heads) for store in stores]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The saved keys and values of layer {layer_idx} must have as many sequences and "
            f"heads, got {sizes[0]} and {sizes[1]}; the file is damaged."
        )


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [_plain(entry, name) for entry in value]
    if isinstance(value, dict):
        return {key: _plain(entry, name) for key, entry in value.items()}
    raise TypeError(f"A layer's {name} of type {type(value).__name__} cannot be saved as plain.")
