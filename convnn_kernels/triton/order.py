# SPDX-License-Identifier: MIT
"""The total order of neighbors as one integer, and the largest of many such integers.

A neighbor (s, index) becomes the int64 `orderable(s) << 32 | (0xFFFFFFFF - index)`. Larger is
nearer: similarity descending, NaN above every number, -0 equal to +0, then index ascending. All
keys of a row differ, so whatever finds the largest of them finds the same ones in any order of
work. Blocks are [rows, n], with n a power of two; rows never meet.
"""

import triton
import triton.language as tl

# Below every neighbor: an empty place.
NOTHING = tl.constexpr(-(2**63))
# The orderable of NaN, and that of the token itself, which comes before even a NaN.
ORDER_OF_NAN = tl.constexpr(0x7FFFFFFE)
ORDER_OF_SELF = tl.constexpr(0x7FFFFFFF)
ORDER_OF_MINUS_INFINITY = tl.constexpr(-0x7F800001)
# Below the orderable of every number.
NO_ORDER = tl.constexpr(-(2**31))
# Above every neighbor: an entry of a list that is not to be replaced.
FIXED = tl.constexpr(2**63 - 1)
_NO_ROW = tl.constexpr(2**31 - 1)


@triton.jit
def orderable(x):
    """float32 to int32, increasing."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, ORDER_OF_NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def from_orderable(order):
    """int32 to float32, the inverse of `orderable`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(order, index):
    """int32 and int64 to the int64 key."""
    return (order.to(tl.int64) << 32) | (0xFFFFFFFF - index)


@triton.jit
def order_of(key):
    return (key >> 32).to(tl.int32)


@triton.jit
def index_of(key):
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def _log2(n: tl.constexpr):
    power: tl.constexpr = 0
    while n > 1:
        n = n // 2
        power = power + 1
    return power


@triton.jit
def _exchange(b_x, SPAN: tl.constexpr, STAGE: tl.constexpr, ASCENDING: tl.constexpr):
    """One step of a bitonic network on b_x [rows, n].

    Elements 2**SPAN apart exchange so that runs of 2**STAGE descend and ascend in turn.
    """
    rows: tl.constexpr = b_x.shape[0]
    n: tl.constexpr = b_x.shape[1]
    b_pairs = tl.reshape(b_x, [rows, n // (2 << SPAN), 2, 1 << SPAN])
    # What remains of the sum of both is the partner; integers wrap around without loss.
    b_partner = tl.reshape(tl.sum(b_pairs, 2, keep_dims=True) - b_pairs, [rows, n])
    o = tl.arange(0, n)[None, :]
    takes_larger = (((o >> SPAN) ^ (o >> STAGE)) & 1) == ASCENDING
    return tl.where(takes_larger, tl.maximum(b_x, b_partner), tl.minimum(b_x, b_partner))


@triton.jit
def _merge_runs(b_x, LOG_RUN: tl.constexpr, ASCENDING: tl.constexpr):
    """Sorts the bitonic runs of 2**LOG_RUN in b_x [rows, n], in turn descending and ascending."""
    for i in tl.static_range(LOG_RUN):
        b_x = _exchange(b_x, LOG_RUN - 1 - i, LOG_RUN, ASCENDING)
    return b_x


@triton.jit
def largest(
    b_x,
    LOG_N: tl.constexpr,
    LOG_COUNT: tl.constexpr,
    ASCENDING: tl.constexpr,
):
    """The 2**LOG_COUNT largest of each row of b_x [rows, 2**LOG_N], sorted: [rows, 2**LOG_COUNT].

    Runs of that length are sorted; then neighboring runs give up their smaller half.
    """
    rows: tl.constexpr = b_x.shape[0]
    for stage in tl.static_range(1, LOG_COUNT + 1):
        b_x = _merge_runs(b_x, stage, ASCENDING)
    for i in tl.static_range(LOG_N - LOG_COUNT):
        b_x = tl.reshape(b_x, [rows, 1 << (LOG_N - LOG_COUNT - 1 - i), 2, 1 << LOG_COUNT])
        b_x = tl.reshape(tl.max(b_x, 2), [rows, 1 << (LOG_N - 1 - i)])
        b_x = _merge_runs(b_x, LOG_COUNT, ASCENDING)
    return b_x


@triton.jit
def exchange_adjacent(b_x):
    """Sorts rows b_x [rows, 16], descending, that are sorted but for pairs of adjacent entries."""
    rows: tl.constexpr = b_x.shape[0]
    b_x = _exchange(b_x, 0, 4, 0)
    # Entries 1 and 2, ..., 13 and 14.
    o_x = tl.arange(0, 16 * rows)
    o_l = o_x % 16
    o_x += tl.where(o_l % 2 == 1, tl.where(o_l < 15, 1, 0), tl.where(o_l > 0, -1, 0))
    b_other = tl.reshape(tl.gather(tl.reshape(b_x, [16 * rows]), o_x, 0), [rows, 16])
    is_first = tl.arange(0, 16)[None, :] % 2 == 1
    return tl.where(is_first == (b_x < b_other), b_other, b_x)


@triton.jit
def merge(b_list, b_x, LOG_N: tl.constexpr, LOG_COUNT: tl.constexpr):
    """The largest of b_list [rows, 2**LOG_COUNT], descending, and b_x [rows, 2**LOG_N] together.

    As long as no row has anything that belongs into its list, nothing is sorted.
    """
    b_lowest = tl.min(b_list, 1, keep_dims=True)
    if tl.max(tl.max((b_x > b_lowest).to(tl.int32), 1), 0) > 0:
        b_new = largest(b_x, LOG_N, LOG_COUNT, 1)
        b_list = _merge_runs(tl.maximum(b_list, b_new), LOG_COUNT, 0)
    return b_list


@triton.jit
def _best(b_order, b_row):
    """The key of the best column of each row of a tile, NOTHING if none is left; its row of key.

    b_order [rows, n] int32; b_row [n] int32.
    """
    order = tl.max(b_order, 1)
    row = tl.min(tl.where(b_order == order[:, None], b_row[None, :], _NO_ROW), 1)
    return tl.where(order == NO_ORDER, NOTHING, pack(order, row.to(tl.int64))), row


@triton.jit
def insert(b_list, b_lowest, b_order, b_row):
    """Puts the best columns of a tile into lists, one for each row at a time.

    b_list [rows, n] has no order, b_lowest [rows] is its minimum; a tile as `_best` takes it. The
    best column takes the place of the lowest entry, until it would be lower. Entries differ.
    """
    key, row = _best(b_order, b_row)
    enters = key > b_lowest
    while tl.max(enters.to(tl.int32), 0) > 0:
        m_lowest = enters[:, None] & (b_list == b_lowest[:, None])
        b_list = tl.where(m_lowest, key[:, None], b_list)
        b_lowest = tl.min(b_list, 1)
        b_order = tl.where(b_row[None, :] == row[:, None], NO_ORDER, b_order)
        key, row = _best(b_order, b_row)
        enters = key > b_lowest
    return b_list, b_lowest


@triton.jit
def store_list(
    b_list,  # [rows, 2**LOG_LIST] int64, descending
    b_s_self,  # [rows] float32: the similarity of the token itself
    p_s,  # [rows] pointers: where the similarities of a row go
    p_i,  # [rows] pointers: where its indices go
    m_r,  # [rows]
    k,
    missing_index: tl.constexpr,
    HAS_SELF: tl.constexpr,
    BY_INDEX: tl.constexpr,
    LOG_LIST: tl.constexpr,
):
    """Unpacks the first k of each list, in the order that is asked for.

    The result is what has been stored, b_s and b_index [rows, 2**LOG_LIST].
    """
    o_l = tl.arange(0, 1 << LOG_LIST)[None, :]
    m_l = o_l < k
    b_order = order_of(b_list)
    if HAS_SELF:
        b_order = tl.where(b_order == ORDER_OF_SELF, orderable(b_s_self)[:, None], b_order)
    b_index = index_of(b_list)
    b_missing = (b_list == NOTHING) | (m_l == 0)
    if BY_INDEX:
        # The same numbers with index and similarity in exchanged places.
        b_key = ((0x7FFFFFFF - b_index) << 32) | (b_order.to(tl.int64) & 0xFFFFFFFF)
        b_key = largest(tl.where(b_missing, NOTHING, b_key), LOG_LIST, LOG_LIST, 0)
        b_missing = b_key == NOTHING
        b_index = 0x7FFFFFFF - (b_key >> 32)
        b_order = b_key.to(tl.int32)
    b_s = tl.where(b_missing, float("-inf"), from_orderable(b_order))
    m_out = m_r[:, None] & m_l
    tl.store(p_s[:, None] + o_l, b_s, m_out)
    b_index = tl.where(b_missing, missing_index, b_index)
    tl.store(p_i[:, None] + o_l, b_index, m_out)
    return b_s, b_index
