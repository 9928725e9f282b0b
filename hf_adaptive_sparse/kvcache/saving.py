"""A cache as plain tensors and numbers, and back: for files, not for copies.

A cache may be pickled and deep-copied like any object. The form made here holds nothing but
tensors, numbers, text, None and lists and dicts of them, so that ``torch.load`` reads it with
``weights_only=True``; packed blocks are written packed, without the slack of their buffers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
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
    state = {
        "cumulative_length": layer.cumulative_length,
        "record_past": layer.record_past,
        "stores": [_store_state(store) for store in layer.stores()],
    }
    if layer.beside:
        state["states"] = _plain(layer.states(), "states")
    return state


def saved_layers(state: object) -> Sequence[Mapping[str, Any]]:
    """Return the layers of a cache's ``state_dict``, each of them a mapping.

    Raises:
        KeyError: If there are none.
        ValueError: If the state, its layers or what they store are of another kind.
    """
    layers: Any = state["layers"] if isinstance(state, Mapping) else None
    if not _is_list_of(layers, Mapping) or not all(
        _is_list_of(layer.get("stores", ()), Mapping) for layer in layers
    ):
        raise ValueError(
            "The state of a cache must be a dict whose 'layers' are a list of dicts with dicts as "
            f"their 'stores', as state_dict() returns it, got {type(state).__name__} with "
            f"{type(layers).__name__}; the file is damaged, or holds something else."
        )
    found: Sequence[Mapping[str, Any]] = layers
    return found


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
    AdaptiveQuantizedLayer.reset(made)
    made.record_past = bool(state["record_past"])
    if state["stores"]:
        keys, values = state["stores"]
        for stored in (keys, values):
            _check_kinds(stored, made.layer_idx)
        made.lazy_initialization(keys["raw"], values["raw"])
        for store, stored in zip(made.stores(), (keys, values), strict=True):
            _restore_store(store, stored, made.layer_idx)
        _check_pair(made, state["cumulative_length"])
        made.set_length(state["cumulative_length"])
    if made.beside:
        made.set_states(_plain(state["states"], "states"))
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
        found = [_but_for_blocks(part) for part in state["parts"]]
        wanted = [_but_for_blocks(part) for part in empty_parts(store.codec, blocks)]
        if found != wanted:
            raise ValueError(
                f"The saved blocks of layer {layer_idx} do not fit its codec: expected "
                f"{wanted}, got {found}. A cache is loaded into one of the same profile, all of "
                "its tensors on one device."
            )
    _check_lengths(state, store.block_length, layer_idx)
    store.restore(state["parts"], lengths, raw, int(state["sinks"]))


def _but_for_blocks(part: torch.Tensor) -> tuple[object, ...]:
    """Return what kernels believe of ``(batch, kv_heads, blocks, ...)``, blocks aside."""
    return tuple(part.shape[:2]), tuple(part.shape[3:]), part.dtype, str(part.device)


def _check_kinds(state: Mapping[str, Any], layer_idx: int) -> None:
    """Refuse what are no states, parts and numbers of tokens."""
    raw, parts, lengths, sinks = (state[name] for name in ("raw", "parts", "lengths", "sinks"))
    is_states = isinstance(raw, torch.Tensor) and raw.is_floating_point() and raw.ndim == 4
    if not (
        is_states
        and raw.shape[-1] > 0
        and isinstance(sinks, int)
        and _is_list_of(parts, torch.Tensor)
        and _is_list_of(lengths, int)
    ):
        raise ValueError(
            f"The saved layer {layer_idx} must have states raw (batch, kv_heads, tokens, "
            "head_dim), a list of tensors parts, a list of whole numbers lengths and a whole "
            f"number sinks, got {tuple(raw.shape) if isinstance(raw, torch.Tensor) else raw}, "
            f"{type(parts).__name__}, {lengths} and {sinks!r}; the file is damaged."
        )


def _is_list_of(entries: object, kind: type) -> bool:
    return isinstance(entries, list | tuple) and all(isinstance(entry, kind) for entry in entries)


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


def _check_pair(layer: AdaptiveQuantizedLayer, tokens: object) -> None:
    """Refuse keys and values that are not of the same sequences: kernels believe the keys.

    Args:
        layer: What was restored.
        tokens: Of the sequence, of which a window holds the newest.
    """
    keys, values = ((s.batch_size, s.kv_heads, str(s.device)) for s in layer.stores())
    if keys != values:
        raise ValueError(
            f"The saved keys and values of layer {layer.layer_idx} must have as many sequences "
            f"and heads, on one device, got {keys} and {values}; the file is damaged."
        )
    window = layer.get_max_length()
    for held in (store.length for store in layer.stores()):
        is_whole = held == tokens
        if not isinstance(tokens, int) or not (is_whole or 0 < window <= held + 1 <= tokens):
            raise ValueError(
                f"The saved layer {layer.layer_idx} must hold the tokens of its sequence, or the "
                f"newest of a window; it holds {held} of {tokens}; the file is damaged."
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
