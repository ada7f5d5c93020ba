# SPDX-License-Identifier: MIT
"""64-bit integers in kernels: an offset may exceed 2**31 elements along any stride.

The channels of a row are adjacent, whatever the tensor. The strides of rows and batch elements are
multiples of the constant ALIGN, which the host chooses: 16 where all strides allow it, else 1.
"""

import triton
import triton.language as tl


@triton.jit
def as_int64(i):
    """A scalar, such as the variable of a loop, as int64. In the interpreter it may be an int."""
    return tl.full([], i, tl.int64)


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """A stride, which is a multiple of ALIGN, in a form from which the compiler sees that."""
    return as_int64(stride) // ALIGN * ALIGN


@triton.jit
def wide(x):
    """An integer that is not negative, in 64 bits: those that had 32 have single products."""
    return (x.to(tl.uint32) if x.dtype == tl.int32 else x).to(tl.uint64)
