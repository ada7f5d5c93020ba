# SPDX-License-Identifier: MIT
"""The rows of key that a query may see (`key_range`): those from its begin to before its end."""

import triton
import triton.language as tl


@triton.jit
def load_ranges(p, m_n, M):
    """Begins and ends of the queries whose ranges are at p, int32, from 0 to M.

    A range without rows, and that of a query that there is not, is from M to 0: then the least
    begin and the greatest end of some queries are those of what any of them may see.
    """
    begin = tl.maximum(tl.load(p, m_n, 0), 0)
    end = tl.minimum(tl.load(p + 1, m_n, 0), M)
    is_empty = begin >= end
    return tl.where(is_empty, M, begin).to(tl.int32), tl.where(is_empty, 0, end).to(tl.int32)


@triton.jit
def in_ranges(row, begin, end):
    """Whether queries [rows] may see rows of key [n]: [rows, n]."""
    return (row[None, :] >= begin[:, None]) & (row[None, :] < end[:, None])
