"""Attention of a few queries over a packed cache, in native code.

Only shapes, dtypes and addresses pass to the library (see ``csrc/attention.h``), through
``ctypes``, which lets other Python threads run meanwhile. Keys and values are never decoded: steps
and minima leave the inner products (``csrc/attention_body.h`` has the formulas).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from hf_adaptive_sparse.kernels.library import (
    DTYPES,
    MAX_CODES,
    PATHS,
    active_path,
    check_status,
    library,
)
from hf_adaptive_sparse.kernels.packed import PackedBlocks, PackedCache

_MASK_DTYPES = {**DTYPES, torch.bool: 3}
_NO_MASK = -1
_KERNEL = "native"

_Int = ctypes.c_int64
_Address = ctypes.c_void_p


class _Segment(ctypes.Structure):
    _fields_ = (
        ("length", _Int),
        ("keys", _Address),
        ("values", _Address),
        ("key_strides", _Int * 3),
        ("value_strides", _Int * 3),
    )


class _Call(ctypes.Structure):
    """``has_attention_call`` of ``csrc/attention.h``, field by field."""

    _fields_ = (
        *((name, _Int) for name in ("batch", "kv_heads", "repeats", "queries")),
        *((name, _Int) for name in ("key_dim", "value_dim", "dtype")),
        ("query", _Address),
        ("query_strides", _Int * 3),
        ("output", _Address),
        ("output_strides", _Int * 3),
        ("mask", _Address),
        ("mask_dtype", _Int),
        ("mask_strides", _Int * 4),
        ("causal", _Int),
        ("sinks", _Segment),
        ("recent", _Segment),
        *((name, _Int) for name in ("skip", "blocks", "block_length")),
        ("block_lengths", _Address),
        *((name, _Int) for name in ("key_bits", "key_mode", "key_group", "key_meta_dtype")),
        ("key_codes", _Address),
        ("key_codes_strides", _Int * 4),
        ("key_steps", _Address),
        ("key_minima", _Address),
        ("key_meta_strides", _Int * 4),
        *((name, _Int) for name in ("value_bits", "value_group", "value_scale_dtype")),
        ("value_codes", _Address),
        ("value_codes_strides", _Int * 4),
        ("value_step_codes", _Address),
        ("value_minimum_codes", _Address),
        ("value_meta_strides", _Int * 4),
        ("value_scales", _Address),
        ("value_scale_strides", _Int * 3),
        ("scale", ctypes.c_double),
        ("threads", _Int),
    )


def is_supported(query: torch.Tensor, cache: PackedCache, mask: torch.Tensor | None) -> bool:
    """Return whether ``attend`` can take these; see there."""
    dtype = query.dtype
    return (
        _prepared(cache.blocks) is not None
        and query.is_cpu
        and cache.raw_keys.is_cpu
        and cache.raw_keys.dtype is dtype
        and cache.raw_values.dtype is dtype
        and dtype in DTYPES
        and query.shape[3] <= MAX_CODES
        and (mask is None or (mask.dtype in _MASK_DTYPES and mask.is_cpu))
    )


def attend(
    query: torch.Tensor,
    cache: PackedCache,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute ``reference.attention`` of the decoded cache without decoding it.

    Products are summed in integers, with queries and probabilities rounded to 14 bits and a sign
    per block, everything else is float32: at 8 bits and below the result is closer to the float32
    reference than torch's own attention on decoded 16-bit states is (the contract test holds it to
    that). No gradient.

    Args:
        query: ``(batch, heads, queries, key head_dim)`` in the cache's dtype: float32, bfloat16 or
            float16; ``heads`` a multiple of the cache's KV heads.
        cache: Keys and values, at most ``MAX_CODES`` tokens per block and channels per key, the
            last dimension of each tensor contiguous.
        mask: Broadcastable to ``(batch, heads, queries, cache.length)``: bool, True where a query
            sees a token, or float32, bfloat16, float16, added to the scores.
        is_causal: Whether query ``i`` sees tokens 0 to ``i`` only, as torch has it.
        scale: Factor of the scores; None: ``1 / sqrt(key head_dim)``.

    Returns:
        ``(batch, heads, queries, value head_dim)`` in the query's dtype, laid out in memory as
        ``(batch, queries, heads, value head_dim)``.

    Raises:
        ValueError: If shapes, strides, dtypes or devices are not those above, or there is no native
            library.
    """
    # What a cache holds lies so; decoding does not ask for it once per token.
    rows_lie_together = _rows_lie_together((cache.raw_keys, cache.raw_values))
    if not rows_lie_together or not is_supported(query, cache, mask):
        raise ValueError(
            "The native attention takes float32, bfloat16 or float16 on the CPU, at most "
            f"{MAX_CODES} tokens per block and channels per key, tensors whose last dimension is "
            f"contiguous, and needs the library (active path: {active_path()}); got {query.dtype} "
            f"on {query.device}, blocks of {cache.blocks.block_length}, keys of "
            f"{query.shape[-1]} channels, codes with strides {cache.blocks.keys.codes.stride()} "
            f"and {cache.blocks.values.codes.stride()}."
        )
    cache.check_query(query)
    return compute(query, cache, mask, is_causal=is_causal, scale=scale)


def compute(
    query: torch.Tensor,
    cache: PackedCache,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Do what ``attend`` does for a call that the caller has checked as ``attend`` would.

    Every layer comes here for every token, right after the model's weights went through the
    processor's caches: each thing touched costs a hundred times what it costs in a loop.
    """
    prepared = _prepared(cache.blocks)
    assert prepared is not None  # `is_supported` has looked
    batch, heads, queries, key_dim = query.shape
    strides = query.stride()
    if strides[3] != 1:
        query = query.contiguous()
        strides = query.stride()
    output = query.new_empty((batch, queries, heads, cache.raw_values.shape[3])).transpose(1, 2)
    call = _Call.from_buffer_copy(prepared.call)
    call.repeats = heads // prepared.kv_heads
    call.queries = queries
    call.key_dim = key_dim
    call.dtype = DTYPES[query.dtype]
    call.query = query.data_ptr()
    call.query_strides = strides[:3]
    call.output = output.data_ptr()
    call.output_strides = output.stride()[:3]
    call.causal = is_causal
    call.scale = key_dim**-0.5 if scale is None else scale
    call.threads = torch.get_num_threads()
    if mask is not None:
        mask = mask.expand(batch, heads, queries, cache.length)
        call.mask = mask.data_ptr()
        call.mask_dtype = _MASK_DTYPES[mask.dtype]
        call.mask_strides = mask.stride()
    _describe_raw(call, cache)
    status = prepared.function(prepared.path, ctypes.byref(call))
    check_status(status, "attention")
    return output


class _Prepared(NamedTuple):
    """A call whose fields about the blocks are filled in.

    Attributes:
        call: To be copied for each call; it holds addresses within the blocks' tensors.
        lengths: Tokens of each block, which it points to.
        kv_heads: Heads of the blocks.
        function: The library's ``has_attend``.
        path: Number of the path to take.
    """

    call: _Call
    lengths: ctypes.Array[ctypes.c_int64] | None
    kv_heads: int
    function: Callable[..., int]
    path: int


def _rows_lie_together(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether the last dimension of each is contiguous: kernels are not told its stride."""
    return all(tensor.stride(-1) == 1 or tensor.shape[-1] == 1 for tensor in tensors)


def _prepared(blocks: PackedBlocks) -> _Prepared | None:
    """Return the call for these blocks, made once; None where the kernels do not serve them.

    Decoding asks once per layer and token, while the blocks change every ``block_length`` tokens.
    Which path to take is asked when they do.
    """
    try:
        prepared: _Prepared | None = blocks.prepared[_KERNEL]
    except KeyError:
        prepared = blocks.prepared[_KERNEL] = _prepare(blocks)
    return prepared


def _prepare(blocks: PackedBlocks) -> _Prepared | None:
    keys, values = blocks.keys, blocks.values
    loaded, path = library(), active_path()
    if (
        loaded is None
        or path is None
        or not keys.codes.is_cpu
        or keys.step.dtype not in DTYPES
        or values.scales.dtype not in DTYPES
        or not 1 <= blocks.block_length <= MAX_CODES
        # Described once for both; memory that was reserved for one only may differ.
        or keys.step.stride() != keys.minimum.stride()
        or values.step_codes.stride() != values.min_codes.stride()
        or not _rows_lie_together(
            (keys.codes, keys.step, values.codes, values.step_codes, values.scales)
        )
    ):
        return None
    lengths = None
    if blocks.lengths is not None:
        lengths = (_Int * len(blocks.lengths))(*blocks.lengths)
    batch, kv_heads = keys.codes.shape[:2]
    call = _Call(
        batch=batch,
        kv_heads=kv_heads,
        value_dim=values.codes.shape[3],
        mask_dtype=_NO_MASK,
        blocks=keys.codes.shape[2],
        block_length=blocks.block_length,
        block_lengths=None if lengths is None else ctypes.addressof(lengths),
        key_bits=keys.bits,
        key_mode=0 if keys.group is None else 1,
        key_group=keys.group or 0,
        key_meta_dtype=DTYPES[keys.step.dtype],
        key_codes=keys.codes.data_ptr(),
        key_codes_strides=keys.codes.stride()[:4],
        key_steps=keys.step.data_ptr(),
        key_minima=keys.minimum.data_ptr(),
        key_meta_strides=keys.step.stride()[:4],
        value_bits=values.bits,
        value_group=values.group,
        value_scale_dtype=DTYPES[values.scales.dtype],
        value_codes=values.codes.data_ptr(),
        value_codes_strides=values.codes.stride()[:4],
        value_step_codes=values.step_codes.data_ptr(),
        value_minimum_codes=values.min_codes.data_ptr(),
        value_meta_strides=values.step_codes.stride()[:4],
        value_scales=values.scales.data_ptr(),
        value_scale_strides=values.scales.stride()[:3],
    )
    return _Prepared(call, lengths, kv_heads, loaded.has_attend, PATHS[path])


def _describe_raw(call: _Call, cache: PackedCache) -> None:
    """Fill in where sinks and recent tokens lie."""
    keys, values, sinks = cache.raw_keys, cache.raw_values, cache.sinks
    key_strides, value_strides = keys.stride(), values.stride()
    call.skip = cache.skip
    recent = call.recent
    recent.length = keys.shape[2] - sinks
    recent.keys = keys.data_ptr()
    recent.values = values.data_ptr()
    recent.key_strides = key_strides[:3]
    recent.value_strides = value_strides[:3]
    if sinks:
        call.sinks = recent
        call.sinks.length = sinks
        item_bytes = keys.element_size()
        recent.keys += sinks * key_strides[2] * item_bytes
        recent.values += sinks * value_strides[2] * item_bytes
