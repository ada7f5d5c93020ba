# SPDX-License-Identifier: MIT
"""Appending the hits of a thread to its queue, in PTX: Triton has no loop that each thread leaves
by itself.

A word has a bit for each of the LEAVES columns that a thread has of a row, the first column in the
highest bit; 1 is a hit. The loop takes the highest bit, finds the product of that column by a tree
of selections, as registers cannot be indexed, and stores both.
"""

import triton
import triton.language as tl

from .hardware import interpreted

if interpreted():
    from . import ptx_interpreter

    ptx_interpreter.install()


def _reversed_bits(i: int, levels: int) -> int:
    return int(f"{i:0{levels}b}"[::-1], 2)


def _append_text(leaves: int) -> str:
    """PTX for operands $0 new count, $1 word, $2 address of the queue, $3 count, $4 number of the
    first column, $5 length of the queue, $6 bytes from entry to entry, $7... products in the order
    of `_leaves`."""
    levels = leaves.bit_length() - 1
    tree: list[str] = []
    nodes = [f"${7 + _reversed_bits(i, levels)}" for i in range(leaves)]
    for level in range(levels):
        parents = []
        for even, odd in zip(nodes[::2], nodes[1::2], strict=True):
            parents.append(f"t{len(tree)}")
            tree.append(f"selp.b32 {parents[-1]}, {odd}, {even}, b{level};")
        nodes = parents
    bits = "".join(f"and.b32 y, c, {1 << i}; setp.ne.u32 b{i}, y, 0;\n" for i in range(levels))
    return f"""{{
        .reg .pred p, q, {", ".join(f"b{i}" for i in range(levels))};
        .reg .b32 w, c, n, x, y, {", ".join(f"t{i}" for i in range(leaves - 1))};
        .reg .b64 a;
        mov.b32 w, $1;
        mov.b32 n, $3;
        setp.eq.u32 p, w, 0;
        @p bra DONE;
        LOOP:
        clz.b32 c, w;
        {bits}
        {" ".join(tree)}
        mad.wide.u32 a, n, $6, $2;
        add.u32 x, $4, c;
        setp.lt.u32 q, n, $5;
        @q st.global.v2.b32 [a], {{x, {nodes[0]}}};
        add.u32 n, n, 1;
        shr.u32 c, 0x80000000, c;
        xor.b32 w, w, c;
        setp.ne.u32 p, w, 0;
        @p bra LOOP;
        DONE:
        mov.b32 $0, n;
    }}"""


_APPEND_8 = tl.constexpr(_append_text(8))
_APPEND_16 = tl.constexpr(_append_text(16))
_APPEND_32 = tl.constexpr(_append_text(32))
_OPERANDS_8 = tl.constexpr("=r,r,l,r,r,r,r" + ",r" * 8)
_OPERANDS_16 = tl.constexpr("=r,r,l,r,r,r,r" + ",r" * 16)
_OPERANDS_32 = tl.constexpr("=r,r,l,r,r,r,r" + ",r" * 32)
# The sign of each of two numbers, 16 times: of the first in the high half.
_SIGNS = tl.constexpr("prmt.b32 $0, $1, $2, 0xbbff;")


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _signs_of_pairs(b_bits, INTERPRETED: tl.constexpr):
    """Words of 32 sign bits, half an instruction for each to take it and half to add it."""
    rows: tl.constexpr = b_bits.shape[0]
    queues: tl.constexpr = b_bits.shape[1]
    # Bits 31 - i and 15 - i have the signs of columns i and 16 + i.
    b_pairs = tl.permute(tl.reshape(b_bits, [rows, queues, 2, 16]), [0, 1, 3, 2])
    b_first, b_second = tl.split(b_pairs)
    b_signs = tl.inline_asm_elementwise(
        _SIGNS, "=r,r,r", [b_first, b_second], dtype=tl.int32, is_pure=True, pack=1
    )
    b_signs = b_signs & (65537 << (15 - tl.arange(0, 16)))[None, None, :]
    # The interpreter runs a custom reduction element by element.
    return tl.sum(b_signs, 2) if INTERPRETED else tl.reduce(b_signs, 2, _or)


@triton.jit
def words_of(b_x, INTERPRETED: tl.constexpr):
    """Words [rows, queues] of the columns of b_x [rows, queues, LEAVES] float32 that are not
    negative; NaN counts as not negative.

    The order in which a reduction takes its elements does not matter.
    """
    LEAVES: tl.constexpr = b_x.shape[2]
    if INTERPRETED:
        # A device makes NaN without a sign.
        b_x = tl.where(b_x == b_x, b_x, 0.0)
    b_bits = b_x.to(tl.int32, bitcast=True)
    if LEAVES == 32:
        b_word = _signs_of_pairs(b_bits, INTERPRETED)
    else:
        b_signs = ((b_bits >> 31) & 1) << (31 - tl.arange(0, LEAVES))[None, None, :]
        b_word = tl.sum(b_signs, 2) if INTERPRETED else tl.reduce(b_signs, 2, _or)
    return ~b_word


@triton.jit
def _leaves(b_x):
    """b_x [rows, queues, LEAVES] as LEAVES blocks [rows, queues]: column i is number
    `_reversed_bits(i)`."""
    rows: tl.constexpr = b_x.shape[0]
    queues: tl.constexpr = b_x.shape[1]
    LEAVES: tl.constexpr = b_x.shape[2]
    parts = tl.split(tl.reshape(b_x, [rows, queues, LEAVES // 2, 2]))
    two = (parts[0], parts[1])
    four = ()
    for i in tl.static_range(2):
        four = four + tl.split(tl.reshape(two[i], [rows, queues, LEAVES // 4, 2]))
    products = ()
    if LEAVES == 8:
        for i in tl.static_range(4):
            products = products + tl.split(four[i])
    else:
        eight = ()
        for i in tl.static_range(4):
            eight = eight + tl.split(tl.reshape(four[i], [rows, queues, LEAVES // 8, 2]))
    if LEAVES == 16:
        for i in tl.static_range(8):
            products = products + tl.split(eight[i])
    if LEAVES == 32:
        sixteen = ()
        for i in tl.static_range(8):
            sixteen = sixteen + tl.split(tl.reshape(eight[i], [rows, queues, 2, 2]))
        for i in tl.static_range(16):
            products = products + tl.split(sixteen[i])
    return products


@triton.jit
def append_hits(
    b_word,  # [rows, queues] int32: the hits
    b_s,  # [rows, queues, LEAVES] float32: the products
    p_queue,  # [rows, queues]: addresses of queues, of int64
    b_count,  # [rows, queues] int32: how many hits there were so far
    first,  # the number of the first column, for all or [1, queues]
    CAP: tl.constexpr,
    STEP: tl.constexpr = 1,
):
    """Appends (number of the column, product) of every hit to its queue; returns the new counts.

    What is beyond the CAP entries of a queue is counted, and not stored. Entries are STEP numbers
    of 64 bits apart.
    """
    LEAVES: tl.constexpr = b_s.shape[2]
    products = _leaves(b_s.to(tl.int32, bitcast=True))
    queue = p_queue.to(tl.int64, bitcast=True)
    operands = (b_word, queue, b_count, first, CAP, 8 * STEP) + products  # noqa: RUF005
    if LEAVES == 8:
        b_count = tl.inline_asm_elementwise(_APPEND_8, _OPERANDS_8, operands, tl.int32, False, 1)
    elif LEAVES == 16:
        b_count = tl.inline_asm_elementwise(_APPEND_16, _OPERANDS_16, operands, tl.int32, False, 1)
    else:
        b_count = tl.inline_asm_elementwise(_APPEND_32, _OPERANDS_32, operands, tl.int32, False, 1)
    return b_count
