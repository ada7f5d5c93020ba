# SPDX-License-Identifier: MIT
"""Numbers of 16 bits: of any size in float16, whose range is small; and as float32."""

import triton
import triton.language as tl


@triton.jit
def near_power(b_x, dtype: tl.constexpr, EXPONENT: tl.constexpr, OF_ROWS: tl.constexpr = False):
    """b_x in 16 bits, and by what to multiply it afterwards, which is [rows, 1] if OF_ROWS.

    In float16 the largest number, or that of each row, is brought to 2^EXPONENT by a power of two,
    so that none is too large, and only what is below 2^(-14 - EXPONENT) of it loses bits.
    """
    unit = 1.0
    if dtype == tl.float16:
        b_x = b_x.to(tl.float32)
        b_max = tl.max(tl.abs(b_x), 1, keep_dims=True) if OF_ROWS else tl.max(tl.abs(b_x))
        exponent = b_max.to(tl.int32, bitcast=True) >> 23
        exponent = tl.minimum(tl.maximum(exponent, EXPONENT + 1), 254)
        b_x = b_x * ((254 + EXPONENT - exponent) << 23).to(tl.float32, bitcast=True)
        unit = ((exponent - EXPONENT) << 23).to(tl.float32, bitcast=True)
    return b_x.to(dtype), unit


@triton.jit
def to_float32(b_x):
    """b_x in float32. A bfloat16 has its leading bits, which takes one instruction."""
    if b_x.dtype == tl.bfloat16:
        b_x = (b_x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return b_x.to(tl.float32)
