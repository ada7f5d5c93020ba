# SPDX-License-Identifier: MIT
"""Select among some hundred columns, in one launch: S = Q K^T (Eq. 3), s_i and I_i (Eq. 4, 5).

It works as select_large.py does, by a threshold and the hits that reach it, but a program does all
of it for a block of BLOCK_N queries, and then for the next one. So hits take the memory of as many
blocks as there are programs, and are still in the cache when they are read. For the first block of
each batch element a program prepares the columns: rows of key that are adjacent and whole, of D
channels and zeros, and what a product is multiplied by. A tile of BLOCK_M columns is rotated by
ROTATE columns more than the one before: image widths divide BLOCK_M, and vertical neighbors would
all share one queue and one group. For each block:

1. Tensor cores multiply the queries with all columns, tile by tile. A row keeps the largest
   x = q k ||k||^-1 of each of GROUPS groups of columns, in registers. The k-th largest of these, by
   networks of comparators (networks.py), is a similarity that k columns reach: the threshold.
2. They multiply again, and each thread appends the columns that reach the threshold, with their
   products, to its queue of the row (append.py).
3. A thread has a row, sorts its hits by the total order (order.py), 16 at a time, and merges them.

Where queues are too short for a row, as where many keys are equal, a block looks at all columns
twice more: the queues then take the similarities above the threshold and, in the places that are
left, the first ones that equal it. What they lack then comes after k neighbors of the row. Where
even those above it do not fit, and where a row of query or key has huge numbers or none, the block
takes these rows' neighbors out of S one by one, as in select_network.py, when all else is done.

For 16 bits only, and no more channels than a step of tensor cores has: products are exact, and
their sum is the similarity that is returned. Shapes as in select.py; without candidates and self.
"""

import torch
import triton
import triton.language as tl

from . import configs, hardware
from .append import append_hits, words_of
from .columns import in_order_of_queues, load_columns, store_columns
from .integers import aligned, as_int64
from .launch import Kernel, Plan, Pointers, cache_plans
from .metrics import COSINE
from .networks import merge_16, merge_lists, sort_16, split_16
from .norms import rescales
from .order import NOTHING, from_orderable, index_of, order_of, orderable, pack, store_list
from .search import Search
from .select_network import _LARGEST_SQUARES, _inverse_root, _one_by_one
from .tensors import alignment, cdiv


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _words(m, QUEUES: tl.constexpr, PAIR: tl.constexpr, INTERPRETED: tl.constexpr):
    """Words [rows, QUEUES], as append.py takes them, of the columns of m [rows, BLOCK_M]."""
    LEAVES: tl.constexpr = m.shape[1] // QUEUES
    b_bits = in_order_of_queues(m.to(tl.int32), QUEUES, PAIR)
    b_bits = b_bits << (31 - tl.arange(0, LEAVES))[None, None, :]
    return tl.sum(b_bits, 2) if INTERPRETED else tl.reduce(b_bits, 2, _or)


@triton.jit
def _prepare_columns(
    p_k,  # key of the batch element
    p_m,  # [M] bool, or None
    p_keys,  # [tiles, BLOCK_M, BLOCK_D]
    p_factor,  # [tiles, BLOCK_M] float32
    p_inverse,  # [tiles * BLOCK_M] float32
    p_valid,  # [tiles, QUEUES] int32
    tiles,
    columns,
    D,
    stride_km,
    METRIC: tl.constexpr,
    INTERPRETED: tl.constexpr,
    QUEUES: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores the rows of key of each tile, zero where there is none; what columns.py says of factor
    and valid; and the factor by the number of the column. 1 if a row has huge numbers or none."""
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    unfit = tl.zeros([], tl.int32)
    for tile in range(0, tiles):
        o_c = tile * BLOCK_M + (o_m + tile * ROTATE) % BLOCK_M
        m_valid = o_c < columns
        if p_m is not None:
            m_valid = m_valid & (tl.load(p_m + o_c, m_valid, 0) != 0)
        m_k = m_valid[:, None] & (o_d < D)[None, :]
        b_k = tl.load((p_k + o_c.to(tl.int64) * stride_km)[:, None] + o_d[None, :], m_k, 0.0)
        tl.store(p_keys + (tile * BLOCK_M + o_m)[:, None] * BLOCK_D + o_d[None, :], b_k)
        b_x = b_k.to(tl.float32)
        squares = tl.sum(b_x * b_x, 1)
        # Comparisons with NaN are false.
        unfit = tl.maximum(unfit, tl.max(tl.where(squares < _LARGEST_SQUARES, 0, 1), 0))
        factor = tl.full([BLOCK_M], 1.0, tl.float32)
        if METRIC == COSINE:
            factor = _inverse_root(squares)
        factor = tl.where(m_valid, factor, float("nan"))
        tl.store(p_inverse + o_c, factor)
        store_columns(p_factor + tile * BLOCK_M, factor, QUEUES, PAIR)
        b_word = _words(m_valid[None, :], QUEUES, PAIR, INTERPRETED)
        tl.store(p_valid + tile * QUEUES + tl.arange(0, QUEUES)[None, :], b_word)
    return unfit


@triton.jit
def _multiply(
    b_q,  # [BLOCK_N, BLOCK_D]
    p_keys,  # [n, BLOCK_D]
    o_k,  # [BLOCK_M]
):
    """q k of a tile, [BLOCK_N, BLOCK_M]."""
    o_d = tl.arange(0, b_q.shape[1])
    b_k = tl.load(p_keys + o_k[None, :] * b_q.shape[1] + o_d[:, None])
    return tl.dot(b_q, b_k)


@triton.jit
def _group_maxima(
    b_q,
    p_keys,
    p_factor,
    tiles,
    INTERPRETED: tl.constexpr,
    GROUPS: tl.constexpr,
    QUEUES: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The largest x of each group of columns, [BLOCK_N, GROUPS], as in sweep.py."""
    BLOCK_N: tl.constexpr = b_q.shape[0]
    EACH: tl.constexpr = GROUPS // QUEUES
    o_m = tl.arange(0, BLOCK_M)
    b_max = tl.full([BLOCK_N, QUEUES, EACH], float("-inf"), tl.float32)
    for tile in range(0, tiles):
        b_s = _multiply(b_q, p_keys, tile * BLOCK_M + o_m)
        b_x = b_s * load_columns(p_factor + tile * BLOCK_M, QUEUES, PAIR, BLOCK_M)[None, :]
        if INTERPRETED:
            # Its maximum of NaN and a number is NaN.
            b_x = tl.where(b_x == b_x, b_x, float("-inf"))
        b_x = in_order_of_queues(b_x, QUEUES, PAIR)
        b_x = tl.reshape(b_x, [BLOCK_N, QUEUES, BLOCK_M // GROUPS, EACH])
        b_max = tl.maximum(b_max, tl.max(b_x, 2))
    return tl.reshape(b_max, [BLOCK_N, GROUPS])


@triton.jit
def _threshold(b_max, k, INTERPRETED: tl.constexpr):
    """The k-th largest of each row of b_max [rows, GROUPS], k at most 15."""
    rows: tl.constexpr = b_max.shape[0]
    GROUPS: tl.constexpr = b_max.shape[1]
    lists = sort_16(*split_16(tl.reshape(b_max, [rows, GROUPS // 16, 16])))
    lists = merge_lists(lists, 1, INTERPRETED)
    b_x = lists[0]
    for i in tl.static_range(1, 15):
        b_x = tl.where(k == i + 1, lists[i], b_x)
    return tl.reshape(b_x, [rows])


@triton.jit
def _append_hits(
    threshold,  # [BLOCK_N]
    b_q,
    p_keys,
    p_factor,
    p_valid,
    p_entry,  # [BLOCK_N, QUEUES]: the first entry of each queue
    tiles,
    INTERPRETED: tl.constexpr,
    QUEUES: tl.constexpr,
    PAIR: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Fills the queues with the columns that reach the threshold; how many there are in each."""
    BLOCK_N: tl.constexpr = b_q.shape[0]
    LEAVES: tl.constexpr = BLOCK_M // QUEUES
    o_q = tl.arange(0, QUEUES)
    # A similarity is rounded once more than what is compared: as in sweep.py.
    b_below = tl.abs(threshold) * 9.5e-7 + 7.5e-37 - threshold
    b_count = tl.zeros([BLOCK_N, QUEUES], tl.int32)
    for tile in range(0, tiles):
        b_s = _multiply(b_q, p_keys, tile * BLOCK_M + tl.arange(0, BLOCK_M))
        b_factor = load_columns(p_factor + tile * BLOCK_M, QUEUES, PAIR, BLOCK_M)
        b_reaches = tl.fma(
            b_s,
            tl.broadcast_to(b_factor[None, :], [BLOCK_N, BLOCK_M]),
            tl.broadcast_to(b_below[:, None], [BLOCK_N, BLOCK_M]),
        )
        b_word = words_of(in_order_of_queues(b_reaches, QUEUES, PAIR), INTERPRETED)
        b_word = b_word & tl.load(p_valid + tile * QUEUES + o_q)[None, :]
        b_s = in_order_of_queues(b_s, QUEUES, PAIR)
        number = (tile * BLOCK_M + o_q * PAIR)[None, :] * LEAVES
        b_count = append_hits(b_word, b_s, p_entry, b_count, number, CAP, BLOCK_N)
    return b_count


@triton.jit
def _append_ties(
    threshold,  # [BLOCK_N]
    inverse_q,  # [BLOCK_N]
    b_q,
    p_keys,
    p_inverse,
    p_entry,
    tiles,
    INTERPRETED: tl.constexpr,
    QUEUES: tl.constexpr,
    PAIR: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Fills the queues with the similarities above the threshold, then with the first ones that
    equal it. How many there are in all, and of the first kind: [BLOCK_N, QUEUES] twice."""
    BLOCK_N: tl.constexpr = b_q.shape[0]
    LEAVES: tl.constexpr = BLOCK_M // QUEUES
    o_m = tl.arange(0, BLOCK_M)
    o_q = tl.arange(0, QUEUES)[None, :]
    b_count = tl.zeros([BLOCK_N, QUEUES], tl.int32)
    b_above = tl.zeros([BLOCK_N, QUEUES], tl.int32)
    for step in range(0, 2 * tiles):
        tile = step % tiles
        # Columns in their order, so that the first ones come first.
        o_k = tile * BLOCK_M + (o_m + (BLOCK_M - ROTATE) * tile) % BLOCK_M
        b_s = _multiply(b_q, p_keys, o_k)
        b_factor = tl.load(p_inverse + tile * BLOCK_M + o_m)
        b_x = b_s * b_factor[None, :] * inverse_q[:, None]
        # Comparisons with NaN, the factor of columns that are not valid, are false.
        m_above = b_x > threshold[:, None]
        m_hit = tl.where(step < tiles, m_above, b_x == threshold[:, None])
        b_word = _words(m_hit, QUEUES, PAIR, INTERPRETED)
        b_s = in_order_of_queues(b_s, QUEUES, PAIR)
        number = (tile * BLOCK_M + o_q * PAIR) * LEAVES
        b_count = append_hits(b_word, b_s, p_entry, b_count, number, CAP, BLOCK_N)
        b_above = tl.where(step < tiles, b_count, b_above)
    return b_count, b_above


@triton.jit
def _hit(
    place,
    p_queue,  # [QUEUES, CAP, BLOCK_N] int64
    p_inverse,
    ends,  # for each queue [BLOCK_N]: the hits in it and those before
    inverse_q,  # [BLOCK_N]
    rotated,  # -1 if columns are rotated, else 0
    METRIC: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROTATE: tl.constexpr,
    CAP: tl.constexpr,
):
    """The hit of each row in that place, as a key of the total order (order.py)."""
    BLOCK_N: tl.constexpr = inverse_q.shape[0]
    QUEUES: tl.constexpr = len(ends)
    LEAVES: tl.constexpr = BLOCK_M // QUEUES
    b_entry = tl.zeros([BLOCK_N], tl.int32) + place
    for q in tl.static_range(QUEUES - 1):
        b_entry = tl.where(place >= ends[q], (q + 1) * CAP + place - ends[q], b_entry)
    m = place < ends[QUEUES - 1]
    b_hit = tl.load(p_queue + b_entry * BLOCK_N + tl.arange(0, BLOCK_N), m, 0)
    b_number = b_hit.to(tl.uint32)
    b_leaf, b_first = b_number % LEAVES, b_number // LEAVES
    b_tile = b_first // BLOCK_M
    b_place = b_first + (b_leaf // PAIR) * (QUEUES * PAIR) + b_leaf % PAIR
    b_place += (b_tile * ROTATE) & rotated
    b_column = b_tile * BLOCK_M + b_place % BLOCK_M
    b_s = (b_hit >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    if METRIC == COSINE:
        b_s = b_s * tl.load(p_inverse + b_column, m, 0.0) * inverse_q
    return tl.where(m, pack(orderable(b_s), b_column.to(tl.int64)), NOTHING)


@triton.jit
def _sorted_hits(
    start,
    p_queue,
    p_inverse,
    ends,
    inverse_q,
    rotated,
    METRIC: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROTATE: tl.constexpr,
    CAP: tl.constexpr,
):
    """16 hits of each row, descending: 16 blocks [BLOCK_N]."""
    hits = ()
    for i in tl.static_range(16):
        hit = _hit(
            start + i,
            p_queue,
            p_inverse,
            ends,
            inverse_q,
            rotated,
            METRIC,
            PAIR,
            BLOCK_M,
            ROTATE,
            CAP,
        )
        hits += (hit,)  # type: ignore[assignment]
    return sort_16(*hits)


@triton.jit
def _best_hits(
    p_queue,
    p_count,  # [QUEUES, BLOCK_N] int32
    p_inverse,
    p_query_inverse,  # [BLOCK_N] float32
    rotated,
    METRIC: tl.constexpr,
    QUEUES: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROTATE: tl.constexpr,
    CAP: tl.constexpr,
):
    """The 16 best hits of each row, descending: 16 blocks [BLOCK_N].

    What is known of rows comes from memory, as each thread shall have one row.
    """
    inverse_q = tl.load(p_query_inverse + tl.arange(0, BLOCK_N))
    total = tl.zeros([BLOCK_N], tl.int32)
    ends = ()
    for q in tl.static_range(QUEUES):
        total += tl.load(p_count + q * BLOCK_N + tl.arange(0, BLOCK_N))
        ends += (total,)  # type: ignore[assignment]
    lists = _sorted_hits(
        0, p_queue, p_inverse, ends, inverse_q, rotated, METRIC, PAIR, BLOCK_M, ROTATE, CAP
    )
    for start in range(16, tl.max(total, 0), 16):
        more = _sorted_hits(
            start, p_queue, p_inverse, ends, inverse_q, rotated, METRIC, PAIR, BLOCK_M, ROTATE, CAP
        )
        lists = merge_16(*lists, *more)
    return lists


@triton.jit
def _store(
    lists,  # 16 blocks [rows] int64, descending (order.py)
    p_s,  # [rows]: where the similarities of a row go
    p_i,  # [rows]: where its indices go
    k,
    BY_INDEX: tl.constexpr,
):
    """Stores the first k of each row in the order that is asked for."""
    if BY_INDEX:
        by_index = ()
        for i in tl.static_range(16):
            # The same numbers with index and similarity in exchanged places.
            b_bits = order_of(lists[i]).to(tl.int64) & 0xFFFFFFFF
            b_key = ((0x7FFFFFFF - index_of(lists[i])) << 32) | b_bits
            b_key = tl.where((lists[i] == NOTHING) | (i >= k), NOTHING, b_key)
            by_index += (b_key,)  # type: ignore[assignment]
        lists = sort_16(*by_index)
    for i in tl.static_range(15):
        if i < k:
            b_missing = lists[i] == NOTHING
            if BY_INDEX:
                b_order, b_index = lists[i].to(tl.int32), 0x7FFFFFFF - (lists[i] >> 32)
            else:
                b_order, b_index = order_of(lists[i]), index_of(lists[i])
            tl.store(p_s + i, tl.where(b_missing, float("-inf"), from_orderable(b_order)))
            tl.store(p_i + i, tl.where(b_missing, 0, b_index))


@Kernel
def select_medium_kernel(
    p_query,  # [B, N, D]
    p_key,  # [B, M, D]
    p_mask,  # [B, M] bool, or None
    p_keys,  # [programs, tiles, BLOCK_M, BLOCK_D]: the rows of key of each tile
    p_factor,  # [programs, tiles, BLOCK_M] float32: of each column, in the order of columns.py
    p_inverse,  # [programs, tiles * BLOCK_M] float32: the same in the order of columns
    p_valid,  # [programs, tiles, QUEUES] int32
    p_queue,  # [programs, QUEUES, CAP, BLOCK_N] int64: product and column of a hit
    p_count,  # [programs, QUEUES, BLOCK_N] int32: the hits of a queue
    p_query_inverse,  # [programs, BLOCK_N] float32
    p_late,  # [programs, blocks_each, BLOCK_N] int32: for rows that are left, their block, else -1
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    N,
    M,
    D,
    columns,
    k,
    B2,
    blocks,  # row blocks of all batch elements
    blocks_each,  # of a program
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_kb1,
    stride_kb2,
    stride_km,
    stride_mb1,
    stride_mb2,
    ALIGN: tl.constexpr,
    METRIC: tl.constexpr,
    BY_INDEX: tl.constexpr,
    RESCALE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    GROUPS: tl.constexpr,
    QUEUES: tl.constexpr,
    PAIR: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LATE: tl.constexpr,
):
    """All of `select` for some blocks of queries."""
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    pid = tl.program_id(0)
    tiles = tl.cdiv(columns, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_q = tl.arange(0, QUEUES)
    o_i = tl.arange(0, BLOCK_N)
    p_keys += as_int64(pid) * tiles * (BLOCK_M * BLOCK_D)
    p_factor += as_int64(pid) * tiles * BLOCK_M
    p_inverse += as_int64(pid) * tiles * BLOCK_M
    p_valid += as_int64(pid) * tiles * QUEUES
    p_queue += as_int64(pid) * (QUEUES * CAP * BLOCK_N)
    p_count += as_int64(pid) * (QUEUES * BLOCK_N)
    p_entry = p_queue + o_q[None, :] * (CAP * BLOCK_N) + o_i[:, None]
    row_blocks = tl.cdiv(N, BLOCK_N)
    p_query_inverse += as_int64(pid) * BLOCK_N
    p_late += as_int64(pid) * blocks_each * BLOCK_N
    late = tl.zeros([], tl.int32)
    begin = (as_int64(pid) * blocks_each).to(tl.int32)
    end = tl.minimum(begin + blocks_each, blocks)

    for b in range(begin // row_blocks, tl.cdiv(end, row_blocks)):
        b1, b2 = b // B2, b % B2
        p_k = p_key + b1 * stride_kb1 + b2 * stride_kb2
        p_m = p_mask
        if p_mask is not None:
            p_m = p_mask + b1 * as_int64(stride_mb1) + b2 * as_int64(stride_mb2)
        # Every thread may store where others have read.
        tl.debug_barrier()
        unfit_keys = _prepare_columns(
            p_k,
            p_m,
            p_keys,
            p_factor,
            p_inverse,
            p_valid,
            tiles,
            columns,
            D,
            stride_km,
            METRIC,
            INTERPRETED,
            QUEUES,
            PAIR,
            BLOCK_M,
            ROTATE,
            BLOCK_D,
        )
        first = tl.maximum(begin, b * row_blocks)
        for block in range(first, tl.minimum(end, (b + 1) * row_blocks)):
            # Every thread may read what others have stored, and store where others have read.
            tl.debug_barrier()
            # The last block may have rows of the one before, which are the same again.
            n = tl.minimum((block - b * row_blocks) * BLOCK_N, N - BLOCK_N)
            o_n = n + o_i
            p_q = p_query + b1 * stride_qb1 + b2 * stride_qb2 + o_n * stride_qn
            b_q = tl.load(p_q[:, None] + o_d[None, :], (o_d < D)[None, :], 0.0)
            b_x = b_q.to(tl.float32)
            squares = tl.sum(b_x * b_x, 1)
            inverse_q = tl.full([BLOCK_N], 1.0, tl.float32)
            if METRIC == COSINE:
                inverse_q = _inverse_root(squares)
            m_unfit = (unfit_keys > 0) | ((squares < _LARGEST_SQUARES) == 0)
            b_max = _group_maxima(
                b_q, p_keys, p_factor, tiles, INTERPRETED, GROUPS, QUEUES, PAIR, BLOCK_M
            )
            threshold = _threshold(b_max, k, INTERPRETED)
            b_count = _append_hits(
                threshold,
                b_q,
                p_keys,
                p_factor,
                p_valid,
                p_entry,
                tiles,
                INTERPRETED,
                QUEUES,
                PAIR,
                CAP,
                BLOCK_M,
            )
            # Of a query that counts as zero, all similarities are equal.
            m_short = (tl.max(b_count, 1) > CAP) | (inverse_q == 0.0)
            rotated = tl.full([], -1, tl.int32).to(tl.uint32)
            if tl.max(m_short.to(tl.int32), 0) > 0:
                rotated = tl.zeros([], tl.uint32)
                threshold = tl.where(threshold == float("-inf"), threshold, threshold * inverse_q)
                b_count, b_above = _append_ties(
                    threshold,
                    inverse_q,
                    b_q,
                    p_keys,
                    p_inverse,
                    p_entry,
                    tiles,
                    INTERPRETED,
                    QUEUES,
                    PAIR,
                    CAP,
                    BLOCK_M,
                    ROTATE,
                )
                m_unfit = m_unfit | (tl.max(b_above, 1) > CAP)
                # Where a product depends on its place in a tile, the k-th one may be below.
                m_unfit = m_unfit | ((tl.sum(b_count, 1) < k) & (threshold != float("-inf")))
            tl.store(p_count + o_q[None, :] * BLOCK_N + o_i[:, None], tl.minimum(b_count, CAP))
            tl.store(p_query_inverse + o_i, inverse_q)
            tl.debug_barrier()

            lists = _best_hits(
                p_queue,
                p_count,
                p_inverse,
                p_query_inverse,
                rotated,
                METRIC,
                QUEUES,
                PAIR,
                BLOCK_N,
                BLOCK_M,
                ROTATE,
                CAP,
            )
            o_r = as_int64(b) * N + o_n
            _store(lists, p_similarities + o_r * k, p_indices + o_r * k, k, BY_INDEX)
            if tl.max(m_unfit.to(tl.int32), 0) > 0:
                p = p_late + as_int64(late) * BLOCK_N + o_i
                tl.store(p, tl.where(m_unfit, block, -1))
                late += 1

    # After the loop, whose registers hold nothing of this.
    tl.debug_barrier()
    o_i = tl.arange(0, LATE)
    for i in range(0, late * (BLOCK_N // LATE)):
        block = tl.load(p_late + as_int64(i) * LATE + o_i)
        m_n = block >= 0
        block = tl.max(block, 0)
        if block >= 0:
            b = block // row_blocks
            b1, b2 = b // B2, b % B2
            n = tl.minimum(block % row_blocks * BLOCK_N, N - BLOCK_N)
            o_n = n + i % (BLOCK_N // LATE) * LATE + o_i
            p_m = p_mask
            if p_mask is not None:
                p_m = p_mask + b1 * as_int64(stride_mb1) + b2 * as_int64(stride_mb2)
            b_list, b_s_self = _one_by_one(
                p_query + b1 * stride_qb1 + b2 * stride_qb2 + o_n * stride_qn,
                m_n,
                tl.full([LATE], -1, tl.int64),
                None,
                None,
                p_key + b1 * stride_kb1 + b2 * stride_kb2,
                None,
                p_m,
                M,
                D,
                columns,
                k,
                stride_km,
                METRIC,
                RESCALE,
                "tf32",  # of 16 bits, whatever it is
                False,
                False,
                INTERPRETED,
                64,
                BLOCK_D,
            )
            o_r = as_int64(b) * N + o_n
            p_s, p_i = p_similarities + o_r * k, p_indices + o_r * k
            store_list(b_list, b_s_self, p_s, p_i, m_n, k, 0, False, BY_INDEX, 4)


@cache_plans
def plan_select_medium(search: Search) -> Plan:
    Q, K = search.Q, search.K
    config = configs.select_medium(search.arch)
    blocks = Q.B * cdiv(Q.N, config["BLOCK_N"])
    blocks_each = cdiv(blocks, config.pop("programs"))
    programs = cdiv(blocks, blocks_each)
    tiles = cdiv(search.columns, config["BLOCK_M"])
    places = programs * tiles * config["BLOCK_M"]
    queues = programs * config["QUEUES"] * config["BLOCK_N"]
    # Rows are read where they lie, not scaled.
    numbers = search.numbers() | Q.strides("q") | K.strides("k") | {"ALIGN": alignment(Q, K)}
    launch = select_medium_kernel.prepare(
        programs,
        config,
        **numbers,
        blocks=blocks,
        blocks_each=blocks_each,
        RESCALE=rescales(search.dtype),
        INTERPRETED=hardware.interpreted(),
    )
    return Plan(
        [launch],
        p_keys=(places * config["BLOCK_D"], search.dtype),
        p_factor=(places, torch.float32),
        p_inverse=(places, torch.float32),
        p_valid=(programs * tiles * config["QUEUES"], torch.int32),
        p_queue=(queues * config["CAP"], torch.int64),
        p_count=(queues, torch.int32),
        p_query_inverse=(programs * config["BLOCK_N"], torch.float32),
        p_late=(programs * blocks_each * config["BLOCK_N"], torch.int32),
    )


def select_medium(search: Search, pointers: Pointers) -> None:
    """Select among some hundred columns."""
    plan_select_medium(search)(pointers)
