"""Attention of a few queries over a packed cache, in native code.

Only shapes, dtypes and addresses pass to the library (see ``csrc/attention.h``), through
``ctypes``, which lets other Python threads run meanwhile. Keys and values are never decoded: steps
and minima leave the inner products (``csrc/attention_body.h`` has the formulas).
"""

from __future__ import annotations

import ctypes
import math

import torch

from hf_adaptive_sparse.kernels.library import PATHS, active_path, library
from hf_adaptive_sparse.kernels.packed import PackedCache

MAX_CODES = 1024
"""Codes in a packed row, that is tokens of a block and channels of a key, which kernels can sum."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MASK_DTYPES = {**_DTYPES, torch.bool: 3}
_NO_MASK = -1
_STATUS = {1: "no such path on this processor", 2: "no memory", 3: "sizes out of range"}

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
        ("block_lengths", ctypes.POINTER(_Int)),
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
    return (
        active_path() is not None
        and query.device.type == "cpu"
        and cache.raw_keys.device.type == "cpu"
        and query.dtype in _DTYPES
        and cache.raw_keys.dtype == cache.raw_values.dtype == query.dtype
        and cache.keys.step.dtype in _DTYPES
        and cache.values.scales.dtype in _DTYPES
        and 1 <= cache.block_length <= MAX_CODES
        and query.shape[-1] <= MAX_CODES
        and (mask is None or (mask.dtype in _MASK_DTYPES and mask.device.type == "cpu"))
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

    Products are summed in integers, with queries and probabilities rounded to 15 bits and a sign
    per block, everything else is float32: at 8 bits and below the result is closer to the float32
    reference than torch's own attention on decoded 16-bit states is (the contract test holds it to
    that). No gradient.

    Args:
        query: ``(batch, heads, queries, key head_dim)`` in the cache's dtype: float32, bfloat16 or
            float16; ``heads`` a multiple of the cache's KV heads.
        cache: Keys and values, at most ``MAX_CODES`` tokens per block and channels per key.
        mask: Broadcastable to ``(batch, heads, queries, cache.length)``: bool, True where a query
            sees a token, or float32, bfloat16, float16, added to the scores.
        is_causal: Whether query ``i`` sees tokens 0 to ``i`` only, as torch has it.
        scale: Factor of the scores; None: ``1 / sqrt(key head_dim)``.

    Returns:
        ``(batch, heads, queries, value head_dim)`` in the query's dtype, laid out in memory as
        ``(batch, queries, heads, value head_dim)``.

    Raises:
        ValueError: If shapes, dtypes or devices are not those above, or there is no native library.
    """
    batch, heads, queries, key_dim = query.shape
    kv_heads = cache.raw_keys.shape[1]
    if not is_supported(query, cache, mask):
        raise ValueError(
            "The native attention takes float32, bfloat16 or float16 on the CPU, at most "
            f"{MAX_CODES} tokens per block and channels per key, and needs the library (active "
            f"path: {active_path()}); got {query.dtype} on {query.device}, blocks of "
            f"{cache.block_length}, keys of {key_dim} channels."
        )
    cache.check_query(query)
    value_dim = cache.raw_values.shape[-1]
    if query.stride(-1) != 1:
        query = query.contiguous()
    output = query.new_empty((batch, queries, heads, value_dim)).transpose(1, 2)
    call = _Call(
        batch=batch,
        kv_heads=kv_heads,
        repeats=heads // kv_heads,
        queries=queries,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=_DTYPES[query.dtype],
        query=query.data_ptr(),
        query_strides=query.stride()[:3],
        output=output.data_ptr(),
        output_strides=output.stride()[:3],
        mask_dtype=_NO_MASK,
        causal=is_causal,
        scale=1 / math.sqrt(key_dim) if scale is None else scale,
        threads=torch.get_num_threads(),
    )
    if mask is not None:
        mask = mask.expand(batch, heads, queries, cache.length)
        call.mask = mask.data_ptr()
        call.mask_dtype = _MASK_DTYPES[mask.dtype]
        call.mask_strides = mask.stride()
    lengths = _describe_cache(call, cache)  # must live as long as the call
    loaded = library()
    assert loaded is not None  # `is_supported` has looked
    path = active_path()
    assert path is not None
    status = loaded.has_attend(PATHS[path], ctypes.byref(call))
    del lengths
    if status:
        raise RuntimeError(f"The attention kernel failed: {_STATUS.get(status, status)}.")
    return output


def _describe_cache(call: _Call, cache: PackedCache) -> object:
    """Fill in the fields of the cache; returns what has to be kept alive for them."""
    keys, values, raw_keys, raw_values = cache.keys, cache.values, cache.raw_keys, cache.raw_values
    raw, item_bytes = raw_keys.shape[-2], raw_keys.element_size()
    for segment, start, stop in ((call.sinks, 0, cache.sinks), (call.recent, cache.sinks, raw)):
        segment.length = stop - start
        segment.keys = raw_keys.data_ptr() + start * raw_keys.stride(2) * item_bytes
        segment.values = raw_values.data_ptr() + start * raw_values.stride(2) * item_bytes
        segment.key_strides = raw_keys.stride()[:3]
        segment.value_strides = raw_values.stride()[:3]
    call.skip = cache.skip
    call.blocks = keys.codes.shape[2]
    call.block_length = cache.block_length
    call.key_bits = keys.bits
    call.key_mode = 0 if keys.group is None else 1
    call.key_group = keys.group or 0
    call.key_meta_dtype = _DTYPES[keys.step.dtype]
    call.key_codes = keys.codes.data_ptr()
    call.key_codes_strides = keys.codes.stride()[:4]
    call.key_steps = keys.step.data_ptr()
    call.key_minima = keys.minimum.data_ptr()
    call.key_meta_strides = keys.step.stride()[:4]
    call.value_bits = values.bits
    call.value_group = values.group
    call.value_scale_dtype = _DTYPES[values.scales.dtype]
    call.value_codes = values.codes.data_ptr()
    call.value_codes_strides = values.codes.stride()[:4]
    call.value_step_codes = values.step_codes.data_ptr()
    call.value_minimum_codes = values.min_codes.data_ptr()
    call.value_meta_strides = values.step_codes.stride()[:4]
    call.value_scales = values.scales.data_ptr()
    call.value_scale_strides = values.scales.stride()[:3]
    if cache.lengths is None:
        return None
    lengths = (_Int * len(cache.lengths))(*cache.lengths)
    call.block_lengths = ctypes.cast(lengths, ctypes.POINTER(_Int))
    return lengths
