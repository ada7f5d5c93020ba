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


@triton.jit
def tiles_of_ranges(
    row_begin, row_end, split, splits, tiles, columns, sample_step, ADVANCE: tl.constexpr
):
    """The first tile with a column of these queries, the one behind the last, of one of `splits`
    equal parts; and the step of a sample of them.

    A sample is for the query that has the fewest columns, as the host chooses one for all columns.
    """
    first = tl.minimum(tl.min(row_begin, 0) // ADVANCE, tiles - 1)
    last = tl.minimum(tl.cdiv(tl.max(row_end, 0), ADVANCE), tiles)
    each = tl.cdiv(tl.maximum(last - first, 0), splits)
    first += (split.to(tl.int64) * each).to(tl.int32)
    # An empty range is no fewer than all columns.
    fewest = tl.min(tl.where(row_begin < row_end, row_end - row_begin, columns), 0)
    share = tl.sqrt(fewest.to(tl.float32) / columns)
    step = tl.maximum((sample_step * share).to(tl.int32), 1)
    return first, tl.minimum(first + each, last), step


@triton.jit
def columns_of_all(row_begin, row_end, columns):
    """Begin and end of the columns that are in all ranges of these queries but empty ones."""
    is_empty = row_begin >= row_end
    begin = tl.max(tl.where(is_empty, 0, row_begin), 0)
    return begin, tl.min(tl.where(is_empty, columns, row_end), 0)


@triton.jit
def _columns_before(column, QUEUES: tl.constexpr, PAIR: tl.constexpr, LEAVES: tl.constexpr):
    """How many of the columns of each queue are before a column of the tile, [rows, QUEUES]."""
    column = tl.minimum(tl.maximum(column, 0), QUEUES * LEAVES)[:, None]
    rest = column % (QUEUES * PAIR) - PAIR * tl.arange(0, QUEUES)[None, :]
    return column // (QUEUES * PAIR) * PAIR + tl.minimum(tl.maximum(rest, 0), PAIR)


@triton.jit
def words_of_ranges(
    start, row_begin, row_end, QUEUES: tl.constexpr, PAIR: tl.constexpr, LEAVES: tl.constexpr
):
    """Words as `words_of` in append.py has them, of the columns in the ranges of rows, [rows,
    QUEUES]; the tile begins with column `start`."""
    before_begin = _columns_before(row_begin - start, QUEUES, PAIR, LEAVES)
    before_end = _columns_before(row_end - start, QUEUES, PAIR, LEAVES)
    ones = tl.full(before_begin.shape, 0xFFFFFFFF, tl.int64)
    return ((ones >> before_begin) & ~(ones >> before_end)).to(tl.int32)
