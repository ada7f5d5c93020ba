# SPDX-License-Identifier: MIT
"""What the sweep (sweep.py) reads of each column of S = Q K^T besides its row of key.

Columns are keys or candidates, in tiles of BLOCK_M that begin ADVANCE columns apart. The last tile
is moved back so that it ends with the last column. A column that two tiles have is valid in one of
them. A program has one tile, reads its rows once, and stores, in the order in which the threads of
the sweep want them,

    factor  1 / ||k|| for cosine, 0 where k counts as zero; 1 for dot
    low     where a bound of the error is needed, what is added to the product q k for a lower
    high    bound of the similarity, and for an upper bound
    valid   a bit for each column: 1 if it may be a neighbor

Factors and lower bounds of columns that are not valid are NaN, which no maximum takes. With
candidates, further programs compute norms of all rows of key.
"""

import triton
import triton.language as tl

from .integers import aligned, as_int64
from .launch import Kernel
from .metrics import COSINE, EUCLIDEAN
from .norms import norms_of_rows
from .products import pieces


@triton.jit
def tiles_of(columns, BLOCK_M: tl.constexpr, ADVANCE: tl.constexpr):
    """How many tiles there are, of which only the last one is moved back."""
    return tl.cdiv(columns - (BLOCK_M - ADVANCE), ADVANCE)


@triton.jit
def in_order_of_queues(b_x, QUEUES: tl.constexpr, PAIR: tl.constexpr):
    """b_x [rows, BLOCK_M] as [rows, QUEUES, BLOCK_M // QUEUES].

    Column (a QUEUES + q) PAIR + p is number a PAIR + p of queue q.
    """
    rows: tl.constexpr = b_x.shape[0]
    BLOCK_M: tl.constexpr = b_x.shape[1]
    b_x = tl.reshape(b_x, [rows, BLOCK_M // (QUEUES * PAIR), QUEUES, PAIR])
    return tl.reshape(tl.permute(b_x, [0, 2, 1, 3]), [rows, QUEUES, BLOCK_M // QUEUES])


@triton.jit
def load_columns(p, QUEUES: tl.constexpr, PAIR: tl.constexpr, BLOCK_M: tl.constexpr):
    """What `columns_kernel` stored for a tile, [BLOCK_M] in the order of columns."""
    b_x = tl.load(p + tl.arange(0, BLOCK_M))
    b_x = tl.reshape(b_x, [QUEUES, BLOCK_M // (QUEUES * PAIR), PAIR])
    return tl.reshape(tl.permute(b_x, [1, 0, 2]), [BLOCK_M])


@triton.jit
def store_columns(p, b_x, QUEUES: tl.constexpr, PAIR: tl.constexpr):
    """b_x [BLOCK_M] for `load_columns`."""
    b_x = in_order_of_queues(b_x[None, :], QUEUES, PAIR)
    BLOCK_M: tl.constexpr = b_x.shape[1] * b_x.shape[2]
    tl.store(p + tl.arange(0, BLOCK_M), tl.reshape(b_x, [BLOCK_M]))


@triton.jit
def sums_of_squares(p_row, m_r, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """||x||^2 of the rows at p_row [ROWS]; infinite where it overflows."""
    o_d = tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([ROWS], tl.float32)
    for d in range(0, D, BLOCK_D):
        m_x = m_r[:, None] & (d + o_d < D)[None, :]
        b_x = tl.load(p_row[:, None] + (d + o_d)[None, :], m_x, 0.0).to(tl.float32)
        b_sum += tl.sum(b_x * b_x, 1)
    return b_sum


@triton.jit
def _store_pieces(
    p_row,  # [ROWS]: rows of D float32
    p_to,  # [ROWS]: where the first of their pieces go
    scale,  # [ROWS]: what rows are multiplied by
    m_r,  # [ROWS]
    D,
    stride_piece,
    INTERPRETED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The rows in three pieces, for products of float32 (products.py)."""
    o_d = tl.arange(0, BLOCK_D)
    for d in range(0, D, BLOCK_D):
        m_x = m_r[:, None] & (d + o_d < D)[None, :]
        b_x = tl.load(p_row[:, None] + (d + o_d)[None, :], m_x, 0.0) * scale[:, None]
        b_high, b_middle, b_low = pieces(b_x, INTERPRETED)
        p = p_to[:, None] + (d + o_d)[None, :]
        tl.store(p, b_high, m_x)
        tl.store(p + stride_piece, b_middle, m_x)
        tl.store(p + 2 * stride_piece, b_low, m_x)


@triton.jit
def _store_norms(
    program,
    p_x,  # [B, N, D]
    p_norm,  # [B, N] float32
    p_scaled,  # as p_x, contiguous, or None
    p_pieces,  # [3, B, N, D] contiguous, or None
    N,
    D,
    B2,
    stride_b1,
    stride_b2,
    stride_n,
    stride_sb1,
    stride_sb2,
    stride_piece,
    METRIC: tl.constexpr,
    RESCALE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Norms of ROWS rows if there is a cosine; and what else is needed."""
    blocks = tl.cdiv(N, ROWS)
    b = program // blocks
    b1, b2 = b // B2, b % B2
    n = (program % blocks) * ROWS + tl.arange(0, ROWS)
    m_r = n < N
    o_r = b * N + n
    p_row = p_x + b1 * stride_b1 + b2 * stride_b2 + n * stride_n
    o_to = b1 * stride_sb1 + b2 * stride_sb2 + n * D
    m_to = m_r & _stored_here(b1, b2, stride_sb1, stride_sb2)
    scale = tl.full([ROWS], 1.0, tl.float32)
    if METRIC == COSINE:
        p_to = p_scaled if p_scaled is None else p_scaled + o_to
        norm, scale = norms_of_rows(p_row, p_to, m_r, m_to, D, RESCALE, ROWS, BLOCK_D)
        tl.store(p_norm + o_r, norm, m_r)
    if p_pieces is not None:
        _store_pieces(p_row, p_pieces + o_to, scale, m_to, D, stride_piece, INTERPRETED, BLOCK_D)


@triton.jit
def _stored_here(b1, b2, stride_b1, stride_b2):
    """Whether a row that batch elements share is stored for this one, the first of them."""
    return ((b1 == 0) | (stride_b1 != 0)) & ((b2 == 0) | (stride_b2 != 0))


@Kernel
def columns_kernel(
    p_key,  # [B, M, D]
    p_columns,  # [R] or [B, R] int64, or None
    p_mask,  # [B, M] bool, or None
    p_key_norm,  # [B, M] float32: for cosine norms of scaled rows; or None
    p_key_scaled,  # [B, M, D] contiguous: rows times a power of two; or None
    p_key_pieces,  # [3, B, M, D] contiguous: the (scaled) rows in three pieces; or None
    p_factor,  # [B, tiles, BLOCK_M] float32, or None
    p_low,  # [B, tiles, BLOCK_M] float32, or None
    p_high,  # [B, tiles, BLOCK_M] float32, or None
    p_valid,  # [B, tiles, QUEUES] int32: the first column of a queue in the highest bit
    p_listed,  # [lists, B] int32: set to 0
    p_is_listed,  # [B, N] int32: set to 0; or None
    p_weight,  # [C, 1, k] contiguous, or None
    p_weight_rows,  # [k, C] contiguous: the weight for `finish_kernel`; or None
    key_programs,  # how many have rows of key: none without candidates
    N,
    M,
    D,
    columns,
    B,
    B2,
    lists,
    C,
    k,
    tolerance,
    stride_kb1,
    stride_kb2,
    stride_km,
    stride_ksb1,
    stride_ksb2,
    stride_piece,
    stride_mb1,
    stride_mb2,
    stride_columns,
    ALIGN: tl.constexpr,
    METRIC: tl.constexpr,
    RESCALE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ADVANCE: tl.constexpr,
    QUEUES: tl.constexpr,
    PAIR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of columns; or, after those of all tiles, ROWS rows of key."""
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    stride_ksb1 = aligned(stride_ksb1, ALIGN)
    stride_ksb2 = aligned(stride_ksb2, ALIGN)
    stride_piece = aligned(stride_piece, ALIGN)
    LEAVES: tl.constexpr = BLOCK_M // QUEUES
    pid = tl.program_id(0).to(tl.int64)
    tiles = tiles_of(columns, BLOCK_M, ADVANCE).to(tl.int64)
    of_columns = tiles * B
    if pid < of_columns:
        b, tile = pid // tiles, pid % tiles
        b1, b2 = b // B2, b % B2
        o_c = tl.minimum(tile * ADVANCE, columns - BLOCK_M) + tl.arange(0, BLOCK_M)
        row = o_c
        if p_columns is not None:
            row = tl.load(p_columns + b * as_int64(stride_columns) + o_c)
        m_row = (row >= 0) & (row < M)
        is_own = (o_c < (tile + 1) * ADVANCE) | (tile == tiles - 1)
        m_valid = m_row & (o_c >= tile * ADVANCE) & is_own
        if p_mask is not None:
            p_m = p_mask + b1 * stride_mb1 + b2 * stride_mb2
            m_valid = m_valid & (tl.load(p_m + row, m_row, 0) != 0)
        p_row = p_key + b1 * stride_kb1 + b2 * stride_kb2 + row * stride_km
        # With candidates other programs store all rows of key.
        o_to = b1 * stride_ksb1 + b2 * stride_ksb2 + row * D
        m_to = m_row & _stored_here(b1, b2, stride_ksb1, stride_ksb2) & (key_programs == 0)
        factor = tl.full([BLOCK_M], 1.0, tl.float32)
        scale = tl.full([BLOCK_M], 1.0, tl.float32)
        if METRIC == COSINE:
            p_to = p_key_scaled if p_key_scaled is None else p_key_scaled + o_to
            norm, scale = norms_of_rows(p_row, p_to, m_row, m_to, D, RESCALE, BLOCK_M, BLOCK_D)
            tl.store(p_key_norm + b * M + row, norm, m_row & (key_programs == 0))
            m_zero = norm == 0.0
            factor = tl.where(m_zero, 0.0, tl.div_rn(1.0, tl.where(m_zero, 1.0, norm)))
        if p_key_pieces is not None:
            p_to = p_key_pieces + o_to
            _store_pieces(p_row, p_to, scale, m_to, D, stride_piece, INTERPRETED, BLOCK_D)
        if p_factor is not None:
            factor = tl.where(m_valid, factor, float("nan"))
            store_columns(p_factor + pid * BLOCK_M, factor, QUEUES, PAIR)
        else:
            squares = sums_of_squares(p_row, m_row, D, BLOCK_M, BLOCK_D)
            middle = tl.zeros([BLOCK_M], tl.float32)
            if METRIC == EUCLIDEAN:
                middle = -0.5 * squares
            low = tl.where(m_valid, middle - tolerance * squares, float("nan"))
            store_columns(p_low + pid * BLOCK_M, low, QUEUES, PAIR)
            store_columns(p_high + pid * BLOCK_M, middle + tolerance * squares, QUEUES, PAIR)
        b_bit = in_order_of_queues(m_valid.to(tl.int32)[None, :], QUEUES, PAIR)
        b_word = tl.sum(b_bit << (31 - tl.arange(0, LEAVES))[None, None, :], 2)
        tl.store(p_valid + pid * QUEUES + tl.arange(0, QUEUES)[None, :], b_word)
        if tile == 0:
            for i in range(0, lists):
                tl.store(p_listed + as_int64(i) * B + b, 0)
        if p_is_listed is not None:
            for start in range(tile.to(tl.int32) * BLOCK_M, N, tiles.to(tl.int32) * BLOCK_M):
                o_n = start + tl.arange(0, BLOCK_M)
                tl.store(p_is_listed + b * N + o_n, 0, o_n < N)
        if p_weight is not None:
            # The tiles of the first batch element share the weight.
            size = C * k * (b == 0).to(tl.int32)
            for start in range(tile.to(tl.int32) * BLOCK_M, size, tiles.to(tl.int32) * BLOCK_M):
                o_w = start + tl.arange(0, BLOCK_M)
                b_w = tl.load(p_weight + (o_w % C).to(tl.int64) * k + o_w // C, o_w < size, 0.0)
                tl.store(p_weight_rows + o_w, b_w, o_w < size)
    elif p_columns is not None:
        _store_norms(
            pid - of_columns,
            p_key,
            p_key_norm,
            p_key_scaled,
            p_key_pieces,
            M,
            D,
            B2,
            stride_kb1,
            stride_kb2,
            stride_km,
            stride_ksb1,
            stride_ksb2,
            stride_piece,
            METRIC,
            RESCALE,
            INTERPRETED,
            ROWS,
            BLOCK_D,
        )
