"""One decoder layer of the adaptive cache, behind the interface of transformers' layers.

The layer *returns what it stores*: ``update`` gives dequantised blocks and the unquantised tokens,
always, prefill included. A stock ``QuantizedLayer`` returns the unquantised states of its first
update, so that a perplexity computed in one forward pass shows no effect of any bit width; here it
shows the effect. Queries of a prompt therefore see the whole blocks of that prompt as they will be
stored, their own block included, which is what later tokens see of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from transformers.cache_utils import BaseQuantizedLayer

from hf_adaptive_sparse.kvcache.attending import Attending
from hf_adaptive_sparse.kvcache.attention import PinnedPair, pin_pair
from hf_adaptive_sparse.kvcache.checks import check_rank, refuse_misfits
from hf_adaptive_sparse.kvcache.refusals import Refusals
from hf_adaptive_sparse.kvcache.selection import key_codec, value_codec
from hf_adaptive_sparse.kvcache.store import TokenStore
from hf_adaptive_sparse.kvcache.view import CacheView, lazy_views


class AdaptiveQuantizedLayer(BaseQuantizedLayer):
    """Cache layer for full attention that quantises every token once.

    After any ``update`` the newest 0 to ``residual_length - 1`` tokens are unquantised, and the
    sinks. A block of ``residual_length`` tokens is quantised when its last token arrives, several
    at once where a prompt brings them: of a prompt of 200 tokens with ``residual_length=64``, 192
    are quantised. ``crop`` removes tokens from either part and quantises nothing anew: what is left
    of a block stays as it is, a shorter block.

    After ``activate_past_recording`` (assisted decoding calls it) another ``residual_length``
    tokens stay unquantised, so that rejected candidates are taken back before their block is
    packed.

    16 bits keep the model's dtype bit for bit; such keys or values have no blocks. No gradient
    flows through the cache. Tensors returned by ``update`` may be views of the cache; they hold
    until the next ``crop``.

    kvpress and its like read ``layer._dequantize(layer._quantized_keys)`` and write
    ``layer._quantized_keys = layer._quantize(keys, axis=layer.axis_key)`` together with
    ``cumulative_length``. That works at any time: what is read includes the unquantised tokens, and
    what is written is quantised completely. ``keys`` and ``values`` are what ``decode`` returns,
    decoded when something reads them; assigning to them changes nothing.

    Args:
        key_bits: Bits per element of the keys: 2, 3, 4, 6, 8 or 16.
        value_bits: The same for the values.
        group_size: Neighbouring elements of one head and token that share a step and a minimum.
        residual_length: Tokens per block.
        layer_idx: Number of the decoder layer, for error messages.
        key_mode: "channel": keys share a step and a minimum over the tokens of a block; "token":
            over ``group_size`` channels of a token.
        sink_length: First tokens that stay unquantised.

    Attributes:
        attending: How the model attends that the cache was made for.
        beside: Names of what a kind of layer keeps beside keys and values.
        refusals: What a GPU refused of this cache's keys and values; None: the host waits for the
            GPU to know, at every encoding.

    Raises:
        ValueError: If ``key_mode`` is unknown.
    """

    is_croppable = True
    beside: ClassVar[tuple[str, ...]] = ()
    attending = Attending({})
    refusals: Refusals | None = None
    # Both name head_dim, the dimension that groups lie along. That they are different numbers lets
    # `_quantize` know keys from values, which may have different bits.
    axis_key = -1
    axis_value = 3

    def __init__(
        self,
        key_bits: int,
        value_bits: int,
        group_size: int = 64,
        residual_length: int = 128,
        layer_idx: int = 0,
        *,
        key_mode: str = "channel",
        sink_length: int = 0,
    ) -> None:
        self._quantized_keys: TokenStore | None = None
        self._quantized_values: TokenStore | None = None
        super().__init__()
        self.key_bits = key_bits
        self.value_bits = value_bits
        self.group_size = group_size
        self.residual_length = residual_length
        self.layer_idx = layer_idx
        self.key_mode = key_mode
        self.sink_length = sink_length
        self.record_past = False
        self._key_codec = key_codec(key_bits, key_mode, group_size)
        self._value_codec = value_codec(value_bits, group_size)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies what the layers of a cache share, once it was read."""
        if self.refusals is not None:
            self.refusals.check()
        return self.__dict__ | {"refusals": None}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(key_bits={self.key_bits}, value_bits={self.value_bits}, "
            f"tokens={self.get_seq_length()})"
        )

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys held, ``(batch, kv_heads, seq, head_dim)``, or None before the first update."""
        return CacheView(self._held(), is_key=True) if self.stores() else None

    @keys.setter
    def keys(self, states: object) -> None:
        """Ignore what transformers and kvpress assign: the store holds the keys."""

    @property
    def values(self) -> torch.Tensor | None:
        """All values held, as for the keys."""
        return CacheView(self._held(), is_key=False) if self.stores() else None

    @values.setter
    def values(self, states: object) -> None:
        """Ignore what is assigned, as for the keys."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values: codes, metadata, raw tokens, and their slack."""
        return sum(store.nbytes for store in self.stores())

    def stores(self) -> tuple[TokenStore, ...]:
        """Return the stores of keys and values, or nothing before the first update."""
        if self._quantized_keys is None or self._quantized_values is None:
            return ()
        return self._quantized_keys, self._quantized_values

    def states(self) -> dict[str, Any]:
        """Return what is kept beside keys and values, in kinds of layers that keep more."""
        return {name: getattr(self, name) for name in self.beside}

    def set_states(self, states: Mapping[str, Any]) -> None:
        """Take over what ``states`` returned.

        Raises:
            KeyError: If a part of it is missing.
        """
        for name in self.beside:
            setattr(self, name, states[name])

    def set_length(self, tokens: int) -> None:
        """Say how many tokens of the sequence the stores stand for, after they were restored."""
        self.cumulative_length = tokens

    def activate_past_recording(self) -> None:
        """Expect tokens to be taken back: keep a further block of them unquantised."""
        self.record_past = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Prepare for states of this shape, dtype and device; nothing is stored yet.

        Args:
            key_states: ``(batch, kv_heads, any, key head_dim)``.
            value_states: ``(batch, kv_heads, any, value head_dim)``.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        self._quantized_keys = self._empty_store(key_states, is_key=True)
        self._quantized_values = self._empty_store(value_states, is_key=False)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens and return all tokens as they are stored.

        Args:
            key_states: ``(batch, kv_heads, n, key head_dim)``, any floating dtype.
            value_states: ``(batch, kv_heads, n, value head_dim)``.
            *args: Ignored, for transformers.
            **kwargs: Ignored, for transformers.

        Returns:
            Keys and values ``(batch, kv_heads, stored tokens, head_dim)`` in their dtypes.

        Raises:
            ValueError: If the states do not fit what is stored already (batch, heads, head size,
                dtype), or are to be quantised and hold NaN or Inf. What is stored has not changed
                then; memory that was made for more may stay. Of NaN and Inf on a GPU the last layer
                of a cache tells for all, once in a forward pass, and they are stored by then.
        """
        if torch.compiler.is_dynamo_compiling():
            got: tuple[torch.Tensor, torch.Tensor] = self._update_uncompiled(
                key_states, value_states
            )
            return got
        return self._update(key_states, value_states)

    def decode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as they are stored, ``(batch, kv_heads, seq, head_dim)`` each."""
        pair = self._held()
        return pair.keys.decode(), pair.values.decode()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens.

        Args:
            tokens_to_remove: Their number as a negative one, as transformers asks; 0 removes none.

        Raises:
            ValueError: If it is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                "crop takes the number of tokens to remove as a negative number (or 0), got "
                f"{tokens_to_remove}."
            )
        if tokens_to_remove == 0:
            return
        self.cumulative_length = max(0, self.cumulative_length + tokens_to_remove)
        for store in self.stores():
            store.remove_newest(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequence ``i`` continue sequence ``beam_idx[i]``, int64 ``(batch,)``."""
        self._transform(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times, repetitions side by side."""
        self._transform(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences that ``indices`` (whole numbers, or a bool per sequence) choose."""
        self._transform(lambda states: states[indices.to(states.device), ...])

    def offload(self) -> None:
        """Move what is stored to CPU memory."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move what is stored back to the device of the model."""
        if self.is_initialized:
            self._move(self.device)

    def _held(self) -> PinnedPair:
        """Return the tokens held that later queries may see, as they are now."""
        keys, values = self.stores()
        return pin_pair(keys, values)

    def _update(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._store_states(key_states, value_states)
        return self._view(None)

    # Lengths change with every token: compiled, it would be compiled anew for each.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _update_uncompiled(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._update(key_states, value_states)

    def _view(self, newest: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the newest tokens of keys and values, or all: what ``update`` hands to attention.

        Args:
            newest: How many tokens; None for all.
        """
        keys, values = self.stores()
        pair = pin_pair(keys, values, newest)
        if self.attending.takes_views:
            return lazy_views(pair)
        return pair.keys.decode(), pair.values.decode()

    def _store_states(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Check and store new tokens; see ``update``."""
        if self.cumulative_length == 0:  # an empty cache takes any shape
            check_rank(key_states, "keys", self.layer_idx)
            check_rank(value_states, "values", self.layer_idx)
            self.lazy_initialization(key_states, value_states)
        keys, values = self.stores()
        if not (keys.fits(key_states) and values.fits(value_states)):
            refuse_misfits(keys, key_states, "keys", self.layer_idx)
            refuse_misfits(values, value_states, "values", self.layer_idx)
        tokens = key_states.shape[2]
        if tokens != value_states.shape[2]:
            raise ValueError(
                f"Layer {self.layer_idx} of the cache takes as many keys as values, got "
                f"{tokens} and {value_states.shape[2]} tokens."
            )
        back = self.residual_length if self.record_past else 0
        if keys.has_room(tokens, back) and values.has_room(tokens, back):  # nearly every token
            keys.append(key_states)
            values.append(value_states)
        else:
            if self.refusals is not None:
                self.refusals.begin(self.layer_idx)
            # Both are encoded before either is stored: a refusal leaves the layer as it was.
            what = (f"keys of layer {self.layer_idx}", f"values of layer {self.layer_idx}")
            new_keys = keys.prepare(key_states, what[0], back, self.refusals)
            new_values = values.prepare(value_states, what[1], back, self.refusals)
            keys.commit(new_keys)
            values.commit(new_values)
        self.cumulative_length += tokens
        if self.refusals is not None:
            self.refusals.end(self.layer_idx)

    def _quantize(self, tensor: torch.Tensor, axis: int) -> TokenStore:
        """Return ``tensor`` ``(batch, kv_heads, seq, head_dim)`` as a store without a tail.

        Args:
            tensor: Keys or values.
            axis: ``axis_key`` or ``axis_value``: which of the two.
        """
        is_key = axis == self.axis_key
        store = self._empty_store(tensor, is_key=is_key)
        what = f"{'keys' if is_key else 'values'} of layer {self.layer_idx}"
        store.commit(store.prepare(tensor, what, whole=True))
        return store

    def _dequantize(self, q_tensor: TokenStore) -> torch.Tensor:
        """Return all tokens of a store, ``(batch, kv_heads, seq, head_dim)``."""
        return q_tensor.pin().decode()

    def _empty_store(self, template: torch.Tensor, *, is_key: bool) -> TokenStore:
        codec = self._key_codec if is_key else self._value_codec
        return TokenStore(codec, self.residual_length, template, self.sink_length)

    def _transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.get_seq_length() == 0:
            return
        for store in self.stores():
            store.transform(function)

    def _move(self, device: torch.device) -> None:
        for store in self.stores():
            store.transform(lambda states: states.to(device, non_blocking=True))
