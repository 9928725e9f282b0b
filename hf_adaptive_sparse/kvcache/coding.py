"""Encoding and decoding blocks: by a kernel where one supports them, else by the codec.

Native ones serve the CPU, Triton's a GPU. All give the same bits; the codecs, in torch,
are the readable form of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from hf_adaptive_sparse.kernels import encoding, triton_decoding, triton_encoding
from hf_adaptive_sparse.kernels.library import DTYPES
from hf_adaptive_sparse.kernels.triton_device import say_what_failed
from hf_adaptive_sparse.kvcache.codec import Codec, Parts
from hf_adaptive_sparse.kvcache.refusals import Refusals

logger = logging.getLogger(__name__)

ENCODED_AT_ONCE = 1 << 18
"""Elements that torch encodes at once, one block of every head at least: 1 MiB in float32."""

GPU_ENCODED_AT_ONCE = 1 << 23
"""The same on a GPU, where each of some forty steps costs a launch, however little it does."""


def empty_parts(codec: Codec, blocks: torch.Tensor) -> Parts:
    """Return the parts of none of ``blocks``: what encoding makes of any, but for their number."""
    none, how = blocks[:, :, :0], codec.kernel_format
    if how is None or blocks.dtype not in DTYPES:
        return codec.encode(none, "states")
    return codec.parts_type(*encoding.empty_parts(none, how))


def encode_into(
    codec: Codec,
    blocks: torch.Tensor,
    parts: Sequence[torch.Tensor],
    what: str,
    refusals: Refusals | None = None,
) -> None:
    """Write the parts of ``blocks`` to tensors of their shapes, a block of a head contiguous.

    Args:
        codec: What encodes them.
        blocks: See ``Codec.encode``.
        parts: ``(batch, kv_heads, blocks, ...)`` each, as ``empty_parts`` has them.
        what: What the states are, for error messages.
        refusals: Where a GPU's kernel may leave word of what it refused; None: it is waited for.

    Raises:
        NonFiniteError: If the codec cannot represent the states; ``parts`` then mean nothing.
    """
    found = encode_blocks(codec, blocks, what, parts, refusals)
    for part, encoded in zip(parts, found, strict=True):
        if encoded is not part:
            part.copy_(encoded)


@torch.no_grad()
def encode_blocks(
    codec: Codec,
    blocks: torch.Tensor,
    what: str,
    room: Sequence[torch.Tensor] | None = None,
    refusals: Refusals | None = None,
) -> Parts:
    """Return the parts of ``blocks``, see ``Codec.encode``: those of ``room`` if a kernel can."""
    how = codec.kernel_format
    parts = None if how is None else _encode_by_kernel(blocks, how, what, room, refusals)
    if parts is not None:
        return codec.parts_type(*parts)
    # A few blocks at a time: what encoding computes with in between stays in the caches.
    at_once = ENCODED_AT_ONCE if blocks.device.type == "cpu" else GPU_ENCODED_AT_ONCE
    count = max(1, at_once // max(1, blocks[:, :, :1].numel()))
    pieces = [codec.encode(some, what) for some in blocks.split(count, dim=2)]
    if len(pieces) == 1:
        return pieces[0]
    return codec.parts_type(*(torch.cat(part, dim=2) for part in zip(*pieces, strict=True)))


@torch.no_grad()
def decode_blocks(
    codec: Codec,
    parts: Parts,
    block_length: int,
    output: torch.Tensor,
    lengths: Sequence[int] | None = None,
) -> None:
    """Write the states of blocks, one behind the other, to ``output``.

    Args:
        codec: What encoded them.
        parts: ``(batch, kv_heads, blocks, ...)`` each.
        block_length: Tokens of a block as it was encoded.
        output: ``(batch, kv_heads, tokens, head_dim)`` in the model's dtype.
        lengths: Tokens of each block that count, from its start; None: all.
    """
    how = codec.kernel_format
    if how is not None and _decode_by_kernel(parts, how, block_length, output, lengths):
        return
    blocks = codec.decode(parts, (block_length, output.shape[-1]), output.dtype)
    if lengths is None:
        output.copy_(blocks.flatten(2, 3))
        return
    start = 0
    for i, length in enumerate(lengths):
        output[:, :, start : start + length] = blocks[:, :, i, :length]
        start += length


def _encode_by_kernel(
    blocks: torch.Tensor,
    how: encoding.Format,
    what: str,
    room: Sequence[torch.Tensor] | None,
    refusals: Refusals | None,
) -> tuple[torch.Tensor, ...] | None:
    parts = encoding.encode(blocks, how, room)
    if parts is not None or not triton_encoding.is_supported(blocks, how):
        return parts
    try:
        refused = None if refusals is None else refusals.flag(blocks, what)
        return triton_encoding.encode(blocks, how, room, refused)
    except triton_encoding.LaunchError as error:
        say_what_failed(
            logger,
            "that quantises keys and values",
            "What is stored stays the same, but torch quantises instead",
            str(error),
        )
        return None


def _decode_by_kernel(
    parts: Parts,
    how: encoding.Format,
    block_length: int,
    output: torch.Tensor,
    lengths: Sequence[int] | None,
) -> bool:
    """Return whether a kernel wrote ``output``."""
    if encoding.decode(parts, how, block_length, output, lengths):
        return True
    if not triton_decoding.is_supported(parts, how, block_length, output):
        return False
    try:
        triton_decoding.decode(parts, how, block_length, output, lengths)
    except triton_decoding.LaunchError as error:
        say_what_failed(
            logger,
            "that restores keys and values",
            "What is restored stays the same, but torch restores instead",
            str(error),
        )
        return False
    return True
