"""What calls of the Triton attention over the same blocks have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from hf_adaptive_sparse.kernels import triton_warp_plan
from hf_adaptive_sparse.kernels.packed import PackedCache, PackedKeys, PackedValues
from hf_adaptive_sparse.kernels.triton_cuts import (
    MATRIX_ROWS,
    Plan,
    least_tile,
    plan,
    plan_of_warps,
)
from hf_adaptive_sparse.kernels.triton_device import Launch, interprets, processors
from hf_adaptive_sparse.kernels.triton_sizes import ALIGNMENT, power_of_two, token_starts

GENERAL = "split"
"""The kernel that takes all calls, by its name without ``_kernel``."""

WARP = "warp"
"""The faster one, which takes what most models ask for; see ``triton_warp_plan``."""


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


@dataclass(frozen=True)
class Blocks:
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


def blocks_of(query: torch.Tensor, cache: PackedCache, general: bool) -> Blocks:
    """Return what is known of the blocks: all layers ask for every token, it costs as a kernel."""
    known = cache.blocks.prepared
    asked = ("triton", query.shape, query.dtype, general)
    if asked not in known:
        known[asked] = _prepare_blocks(query, cache, general)
    found: Blocks = known[asked]
    return found


def _prepare_blocks(query: torch.Tensor, cache: PackedCache, general: bool) -> Blocks:
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
        "VALUE_PAD": max(MATRIX_ROWS, power_of_two(value_dim)),
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
        cut = plan_of_warps(cut, units.tile, keys, cache.blocks.block_length, query.device)
        constants |= {
            "KEY_PAD": triton_warp_plan.key_pad(key_dim, units.key),
            "RAW_PAD": max(MATRIX_ROWS, power_of_two(key_dim)),
            "KEY_UNIT": units.key,
            "VALUE_UNIT": units.value,
            "NATIVE": not interprets(),
        }
    else:
        constants |= {
            "KEY_PAD": max(power_of_two(key_dim), least_tile(keys.bits, cut.key_word)),
            "KEY_WORD": cut.key_word,
            "VALUE_WORD": cut.value_word,
            "KEY_GROUP": 0 if keys.group is None else min(keys.group, key_dim),
            "ROWS": cut.rows,
            "GROUPS": cut.groups,
            "HALF": query.dtype != torch.float32,
        }
    constants |= {"TILE": cut.tile, "RAW_TILE": cut.raw_tile}
    return Blocks(
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


def _aligned(*parts: torch.Tensor) -> bool:
    """Return whether each head of these tensors begins at a multiple of 16 elements."""
    return all(all_divisible(part.stride()[:2]) for part in parts)


def all_divisible(strides: Iterable[int]) -> bool:
    """Return whether all strides are multiples of 16 elements."""
    return all(stride % ALIGNMENT == 0 for stride in strides)


def contiguous_rows(part: torch.Tensor, inner: int) -> torch.Tensor:
    """Return ``part`` with its last ``inner`` dimensions contiguous: itself, as a rule."""
    expected = 1
    for size, stride in zip(part.shape[: -inner - 1 : -1], part.stride()[::-1], strict=False):
        if size > 1 and stride != expected:
            return part.contiguous()
        expected *= size
    return part


def _with_rows(keys: PackedKeys) -> PackedKeys:
    codes, step, minimum = (
        contiguous_rows(part, part.dim() - 3) for part in (keys.codes, keys.step, keys.minimum)
    )
    if step.stride() != minimum.stride():
        step, minimum = step.contiguous(), minimum.contiguous()
    return PackedKeys(keys.bits, codes, step, minimum, keys.group)


def _with_rows_of_values(values: PackedValues) -> PackedValues:
    codes, steps, minima, scales = (
        contiguous_rows(part, part.dim() - 3)
        for part in (values.codes, values.step_codes, values.min_codes, values.scales)
    )
    if steps.stride() != minima.stride():
        steps, minima = steps.contiguous(), minima.contiguous()
    return PackedValues(values.bits, codes, steps, minima, scales, values.group)
