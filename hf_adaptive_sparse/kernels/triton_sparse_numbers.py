"""What is spread over columns as numbers, and sums of its products with x, for Triton.

Sums are float32. Where x is read in words, too (``PACKED``), NVIDIA's matrix units multiply words
as they are: a thread's two rows and its columns of x are its part of the operands of an instruction
that multiplies 16 x 16 numbers with 16 x 8. Four threads in turn make up a row of the first and a
column of the second, so that the product of each four with itself is on the diagonal of the result,
and the rest is left. That wastes seven eighths of what these units do, and saves taking words apart
and a multiplication per number, for every token anew. Elsewhere words are taken apart.
"""

# What Triton compiles has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hf_adaptive_sparse.kernels.triton_words import permute_bytes

_UPPER: tl.constexpr = tl.constexpr(0xFFFF0000)


@triton.jit
def _pair(word, HALF: tl.constexpr):
    """Return the two 16-bit numbers of uint32 words as float32."""
    if HALF:
        first = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        first = (word << 16).to(tl.float32, bitcast=True)
        second = (word & _UPPER).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def _code(word, k: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Return the code in byte ``k``: by its bits in those of 2**23 + excess code, less that."""
    base: tl.constexpr = 8388608.0 + (1 << (BITS - 1))
    bits = permute_bytes(word, (word & 0) + 0x4B000000, (word & 0) + 0x7540 + k, NATIVE)
    return bits.to(tl.float32, bitcast=True) - base


@triton.jit
def four_numbers(
    w0, w1, w2, w3, i: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """Return the ``i``-th four columns of spread words: float32, codes as such."""
    if BITS == 32:
        n0 = w0.to(tl.float32, bitcast=True)
        n1 = w1.to(tl.float32, bitcast=True)
        n2 = w2.to(tl.float32, bitcast=True)
        n3 = w3.to(tl.float32, bitcast=True)
    elif BITS == 16:
        n0, n1 = _pair(w0 if i == 0 else w2, HALF)
        n2, n3 = _pair(w1 if i == 0 else w3, HALF)
    else:
        word = w0 if i == 0 else (w1 if i == 1 else (w2 if i == 2 else w3))
        n0 = _code(word, 0, BITS, NATIVE)
        n1 = _code(word, 1, BITS, NATIVE)
        n2 = _code(word, 2, BITS, NATIVE)
        n3 = _code(word, 3, BITS, NATIVE)
    return n0, n1, n2, n3


@triton.jit
def _four_of_x(x, column, columns, FULL: tl.constexpr):
    """Return one token's numbers of four columns: float32."""
    if FULL:
        x0 = tl.load(x + column).to(tl.float32)
        x1 = tl.load(x + column + 1).to(tl.float32)
        x2 = tl.load(x + column + 2).to(tl.float32)
        x3 = tl.load(x + column + 3).to(tl.float32)
    else:
        x0 = tl.load(x + column, mask=column < columns, other=0).to(tl.float32)
        x1 = tl.load(x + column + 1, mask=column + 1 < columns, other=0).to(tl.float32)
        x2 = tl.load(x + column + 2, mask=column + 2 < columns, other=0).to(tl.float32)
        x3 = tl.load(x + column + 3, mask=column + 3 < columns, other=0).to(tl.float32)
    return x0, x1, x2, x3


@triton.jit
def words_of_eight(rows, begin, COLUMNS: tl.constexpr, i: tl.constexpr, THREADS: tl.constexpr):
    """Return the addresses of 16 bytes of each thread, ``(THREADS, 4)`` words.

    Threads have ``COLUMNS`` columns of 16 bits each, from column ``begin`` on; these are the
    ``i``-th eight.
    """
    place = tl.arange(0, THREADS)[:, None] * (COLUMNS // 2) + tl.arange(0, 4)[None, :]
    return rows.to(tl.pointer_type(tl.uint32)) + (begin // 2 + 4 * i + place)


@triton.jit
def _eight_of_x(
    x, begin, columns, COLUMNS: tl.constexpr, i: tl.constexpr, THREADS: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Return four words of one token's numbers, read at once."""
    address = words_of_eight(x, begin, COLUMNS, i, THREADS)
    if FULL:
        words = tl.load(address)
    else:
        column = begin + tl.arange(0, THREADS) * COLUMNS + 8 * i
        words = tl.load(address, mask=(column < columns)[:, None], other=0)
    even, odd = tl.split(tl.reshape(words, (THREADS, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


def _pairs_by(high_byte: str, start: str, end: str) -> tl.constexpr:
    """Return the program that puts ``high_byte`` above each byte of a word, and goes on so."""
    return tl.constexpr(
        "{.reg .b32 m, b, u, z, h, p, q; mov.b32 m, 0x" + high_byte * 4 + "; " + start + "; "
        "prmt.b32 $0, $2, m, 0x4140; prmt.b32 $1, $2, m, 0x4342; " + end + "}"
    )


_ADD_HALVES = "add.rn.f16x2 $0, $0, b; add.rn.f16x2 $1, $1, b;"
_ADD = "fma.rn.bf16x2 $0, $0, u, b; fma.rn.bf16x2 $1, $1, u, b;"
_ONE = "; mov.b32 u, 0x3F803F80"
_HALVE = "max.bf16x2 p, $0, z; max.bf16x2 q, $1, z;"
_HALVE += "fma.rn.bf16x2 $0, p, h, $0; fma.rn.bf16x2 $1, q, h, $1;"
# Bases are -1152, -1032, -256 and -136, twice.
_HALF_8: tl.constexpr = _pairs_by("64", "mov.b32 b, 0xE480E480", _ADD_HALVES)
_HALF_4: tl.constexpr = _pairs_by("64", "mov.b32 b, 0xE408E408", _ADD_HALVES)
_BFLOAT_8: tl.constexpr = _pairs_by(
    "43", "mov.b32 b, 0xC380C380; mov.b32 z, 0; mov.b32 h, 0xBF00BF00" + _ONE, _ADD + _HALVE
)
_BFLOAT_4: tl.constexpr = _pairs_by("43", "mov.b32 b, 0xC308C308" + _ONE, _ADD)


@triton.jit
def _sixteen_bits(number, HALF: tl.constexpr):
    """Return the bits of a float32 of at most eight digits as a 16-bit number: uint32."""
    if HALF:
        bits = number.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        bits = number.to(tl.uint32, bitcast=True) >> 16
    return bits


@triton.jit
def _pairs_of_codes(word, BITS: tl.constexpr, HALF: tl.constexpr, NATIVE: tl.constexpr):
    """Return the codes of a word's bytes as two words of 16-bit numbers.

    By their bits in those of 1024 + excess code as float16, or of 128 + excess code as bfloat16. Of
    the latter only seven bits are the number's: beyond they count twice, and are halved again.
    """
    if NATIVE:
        if HALF:
            asm: tl.constexpr = _HALF_8 if BITS == 8 else _HALF_4
        else:
            asm: tl.constexpr = _BFLOAT_8 if BITS == 8 else _BFLOAT_4  # type: ignore[no-redef]
        low, high = tl.inline_asm_elementwise(
            asm, "=&r,=&r,r", [word], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
        )
    else:
        low = _sixteen_bits(_code(word, 0, BITS, NATIVE), HALF)
        low |= _sixteen_bits(_code(word, 1, BITS, NATIVE), HALF) << 16
        high = _sixteen_bits(_code(word, 2, BITS, NATIVE), HALF)
        high |= _sixteen_bits(_code(word, 3, BITS, NATIVE), HALF) << 16
    return low, high


@triton.jit
def _added(total, word, other, HALF: tl.constexpr):
    """Return ``total`` plus the products of two words' pairs."""
    w0, w1 = _pair(word, HALF)
    x0, x1 = _pair(other, HALF)
    total += w0 * x0
    total += w1 * x1
    return total


@triton.jit
def _multiply(c0, c1, c2, c3, u0, v0, u1, v1, x0, x1, HALF: tl.constexpr, NATIVE: tl.constexpr):
    """Add the product of words, four numbers of two rows with four of x, to a thread's part."""
    if NATIVE:
        kind: tl.constexpr = "f16" if HALF else "bf16"
        asm: tl.constexpr = (
            "mma.sync.aligned.m16n8k16.row.col.f32." + kind + "." + kind + ".f32 "
            "{$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$4,$5,$6,$7};"
        )
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            asm,
            "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r",
            [c0, c1, c2, c3, u0, v0, u1, v1, x0, x1],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,  # all threads of a warp take part: it must stay where it is
            pack=1,
        )
    else:
        c0 = _added(_added(c0, u0, x0, HALF), u1, x1, HALF)
        c2 = _added(_added(c2, v0, x0, HALF), v1, x1, HALF)
    return c0, c1, c2, c3


@triton.jit
def no_sums(THREADS: tl.constexpr):
    """Return the sums of no products, of one token: four per thread."""
    zero = tl.zeros((THREADS,), dtype=tl.float32)
    return zero, zero, zero, zero


@triton.jit
def add_products(
    sums, u, v, x, begin, columns, BITS: tl.constexpr, COLUMNS: tl.constexpr,
    THREADS: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Return ``sums`` plus the products of one token with a tile of two rows.

    ``u`` and ``v`` are the rows' spread words, ``begin`` is the tile's first column.
    """
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    c0, c1, c2, c3 = sums
    if PACKED:
        for i in tl.static_range(COLUMNS // 8):
            x0, x1, x2, x3 = _eight_of_x(x, begin, columns, COLUMNS, i, THREADS, FULL)
            if BITS == 16:
                u0, u1, u2, u3 = u
                v0, v1, v2, v3 = v
            else:
                u0, u1 = _pairs_of_codes(u[2 * i], BITS, HALF, NATIVE)
                u2, u3 = _pairs_of_codes(u[2 * i + 1], BITS, HALF, NATIVE)
                v0, v1 = _pairs_of_codes(v[2 * i], BITS, HALF, NATIVE)
                v2, v3 = _pairs_of_codes(v[2 * i + 1], BITS, HALF, NATIVE)
            c0, c1, c2, c3 = _multiply(c0, c1, c2, c3, u0, v0, u1, v1, x0, x1, HALF, NATIVE)
            c0, c1, c2, c3 = _multiply(c0, c1, c2, c3, u2, v2, u3, v3, x2, x3, HALF, NATIVE)
    else:
        for i in tl.static_range(COLUMNS // 4):
            column = begin + tl.arange(0, THREADS) * COLUMNS + 4 * i
            x0, x1, x2, x3 = _four_of_x(x, column, columns, FULL)
            u0, u1, u2, u3 = four_numbers(u[0], u[1], u[2], u[3], i, BITS, HALF, NATIVE)
            v0, v1, v2, v3 = four_numbers(v[0], v[1], v[2], v[3], i, BITS, HALF, NATIVE)
            c0 += u0 * x0
            c0 += u1 * x1
            c0 += u2 * x2
            c0 += u3 * x3
            c2 += v0 * x0
            c2 += v1 * x1
            c2 += v2 * x2
            c2 += v3 * x3
    return c0, c1, c2, c3


@triton.jit
def rows_of_sums(sums, PACKED: tl.constexpr, NATIVE: tl.constexpr):
    """Return what the sums of one token come to in each of the two rows."""
    c0, c1, c2, c3 = sums
    if PACKED and NATIVE:
        lane = tl.inline_asm_elementwise(
            "mov.u32 $0, %laneid;", "=r,f", [c0], dtype=tl.int32, is_pure=True, pack=1
        )
        # Of row lane // 4 a thread has columns 2 * (lane % 4) and the next: one of eight is wanted.
        first = (lane >> 2) == (lane & 3) * 2
        second = (lane >> 2) == (lane & 3) * 2 + 1
        c0 = tl.where(first, c0, tl.where(second, c1, 0.0))
        c2 = tl.where(first, c2, tl.where(second, c3, 0.0))
    return tl.sum(c0, axis=0), tl.sum(c2, axis=0)
