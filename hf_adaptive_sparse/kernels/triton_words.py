"""Words of 32 bits, taken apart and put together anew, for Triton.

``NATIVE`` says that it is done by NVIDIA's instructions, else it takes shifts and selections.
"""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def permute_bytes(first, second, selector, NATIVE: tl.constexpr):
    """Return the bytes of two words that a selector's four digits name: 4 to 7, the second's."""
    if NATIVE:
        taken = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [first, second, selector],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        taken = first & 0
        for i in tl.static_range(4):
            digit = selector >> (4 * i)
            word = tl.where((digit & 4) != 0, second, first)
            taken |= ((word >> ((digit & 3) * 8)) & 0xFF) << (8 * i)
    return taken


@triton.jit
def shifted(low, high, bits, NATIVE: tl.constexpr):
    """Return 32 bits of two words from bit ``bits``, 0 to 32, of the first on."""
    if NATIVE:
        word = tl.inline_asm_elementwise(
            "shf.r.clamp.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, bits],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        both = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
        word = (both >> bits.to(tl.uint64)).to(tl.uint32)
    return word


@triton.jit
def moved_up(kept, below, here, NATIVE: tl.constexpr):
    """Return a word of two halves, or where none is kept the upper half below and the lower."""
    if NATIVE:
        word = tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.u32 p, $1, 0;"
            + "mov.b32 $0, $3; @!p prmt.b32 $0, $2, $3, 0x5432;}",
            "=&r,r,r,r",
            [kept, below, here],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        word = tl.where(kept != 0, here, (below >> 16) | (here << 16))
    return word


@triton.jit
def gap(kept, here, UPPER: tl.constexpr, NATIVE: tl.constexpr):
    """Return a word of two halves, or where none is kept a zero, and the lower half above it.

    With ``UPPER`` the zero is the upper half, and nothing is above it.
    """
    if NATIVE:
        cut: tl.constexpr = "and.b32 $0, $2, 0xffff" if UPPER else "shl.b32 $0, $2, 16"
        word = tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.u32 p, $1, 0; mov.b32 $0, $2; @!p " + cut + ";}",
            "=&r,r,r",
            [kept, here],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        word = tl.where(kept != 0, here, here & 0xFFFF if UPPER else here << 16)
    return word


@triton.jit
def joined(first, second, HALF: tl.constexpr, NATIVE: tl.constexpr):
    """Return two float32 rounded to 16 bits as one uint32, the first in its lower half."""
    if NATIVE:  # in one instruction, which takes the upper half first
        kind: tl.constexpr = "f16x2" if HALF else "bf16x2"
        word = tl.inline_asm_elementwise(
            "cvt.rn." + kind + ".f32 $0, $2, $1;",
            "=r,f,f",
            [first, second],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        number: tl.constexpr = tl.float16 if HALF else tl.bfloat16
        low = first.to(number).to(tl.uint16, bitcast=True).to(tl.uint32)
        word = low | (second.to(number).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    return word
