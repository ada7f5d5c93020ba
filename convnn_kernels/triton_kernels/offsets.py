# SPDX-License-Identifier: MIT
"""Places in memory are counted in 64 bits: an offset may exceed 2**31 elements along any stride."""

import triton
import triton.language as tl


@triton.jit
def wide(i):
    """A scalar, such as the variable of a loop, as int64. In the interpreter it may be an int."""
    return tl.full([], i, tl.int64)
