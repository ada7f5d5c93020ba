# SPDX-License-Identifier: MIT
"""The 16 or 12 largest of each row of many numbers, by networks of comparators, in registers.

Lists are 16 or 12 blocks [rows, lists]; the first has the largest entry of each list. A comparator
is two instructions for all lists that a thread has one of, and numbers move only between threads.
Which numbers of a row meet follows from how tensor cores leave a product: four threads share a row,
and of 8 adjacent columns each has 2. None may be NaN.
"""

import triton
import triton.language as tl


@triton.jit
def _exchange(a, b):
    return tl.maximum(a, b), tl.minimum(a, b)


@triton.jit
def sort_16(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15):
    """Descending, by the 60 comparators of the smallest known network."""
    a0, a1 = _exchange(a0, a1)
    a2, a3 = _exchange(a2, a3)
    a4, a5 = _exchange(a4, a5)
    a6, a7 = _exchange(a6, a7)
    a8, a9 = _exchange(a8, a9)
    a10, a11 = _exchange(a10, a11)
    a12, a13 = _exchange(a12, a13)
    a14, a15 = _exchange(a14, a15)
    a0, a2 = _exchange(a0, a2)
    a1, a3 = _exchange(a1, a3)
    a4, a6 = _exchange(a4, a6)
    a5, a7 = _exchange(a5, a7)
    a8, a10 = _exchange(a8, a10)
    a9, a11 = _exchange(a9, a11)
    a12, a14 = _exchange(a12, a14)
    a13, a15 = _exchange(a13, a15)
    a0, a4 = _exchange(a0, a4)
    a1, a5 = _exchange(a1, a5)
    a2, a6 = _exchange(a2, a6)
    a3, a7 = _exchange(a3, a7)
    a8, a12 = _exchange(a8, a12)
    a9, a13 = _exchange(a9, a13)
    a10, a14 = _exchange(a10, a14)
    a11, a15 = _exchange(a11, a15)
    a0, a8 = _exchange(a0, a8)
    a1, a9 = _exchange(a1, a9)
    a2, a10 = _exchange(a2, a10)
    a3, a11 = _exchange(a3, a11)
    a4, a12 = _exchange(a4, a12)
    a5, a13 = _exchange(a5, a13)
    a6, a14 = _exchange(a6, a14)
    a7, a15 = _exchange(a7, a15)
    a5, a10 = _exchange(a5, a10)
    a6, a9 = _exchange(a6, a9)
    a3, a12 = _exchange(a3, a12)
    a13, a14 = _exchange(a13, a14)
    a4, a8 = _exchange(a4, a8)
    a7, a11 = _exchange(a7, a11)
    a1, a2 = _exchange(a1, a2)
    a1, a4 = _exchange(a1, a4)
    a7, a13 = _exchange(a7, a13)
    a2, a8 = _exchange(a2, a8)
    a11, a14 = _exchange(a11, a14)
    a2, a4 = _exchange(a2, a4)
    a5, a6 = _exchange(a5, a6)
    a9, a10 = _exchange(a9, a10)
    a11, a13 = _exchange(a11, a13)
    a3, a8 = _exchange(a3, a8)
    a7, a12 = _exchange(a7, a12)
    a6, a8 = _exchange(a6, a8)
    a10, a12 = _exchange(a10, a12)
    a3, a5 = _exchange(a3, a5)
    a7, a9 = _exchange(a7, a9)
    a3, a4 = _exchange(a3, a4)
    a5, a6 = _exchange(a5, a6)
    a7, a8 = _exchange(a7, a8)
    a9, a10 = _exchange(a9, a10)
    a11, a12 = _exchange(a11, a12)
    a6, a7 = _exchange(a6, a7)
    a8, a9 = _exchange(a8, a9)
    return a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15


@triton.jit
def merge_16(
    a0,
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    a7,
    a8,
    a9,
    a10,
    a11,
    a12,
    a13,
    a14,
    a15,
    b0,
    b1,
    b2,
    b3,
    b4,
    b5,
    b6,
    b7,
    b8,
    b9,
    b10,
    b11,
    b12,
    b13,
    b14,
    b15,
):
    """The 16 largest of two descending lists, descending."""
    a0 = tl.maximum(a0, b15)
    a1 = tl.maximum(a1, b14)
    a2 = tl.maximum(a2, b13)
    a3 = tl.maximum(a3, b12)
    a4 = tl.maximum(a4, b11)
    a5 = tl.maximum(a5, b10)
    a6 = tl.maximum(a6, b9)
    a7 = tl.maximum(a7, b8)
    a8 = tl.maximum(a8, b7)
    a9 = tl.maximum(a9, b6)
    a10 = tl.maximum(a10, b5)
    a11 = tl.maximum(a11, b4)
    a12 = tl.maximum(a12, b3)
    a13 = tl.maximum(a13, b2)
    a14 = tl.maximum(a14, b1)
    a15 = tl.maximum(a15, b0)
    # What is left rises and falls once.
    a0, a8 = _exchange(a0, a8)
    a1, a9 = _exchange(a1, a9)
    a2, a10 = _exchange(a2, a10)
    a3, a11 = _exchange(a3, a11)
    a4, a12 = _exchange(a4, a12)
    a5, a13 = _exchange(a5, a13)
    a6, a14 = _exchange(a6, a14)
    a7, a15 = _exchange(a7, a15)
    a0, a4 = _exchange(a0, a4)
    a1, a5 = _exchange(a1, a5)
    a2, a6 = _exchange(a2, a6)
    a3, a7 = _exchange(a3, a7)
    a8, a12 = _exchange(a8, a12)
    a9, a13 = _exchange(a9, a13)
    a10, a14 = _exchange(a10, a14)
    a11, a15 = _exchange(a11, a15)
    a0, a2 = _exchange(a0, a2)
    a1, a3 = _exchange(a1, a3)
    a4, a6 = _exchange(a4, a6)
    a5, a7 = _exchange(a5, a7)
    a8, a10 = _exchange(a8, a10)
    a9, a11 = _exchange(a9, a11)
    a12, a14 = _exchange(a12, a14)
    a13, a15 = _exchange(a13, a15)
    a0, a1 = _exchange(a0, a1)
    a2, a3 = _exchange(a2, a3)
    a4, a5 = _exchange(a4, a5)
    a6, a7 = _exchange(a6, a7)
    a8, a9 = _exchange(a8, a9)
    a10, a11 = _exchange(a10, a11)
    a12, a13 = _exchange(a12, a13)
    a14, a15 = _exchange(a14, a15)
    return a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15


@triton.jit
def merge_12(
    a0,
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    a7,
    a8,
    a9,
    a10,
    a11,
    b0,
    b1,
    b2,
    b3,
    b4,
    b5,
    b6,
    b7,
    b8,
    b9,
    b10,
    b11,
):
    """The 12 largest of two descending lists, descending."""
    a0 = tl.maximum(a0, b11)
    a1 = tl.maximum(a1, b10)
    a2 = tl.maximum(a2, b9)
    a3 = tl.maximum(a3, b8)
    a4 = tl.maximum(a4, b7)
    a5 = tl.maximum(a5, b6)
    a6 = tl.maximum(a6, b5)
    a7 = tl.maximum(a7, b4)
    a8 = tl.maximum(a8, b3)
    a9 = tl.maximum(a9, b2)
    a10 = tl.maximum(a10, b1)
    a11 = tl.maximum(a11, b0)
    # What is left falls and rises once, as do 16 of which the last 4 are infinite. The network for
    # these, without the comparators of which one number is infinite:
    a0, a8 = _exchange(a0, a8)
    a1, a9 = _exchange(a1, a9)
    a2, a10 = _exchange(a2, a10)
    a3, a11 = _exchange(a3, a11)
    a0, a2 = _exchange(a0, a2)
    a1, a3 = _exchange(a1, a3)
    a8, a4 = _exchange(a8, a4)
    a9, a5 = _exchange(a9, a5)
    a10, a6 = _exchange(a10, a6)
    a11, a7 = _exchange(a11, a7)
    a0, a1 = _exchange(a0, a1)
    a2, a3 = _exchange(a2, a3)
    a8, a10 = _exchange(a8, a10)
    a9, a11 = _exchange(a9, a11)
    a4, a6 = _exchange(a4, a6)
    a5, a7 = _exchange(a5, a7)
    a8, a9 = _exchange(a8, a9)
    a10, a11 = _exchange(a10, a11)
    a4, a5 = _exchange(a4, a5)
    a6, a7 = _exchange(a6, a7)
    return a0, a1, a2, a3, a8, a9, a10, a11, a4, a5, a6, a7


@triton.jit
def merge(first, second):
    """Lists of 16 or 12 blocks: as many of the largest of both."""
    if len(first) == 12:
        return merge_12(*first, *second)
    else:
        return merge_16(*first, *second)


@triton.jit
def split_16(b_x):
    """The 16 blocks b_x[:, :, i] of b_x [rows, lists, 16]."""
    rows: tl.constexpr = b_x.shape[0]
    lists: tl.constexpr = b_x.shape[1]
    a, b = tl.split(tl.reshape(b_x, [rows, lists, 8, 2]))
    a0, a1 = tl.split(tl.reshape(a, [rows, lists, 4, 2]))
    b0, b1 = tl.split(tl.reshape(b, [rows, lists, 4, 2]))
    c0, c1 = tl.split(tl.reshape(a0, [rows, lists, 2, 2]))
    c2, c3 = tl.split(tl.reshape(a1, [rows, lists, 2, 2]))
    c4, c5 = tl.split(tl.reshape(b0, [rows, lists, 2, 2]))
    c6, c7 = tl.split(tl.reshape(b1, [rows, lists, 2, 2]))
    d0, d1 = tl.split(c0)
    d2, d3 = tl.split(c1)
    d4, d5 = tl.split(c2)
    d6, d7 = tl.split(c3)
    d8, d9 = tl.split(c4)
    d10, d11 = tl.split(c5)
    d12, d13 = tl.split(c6)
    d14, d15 = tl.split(c7)
    return d0, d1, d2, d3, d4, d5, d6, d7, d8, d9, d10, d11, d12, d13, d14, d15


@triton.jit
def _join(b_x, b_y):
    """[rows, n] twice to [rows, 2 n], of each in turn."""
    return tl.reshape(tl.join(b_x, b_y), [b_x.shape[0], 2 * b_x.shape[1]])


@triton.jit
def join_16(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15):
    """16 blocks [rows, 1] to [rows, 16]."""
    b0 = _join(_join(a0, a8), _join(a4, a12))
    b1 = _join(_join(a1, a9), _join(a5, a13))
    b2 = _join(_join(a2, a10), _join(a6, a14))
    b3 = _join(_join(a3, a11), _join(a7, a15))
    return _join(_join(b0, b2), _join(b1, b3))


@triton.jit
def _halves(a):
    """[rows, 2 n] to [rows, n] twice."""
    return tl.split(tl.reshape(a, [a.shape[0], a.shape[1] // 2, 2]))


@triton.jit
def merge_lists(lists, COUNT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Each row's lists merged down to COUNT: blocks [rows, COUNT]."""
    rows: tl.constexpr = lists[0].shape[0]
    n: tl.constexpr = lists[0].shape[1]
    if INTERPRETED:
        # A reduction would merge the lists of one row after another.
        while lists[0].shape[1] > COUNT:
            first, second = (), ()
            for i in tl.static_range(len(lists)):
                a, b = _halves(lists[i])
                first += (a,)  # type: ignore[assignment]
                second += (b,)  # type: ignore[assignment]
            lists = merge(first, second)
    elif n > COUNT:
        parts = ()
        for i in tl.static_range(len(lists)):
            part = tl.reshape(lists[i], [rows, COUNT, n // COUNT])
            parts += (part,)  # type: ignore[assignment]
        lists = tl.reduce(parts, 2, merge_12 if len(lists) == 12 else merge_16)
    return lists


@triton.jit
def best_of_four(b_x, LIST: tl.constexpr, INTERPRETED: tl.constexpr):
    """The LIST largest, 12 or 16, of each row of b_x [rows, n] in four lists, of what each thread
    has."""
    rows: tl.constexpr = b_x.shape[0]
    n: tl.constexpr = b_x.shape[1]
    b_x = tl.permute(tl.reshape(b_x, [rows, n // 8, 4, 2]), [0, 2, 1, 3])
    lists = sort_16(*split_16(tl.reshape(b_x, [rows, n // 16, 16])))
    return merge_lists(lists[:LIST], 4, INTERPRETED)
