"""What the threads of one warp do together, for Triton: tensors ``(N, 32)``, a thread a column.

A thread reads words where it needs them as operands of the matrix units, so that nothing moves
between threads but the maximum of a row. That is NVIDIA's ``mma.sync.m16n8k16``, of which thread
``4 * i + j`` has, of the first operand, row ``i``, of the second, column ``i``, and of the result,
of row ``i``, columns ``2 * j`` and ``2 * j + 1``: here called its row and its part. Which of the 16
numbers that are multiplied and summed up a thread has does not matter, if it has the same of both.

``NATIVE`` says that instructions are to be had; else the same is done by Triton's own operations,
for its interpreter. Everything goes by instructions, loads too: given loads of its own, Triton
would deal elements to threads anew.
"""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

THREADS: tl.constexpr = tl.constexpr(32)


@triton.jit
def row_and_part():
    """Return each thread's row, 0 to 7, and its part of it, 0 to 3: int32 ``(1, 32)``."""
    lane = tl.arange(0, THREADS)[None, :]
    return lane // 4, lane % 4


@triton.jit
def pick(words, i):
    """Return element ``i`` of each thread: integers ``(N, 32)`` to ``(1, 32)``."""
    index = tl.arange(0, words.shape[0])[:, None]
    return tl.sum(tl.where(index == i, words, 0), axis=0)[None, :]


@triton.jit
def load_bits(address, NATIVE: tl.constexpr):
    """Return what lies at addresses of numbers of 8, 16 or 32 bits: uint32."""
    SIZE: tl.constexpr = address.dtype.element_ty.primitive_bitwidth
    if not NATIVE:
        unsigned: tl.constexpr = tl.uint8 if SIZE == 8 else (tl.uint16 if SIZE == 16 else tl.uint32)
        bits = tl.load(address).to(unsigned, bitcast=True).to(tl.uint32)
    elif SIZE == 32:
        bits = tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [address], dtype=tl.uint32, is_pure=False, pack=1
        )
    elif SIZE == 16:
        bits = tl.inline_asm_elementwise(
            "{.reg .u16 h; ld.global.u16 h, [$1]; cvt.u32.u16 $0, h;}",
            "=r,l",
            [address],
            dtype=tl.uint32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.static_assert(SIZE == 8)
        bits = tl.inline_asm_elementwise(
            "ld.global.u8 $0, [$1];", "=r,l", [address], dtype=tl.uint32, is_pure=False, pack=1
        )
    return bits


@triton.jit
def load_numbers(address, NATIVE: tl.constexpr):
    """Return the numbers at addresses as float32."""
    bits = load_bits(address, NATIVE)
    if address.dtype.element_ty == tl.float16:
        numbers = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif address.dtype.element_ty == tl.bfloat16:
        numbers = (bits << 16).to(tl.float32, bitcast=True)
    elif address.dtype.element_ty == tl.float32:
        numbers = bits.to(tl.float32, bitcast=True)
    else:
        tl.static_assert(address.dtype.element_ty == tl.uint8)
        numbers = bits.to(tl.float32)
    return numbers


@triton.jit
def _load_2(address, NATIVE: tl.constexpr):
    if NATIVE:
        w0, w1 = tl.inline_asm_elementwise(
            "ld.global.v2.b32 {$0, $1}, [$2];",
            "=r,=r,l",
            [address],
            dtype=(tl.uint32, tl.uint32),
            is_pure=False,
            pack=1,
        )
    else:
        w0 = tl.load(address)
        w1 = tl.load(address + 1)
    return w0, w1


@triton.jit
def _load_4(address, NATIVE: tl.constexpr):
    if NATIVE:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [address],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=False,
            pack=1,
        )
    else:
        w0 = tl.load(address)
        w1 = tl.load(address + 1)
        w2 = tl.load(address + 2)
        w3 = tl.load(address + 3)
    return w0, w1, w2, w3


@triton.jit
def load_words(address, COUNT: tl.constexpr, NATIVE: tl.constexpr):
    """Return ``COUNT`` words, 1 to 8, from byte addresses on: a tuple of uint32.

    Addresses are multiples of as many bytes, up to 16, as the lowest bit of ``4 * COUNT`` says.
    """
    words = address.to(tl.pointer_type(tl.uint32))
    if COUNT == 1:
        found = (load_bits(words, NATIVE),)
    elif COUNT == 2:
        found = _load_2(words, NATIVE)
    elif COUNT == 3:
        w0 = load_bits(words, NATIVE)
        w1 = load_bits(words + 1, NATIVE)
        w2 = load_bits(words + 2, NATIVE)
        found = (w0, w1, w2)
    elif COUNT == 4:
        found = _load_4(words, NATIVE)
    elif COUNT == 6:
        w0, w1 = _load_2(words, NATIVE)
        w2, w3 = _load_2(words + 2, NATIVE)
        w4, w5 = _load_2(words + 4, NATIVE)
        found = (w0, w1, w2, w3, w4, w5)
    else:
        tl.static_assert(COUNT == 8)
        w0, w1, w2, w3 = _load_4(words, NATIVE)
        w4, w5, w6, w7 = _load_4(words + 4, NATIVE)
        found = (w0, w1, w2, w3, w4, w5, w6, w7)
    return found


@triton.jit
def store_pairs(address, first, second, inside, NATIVE: tl.constexpr):
    """Store two float32 numbers at addresses that are multiples of 8, where ``inside`` says so."""
    if NATIVE:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.u32 p, $4, 0; @p st.global.v2.f32 [$1], {$2, $3}; "
            "mov.b32 $0, 0;}",
            "=r,l,f,f,r",
            [address.to(tl.int64), first, second, inside.to(tl.uint32)],
            dtype=tl.uint32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(address, first, mask=inside)
        tl.store(address + 1, second, mask=inside)


@triton.jit
def store_numbers(address, number, inside, NATIVE: tl.constexpr):
    """Store float32 numbers at addresses, where ``inside`` says so."""
    if NATIVE:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.u32 p, $3, 0; @p st.global.f32 [$1], $2; mov.b32 $0, 0;}",
            "=r,l,f,r",
            [address.to(tl.int64), number, inside.to(tl.uint32)],
            dtype=tl.uint32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(address, number, mask=inside)


@triton.jit
def _four_numbers(first, second):
    """Return the numbers of two words of two float16 each, ``(N, 32, 2, 2)``, as float32."""
    words = tl.join(first, second)
    low = (words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    high = (words >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(low, high).to(tl.float32)


@triton.jit
def multiply(sums, a0, a1, b0, b1, NATIVE: tl.constexpr):
    """Return sums and the products of eight rows with eight columns, added up over 16 numbers.

    Args:
        sums: From ``no_sums``, or here; ``(N, 32)`` each. The first is of the thread's row and the
            first column of its part, the second of the next column, the others are zeros: of eight
            more rows, which stay empty, but where the instruction has them nothing need be moved.
        a0: Two numbers, float16, of the thread's row; ``(1, 32)``.
        a1: Two more.
        b0: Two numbers, float16, of the thread's column, ``(N, 32)``: those which a0's go with.
        b1: Two more.
        NATIVE: See the module.
    """
    c0, c1, c2, c3 = sums
    if NATIVE:
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            "{.reg .b32 z; mov.b32 z, 0; mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{$0, $1, $2, $3}, {$8, z, $9, z}, {$10, $11}, {$4, $5, $6, $7};}",
            "=f,=f,=f,=f,f,f,f,f,r,r,r,r",
            [c0, c1, c2, c3, a0, a1, b0, b1],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,  # all threads of a warp take part: it must stay where it is
            pack=1,
        )
    else:
        rows = tl.reshape(_four_numbers(a0, a1), (1, 8, 1, 16))
        columns = tl.reshape(_four_numbers(b0, b1), (b0.shape[0], 1, 8, 16))
        total = tl.sum(rows * columns, axis=3)
        even, odd = tl.split(tl.reshape(total, (b0.shape[0], 8, 4, 2)))
        c0 += tl.reshape(even, (b0.shape[0], THREADS))
        c1 += tl.reshape(odd, (b0.shape[0], THREADS))
    return c0, c1, c2, c3


@triton.jit
def no_sums(COUNT: tl.constexpr):
    """Return sums of no products for ``multiply``, ``(COUNT, 32)`` each."""
    zeros = tl.zeros((COUNT, THREADS), dtype=tl.float32)
    return zeros, zeros, zeros, zeros


@triton.jit
def _exchanged(number, DISTANCE: tl.constexpr):
    """Return the number of the part whose place differs in one bit: 1 or 2."""
    if DISTANCE == 1:
        asm: tl.constexpr = "shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;"
    else:
        asm: tl.constexpr = "shfl.sync.bfly.b32 $0, $1, 2, 0x1f, 0xffffffff;"  # type: ignore[no-redef]
    return tl.inline_asm_elementwise(asm, "=f,f", [number], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def row_max(number, NATIVE: tl.constexpr):
    """Return the highest of the four parts of a thread's row: float32 ``(1, 32)``."""
    if NATIVE:
        number = tl.maximum(number, _exchanged(number, 1))
        number = tl.maximum(number, _exchanged(number, 2))
    else:
        highest = tl.max(tl.reshape(number, (8, 4)), axis=1)[:, None]
        number = tl.reshape(tl.broadcast_to(highest, (8, 4)), (1, THREADS))
    return number


@triton.jit
def row_sum(number, NATIVE: tl.constexpr):
    """Return the sum of the four parts of a thread's row: float32 ``(1, 32)``."""
    if NATIVE:
        number += _exchanged(number, 1)
        number += _exchanged(number, 2)
    else:
        total = tl.sum(tl.reshape(number, (8, 4)), axis=1)[:, None]
        number = tl.reshape(tl.broadcast_to(total, (8, 4)), (1, THREADS))
    return number
