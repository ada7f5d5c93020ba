# SPDX-License-Identifier: MIT
"""q_i k_i of pairs of rows in 16 bits, 32 channels at a time, on tensor cores.

They are the diagonal of Q K^T. The instruction mma.m16n8k8 multiplies 8 rows as loads leave them in
registers: lane 4 g + q has 8 adjacent channels, from 8 q on, of row g, four words of two channels.
One word is what an instruction takes of K, and two of Q: as its rows g and g + 8. So it has one
diagonal that is of use, in the first or the last two of the four numbers of each lane. That is one
instruction for two channels, and not three for one, to convert both and add their product.

Words 0 and 2 are added to the first four of a lane's eight numbers, words 1 and 3 to the others.

Triton does not say which elements it gives to a lane. So a lane compares their numbers with its own
(`checked`), and sums become NaN where these are not the expected ones.
"""

import triton
import triton.language as tl


def _text(kind: str) -> str:
    """PTX for operands $0... sums, $8... and $12... words of both rows, $16... the sums so far."""
    lines = ["{ .reg .f32 s<8>;"]
    for word in range(4):
        sums = range(word % 2 * 4, word % 2 * 4 + 4)
        # From the operands to registers, and from there to the results.
        old, new = (("$", 16), ("s", 0)) if word < 2 else (("s", 0), ("$", 0))
        results, addends = (
            ", ".join(f"{name}{first + i}" for i in sums) for name, first in (new, old)
        )
        both = f"${8 + word // 2 * 2}, ${9 + word // 2 * 2}"
        lines += [
            f"mma.sync.aligned.m16n8k8.row.col.f32.{kind}.{kind}.f32 "
            f"{{{results}}}, {{{both}}}, {{${12 + word}}}, {{{addends}}};"
        ]
    return "\n".join((*lines, "}"))


def _check_text() -> str:
    """PTX for operands $0... results, $8... numbers, $16... those of their elements, which should
    be 8 lane, ..., 8 lane + 7; they are sums of the first one and those of 1, 2 and 4."""
    lines = ["{ .reg .pred p; .reg .b32 n, x; mov.u32 n, %laneid; shl.b32 n, n, 3;"]
    lines += ["setp.eq.u32 p, $16, n;"]
    for i in (1, 2, 4):
        lines += [f"add.u32 x, n, {i}; setp.eq.and.u32 p, ${16 + i}, x, p;"]
    lines += ["selp.f32 $0, $8, 0f7FFFFFFF, p;"]
    lines += [f"mov.f32 ${i}, ${8 + i};" for i in range(1, 8)]
    return "\n".join((*lines, "}"))


_BFLOAT16, _FLOAT16 = (tl.constexpr(_text(kind)) for kind in ("bf16", "f16"))
_OPERANDS = tl.constexpr(",".join(["=&f"] * 8 + ["r"] * 8 + ["f"] * 8))
_CHECK = tl.constexpr(_check_text())
_OPERANDS_OF_CHECK = tl.constexpr(",".join(["=&f"] * 8 + ["f"] * 8 + ["r"] * 8))


@triton.jit
def numbers_of_elements(ROWS: tl.constexpr):
    """32 times the row, of 8, plus the channel: [ROWS, 32]."""
    return 32 * (tl.arange(0, ROWS)[:, None] % 8) + tl.arange(0, 32)[None, :]


@triton.jit
def on_diagonal(b_number):
    """Which elements a lane has of diagonals."""
    o_g, o_x = b_number // 32, b_number % 32
    return (o_x // 8 == o_g // 2) & ((o_x % 8 == o_g % 2) | (o_x % 8 == 6 + o_g % 2))


@triton.jit
def _of_instructions(b_x, b_y):
    """What instructions make of b_x and b_y [rows, 32]; for the interpreter."""
    blocks: tl.constexpr = b_x.shape[0] // 8
    b_x = tl.permute(tl.reshape(b_x, [blocks, 8, 4, 2, 2, 2]), [0, 3, 4, 1, 2, 5])
    b_x = tl.reshape(b_x.to(tl.float32), [blocks, 2, 1, 16, 1, 8])
    b_y = tl.permute(tl.reshape(b_y, [blocks, 8, 4, 2, 2, 2]), [0, 3, 4, 1, 2, 5])
    b_y = tl.reshape(b_y.to(tl.float32), [blocks, 2, 2, 1, 8, 8])
    b_s = tl.sum(tl.sum(b_x * b_y, 5), 1)
    b_s = tl.permute(tl.reshape(b_s, [blocks, 2, 2, 8, 4, 2]), [0, 3, 4, 1, 2, 5])
    return tl.reshape(b_s, [blocks * 8, 32])


@triton.jit
def add_products(b_s, b_x, b_y, INTERPRETED: tl.constexpr):
    """b_s [rows, 32] float32 and what b_x and b_y [rows, 32] add to it, on diagonals."""
    if INTERPRETED:
        return b_s + _of_instructions(b_x, b_y)
    TEXT: tl.constexpr = _BFLOAT16 if b_x.dtype == tl.bfloat16 else _FLOAT16
    operands = [b_x, b_y, b_s]
    return tl.inline_asm_elementwise(TEXT, _OPERANDS, operands, tl.float32, True, 8)


@triton.jit
def checked(b_x, INTERPRETED: tl.constexpr):
    """b_x [rows, 32], but NaN in one number of 8 where Triton gives other elements to a lane than
    are expected here."""
    if INTERPRETED:
        return b_x
    operands = [b_x, numbers_of_elements(b_x.shape[0])]
    return tl.inline_asm_elementwise(_CHECK, _OPERANDS_OF_CHECK, operands, tl.float32, True, 8)
