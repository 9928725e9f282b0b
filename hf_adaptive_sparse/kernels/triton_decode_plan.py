"""How blocks to decode are cut into programs of Triton's kernels, and the arguments they get."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hf_adaptive_sparse.kernels.encoding import Format
from hf_adaptive_sparse.kernels.triton_device import Call, interprets
from hf_adaptive_sparse.kernels.triton_sizes import (
    ALIGNMENT,
    pattern_codes,
    power_of_two,
    token_starts,
)

_TILE = 8192  # elements that a program takes, where blocks have as many
_STORE_BYTES = 16  # that a thread writes at once
_WARPS = 4


def prepare(
    parts: Sequence[torch.Tensor],
    how: Format,
    block_length: int,
    output: torch.Tensor,
    lengths: Sequence[int] | None,
) -> Call:
    """Return the launch that fills ``output``.

    Args:
        parts: ``(batch, kv_heads, blocks, ...)`` as the codec has them, what belongs to one head of
            one block contiguous.
        how: Their format.
        block_length: Tokens of a block as it was encoded.
        output: ``(batch, kv_heads, tokens, head_dim)``, channels side by side.
        lengths: Tokens to write of each block; None: all.
    """
    codes, *metadata = parts
    if metadata[0].stride() != metadata[1].stride():
        metadata[:2] = metadata[0].contiguous(), metadata[1].contiguous()
    batch, heads, blocks = codes.shape[:3]
    starts = codes if lengths is None else token_starts(tuple(lengths), output.device)
    measured = (codes, *metadata[1:])
    strides = tuple(stride for part in measured for stride in part.stride()[:3])
    own_strides = output.stride()[:3]
    # Metadata by group are read one by one.
    aligned = own_strides if how.layout == "group" else (*own_strides, *metadata[0].stride()[:3])
    constants, pieces = _constants(how, block_length, codes, output)
    constants |= {
        "SHORT": lengths is not None,
        "BFLOAT": output.dtype == torch.bfloat16,
        "BY_BITS": output.dtype == torch.bfloat16 and interprets(),
        "ALIGN": math.gcd(ALIGNMENT, *aligned),
        # Sums of products that are not rounded in between would be other numbers.
        "enable_fp_fusion": False,
        "num_warps": _WARPS,
    }
    pointers = (codes, *metadata, starts, output)
    kind = (
        *(output.device, output.dtype),
        *(tensor.data_ptr() % ALIGNMENT for tensor in pointers),
        *(stride >> 31 for stride in (*strides, *own_strides)),
    )
    arguments: tuple[torch.Tensor | int, ...] = (*pointers, *strides, *own_strides, heads, blocks)
    kernel = "transposed" if how.layout == "transposed" else "token"
    return Call(kernel, (batch * heads * blocks, pieces, 1), arguments, constants, kind)


def _constants(
    how: Format, tokens: int, codes: torch.Tensor, output: torch.Tensor
) -> tuple[dict[str, int | bool], int]:
    """Return the tile's sizes and what follows from them, and the programs per block."""
    width = output.shape[3]
    group = min(how.group or width, width)
    row_count, count = (group, tokens) if how.layout == "transposed" else (tokens, width)
    word = _word(how.bits, _STORE_BYTES // output.element_size(), codes)
    unit_codes = pattern_codes(how.bits, word)
    units = power_of_two(-(-count // unit_codes))
    rows = min(max(1, _TILE // (units * unit_codes)), power_of_two(row_count))
    pieces = -(-row_count // rows)
    if how.layout == "transposed":
        pieces *= -(-width // group)
    constants: dict[str, int | bool] = {
        "TOKENS": tokens,
        "WIDTH": width,
        "BITS": how.bits,
        "WORD": word,
        "CODES": unit_codes,
        "ROWS": rows,
        "UNITS": units,
        "GROUP": 0 if how.layout == "channel" else group,
    }
    return constants, pieces


def _word(bits: int, most_codes: int, codes: torch.Tensor) -> int:
    """Return the widest word whose pattern is so many codes at most, and that rows are whole of."""
    word = 64 if bits == 8 else 32
    places = (codes.data_ptr(), codes.shape[-1], *codes.stride()[:-1])
    while word > 8 and (
        pattern_codes(bits, word) > most_codes or any(place % (word // 8) for place in places)
    ):
        word //= 2
    return word
