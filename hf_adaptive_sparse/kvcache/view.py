"""Keys or values of a cache as a tensor that is decoded only when something reads its elements.

``update`` of a cache layer returns two of these. An unmodified model hands them to
``torch.nn.functional.scaled_dot_product_attention``, where torch asks the arguments' classes first
(``__torch_function__``): with a few queries, attention is computed from the packed blocks. Anything
else that reads them (eager attention, flash attention, indexing, ``.to``) gets the decoded tensor,
an ordinary one, and so do its results. Layers hand none of these to flex attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import _pytree as pytree

from hf_adaptive_sparse.kvcache.attention import PinnedPair, attend

_WHOLE = slice(None)
_ADD_DIMENSION = (_WHOLE, _WHOLE, None, _WHOLE, _WHOLE)


class CacheView(torch.Tensor):
    """Keys or values ``(batch, kv_heads, tokens, head_dim)``, as they were when it was made.

    Later appends to the cache do not change it; ``crop`` followed by an append may. transformers'
    ``repeat_kv`` (``x[:, :, None, :, :].expand(...).reshape(...)``) stays a view, with each head
    ``repeats`` times. Once decoded, a view is what was decoded: it can be written to, which changes
    neither the cache nor other views.

    Args:
        pair: Keys and values of a layer.
        is_key: Which of the two this is.
        repeats: How often each head comes.
        is_split: Whether heads and repeats are two dimensions:
            ``(batch, kv_heads, repeats, tokens, head_dim)``.
    """

    _pair: PinnedPair
    _is_key: bool
    _shape: torch.Size
    _repeats: int = 1
    _is_split: bool = False
    _decoded: torch.Tensor | None = None

    @staticmethod
    def __new__(
        cls: type[CacheView],
        pair: PinnedPair,
        is_key: bool,
        repeats: int = 1,
        is_split: bool = False,
    ) -> CacheView:
        """Make the wrapper, which has a shape and no storage."""
        pinned = pair.keys if is_key else pair.values
        raw = pinned.raw
        batch, kv_heads, _, head_dim = raw.shape
        heads = (kv_heads, repeats) if is_split else (kv_heads * repeats,)
        shape = (batch, *heads, pinned.length, head_dim)
        view: CacheView = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=raw.dtype, device=raw.device
        )
        view._shape = torch.Size(shape)
        view._pair = pair
        view._is_key = is_key
        if is_split or repeats > 1:
            view._repeats = repeats
            view._is_split = is_split
        return view

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Sizes; attention asks for them several times a step, which torch would ask this class."""
        return self._shape

    def decode(self) -> torch.Tensor:
        """Return the ordinary tensor of this shape, decoded at the first call."""
        if self._decoded is None:
            states = (self._pair.keys if self._is_key else self._pair.values).decode()
            if self._is_split or self._repeats > 1:
                batch, kv_heads, tokens, head_dim = states.shape
                states = states[:, :, None].expand(batch, kv_heads, self._repeats, tokens, head_dim)
            if self._repeats > 1 and not self._is_split:
                states = states.flatten(1, 2)
            self._decoded = states
        return self._decoded

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer what needs no elements, and attention; decode for the rest."""
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            if torch.compiler.is_dynamo_compiling():
                return _attention_uncompiled(*args, **kwargs)
            return _attention(*args, **kwargs)
        if func in _WITHOUT_ELEMENTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if (step := _REPEAT_STEPS.get(func)) and not kwargs and isinstance(args[0], CacheView):
            repeated = step(args[0], *args[1:])
            if repeated is not None:
                return repeated
        args, kwargs = _decoded((tuple(args), dict(kwargs)))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Decode for what reaches the elements from within torch."""
        args, kwargs = _decoded((tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


def lazy_views(pair: PinnedPair) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values ``(batch, kv_heads, tokens, head_dim)``, lazily where that pays.

    Args:
        pair: Keys and values. Where no kernel could read them (nothing packed yet, 16 bits), the
            decoded tensors are returned.
    """
    if pair.blocks is None:
        return pair.keys.decode(), pair.values.decode()
    return CacheView(pair, is_key=True), CacheView(pair, is_key=False)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention, an argument of which is a view."""
    if (
        not dropout_p
        and isinstance(key, CacheView)
        and isinstance(value, CacheView)
        and _are_one_cache(key, value)
        and not isinstance(query, CacheView)
        and not isinstance(attn_mask, CacheView)
        and (enable_gqa or query.shape[1] == key.shape[1])
    ):
        output = attend(key._pair, query, attn_mask, is_causal=is_causal, scale=scale)
        if output is not None:
            return output
    query, key, value, attn_mask = _decoded((query, key, value, attn_mask))
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attention_uncompiled(*args: Any, **kwargs: Any) -> torch.Tensor:
    """``_attention``, for a graph that is being captured to break at."""
    return _attention(*args, **kwargs)


def _are_one_cache(key: CacheView, value: CacheView) -> bool:
    return (
        key._pair is value._pair
        and key._is_key
        and not value._is_key
        and not key._is_split
        and not value._is_split
        and key._repeats == value._repeats
        # What was decoded may have been written to.
        and key._decoded is None
        and value._decoded is None
    )


def _split(view: CacheView, index: object) -> CacheView | None:
    """``view[:, :, None, :, :]``, the first step of ``repeat_kv``."""
    if index != _ADD_DIMENSION or view._is_split or view._repeats > 1 or view._decoded is not None:
        return None
    return CacheView(view._pair, view._is_key, 1, is_split=True)


def _expand(view: CacheView, *sizes: Any) -> CacheView | None:
    """``view.expand(batch, kv_heads, repeats, tokens, head_dim)``, the second step."""
    if not view._is_split or view._repeats > 1 or len(sizes) != 5:
        return None
    if (*sizes[:2], 1, *sizes[3:]) != tuple(view.shape):
        return None
    return CacheView(view._pair, view._is_key, int(sizes[2]), is_split=True)


def _reshape(view: CacheView, *sizes: Any) -> CacheView | None:
    """``view.reshape(batch, kv_heads * repeats, tokens, head_dim)``, the last step."""
    batch, *heads, tokens, head_dim = view.shape
    if not view._is_split or sizes != (batch, heads[0] * heads[1], tokens, head_dim):
        return None
    return CacheView(view._pair, view._is_key, view._repeats)


def _decoded(arguments: Any) -> Any:
    """Return nested arguments with every view decoded."""
    return pytree.tree_map_only(CacheView, CacheView.decode, arguments)


_REPEAT_STEPS: Mapping[Callable[..., Any], Callable[..., CacheView | None]] = {
    torch.Tensor.__getitem__: _split,
    torch.Tensor.expand: _expand,
    torch.Tensor.reshape: _reshape,
}

# Asked of keys and values on the way to attention; a wrapper without storage can answer.
_WITHOUT_ELEMENTS = frozenset(
    {
        torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
        torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
        torch.Tensor.device.__get__,
        torch.Tensor.layout.__get__,  # type: ignore[attr-defined]
        torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
        torch.Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
        torch.Tensor.is_meta.__get__,  # type: ignore[attr-defined]
        torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.element_size,
        torch.Tensor.is_floating_point,
        torch.Tensor.__len__,
    }
)
