# SPDX-License-Identifier: MIT
"""Products of float32 blocks with blocks of any dtype on tensor cores."""

import triton
import triton.language as tl


@triton.jit
def dot_of_float(b_a, b_b, b_sum, PRECISION: tl.constexpr):
    """b_sum + b_a b_b for float32 b_a and b_b of any dtype.

    A b_b of 16 bits is exact in tf32, and b_a is nearly exact as the sum of two tf32 numbers: what
    is left is 2^-22 of it. Their range is that of float32, unlike that of float16.
    """
    if b_b.dtype == tl.float32:
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
    else:
        b_high = (b_a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        b_low = tl.where(tl.abs(b_a) < float("inf"), b_a - b_high, 0.0)
        b_b = b_b.to(tl.float32)
        b_sum = tl.dot(b_low, b_b, b_sum, input_precision="tf32")
        b_sum = tl.dot(b_high, b_b, b_sum, input_precision="tf32")
    return b_sum
