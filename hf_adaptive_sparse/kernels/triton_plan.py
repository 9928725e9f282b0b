"""How a call of the Triton attention is cut into programs, and the arguments they get.

Sizes of tiles follow from the sizes of heads and blocks: nothing is tuned at run time. On an H100,
tiles of 128 tokens were faster than of 64 in every width, and eight programs per processor than
four where there are more; the kernel of single warps was fastest with eight warps per processor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from hf_adaptive_sparse.kernels import triton_warp_plan
from hf_adaptive_sparse.kernels.packed import PackedCache, PackedKeys, PackedValues
from hf_adaptive_sparse.kernels.triton_device import Launch, interprets, processors
from hf_adaptive_sparse.kernels.triton_sizes import (
    ALIGNMENT,
    pattern_codes,
    power_of_two,
    token_starts,
)

GENERAL = "split"
"""The kernel that takes all calls, by its name without ``_kernel``."""

WARP = "warp"
"""The faster one, which takes what most models ask for; see ``triton_warp_plan``."""

_MATRIX_ROWS = 16  # rows, and summed elements, that a matrix product has at least
_MOST_ROWS = 32
_LEAST_TILE_OF_BYTES = 32
_PROGRAMS_PER_PROCESSOR = 8
_WARPS_PER_PROCESSOR = 8
_LOG2E = math.log2(math.e)
_NO_MASK, _BOOL_MASK, _ADDED_MASK = 0, 1, 2


@dataclass(frozen=True)
class Plan:
    """How one call is cut into programs.

    The kernel of single warps has one program for all queries of a KV head: ``rows``, ``groups``,
    ``row_tiles`` and the words are of the general kernel alone.

    Attributes:
        tile: Tokens of a block that a program takes at once.
        raw_tile: The same of raw tokens.
        rows: Queries of one KV head per program, a power of two.
        groups: Groups of channels, padded to a power of two; ``rows * groups >= 16``.
        row_tiles: Programs per KV head and split.
        tiles_per_split: Tiles of blocks per program.
        block_splits: Splits of the blocks; raw tokens have one of their own.
        key_word: Bits of the words that keys are read in.
        value_word: The same for values.
        warps: Warps per program.
        stages: Tiles that are loaded ahead, and one.
        registers: The most registers per thread, None: the device's own limit.
    """

    tile: int
    raw_tile: int
    rows: int
    groups: int
    row_tiles: int
    tiles_per_split: int
    block_splits: int
    key_word: int
    value_word: int
    warps: int
    stages: int
    registers: int | None


def plan(query: torch.Tensor, cache: PackedCache, processors: int) -> Plan:
    """Return the plan of a call for a device of ``processors`` multiprocessors."""
    batch, heads, queries, key_dim = query.shape
    kv_heads, value_dim = cache.raw_keys.shape[1], cache.raw_values.shape[-1]
    groups = power_of_two(channel_groups(cache))
    row_count = heads // kv_heads * queries
    half = query.dtype != torch.float32
    most_rows = max(1, (_MOST_ROWS if half else _MATRIX_ROWS) // groups)
    rows = max(_MATRIX_ROWS // groups, min(power_of_two(row_count), most_rows), 1)
    row_tiles = -(-row_count // rows)
    widest = max(key_dim, value_dim)
    # As many codes as registers and shared memory hold as operands of a matrix product.
    wished = (128 if widest <= 128 else 64) if half else max(16, 4096 // power_of_two(widest))
    tile = min(wished, power_of_two(cache.blocks.block_length))
    value_word = _word(cache.blocks.values.bits, tile, cache.blocks.values.codes)
    tile = max(tile, _least_tile(cache.blocks.values.bits, value_word))
    key_word = _word(cache.blocks.keys.bits, power_of_two(key_dim), cache.blocks.keys.codes)
    tiles = cache.blocks.keys.codes.shape[2] * -(-cache.blocks.block_length // tile)
    wanted = max(1, processors * _PROGRAMS_PER_PROCESSOR // (batch * kv_heads * row_tiles))
    tiles_per_split = max(1, -(-tiles // wanted))
    return Plan(
        tile=tile,
        raw_tile=32 if half else 16,
        rows=rows,
        groups=groups,
        row_tiles=row_tiles,
        tiles_per_split=tiles_per_split,
        block_splits=-(-tiles // tiles_per_split),
        key_word=key_word,
        value_word=value_word,
        warps=4 if widest <= 128 else 8,
        stages=2 if half and widest <= 128 else 1,
        # Where the common case needs few more anyway, three programs of a processor overlap.
        registers=168 if half and widest <= 128 and rows * groups == _MATRIX_ROWS else None,
    )


@dataclass(eq=False)
class Variant:
    """What calls over the same blocks compile the kernels for.

    Attributes:
        name: Of the kernel that reads the blocks, without ``_kernel``.
        constants: By name.
        options: Warps, stages and registers.
        kernel: What stands for it where kernels that cannot be had are kept.
        kind: What else it is compiled for: types, alignment and width of the arguments.
        launches: What launches the two kernels again, once they are compiled.
    """

    name: str
    constants: dict[str, int | bool]
    options: dict[str, int]
    kernel: tuple[object, ...]
    kind: tuple[object, ...]
    launches: tuple[Launch, Launch] | None = None


class Call(NamedTuple):
    """Arguments of ``split_kernel`` or ``warp_kernel``, which are the same.

    Attributes:
        arguments: In its order: tensors, scale, strides, counts.
        grid: Programs: (batch, KV head, tile of rows), splits, 1.
        variant: What the kernel is compiled for.
    """

    arguments: tuple[torch.Tensor | float, ...]
    grid: tuple[int, int, int]
    variant: Variant


def channel_groups(cache: PackedCache) -> int:
    """Return the groups of channels of a head, of keys or values, whichever has more."""
    key_dim, value_dim = cache.raw_keys.shape[-1], cache.raw_values.shape[-1]
    key_group = (
        key_dim if cache.blocks.keys.group is None else min(cache.blocks.keys.group, key_dim)
    )
    return max(-(-key_dim // key_group), -(-value_dim // min(cache.blocks.values.group, value_dim)))


def prepare(
    query: torch.Tensor,
    cache: PackedCache,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    *,
    general: bool = False,
) -> tuple[Call, torch.Tensor]:
    """Return the call of a kernel, of the general one if so asked, and the tensor it writes.

    That tensor is float32: sums of weighted values ``(splits, rows, value head_dim)``, then highest
    scores and sums of weights, ``(splits, rows)`` each, where rows are ``batch * heads * queries``.
    """
    batch, heads, queries, _ = query.shape
    blocks = _blocks_of(query, cache, general)
    raw_keys, raw_values = _tokens(cache.raw_keys), _tokens(cache.raw_values)
    raw_length, value_dim = raw_keys.shape[2], raw_values.shape[3]
    splits = blocks.cut.block_splits + (raw_length > 0)
    if blocks.kernel == WARP:
        splits = blocks.cut.block_splits + -(-raw_length // blocks.cut.raw_tile)
    mask_kind, given_mask, mask_rows = _NO_MASK, query, False
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        given_mask = mask.expand(batch, heads, queries, cache.length)
        mask_strides = given_mask.stride()
        mask_kind = _ADDED_MASK
        if mask.dtype == torch.bool:
            mask_kind, given_mask = _BOOL_MASK, given_mask.view(torch.uint8)
        # transformers may hand over the heads of a KV head as queries, one mask for all of them.
        mask_rows = (heads > 1 and mask_strides[1] != 0) or (queries > 1 and mask_strides[2] != 0)
    partial = query.new_empty(
        splits * batch * heads * queries * (value_dim + 2), dtype=torch.float32
    )
    raw_strides = (*raw_keys.stride()[:2], *raw_values.stride()[:2])
    strides = (*query.stride()[:3], *raw_strides, *mask_strides)
    asked = (
        *(mask_kind, mask_rows, is_causal, cache.skip > 0, given_mask.dtype),
        *(query.data_ptr() % ALIGNMENT, given_mask.data_ptr() % ALIGNMENT),
        *(raw_keys.data_ptr() % ALIGNMENT, raw_values.data_ptr() % ALIGNMENT),
        *(_all_divisible(raw_strides), max(strides) >> 31),
    )
    variant = blocks.variants.get(asked)
    if variant is None or asked[-1]:
        variant = _variant(query, blocks, asked, strides)
        blocks.variants[asked] = variant
    arguments: tuple[torch.Tensor | float, ...] = (
        *(query, partial, *blocks.tensors, raw_keys, raw_values, given_mask),
        query if blocks.starts is None else blocks.starts,
        scale * _LOG2E,
        *strides[:3],
        *blocks.strides,
        *strides[3:],
        *blocks.heads,
        *(blocks.count, cache.blocks.length, raw_length, cache.sinks, cache.skip),
        *blocks.cuts,
    )
    return Call(arguments, (blocks.programs, splits, 1), variant), partial


@dataclass(frozen=True)
class _Blocks:
    """What calls have in common as long as the blocks are the same, worked out once.

    Attributes:
        kernel: The kernel's name, ``GENERAL`` or ``WARP``.
        cut: The plan.
        tensors: The blocks' tensors, in the kernel's order.
        strides: Their strides of batch, head and block, likewise.
        starts: First token of each block where some are short.
        heads: Queries per KV head, KV heads, heads per KV head, queries per head.
        count: Blocks.
        cuts: Tiles per split, splits of the blocks, programs per KV head and split.
        programs: Programs per split.
        constants: What the kernel is compiled for, but for what masks and raw tokens decide.
        is_aligned: Whether each head of the tensors begins at a multiple of 16 elements.
        kind: Types and alignment of the tensors, divisibility and width of the strides.
        variants: What calls were compiled for, by what they differ in.
    """

    kernel: str
    cut: Plan
    tensors: tuple[torch.Tensor, ...]
    strides: tuple[int, ...]
    starts: torch.Tensor | None
    heads: tuple[int, ...]
    count: int
    cuts: tuple[int, ...]
    programs: int
    constants: dict[str, int | bool]
    is_aligned: bool
    kind: tuple[object, ...]
    variants: dict[tuple[object, ...], Variant] = field(default_factory=dict)


def _variant(
    query: torch.Tensor, blocks: _Blocks, asked: tuple[Any, ...], strides: tuple[int, ...]
) -> Variant:
    mask_kind, mask_rows, is_causal, skips, *kind, raw_divisible, _ = asked
    constants = {
        **blocks.constants,
        "MASK": mask_kind,
        "MASK_ROWS": mask_rows,
        "CAUSAL": is_causal,
    }
    options = {"num_warps": blocks.cut.warps, "num_stages": blocks.cut.stages}
    if blocks.kernel == WARP:
        constants["EDGES"] = skips or blocks.starts is not None
    else:
        constants["ALIGNED"] = blocks.is_aligned and raw_divisible
        registers = blocks.cut.registers
        by_channel = constants["KEY_GROUP"] == 0
        if registers and not mask_rows and by_channel and torch.version.hip is None:
            options["maxnreg"] = registers
    return Variant(
        name=blocks.kernel,
        constants=constants,
        options=options,
        kernel=(blocks.kernel, query.device, query.dtype, *constants.values()),
        kind=(*blocks.kind, *kind, *(stride >> 31 for stride in strides)),
    )


def _blocks_of(query: torch.Tensor, cache: PackedCache, general: bool) -> _Blocks:
    """Return what is known of the blocks: all layers ask for every token, it costs as a kernel."""
    known = cache.blocks.prepared
    asked = ("triton", query.shape, query.dtype, general)
    if asked not in known:
        known[asked] = _prepare_blocks(query, cache, general)
    found: _Blocks = known[asked]
    return found


def _prepare_blocks(query: torch.Tensor, cache: PackedCache, general: bool) -> _Blocks:
    batch, heads, queries, key_dim = query.shape
    kv_heads, value_dim = cache.raw_keys.shape[1], cache.raw_values.shape[-1]
    keys, values = _with_rows(cache.blocks.keys), _with_rows_of_values(cache.blocks.values)
    cut = plan(query, cache, processors(query.device))
    lengths = cache.blocks.lengths
    key_parts = (keys.codes, keys.step, keys.minimum)
    value_parts = (values.codes, values.step_codes, values.min_codes, values.scales)
    measured = (keys.codes, keys.step, values.codes, values.step_codes, values.scales)
    strides = tuple(stride for part in measured for stride in part.stride()[:3])
    row_count = heads // kv_heads * queries
    constants: dict[str, int | bool] = {
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "VALUE_PAD": max(_MATRIX_ROWS, power_of_two(value_dim)),
        "KEY_BITS": keys.bits,
        "VALUE_BITS": values.bits,
        "VALUE_GROUP": min(values.group, value_dim),
        "BLOCK": cache.blocks.block_length,
        "SHORT": lengths is not None,
        "WIDEN": query.dtype == torch.bfloat16 and interprets(),
    }
    units = None
    if not general and torch.version.hip is None:
        units = triton_warp_plan.units(query, keys, values, cache.blocks.block_length, row_count)
    if units is not None:
        cut = _plan_of_warps(cut, units.tile, keys, cache.blocks.block_length, query.device)
        constants |= {
            "KEY_PAD": triton_warp_plan.key_pad(key_dim, units.key),
            "RAW_PAD": max(_MATRIX_ROWS, power_of_two(key_dim)),
            "KEY_UNIT": units.key,
            "VALUE_UNIT": units.value,
            "NATIVE": not interprets(),
        }
    else:
        constants |= {
            "KEY_PAD": max(power_of_two(key_dim), _least_tile(keys.bits, cut.key_word)),
            "KEY_WORD": cut.key_word,
            "VALUE_WORD": cut.value_word,
            "KEY_GROUP": 0 if keys.group is None else min(keys.group, key_dim),
            "ROWS": cut.rows,
            "GROUPS": cut.groups,
            "HALF": query.dtype != torch.float32,
        }
    constants |= {"TILE": cut.tile, "RAW_TILE": cut.raw_tile}
    return _Blocks(
        kernel=GENERAL if units is None else WARP,
        cut=cut,
        tensors=(*key_parts, *value_parts),
        strides=strides,
        starts=None if lengths is None else token_starts(lengths, query.device),
        heads=(row_count, kv_heads, heads // kv_heads, queries),
        count=keys.codes.shape[2],
        cuts=(cut.tiles_per_split, cut.block_splits, cut.row_tiles),
        programs=batch * kv_heads * cut.row_tiles,
        constants=constants,
        is_aligned=_aligned(keys.codes, values.codes, values.step_codes),
        kind=(
            *((part.dtype, part.data_ptr() % ALIGNMENT) for part in (*key_parts, *value_parts)),
            *((s % ALIGNMENT == 0, s == 1, s >> 31) for s in strides),
        ),
    )


def _plan_of_warps(
    cut: Plan, tile: int, keys: PackedKeys, block_length: int, device: torch.device
) -> Plan:
    """Return the plan of the kernel of single warps: as many as a device holds at once."""
    batch, kv_heads, blocks = keys.codes.shape[:3]
    tiles = blocks * (block_length // tile)
    wanted = max(1, processors(device) * _WARPS_PER_PROCESSOR // (batch * kv_heads))
    tiles_per_split = -(-tiles // wanted)
    return replace(
        cut,
        tile=tile,
        row_tiles=1,
        tiles_per_split=tiles_per_split,
        block_splits=-(-tiles // tiles_per_split),
        warps=1,
        stages=1,
        registers=None,
    )


def _least_size(bits: int, word: int) -> int:
    """Return the codes that fill the words which repeat the pattern, and a matrix product."""
    return max(_MATRIX_ROWS, pattern_codes(bits, word))


def _least_tile(bits: int, word: int) -> int:
    """Return the codes in a row of a tile at least."""
    if bits % 3 == 0 and word == 8:
        # 16 of these came out wrong on an H100 (Triton 3.6), right in the interpreter.
        return _LEAST_TILE_OF_BYTES
    return _least_size(bits, word)


def _word(bits: int, size: int, codes: torch.Tensor) -> int:
    """Return the widest word that ``size`` codes per row allow, and the rows' addresses."""
    word = 32
    places = (codes.data_ptr(), codes.shape[-1], *codes.stride()[:-1])
    while word > 8 and (_least_size(bits, word) > size or any(p % (word // 8) for p in places)):
        word //= 2
    return word


def _aligned(*parts: torch.Tensor) -> bool:
    """Return whether each head of these tensors begins at a multiple of 16 elements."""
    return all(_all_divisible(part.stride()[:2]) for part in parts)


def _all_divisible(strides: Iterable[int]) -> bool:
    return all(stride % ALIGNMENT == 0 for stride in strides)


def _tokens(part: torch.Tensor) -> torch.Tensor:
    """Return raw tokens with those of a head side by side: themselves, as a rule."""
    _, _, token, channel = part.stride()
    if channel == 1 and token == part.shape[3]:
        return part
    return _rows(part, 2)


def _rows(part: torch.Tensor, inner: int) -> torch.Tensor:
    """Return ``part`` with its last ``inner`` dimensions contiguous: itself, as a rule."""
    expected = 1
    for size, stride in zip(part.shape[: -inner - 1 : -1], part.stride()[::-1], strict=False):
        if size > 1 and stride != expected:
            return part.contiguous()
        expected *= size
    return part


def _with_rows(keys: PackedKeys) -> PackedKeys:
    codes, step, minimum = (
        _rows(part, part.dim() - 3) for part in (keys.codes, keys.step, keys.minimum)
    )
    if step.stride() != minimum.stride():
        step, minimum = step.contiguous(), minimum.contiguous()
    return PackedKeys(keys.bits, codes, step, minimum, keys.group)


def _with_rows_of_values(values: PackedValues) -> PackedValues:
    codes, steps, minima, scales = (
        _rows(part, part.dim() - 3)
        for part in (values.codes, values.step_codes, values.min_codes, values.scales)
    )
    if steps.stride() != minima.stride():
        steps, minima = steps.contiguous(), minima.contiguous()
    return PackedValues(values.bits, codes, steps, minima, scales, values.group)
