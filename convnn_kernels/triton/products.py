# SPDX-License-Identifier: MIT
"""Tiles of S = Q K^T on tensor cores, the same bits for a pair in any tile.

16 bits: one product, exact up to the sum. float32: "tf32" where PyTorch's switch allows it, else
"split" into three bfloat16, of which six of nine products are taken (`configs.screen_precision`).
"""

import triton
import triton.language as tl


@triton.jit
def _leading_bits(b_x):
    """float32 without its last 16 bits, which is a bfloat16, not larger than b_x in magnitude."""
    return (b_x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def pieces(b_x, INTERPRETED: tl.constexpr):
    """Three bfloat16 of b_x (float32), whose sum it is; of the same sign, so that none overflows.

    Of NaN, the first is NaN. Of infinity, the first is infinity, and the others are NaN.
    """
    # The bits of a NaN that mark it as such may be the last ones.
    b_high = tl.where(b_x == b_x, _leading_bits(b_x), b_x)
    b_rest = b_x - b_high
    b_middle = _leading_bits(b_rest)
    b_low = b_rest - b_middle
    if not INTERPRETED:
        # Without rounding: each has 8 bits. The interpreter does not know bfloat16.
        b_high, b_middle = b_high.to(tl.bfloat16), b_middle.to(tl.bfloat16)
        b_low = b_low.to(tl.bfloat16)
    return b_high, b_middle, b_low


@triton.jit
def split_dot(b_q, k_high, k_middle, k_low, b_s, b_rest, INTERPRETED: tl.constexpr):
    """Adds q k to b_s + b_rest, with b_s the products of the largest pieces only.

    b_q [rows, channels] float32; the pieces of k [channels, columns]. Six of the nine products of
    pieces. The others are below 2^-21 of the whole, and 0 wherever a float32 sum is exact: see
    `configs.screen_precision`.
    """
    q_high, q_middle, q_low = pieces(b_q, INTERPRETED)
    b_rest = tl.dot(q_low, k_high, b_rest, input_precision="ieee")
    b_rest = tl.dot(q_middle, k_middle, b_rest, input_precision="ieee")
    b_rest = tl.dot(q_high, k_low, b_rest, input_precision="ieee")
    b_rest = tl.dot(q_middle, k_high, b_rest, input_precision="ieee")
    b_rest = tl.dot(q_high, k_middle, b_rest, input_precision="ieee")
    b_s = tl.dot(q_high, k_high, b_s, input_precision="ieee")
    return b_s, b_rest


@triton.jit
def sum_of_split(b_s, b_rest, INTERPRETED: tl.constexpr):
    """b_s + b_rest. b_rest is not a number only where b_s is infinite or not a number, too; a
    maximum ignores that, but for the interpreter's."""
    if INTERPRETED:
        b_rest = tl.where(b_rest == b_rest, b_rest, 0.0)
    return b_s + tl.maximum(b_rest, -3.0e38)
