"""How blocks to encode are cut into programs of Triton's kernels, and the arguments they get."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_adaptive_sparse.kernels.encoding import Format
from hf_adaptive_sparse.kernels.triton_device import Call
from hf_adaptive_sparse.kernels.triton_sizes import ALIGNMENT, pattern_codes, power_of_two

_TILE = 8192  # elements that a program takes at once where it has the choice
_MOST_ELEMENTS = 32768  # that a program has to take at once
_MOST_FITTED = (
    16384  # the same where scales are fitted: what is halved passes through shared memory
)
_MOST_GROUPS = 32
_MOST_CODES = 1024
_ELEMENTS_PER_WARP = 1024


def takes(how: Format, tokens: int, width: int) -> bool:
    """Return whether a program can hold what has to be seen at once.

    That is all groups of a token, and where values have steps of two levels also all tokens.
    """
    if not (1 <= tokens <= _MOST_CODES and 1 <= width <= _MOST_CODES):
        return False
    if how.layout == "channel":
        return True
    group = min(how.group or width, width)
    if -(-width // group) > _MOST_GROUPS:
        return False
    columns = power_of_two(tokens)
    at_once = columns * max(power_of_two(group), power_of_two(-(-width // group)))
    return how.layout == "group" or at_once <= (_MOST_FITTED if how.fits else _MOST_ELEMENTS)


def prepare(
    blocks: torch.Tensor,
    how: Format,
    parts: Sequence[torch.Tensor],
    refused: torch.Tensor,
    head_blocks: int,
) -> Call:
    """Return the launch that fills ``parts``.

    Args:
        blocks: ``(batch, kv_heads, blocks, tokens, head_dim)``, channels side by side.
        how: Their format, which ``takes`` takes.
        parts: As the codec has them, see ``encoding.blocks_of_a_head``.
        refused: int32 ``(1,)``, becomes 1 where blocks cannot be stored.
        head_blocks: Blocks from one head's first to the next one's in the parts.
    """
    batch, heads, count, tokens, width = blocks.shape
    strides = blocks.stride()[:4]
    is_aligned = all(stride % ALIGNMENT == 0 for stride in strides)
    constants, pieces = _constants(how, tokens, width)
    constants |= {
        "TOKENS": tokens,
        "WIDTH": width,
        "BITS": how.bits,
        "BFLOAT": blocks.dtype == torch.bfloat16,
        "ALIGNED": is_aligned,
        # Sums of products that are not rounded in between would be other numbers.
        "enable_fp_fusion": False,
    }
    token_stride = strides[3]
    kind = (
        *(blocks.device, blocks.dtype),
        # Of `scales` and `refused` single numbers are written, wherever they lie.
        *(tensor.data_ptr() % ALIGNMENT == 0 for tensor in (blocks, *parts[:3])),
        *(token_stride % ALIGNMENT == 0, token_stride == 1),
        *(stride >> 31 for stride in strides),
    )
    sizes = (heads, count, head_blocks)
    arguments: tuple[torch.Tensor | int, ...] = (blocks, *parts, refused, *strides, *sizes)
    return Call(how.layout, (batch * heads * count, pieces, 1), arguments, constants, kind)


def _constants(how: Format, tokens: int, width: int) -> tuple[dict[str, int | bool], int]:
    """Return the tile's sizes and what follows from them, and the programs per block."""
    if how.layout == "channel":
        rows = power_of_two(tokens)
        columns = min(max(8, _TILE // rows), _least_columns(width))
        constants = {"FITS": how.fits, "HALVINGS": rows.bit_length() - 1}
        pieces, packed, elements = -(-width // columns), width, rows * columns
    elif how.layout == "group":
        columns = _least_columns(width)
        rows = min(max(1, _TILE // columns), power_of_two(tokens))
        constants = {"GROUP": min(how.group or width, width), "ROWS": rows}
        pieces, packed, elements = -(-tokens // rows), width, rows * columns
    else:
        group = min(how.group or width, width)
        rows, columns = power_of_two(group), _least_columns(tokens)
        constants = {"GROUP": group, "GROUPS": power_of_two(-(-width // group))}
        constants |= {"FITS": how.fits, "HALVINGS": rows.bit_length() - 1}
        pieces, packed, elements = 1, tokens, rows * columns
    fixed: dict[str, int | bool] = {
        **constants,
        "COLUMNS": columns,
        "WORD": _word(how.bits, packed, columns),
        "num_warps": min(16, max(4, elements // _ELEMENTS_PER_WARP)),
    }
    return fixed, pieces


def _word(bits: int, count: int, columns: int) -> int:
    """Return the widest word that rows of ``count`` codes are whole ones of."""
    if bits == 8:  # bytes as they are; neighbouring ones are stored together anyway
        return 8
    word, row_bytes = 32, (count * bits + 7) // 8
    while word > 8 and (row_bytes % (word // 8) or pattern_codes(bits, word) > columns):
        word //= 2
    return word


def _least_columns(count: int) -> int:
    return max(8, power_of_two(count))  # eight codes are whole bytes at every width
