# SPDX-License-Identifier: MIT
"""Select where there are many columns: those that may be neighbors, with their products.

S = Q K^T (Eq. 3) is computed tile by tile on tensor cores and never stored. A program has BLOCK_N
queries, and all columns or a range of them.

1. A threshold. In a sample of the tiles, columns are divided into GROUPS groups, and a row keeps
   the largest similarity of each group: a maximum for each element, in registers. The k-th largest
   of these is a similarity that k columns reach.
2. The hits. In every tile, the columns that reach the threshold are appended, with their products,
   to the queues of the row. The columns of a tile are divided among QUEUES threads as tensor cores
   leave them, and each thread has a queue of its own (append.py), so that none waits for another.

Every neighbor is a hit. finish.py picks the k best hits. A row of which a queue is too short, as
where thousands of keys are equal, is listed, and exact_topk.py does it.

What decides is x = q k ||k||^-1 for cosine, q k for dot: a monotonic function of the similarity up
to some roundings, by which the threshold is lowered. Where products are not accurate enough, or
the similarity is not a product (euclidean), x is a lower bound of the similarity for the threshold
and an upper bound for the hits; both contain ||k||^2 times a tolerance (columns.py), and the
threshold is lowered by that of ||q||^2.

The first kernel that reads the queries computes their norms, and scales the rows for a cosine.
"""

import triton
import triton.language as tl

from .append import append_hits, words_of
from .columns import in_order_of_queues, load_columns, sums_of_squares, tiles_of
from .integers import aligned, as_int64
from .launch import Kernel
from .metrics import COSINE
from .norms import norms_of_rows
from .products import split_dot, sum_of_split
from .ranges import columns_of_all, load_ranges, tiles_of_ranges, words_of_ranges


@triton.jit
def _tile_start(tile, columns, BLOCK_M: tl.constexpr, ADVANCE: tl.constexpr):
    """The first column of a tile. The last tile ends with the last column."""
    return tl.minimum(tile * ADVANCE, columns - BLOCK_M)


@triton.jit
def _rows_of_key(
    p_tile,
    p_k,
    p_columns,
    tile,
    columns,
    M,
    stride_km,
    BLOCK_M: tl.constexpr,
    ADVANCE: tl.constexpr,
):
    """Pointers to the rows of key of a tile, all of which can be read. p_tile is its first one,
    unless columns are candidates."""
    o_m = tl.arange(0, BLOCK_M)
    if p_columns is not None:
        row = tl.load(p_columns + _tile_start(tile, columns, BLOCK_M, ADVANCE) + o_m)
        return p_k + tl.where((row >= 0) & (row < M), row, 0) * stride_km
    else:
        return p_tile + o_m * stride_km


@triton.jit
def _multiply(
    b_q,  # [BLOCK_N, BLOCK_D]: all channels of the queries, if ONE_BLOCK_D
    p_q,  # [BLOCK_N]: rows of query
    m_n,  # [BLOCK_N]
    p_k,  # [BLOCK_M]: rows of key; of their first pieces if products are split
    D,
    stride_piece,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr,
):
    """q k of a tile, [BLOCK_N, BLOCK_M]."""
    BLOCK_N: tl.constexpr = p_q.shape[0]
    BLOCK_M: tl.constexpr = p_k.shape[0]
    o_d = tl.arange(0, BLOCK_D)
    b_s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    b_rest = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # One step without a loop, where it is enough: the queries stay where tensor cores read them.
    for d in range(0, BLOCK_D if ONE_BLOCK_D else D, BLOCK_D):
        p = p_k[None, :] + (d + o_d)[:, None]
        m_d = None if WHOLE_D else (d + o_d < D)[:, None]
        other = None if WHOLE_D else 0.0
        if not ONE_BLOCK_D:
            b_q = tl.load(
                p_q[:, None] + (d + o_d)[None, :], m_n[:, None] & (d + o_d < D)[None, :], 0.0
            )
        b_k = tl.load(p, m_d, other)
        if PRECISION == "split":
            k_middle = tl.load(p + stride_piece, m_d, other)
            k_low = tl.load(p + 2 * stride_piece, m_d, other)
            b_s, b_rest = split_dot(b_q, b_k, k_middle, k_low, b_s, b_rest, INTERPRETED)
        else:
            b_s = tl.dot(b_q, b_k, b_s, input_precision=PRECISION)
    if PRECISION == "split":
        b_s = sum_of_split(b_s, b_rest, INTERPRETED)
    return b_s


@triton.jit
def _group_maxima(
    b_q,
    p_q,
    m_n,
    p_k,  # [M, D]: the keys of the batch element
    p_columns,
    p_factor,  # [tiles, BLOCK_M], of the batch element; or None
    p_low,  # [tiles, BLOCK_M], or None
    row_begin,  # [BLOCK_N] int32, or None: the ranges of the queries
    row_end,
    first,
    last,
    columns,
    M,
    D,
    stride_km,
    stride_piece,
    sample_step,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    GROUPS: tl.constexpr,
    QUEUES: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ADVANCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr,
):
    """[BLOCK_N, GROUPS]: for each group of columns the largest x, of every `sample_step`-th tile
    from `first` to `last`."""
    BLOCK_N: tl.constexpr = p_q.shape[0]
    EACH: tl.constexpr = GROUPS // QUEUES
    b_max = tl.full([BLOCK_N, QUEUES, EACH], float("-inf"), tl.float32)
    tiles = tiles_of(columns, BLOCK_M, ADVANCE)
    p_tile = p_k + _tile_start(first, columns, BLOCK_M, ADVANCE) * stride_km
    # From the tile before it to the last one, which ends with the last column.
    last_step = (columns - BLOCK_M - (tiles - 1 - sample_step) * ADVANCE) * stride_km
    p_f = p_factor if p_factor is None else p_factor + as_int64(first) * BLOCK_M
    if row_begin is not None:
        begin_of_all, end_of_all = columns_of_all(row_begin, row_end, columns)
    for tile in range(first, last, sample_step):
        b_x = _multiply(
            b_q,
            p_q,
            m_n,
            _rows_of_key(p_tile, p_k, p_columns, tile, columns, M, stride_km, BLOCK_M, ADVANCE),
            D,
            stride_piece,
            PRECISION,
            INTERPRETED,
            BLOCK_D,
            ONE_BLOCK_D,
            WHOLE_D,
        )
        if p_factor is not None:
            b_x = b_x * load_columns(p_f, QUEUES, PAIR, BLOCK_M)[None, :]
            p_f += sample_step * BLOCK_M
        else:
            p_l = p_low + as_int64(tile) * BLOCK_M
            b_x = b_x + load_columns(p_l, QUEUES, PAIR, BLOCK_M)[None, :]
        if row_begin is not None:
            start = _tile_start(tile, columns, BLOCK_M, ADVANCE)
            if (start < begin_of_all) | (start + BLOCK_M > end_of_all):
                # One comparison after the other: ptxas would keep their conjunction in words.
                o_c = (start + tl.arange(0, BLOCK_M))[None, :]
                b_x = tl.where(o_c < row_begin[:, None], float("-inf"), b_x)
                b_x = tl.where(o_c < row_end[:, None], b_x, float("-inf"))
        if INTERPRETED:
            # Its maximum of NaN and a number is NaN.
            b_x = tl.where(b_x == b_x, b_x, float("-inf"))
        b_x = in_order_of_queues(b_x, QUEUES, PAIR)
        # A group has columns that are far apart, as neighboring ones are alike.
        b_x = tl.reshape(b_x, [BLOCK_N, QUEUES, BLOCK_M // GROUPS, EACH])
        b_max = tl.maximum(b_max, tl.max(b_x, 2))
        if p_columns is None:
            is_last = tile + sample_step == tiles - 1
            p_tile += tl.where(is_last, last_step, sample_step * ADVANCE * stride_km)
    return tl.reshape(b_max, [BLOCK_N, GROUPS])


@triton.jit
def _in_order(a, b):
    return tl.maximum(a, b), tl.minimum(a, b)


@triton.jit
def _kth_largest(b_x, k, QUEUES: tl.constexpr):
    """The k-th largest of each row of b_x [rows, n], or less where some are equal.

    One maximum after another is removed from fours in descending order, of which only the first can
    be the next one.
    """
    rows: tl.constexpr = b_x.shape[0]
    FOURS: tl.constexpr = b_x.shape[1] // 4
    # Numbers of a four are far apart among those of a thread: ptxas spills if they are adjacent.
    b_x = tl.reshape(b_x, [rows, QUEUES, 2, 2, FOURS // QUEUES])
    b_x = tl.reshape(tl.permute(b_x, [0, 1, 4, 2, 3]), [rows, FOURS, 2, 2])
    b_even, b_odd = tl.split(b_x)
    b_0, b_2 = tl.split(b_even)
    b_1, b_3 = tl.split(b_odd)
    b_0, b_1 = _in_order(b_0, b_1)
    b_2, b_3 = _in_order(b_2, b_3)
    b_0, b_2 = _in_order(b_0, b_2)
    b_1, b_3 = _in_order(b_1, b_3)
    b_1, b_2 = _in_order(b_1, b_2)
    b_max = tl.max(b_0, 1)
    for _ in range(1, k):
        m = b_0 == b_max[:, None]
        b_0 = tl.where(m, b_1, b_0)
        b_1 = tl.where(m, b_2, b_1)
        b_2 = tl.where(m, b_3, b_2)
        b_3 = tl.where(m, float("-inf"), b_3)
        b_max = tl.max(b_0, 1)
    return b_max


@triton.jit
def _load_queries(
    p_query,  # [B, N, D]
    p_query_scaled,  # [B, N, D] contiguous, or None
    p_norm,  # [BLOCK_N], or None
    b1,
    b2,
    o_n,  # [BLOCK_N]
    m_n,  # [BLOCK_N]
    D,
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_qsb1,
    stride_qsb2,
    stride_qsn,
    METRIC: tl.constexpr,
    RESCALE: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Pointers to the rows, [BLOCK_N], and their first channels, [BLOCK_N, BLOCK_D].

    OF_QUERIES: stores norms, for cosine those of scaled rows, else sums of squares; and the scaled
    rows, which are then those that are read. All programs with the same queries store the same.
    """
    p_row = p_query + b1 * stride_qb1 + b2 * stride_qb2 + o_n * stride_qn
    p_scaled = p_query_scaled
    if p_query_scaled is not None:
        p_scaled = p_query_scaled + b1 * stride_qsb1 + b2 * stride_qsb2 + o_n * stride_qsn
    if OF_QUERIES:
        BLOCK_N: tl.constexpr = m_n.shape[0]
        BLOCK: tl.constexpr = BLOCK_D if BLOCK_D < 64 else 64
        if METRIC == COSINE:
            norm, _ = norms_of_rows(p_row, p_scaled, m_n, m_n, D, RESCALE, BLOCK_N, BLOCK)
        else:
            norm = sums_of_squares(p_row, m_n, D, BLOCK_N, BLOCK)
        tl.store(p_norm, norm, m_n)
        # Every thread may read what another one has stored.
        tl.debug_barrier()
    if p_query_scaled is not None:
        p_row = p_scaled
    o_d = tl.arange(0, BLOCK_D)
    return p_row, tl.load(p_row[:, None] + o_d[None, :], m_n[:, None] & (o_d < D)[None, :], 0.0)


@triton.jit
def rows_of_block(block, first_b, first_n, rows_n, BLOCK_N: tl.constexpr):
    """The batch element of a block of queries, their numbers in it, and in the launch.

    A launch has `rows_n` queries, from number `first_n` on, of batch elements from `first_b` on.
    """
    blocks = tl.cdiv(rows_n, BLOCK_N)
    b, o = block // blocks, (block % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    return first_b + b, first_n + o, o < rows_n, b.to(tl.int64) * rows_n + o


@Kernel
def threshold_kernel(
    p_query,  # [B, N, D]
    p_query_scaled,  # [B, N, D] contiguous: rows times a power of two; or None
    p_key,  # [B, M, D]; [3, B, M, D], the pieces, if products are split
    p_columns,  # [R] or [B, R] int64, or None
    p_range,  # [N, 2] or [B, N, 2] int64, or None
    p_query_norm,  # [B, N] float32: for cosine norms of scaled rows, else sums of squares; or None
    p_factor,  # [B, tiles, BLOCK_M] float32, or None
    p_low,  # [B, tiles, BLOCK_M] float32, or None
    p_maxima,  # [queries of the launch, splits, GROUPS] float32
    first_b,
    first_n,
    rows_n,
    N,
    M,
    D,
    columns,
    B2,
    splits,
    tiles_each,
    sample_step,
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_qsb1,
    stride_qsb2,
    stride_qsn,
    stride_kb1,
    stride_kb2,
    stride_km,
    stride_piece,
    stride_columns,
    stride_range,
    ALIGN: tl.constexpr,
    METRIC: tl.constexpr,
    RESCALE: tl.constexpr,
    OF_QUERIES: tl.constexpr,  # whether norms of the queries are computed here
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    GROUPS: tl.constexpr,
    QUEUES: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ADVANCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr,
):
    """The maxima of groups, of one range of columns; where columns are divided among programs."""
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    stride_piece = aligned(stride_piece, ALIGN)
    pid = tl.program_id(0)
    b, o_n, m_n, o_r = rows_of_block(pid // splits, first_b, first_n, rows_n, BLOCK_N)
    b1, b2 = b // B2, b % B2
    b = b.to(tl.int64)
    tiles = tiles_of(columns, BLOCK_M, ADVANCE)
    split = pid % splits
    first = (split.to(tl.int64) * tiles_each).to(tl.int32)
    last = tl.minimum(first + tiles_each, tiles)
    row_begin, row_end = None, None
    if p_range is not None:
        p_r = p_range + (b * as_int64(stride_range) + o_n) * 2
        row_begin, row_end = load_ranges(p_r, m_n, M)
        first, last, sample_step = tiles_of_ranges(
            row_begin, row_end, split, splits, tiles, columns, sample_step, ADVANCE
        )
    p_q, b_q = _load_queries(
        p_query,
        p_query_scaled,
        p_query_norm if p_query_norm is None else p_query_norm + b * N + o_n,
        b1,
        b2,
        o_n,
        m_n,
        D,
        aligned(stride_qb1, ALIGN),
        aligned(stride_qb2, ALIGN),
        aligned(stride_qn, ALIGN),
        aligned(stride_qsb1, ALIGN),
        aligned(stride_qsb2, ALIGN),
        aligned(stride_qsn, ALIGN),
        METRIC,
        RESCALE,
        OF_QUERIES,
        BLOCK_D,
    )
    b_max = _group_maxima(
        b_q,
        p_q,
        m_n,
        p_key + b1 * stride_kb1 + b2 * stride_kb2,
        p_columns if p_columns is None else p_columns + b * as_int64(stride_columns),
        p_factor if p_factor is None else p_factor + b * tiles * BLOCK_M,
        p_low if p_low is None else p_low + b * tiles * BLOCK_M,
        row_begin,
        row_end,
        first,
        last,
        columns,
        M,
        D,
        stride_km,
        stride_piece,
        sample_step,
        PRECISION,
        INTERPRETED,
        GROUPS,
        QUEUES,
        PAIR,
        BLOCK_M,
        ADVANCE,
        BLOCK_D,
        ONE_BLOCK_D,
        WHOLE_D,
    )
    p_out = p_maxima + ((o_r * splits + split) * GROUPS)[:, None]
    tl.store(p_out + tl.arange(0, GROUPS)[None, :], b_max, m_n[:, None])


@Kernel
def sweep_kernel(
    p_query,  # [B, N, D]
    p_query_scaled,  # [B, N, D] contiguous: rows times a power of two; or None
    p_key,  # [B, M, D]; [3, B, M, D], the pieces, if products are split
    p_columns,  # [R] or [B, R] int64, or None
    p_range,  # [N, 2] or [B, N, 2] int64, or None
    p_query_norm,  # [B, N] float32: for cosine norms of scaled rows, else sums of squares; or None
    p_factor,  # [B, tiles, BLOCK_M] float32, or None
    p_low,  # [B, tiles, BLOCK_M] float32, or None
    p_high,  # [B, tiles, BLOCK_M] float32, or None
    p_valid,  # [B, tiles, QUEUES] int32
    p_maxima,  # [queries of the launch, splits, GROUPS] float32; or None: there is one range
    p_queue,  # [queries of the launch, splits, QUEUES, CAP] int64: product and number of a hit
    p_count,  # [queries of the launch, splits, QUEUES] int32: hits, of which CAP are stored
    p_listed,  # [lists, B] int32: how many rows of a batch element are listed
    p_rows,  # [B, N] int32: which, in any order
    p_is_listed,  # [B, N] int32, 0 at first: whether one of the ranges has listed a row; or None
    list_number,
    first_b,
    first_n,
    rows_n,
    B,
    N,
    M,
    D,
    k,
    columns,
    B2,
    splits,
    tiles_each,
    sample_step,
    tolerance,
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_qsb1,
    stride_qsb2,
    stride_qsn,
    stride_kb1,
    stride_kb2,
    stride_km,
    stride_piece,
    stride_columns,
    stride_range,
    ALIGN: tl.constexpr,
    METRIC: tl.constexpr,
    RESCALE: tl.constexpr,
    OF_QUERIES: tl.constexpr,  # whether norms of the queries are computed here
    BOUNDS: tl.constexpr,  # whether x are bounds of similarities
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    GROUPS: tl.constexpr,
    QUEUES: tl.constexpr,
    PAIR: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ADVANCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr,
):
    """The hits of BLOCK_N queries in all columns, or in one range of them."""
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    stride_piece = aligned(stride_piece, ALIGN)
    LEAVES: tl.constexpr = BLOCK_M // QUEUES
    pid = tl.program_id(0)
    b, o_n, m_n, o_r = rows_of_block(pid // splits, first_b, first_n, rows_n, BLOCK_N)
    b1, b2 = b // B2, b % B2
    b = b.to(tl.int64)
    split = pid % splits
    tiles = tiles_of(columns, BLOCK_M, ADVANCE)
    first = (split.to(tl.int64) * tiles_each).to(tl.int32)
    last = tl.minimum(first + tiles_each, tiles)
    row_begin, row_end = None, None
    if p_range is not None:
        p_r = p_range + (b * as_int64(stride_range) + o_n) * 2
        row_begin, row_end = load_ranges(p_r, m_n, M)
        first, last, sample_step = tiles_of_ranges(
            row_begin, row_end, split, splits, tiles, columns, sample_step, ADVANCE
        )
    p_q, b_q = _load_queries(
        p_query,
        p_query_scaled,
        p_query_norm if p_query_norm is None else p_query_norm + b * N + o_n,
        b1,
        b2,
        o_n,
        m_n,
        D,
        aligned(stride_qb1, ALIGN),
        aligned(stride_qb2, ALIGN),
        aligned(stride_qn, ALIGN),
        aligned(stride_qsb1, ALIGN),
        aligned(stride_qsb2, ALIGN),
        aligned(stride_qsn, ALIGN),
        METRIC,
        RESCALE,
        OF_QUERIES,
        BLOCK_D,
    )
    p_k = p_key + b1 * stride_kb1 + b2 * stride_kb2
    p_c = p_columns if p_columns is None else p_columns + b * as_int64(stride_columns)
    p_f = p_factor if p_factor is None else p_factor + b * tiles * BLOCK_M
    p_l = p_low if p_low is None else p_low + b * tiles * BLOCK_M

    if p_maxima is not None:
        o_g = tl.arange(0, GROUPS)
        b_max = tl.full([BLOCK_N, GROUPS], float("-inf"), tl.float32)
        for i in range(0, splits):
            p = p_maxima + ((o_r * splits + i) * GROUPS)[:, None] + o_g[None, :]
            b_max = tl.maximum(b_max, tl.load(p, m_n[:, None], 0.0))
    else:
        b_max = _group_maxima(
            b_q,
            p_q,
            m_n,
            p_k,
            p_c,
            p_f,
            p_l,
            row_begin,
            row_end,
            first,
            last,
            columns,
            M,
            D,
            stride_km,
            stride_piece,
            sample_step,
            PRECISION,
            INTERPRETED,
            GROUPS,
            QUEUES,
            PAIR,
            BLOCK_M,
            ADVANCE,
            BLOCK_D,
            ONE_BLOCK_D,
            WHOLE_D,
        )
    threshold = _kth_largest(b_max, k, QUEUES)
    # Below what is left of the k-th similarity after some roundings of relative size 2^-24, or of
    # absolute size 2^-149.
    threshold -= tl.abs(threshold) * 9.5e-7 + 7.5e-37
    if BOUNDS:
        threshold -= 2.0 * tolerance * tl.load(p_query_norm + b * N + o_n, m_n, 0.0)
    b_below = -threshold[:, None]
    # Rows that there are not have no queues.
    b_row = tl.where(m_n, -1, 0)[:, None]

    o_q = tl.arange(0, QUEUES)
    o_queue = (o_r * splits + split)[:, None] * QUEUES + o_q[None, :]
    p_entry = p_queue + o_queue * CAP
    b_count = tl.zeros([BLOCK_N, QUEUES], tl.int32)
    p_v = p_valid + b * tiles * QUEUES + o_q
    p_tile = p_k + _tile_start(first, columns, BLOCK_M, ADVANCE) * stride_km
    last_step = (columns - BLOCK_M - (tiles - 2) * ADVANCE) * stride_km
    if p_f is not None:
        p_f += as_int64(first) * BLOCK_M
    p_v += as_int64(first) * QUEUES
    for tile in range(first, last):
        b_s = _multiply(
            b_q,
            p_q,
            m_n,
            _rows_of_key(p_tile, p_k, p_c, tile, columns, M, stride_km, BLOCK_M, ADVANCE),
            D,
            stride_piece,
            PRECISION,
            INTERPRETED,
            BLOCK_D,
            ONE_BLOCK_D,
            WHOLE_D,
        )
        if p_factor is not None:
            b_factor = load_columns(p_f, QUEUES, PAIR, BLOCK_M)[None, :]
            p_f += BLOCK_M
            b_above = tl.fma(
                b_s,
                tl.broadcast_to(b_factor, [BLOCK_N, BLOCK_M]),
                tl.broadcast_to(b_below, [BLOCK_N, BLOCK_M]),
            )
        else:
            p_h = p_high + (b * tiles + tile) * BLOCK_M
            b_above = b_s + load_columns(p_h, QUEUES, PAIR, BLOCK_M)[None, :] + b_below
        b_word = words_of(in_order_of_queues(b_above, QUEUES, PAIR), INTERPRETED)
        b_word = b_word & tl.load(p_v)[None, :] & b_row
        p_v += QUEUES
        if p_range is not None:
            start = _tile_start(tile, columns, BLOCK_M, ADVANCE)
            b_word &= words_of_ranges(start, row_begin, row_end, QUEUES, PAIR, LEAVES)
        b_s = in_order_of_queues(b_s, QUEUES, PAIR)
        b_count = append_hits(b_word, b_s, p_entry, b_count, tile * LEAVES, CAP)
        if p_columns is None:
            p_tile += tl.where(tile + 1 == tiles - 1, last_step, ADVANCE * stride_km)
    tl.store(p_count + o_queue, b_count, m_n[:, None])

    m_short = m_n & (tl.max(b_count, 1) > CAP)
    if tl.max(m_short.to(tl.int32), 0) > 0:
        if p_is_listed is not None:
            listed = tl.atomic_xchg(p_is_listed + b * N + o_n, 1, m_short, sem="relaxed")
            m_short = m_short & (listed == 0)
        p_number = p_listed + as_int64(list_number) * B + b + tl.zeros([BLOCK_N], tl.int64)
        place = tl.atomic_add(p_number, 1, m_short, sem="relaxed")
        tl.store(p_rows + b * N + place, o_n.to(tl.int32), m_short)
