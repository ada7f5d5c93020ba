# SPDX-License-Identifier: MIT
"""The k nearest keys of every query: S = Q K^T (Eq. 3), s_i = k-max and I_i = k-argmax (Eq. 4, 5).

S is never stored. The columns of a row of S (keys, or candidates in ascending order) are cut into
groups of GROUP consecutive ones:

1. `norms_kernel` (cosine only): the norm of each row.
2. `sweep_kernel`: tiles of S on tensor cores, of which only the maximum of each group is stored.
   One program has BLOCK_N queries and a range of columns; the tile of S stays in registers. As the
   maxima of different columns do not meet, a single row block can fill the chip. A row of maxima
   has place for `stride_g` groups, a multiple of 16 whatever their number G; the last are not read.
3. `nominate_kernel`: the k groups of each query with the largest maxima, ties by group.
4. `refine_kernel`: the similarities of the members of those groups, each one fixed sum over D in
   float32, and the k largest of them. One program has ROWS queries; its list stays in registers.

Every neighbor is a member of one of the k groups: a group ranked before the neighbor's own
holds, by its maximum or at a tie by its lower columns, a key that precedes the neighbor, and
fewer than k do. Ties, constant rows and NaN need no special path, and nothing can overflow.

With few columns, steps 2 and 3 are left out and `refine_kernel` takes all columns, or
`select_small_kernel` (select_small.py) does it all. `refine_kernel` also serves k beyond the
longest list: it runs again for the next places, with the last key that it gave out as a bound.

Shapes: query [B, N, D], key [B, M, D], columns [R] or none, mask [B, M] or none, own [N] or none.
The batch B is two dimensions of any strides, b = b1 * B2 + b2. Rows are worked on in blocks of
BLOCK_N, which do not cross batch elements; a launch begins at block `first_block`.
"""

import triton
import triton.language as tl

from .offsets import SIZES, aligned
from .order import (
    NOTHING,
    ORDER_OF_SELF,
    from_orderable,
    index_of,
    largest,
    merge,
    order_of,
    orderable,
    pack,
)

COSINE = tl.constexpr(0)
DOT = tl.constexpr(1)
EUCLIDEAN = tl.constexpr(2)


@triton.jit(do_not_specialize=SIZES)
def norms_kernel(
    p_x,  # [B, N, D]
    p_norm,  # [B, N] float32: the norm of the scaled row, 0 where it counts as zero, or NaN
    p_scale,  # [B, N] float32: the power of two that brings the row near 1
    p_inverse,  # [B, N] float32: 1 / norm, or 0
    p_scaled,  # [B, N, D] contiguous: the scaled row, of the dtype of x
    rows,
    N,
    D,
    B2,
    stride_b1,
    stride_b2,
    stride_n,
    ALIGN: tl.constexpr,
    RESCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Norms of the rows of x. Scaling by a power of two is exact and keeps squares finite."""
    stride_b1 = aligned(stride_b1, ALIGN)
    stride_b2 = aligned(stride_b2, ALIGN)
    stride_n = aligned(stride_n, ALIGN)
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < rows
    b = o_r // N
    p_row = p_x + (b // B2) * stride_b1 + (b % B2) * stride_b2 + (o_r % N) * stride_n
    o_d = tl.arange(0, BLOCK_D)

    scale = tl.full([ROWS], 1.0, tl.float32)
    if RESCALE:
        b_largest = tl.zeros([ROWS], tl.float32)
        for d in range(0, D, BLOCK_D):
            m_x = m_r[:, None] & (d + o_d < D)[None, :]
            b_x = tl.load(p_row[:, None] + (d + o_d)[None, :], m_x, 0.0).to(tl.float32)
            b_largest = tl.maximum(b_largest, tl.max(tl.abs(tl.where(b_x == b_x, b_x, 0.0)), 1))
        exponent = (b_largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
        # 2^-(exponent - 127), for which the exponent must be between 1 and 253.
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)

    b_sum = tl.zeros([ROWS], tl.float32)
    for d in range(0, D, BLOCK_D):
        m_x = m_r[:, None] & (d + o_d < D)[None, :]
        b_x = tl.load(p_row[:, None] + (d + o_d)[None, :], m_x, 0.0).to(tl.float32)
        b_x = b_x * scale[:, None]
        if RESCALE:
            p_out = p_scaled + o_r[:, None] * D + (d + o_d)[None, :]
            tl.store(p_out, b_x.to(p_scaled.dtype.element_ty), m_x)
        b_sum += tl.sum(b_x * b_x, 1)
    norm = tl.sqrt_rn(b_sum)
    # Not finite: the unit vector is NaN.
    norm = tl.where(norm < float("inf"), norm, float("nan"))
    norm = tl.where(tl.div_rn(norm, scale) <= 1e-12, 0.0, norm)
    tl.store(p_norm + o_r, norm, m_r)
    tl.store(p_scale + o_r, scale, m_r)
    is_zero = norm == 0.0
    inverse = tl.where(is_zero, 0.0, tl.div_rn(1.0, tl.where(is_zero, 1.0, norm)))
    tl.store(p_inverse + o_r, inverse, m_r)


@triton.jit(do_not_specialize=SIZES)
def group_flags_kernel(
    p_columns,  # [R] int64, or unused
    p_mask,  # [B, M] bool, or unused
    p_flags,  # [B, stride_g] int8
    M,
    columns,
    B2,
    stride_g,
    stride_mb1,
    stride_mb2,
    HAS_COLUMNS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Whether a group has a column that may be a neighbor."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(stride_g, GROUPS)
    b = pid // blocks
    o_g = (pid % blocks) * GROUPS + tl.arange(0, GROUPS)
    o_c = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    m_c = o_c < columns
    row = o_c
    if HAS_COLUMNS:
        row = tl.load(p_columns + o_c, m_c, -1)
        m_c = m_c & (row >= 0) & (row < M)
    if HAS_MASK:
        p_b = p_mask + (b // B2) * stride_mb1 + (b % B2) * stride_mb2
        m_c = m_c & (tl.load(p_b + row, m_c, 0) != 0)
    b_flag = tl.max(m_c.to(tl.int32), 1).to(tl.int8)
    tl.store(p_flags + b * stride_g + o_g, b_flag, o_g < stride_g)


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _group_maxima(b_s, INTERPRETED: tl.constexpr):
    """The maximum over the last axis of b_s [rows, groups, GROUP], NaN if there is a NaN."""
    if INTERPRETED:
        # The interpreter runs a reduction of one's own element by element.
        b_nan = b_s != b_s
        b_max = tl.max(tl.where(b_nan, float("-inf"), b_s), 2)
        b_max = tl.where(tl.max(b_nan.to(tl.int32), 2) > 0, float("nan"), b_max)
    else:
        b_max = tl.reduce(b_s, 2, _larger_or_nan)
    return b_max


@triton.jit
def _leading_bits(b_x):
    """float32 without its last 16 bits, which is a bfloat16, not larger than b_x in magnitude."""
    return (b_x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _pieces(b_x, INTERPRETED: tl.constexpr):
    """Three bfloat16 of b_x (float32), whose sum it is; of the same sign, so that none overflows.

    Of NaN, the first is NaN. Of infinity, the first is infinity, and the others are NaN.
    """
    # The bits of a NaN that mark it as such may be the last ones.
    b_high = tl.where(b_x == b_x, _leading_bits(b_x), b_x)
    b_rest = b_x - b_high
    b_middle = _leading_bits(b_rest)
    b_low = b_rest - b_middle
    if not INTERPRETED:
        # Without rounding: each has 8 bits. The interpreter does not know bfloat16.
        b_high, b_middle = b_high.to(tl.bfloat16), b_middle.to(tl.bfloat16)
        b_low = b_low.to(tl.bfloat16)
    return b_high, b_middle, b_low


@triton.jit
def _split_dot(b_q, b_k, b_s, b_rest, INTERPRETED: tl.constexpr):
    """Adds b_q b_k to b_s + b_rest, with b_s the products of the largest pieces only.

    Six of the nine products of pieces. The others are below 2^-21 of the whole, and 0 wherever a
    float32 sum is exact: see `configs.sweep_precision`.
    """
    q_high, q_middle, q_low = _pieces(b_q, INTERPRETED)
    k_high, k_middle, k_low = _pieces(b_k, INTERPRETED)
    b_rest = tl.dot(q_low, k_high, b_rest, input_precision="ieee")
    b_rest = tl.dot(q_middle, k_middle, b_rest, input_precision="ieee")
    b_rest = tl.dot(q_high, k_low, b_rest, input_precision="ieee")
    b_rest = tl.dot(q_middle, k_high, b_rest, input_precision="ieee")
    b_rest = tl.dot(q_high, k_middle, b_rest, input_precision="ieee")
    b_s = tl.dot(q_high, k_high, b_s, input_precision="ieee")
    return b_s, b_rest


@triton.jit(do_not_specialize=SIZES)
def sweep_kernel(
    p_query,  # [B, N, D]
    p_key,  # [B, M, D]
    p_query_inverse,  # [B, N] float32, cosine only
    p_key_inverse,  # [B, M] float32, cosine only
    p_columns,  # [R] int64, or unused
    p_mask,  # [B, M] bool, or unused
    p_maxima,  # [blocks of the launch * BLOCK_N, stride_g] float32
    first_block,
    N,
    M,
    D,
    columns,
    B2,
    row_blocks,
    tiles_each,
    stride_g,
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
    HAS_COLUMNS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_BLOCK_D: tl.constexpr,
):
    """Maxima of the groups of S, for BLOCK_N rows and `tiles_each` tiles of BLOCK_M columns.

    A maximum decides only which groups are looked at. ||q|| is applied to it rather than to S.
    """
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    GROUPS: tl.constexpr = BLOCK_M // GROUP
    stride_g = aligned(stride_g, 16)
    tiles = stride_g // GROUPS
    splits = tl.cdiv(tiles, tiles_each)
    pid = tl.program_id(0).to(tl.int64)
    local = pid // splits
    block = first_block + local
    b = block // row_blocks
    o_n = (block % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_d = tl.arange(0, BLOCK_D)
    p_q = p_query + (b // B2) * stride_qb1 + (b % B2) * stride_qb2 + o_n * stride_qn
    p_k = p_key + (b // B2) * stride_kb1 + (b % B2) * stride_kb2
    p_m = p_mask + (b // B2) * stride_mb1 + (b % B2) * stride_mb2

    inverse_q = tl.full([BLOCK_N], 1.0, tl.float32)
    if METRIC == COSINE:
        inverse_q = tl.load(p_query_inverse + b * N + o_n, m_n, 0.0)
    if ONE_BLOCK_D:
        m_q = m_n[:, None] & (o_d < D)[None, :]
        b_q = tl.load(p_q[:, None] + o_d[None, :], m_q, 0.0)

    first = (pid % splits) * tiles_each
    last = tl.minimum(first + tiles_each, tiles)
    for tile in range(first, last):
        # Scalars of 64 bits, ranges of 32: every thread has half of the columns.
        o_m = tl.arange(0, BLOCK_M)
        m_c = o_m < tl.minimum(columns - tile * BLOCK_M, BLOCK_M).to(tl.int32)
        row = tile * BLOCK_M + o_m
        p_inverse = p_key_inverse + (b * M + tile * BLOCK_M) + o_m
        if HAS_COLUMNS:
            row = tl.load(p_columns + row, m_c, -1)
            m_c = m_c & (row >= 0) & (row < M)
            p_inverse = p_key_inverse + b * M + row
        if HAS_MASK:
            m_c = m_c & (tl.load(p_m + row, m_c, 0) != 0)
        b_s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        b_rest = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if ONE_BLOCK_D and METRIC != EUCLIDEAN:
            p = p_k + row[None, :] * stride_km + o_d[:, None]
            b_k = tl.load(p, m_c[None, :] & (o_d < D)[:, None], 0.0)
            if PRECISION == "split":
                b_s, b_rest = _split_dot(b_q, b_k, b_s, b_rest, INTERPRETED)
            else:
                b_s = tl.dot(b_q, b_k, b_s, input_precision=PRECISION)
        else:
            for d in range(0, D, BLOCK_D):
                o_x = d + o_d
                m_d = o_x < D
                p = p_q[:, None] + o_x[None, :]
                b_q = tl.load(p, m_n[:, None] & m_d[None, :], 0.0)
                p = p_k + row[None, :] * stride_km + o_x[:, None]
                b_k = tl.load(p, m_c[None, :] & m_d[:, None], 0.0)
                if METRIC == EUCLIDEAN:
                    b_q3 = b_q.to(tl.float32)[:, None, :]
                    b_diff = b_q3 - tl.trans(b_k).to(tl.float32)[None, :, :]
                    b_s -= tl.sum(b_diff * b_diff, 2)
                elif PRECISION == "split":
                    b_s, b_rest = _split_dot(b_q, b_k, b_s, b_rest, INTERPRETED)
                else:
                    b_s = tl.dot(b_q, b_k, b_s, input_precision=PRECISION)
        if PRECISION == "split":
            # Not a number only where b_s is infinite or not a number, too.
            b_s += tl.where(b_rest == b_rest, b_rest, 0.0)
        if METRIC == COSINE:
            # What may not be a neighbor was read as zeros, so that -inf can be added to it: an
            # instruction for each similarity, and not three.
            inverse_k = tl.load(p_inverse, m_c, 0.0)
            b_s = b_s * inverse_k[None, :] + tl.where(m_c, 0.0, float("-inf"))[None, :]
        else:
            b_s = tl.where(m_c[None, :], b_s, float("-inf"))
        b_max = _group_maxima(tl.reshape(b_s, [BLOCK_N, GROUPS, GROUP]), INTERPRETED)
        if METRIC == COSINE:
            b_max = b_max * inverse_q[:, None]
        o_g = tile * GROUPS + tl.arange(0, GROUPS)
        p_out = p_maxima + (local * BLOCK_N + tl.arange(0, BLOCK_N))[:, None] * stride_g
        tl.store(p_out + o_g[None, :], b_max, m_n[:, None])


@triton.jit(do_not_specialize=SIZES)
def nominate_kernel(
    p_maxima,  # [blocks of the launch * BLOCK_N, stride_g] float32
    p_flags,  # [B, stride_g] int8, or unused
    p_groups,  # [blocks of the launch * BLOCK_N, 2**LOG_LIST] int32, -1 where there is none
    first_block,
    N,
    G,
    row_blocks,
    stride_g,
    HAS_FLAGS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_LIST: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    """The groups with the largest maxima, the largest first, for ROWS rows."""
    stride_g = aligned(stride_g, 16)
    row0 = tl.program_id(0).to(tl.int64) * ROWS
    o_r = row0 + tl.arange(0, ROWS)
    block = first_block + row0 // BLOCK_N
    b = block // row_blocks
    m_n = (block % row_blocks) * BLOCK_N + row0 % BLOCK_N + tl.arange(0, ROWS) < N
    b_list = tl.full([ROWS, 1 << LOG_LIST], NOTHING, tl.int64)
    for g in range(0, G, 1 << LOG_TILE):
        o_g = g + tl.arange(0, 1 << LOG_TILE)
        m_row = o_g < stride_g
        p_max = p_maxima + o_r[:, None] * stride_g + o_g[None, :]
        b_max = tl.load(p_max, m_n[:, None] & m_row[None, :], 0.0)
        m_g = o_g < G
        if HAS_FLAGS:
            m_g = m_g & (tl.load(p_flags + b * stride_g + o_g, m_row, 0) != 0)
        m = m_n[:, None] & m_g[None, :]
        b_key = tl.where(m, pack(orderable(b_max), o_g[None, :].to(tl.int64)), NOTHING)
        b_list = merge(b_list, b_key, LOG_TILE, LOG_LIST)
    b_group = tl.where(b_list == NOTHING, -1, index_of(b_list)).to(tl.int32)
    o_l = tl.arange(0, 1 << LOG_LIST)
    tl.store(p_groups + (o_r[:, None] << LOG_LIST) + o_l[None, :], b_group, m_n[:, None])


@triton.jit
def store_list(
    b_list,  # [rows, 2**LOG_LIST] int64, descending
    s_own,  # [rows] float32: the similarity of the token itself
    p_s,  # [rows] pointers: where the similarities of a row go
    p_i,  # [rows] pointers: where its indices go
    m_r,  # [rows]
    k,
    missing_index: tl.constexpr,
    HAS_SELF: tl.constexpr,
    BY_INDEX: tl.constexpr,
    LOG_LIST: tl.constexpr,
):
    """Unpacks the first k of each list, in the order that is asked for."""
    o_l = tl.arange(0, 1 << LOG_LIST)[None, :]
    m_l = o_l < k
    b_order = order_of(b_list)
    if HAS_SELF:
        b_order = tl.where(b_order == ORDER_OF_SELF, orderable(s_own)[:, None], b_order)
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
    tl.store(p_i[:, None] + o_l, tl.where(b_missing, missing_index, b_index), m_out)


@triton.jit(do_not_specialize=SIZES)
def refine_kernel(
    p_query,  # [B, N, D]
    p_key,  # [B, M, D]
    p_query_norm,  # [B, N] float32, cosine only
    p_key_norm,  # [B, M] float32, cosine only
    p_columns,  # [R] int64, or unused
    p_mask,  # [B, M] bool, or unused
    p_own,  # [N] int64, or unused
    p_groups,  # [blocks of the launch * BLOCK_N, 2**LOG_LIST] int32, or unused
    p_bound,  # [B, N] int64, or unused
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    first_block,
    N,
    M,
    D,
    columns,
    k,
    place,
    B2,
    row_blocks,
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
    HAS_COLUMNS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SELF: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    HAS_BOUND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_LIST: tl.constexpr,
    LOG_TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Neighbors `place` to `place + 2**LOG_LIST` of ROWS queries, as far as there are k.

    The members are those of the k groups with the largest maxima, or all columns. One more turn of
    the loop has the token itself, whose key is above all others.
    """
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    TILE: tl.constexpr = 1 << LOG_TILE
    LIST: tl.constexpr = 1 << LOG_LIST
    row0 = tl.program_id(0).to(tl.int64) * ROWS
    o_r = row0 + tl.arange(0, ROWS)
    block = first_block + row0 // BLOCK_N
    b = block // row_blocks
    o_n = (block % row_blocks) * BLOCK_N + row0 % BLOCK_N + tl.arange(0, ROWS)
    m_n = o_n < N
    p_q = p_query + (b // B2) * stride_qb1 + (b % B2) * stride_qb2 + o_n * stride_qn
    p_k = p_key + (b // B2) * stride_kb1 + (b % B2) * stride_kb2
    p_m = p_mask + (b // B2) * stride_mb1 + (b % B2) * stride_mb2
    o_d = tl.arange(0, BLOCK_D)

    norm_q = tl.full([ROWS], 1.0, tl.float32)
    if METRIC == COSINE:
        norm_q = tl.load(p_query_norm + b * N + o_n, m_n, 1.0)
    own = tl.full([ROWS], -1, tl.int64)
    if HAS_SELF:
        own = tl.load(p_own + o_n, m_n, -1)
        own = tl.where(own < M, own, -1)
    s_own = tl.zeros([ROWS], tl.float32)
    if HAS_BOUND:
        bound = tl.load(p_bound + b * N + o_n, m_n, NOTHING)

    members = columns
    if HAS_GROUPS:
        members = k * GROUP
    turns = tl.cdiv(members, TILE)
    b_list = tl.full([ROWS, LIST], NOTHING, tl.int64)
    for turn in range(0, turns + HAS_SELF):
        o_t = tl.arange(0, TILE)
        o_p = tl.full([TILE], TILE, tl.int64) * turn + o_t
        if HAS_GROUPS:
            o_slot = o_p // GROUP
            p_slot = p_groups + o_r[:, None] * LIST + o_slot[None, :]
            b_group = tl.load(p_slot, m_n[:, None] & (o_slot < k)[None, :], -1).to(tl.int64)
            o_c = b_group * GROUP + (o_p % GROUP)[None, :]
            m_c = (b_group >= 0) & (o_c < columns)
        else:
            o_c = o_p[None, :] + tl.zeros([ROWS, 1], tl.int64)
            m_c = o_c < columns
        row = o_c
        if HAS_COLUMNS:
            row = tl.load(p_columns + o_c, m_c, -1)
            m_c = m_c & (row >= 0) & (row < M)
        if HAS_SELF:
            is_own = turn == turns
            m_c = tl.where(
                is_own, (own >= 0)[:, None] & (o_t == 0)[None, :], m_c & (row != own[:, None])
            )
            row = tl.where(is_own, own[:, None], row)
        m_c = m_c & m_n[:, None]
        if HAS_MASK:
            m_c = m_c & (tl.load(p_m + row, m_c, 0) != 0)

        b_s = tl.zeros([ROWS, TILE], tl.float32)
        for d in range(0, D, BLOCK_D):
            m_d = d + o_d < D
            p_d = p_q[:, None] + (d + o_d)[None, :]
            b_q = tl.load(p_d, m_n[:, None] & m_d[None, :], 0.0).to(tl.float32)[:, None, :]
            p_d = p_k + row[:, :, None] * stride_km + (d + o_d)[None, None, :]
            b_k = tl.load(p_d, m_c[:, :, None] & m_d[None, None, :], 0.0).to(tl.float32)
            if METRIC == EUCLIDEAN:
                b_diff = b_q - b_k
                b_s -= tl.sum(b_diff * b_diff, 2)
            else:
                b_s += tl.sum(b_q * b_k, 2)
        if METRIC == COSINE:
            b_norm = norm_q[:, None] * tl.load(p_key_norm + b * M + row, m_c, 1.0)
            b_s = tl.where(b_norm == 0.0, 0.0, tl.div_rn(b_s, tl.where(b_norm == 0.0, 1.0, b_norm)))

        b_order = orderable(b_s)
        if HAS_SELF:
            s_own += tl.where(is_own, tl.sum(tl.where(m_c & is_own, b_s, 0.0), 1), 0.0)
            b_order = tl.where(is_own, ORDER_OF_SELF, b_order)
        b_key = tl.where(m_c, pack(b_order, row), NOTHING)
        if HAS_BOUND:
            b_key = tl.where((b_key < bound[:, None]) | (place == 0), b_key, NOTHING)
        b_list = merge(b_list, b_key, LOG_TILE, LOG_LIST)

    if HAS_BOUND:
        tl.store(p_bound + b * N + o_n, tl.min(b_list, 1), m_n)
    # Of several passes, the host puts the places in order and must know the missing ones.
    missing_index: tl.constexpr = -1 if HAS_BOUND else 0
    p_s = p_similarities + (b * N + o_n) * k + place
    p_i = p_indices + (b * N + o_n) * k + place
    store_list(b_list, s_own, p_s, p_i, m_n, k - place, missing_index, HAS_SELF, BY_INDEX, LOG_LIST)
