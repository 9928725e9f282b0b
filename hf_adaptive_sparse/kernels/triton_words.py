"""What several of Triton's kernels do with words of 32 bits."""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def permute_bytes(first, second, selector, NATIVE: tl.constexpr):
    """Return the bytes of two words that the four digits of a selector name: 4 to 7, the second's.

    ``NATIVE`` says that it is NVIDIA's instruction, else it takes shifts.
    """
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
