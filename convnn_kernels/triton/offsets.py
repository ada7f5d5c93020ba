# SPDX-License-Identifier: MIT
"""Places in memory: how they are counted, and what of them a kernel is compiled for.

They are counted in 64 bits: an offset may exceed 2**31 elements along any stride.

Triton compiles a kernel anew where an integer is 1 or begins or ceases to be a multiple of 16. That
is wanted for numbers of channels only, on which loads of many bytes and whole blocks depend. All
other integers are SIZES, and one compiled kernel serves them all. Channels of a row lie next to
each other, whatever the tensor. How far apart rows and batch elements are is known to be a
multiple of the constant ALIGN, which the host chooses: 16 where all strides allow it, else 1.
"""

import triton
import triton.language as tl

SIZES = [
    "first_block",
    "rows",
    "keys",
    "N",
    "M",
    "columns",
    "G",
    "k",
    "place",
    "B",
    "tiles",
    "pairs_each",
    "pairs",
    "B2",
    "row_blocks",
    "rows_each",
    "tiles_each",
    *(f"stride_{tensor}{dim}" for tensor in "qkvm" for dim in ("b1", "b2", "n", "m")),
    *(f"stride_{dim}" for dim in ("b1", "b2", "n", "g")),
]


@triton.jit
def wide(i):
    """A scalar, such as the variable of a loop, as int64. In the interpreter it may be an int."""
    return tl.full([], i, tl.int64)


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """A stride, which is a multiple of ALIGN, in a form from which the compiler sees that."""
    return wide(stride) // ALIGN * ALIGN
