# SPDX-License-Identifier: MIT
"""dq and dk for few tokens and 16 bits, as products of matrices on tensor cores.

Of a batch element, E [N, M] has ds_ij in the row of query i and the column of its j-th neighbor,
and 0 elsewhere. With u the unit vectors of rows of query, v those of rows of key:

    dot      dq = E K                                        dk = E^T Q
    cosine   dq_i = (sum_m E_im v_m - (E s)_i u_i) / ||q_i||
             dk_m = (sum_i E_im u_i - (E^T s)_m v_m) / ||k_m||

with (E s)_i = sum_j ds_ij s_ij, and (E^T s)_m the sum over all pairs (i, j) of key m. The query
side has ds and the columns (query_side_small.py); the key side has the norms and the sums of keys
(key_side_small.py).

A block of channels of a batch element is a piece of work. Rows of key, and the sums for them, stay
on chip while a program goes through the queries ROWS at a time, and reads each row of query and key
once. Of E, a program has memory for ROWS rows, which are zeros, where it puts ds of these queries,
loads them, and puts zeros back. Neighbors of a query are distinct. There are
as many programs as run at a time, and each goes on to further pieces of work.

u, v and ds are rounded to 16 bits once. In float16, ds is first brought near a power of two row by
row; what that has taken from a row, u gets back, and u and v are brought near one themselves.
Products with the zeros of E must not add NaN to other rows: where a sum is not finite, the program
computes its block of both again in float32, pair by pair.
"""

import triton
import triton.language as tl

from .float16 import near_power, to_float32
from .integers import aligned
from .inverse_norms import has_no_gradient
from .launch import Kernel
from .metrics import COSINE
from .modulate import load_neighbors


@triton.jit
def _scaled(b_x, b_factor, HAS_FACTOR: tl.constexpr):
    """Rows times their factors in 16 bits, and by what to multiply a product with them."""
    dtype: tl.constexpr = b_x.dtype
    if HAS_FACTOR:
        b_x = to_float32(b_x) * b_factor[:, None]
    return near_power(b_x, dtype, 14)


@triton.jit
def _without_along(b_sum, b_x, b_inverse, b_along):
    """The gradient of rows x, where b_sum is that of the unit vectors, and finite."""
    b_along = tl.where(b_inverse == 0.0, 0.0, b_along * b_inverse)
    return (b_sum - b_along[:, None] * to_float32(b_x)) * b_inverse[:, None]


@triton.jit
def _rows_of_matrix(
    p_tile,  # [ROWS, columns]: zeros
    p_column,  # [ROWS]: rows of columns
    p_ds,  # [ROWS]: rows of ds
    m_n,  # [ROWS]: which there are
    columns,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows of E [ROWS, COLUMNS], and what has been taken from them [ROWS]."""
    o_j = tl.arange(0, SLOTS)
    o_m = tl.arange(0, COLUMNS)
    b_column = tl.load(p_column[:, None] + o_j[None, :], m_n[:, None], -1)
    m = b_column >= 0
    b_ds = tl.load(p_ds[:, None] + o_j[None, :], m, 0.0)
    b_ds, unit = near_power(b_ds, p_tile.dtype.element_ty, 14, OF_ROWS=True)
    p_row = p_tile + tl.arange(0, p_ds.shape[0])[:, None] * columns
    # Every thread may read or write what another one has stored.
    tl.debug_barrier()
    tl.store(p_row + b_column, b_ds, m)
    tl.debug_barrier()
    b_e = tl.load(p_row + o_m[None, :], (o_m < columns)[None, :], 0.0)
    tl.debug_barrier()
    tl.store(p_row + b_column, tl.zeros(b_column.shape, b_ds.dtype), m)
    if b_ds.dtype == tl.float16:
        return b_e, tl.reshape(unit, [p_ds.shape[0]])
    else:
        return b_e, tl.full([p_ds.shape[0]], 1.0, tl.float32)


@triton.jit
def _differentiate(
    p_q,  # the rows of query of this batch element, from this block of channels on; so those below
    p_k,
    p_tile,  # [ROWS, columns] of this program: zeros
    p_columns,  # [N, SLOTS]; so those below of this batch element
    p_ds,  # [N, SLOTS]
    p_inverse_q,  # [N], or None: the metric is dot
    p_inverse_k,  # [M]
    p_along_q,  # [N]
    p_along_k,  # [M]
    p_dq,  # or None
    p_dk,  # or None
    m_d,  # [1, BLOCK_D]: which channels there are
    N,
    M,
    D,
    columns,
    stride_qn,
    stride_km,
    METRIC: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns 0, or NaN where a sum is not finite."""
    HAS_UNIT: tl.constexpr = p_tile.dtype.element_ty == tl.float16
    o_d = tl.arange(0, BLOCK_D)
    o_m = tl.arange(0, COLUMNS)
    m_m = o_m < M
    m_k = m_m[:, None] & m_d
    p_key = p_k + o_m.to(tl.int64)[:, None] * stride_km + o_d[None, :]
    b_key = tl.load(p_key, m_k, 0.0)
    inverse_k = tl.zeros([COLUMNS], tl.float32)
    if METRIC == COSINE:
        inverse_k = tl.load(p_inverse_k + o_m, m_m, 0.0)
    b_v, unit_of_v = _scaled(b_key, inverse_k, METRIC == COSINE)
    b_dk = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    test = tl.sum(b_v * 0.0).to(tl.float32)
    for begin in tl.range(0, N, ROWS, disable_licm=True):
        i = begin + tl.arange(0, ROWS)
        m_n = i < N
        m_q = m_n[:, None] & m_d
        b_e, b_unit = _rows_of_matrix(
            p_tile, p_columns + i * SLOTS, p_ds + i * SLOTS, m_n, columns, SLOTS, COLUMNS
        )
        b_q = tl.load(p_q + i.to(tl.int64)[:, None] * stride_qn + o_d[None, :], m_q, 0.0)
        inverse_q = b_unit
        if METRIC == COSINE:
            inverse_q = tl.load(p_inverse_q + i, m_n, 0.0)
        if p_dq is not None:
            b_dq = tl.dot(b_e, b_v)
            if HAS_UNIT:
                b_dq = b_dq * (b_unit * unit_of_v)[:, None]
            if METRIC == COSINE:
                b_along = tl.load(p_along_q + i, m_n, 0.0)
                if p_dk is None:
                    # No other sum shows that a query is not finite.
                    test += tl.sum(inverse_q * 0.0)
                b_dq = _without_along(b_dq, b_q, inverse_q, b_along)
            b_dq = b_dq.to(p_dq.dtype.element_ty)
            tl.store(p_dq + i.to(tl.int64)[:, None] * D + o_d[None, :], b_dq, m_q)
        if p_dk is not None:
            if METRIC == COSINE and HAS_UNIT:
                b_unit = b_unit * inverse_q
            elif METRIC == COSINE:
                b_unit = inverse_q
            b_u, unit_of_u = _scaled(b_q, b_unit, METRIC == COSINE or HAS_UNIT)
            if HAS_UNIT:
                b_dk += tl.dot(tl.trans(b_e), b_u) * unit_of_u
            else:
                b_dk = tl.dot(tl.trans(b_e), b_u, b_dk)
    if p_dk is not None:
        test += tl.sum(b_dk * 0.0)
        if METRIC == COSINE:
            if HAS_UNIT:
                # Loaded again, rather than kept in registers, of which powers of two take some.
                b_key = tl.load(p_key, m_k, 0.0)
            b_along = tl.load(p_along_k + o_m, m_m, 0.0)
            b_dk = _without_along(b_dk, b_key, inverse_k, b_along)
        b_dk = b_dk.to(p_dk.dtype.element_ty)
        tl.store(p_dk + o_m.to(tl.int64)[:, None] * D + o_d[None, :], b_dk, m_k)
    return test


@triton.jit
def _differentiate_query(
    p_q,  # as above
    p_k,
    p_similarities,
    p_indices,
    p_ds,  # [N, SLOTS]
    p_inverse_q,
    p_inverse_k,
    p_along_q,
    p_dq,
    m_d,
    N,
    M,
    D,
    stride_qn,
    stride_km,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq, pair by pair."""
    o_d = tl.arange(0, BLOCK_D)
    for first in range(0, N, ROWS):
        i = first + tl.arange(0, ROWS).to(tl.int64)
        m_n = i < N
        m_q = m_n[:, None] & m_d
        b_dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for j in range(0, K):
            _, b_row, m = load_neighbors(p_similarities, p_indices, i * K + j, m_n, M)
            b_ds = tl.load(p_ds + i * SLOTS + j, m, 0.0)
            if METRIC == COSINE:
                b_ds = b_ds * tl.load(p_inverse_k + b_row, m, 0.0)
            p = p_k + b_row[:, None] * stride_km + o_d[None, :]
            b_dq += b_ds[:, None] * tl.load(p, m[:, None] & m_d, 0.0).to(tl.float32)
        if METRIC == COSINE:
            b_q = tl.load(p_q + i.to(tl.int64)[:, None] * stride_qn + o_d[None, :], m_q, 0.0)
            inverse = tl.load(p_inverse_q + i, m_n, 0.0)
            b_along = tl.load(p_along_q + i, m_n, 0.0)
            b_dq = _without_along(b_dq, b_q, inverse, b_along)
            b_dq = tl.where(has_no_gradient(inverse, b_along)[:, None], 0.0, b_dq)
        tl.store(
            p_dq + i.to(tl.int64)[:, None] * D + o_d[None, :], b_dq.to(p_dq.dtype.element_ty), m_q
        )


@triton.jit
def _differentiate_key(
    p_q,  # as above
    p_k,
    p_pairs,
    p_ends,
    p_ds,  # [N, SLOTS]
    p_inverse_q,
    p_inverse_k,
    p_along_k,
    p_dk,
    m_d,
    M,
    D,
    stride_qn,
    stride_km,
    METRIC: tl.constexpr,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk, pair by pair."""
    o_d = tl.arange(0, BLOCK_D)
    first = 0
    for first_key in range(0, M, KEYS):
        row = first_key + tl.arange(0, KEYS).to(tl.int64)
        m_k = (row < M)[:, None] & m_d
        last = tl.load(p_ends + first_key // KEYS)
        b_dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
        for position in range(first, last):
            pair = tl.load(p_pairs + position)
            i = (pair >> 12).to(tl.int64)
            ds = tl.load(p_ds + (pair >> 8))
            if METRIC == COSINE:
                ds = ds * tl.load(p_inverse_q + i)
            b_q = tl.load(p_q + i * stride_qn + o_d[None, :], m_d, 0.0).to(tl.float32)
            b_dk += tl.where((row % TILE == pair & 255)[:, None], ds * b_q, 0.0)
        first = last
        if METRIC == COSINE:
            b_key = tl.load(p_k + row[:, None] * stride_km + o_d[None, :], m_k, 0.0)
            inverse = tl.load(p_inverse_k + row, row < M, 0.0)
            b_along = tl.load(p_along_k + row, row < M, 0.0)
            b_dk = _without_along(b_dk, b_key, inverse, b_along)
            b_dk = tl.where(has_no_gradient(inverse, b_along)[:, None], 0.0, b_dk)
        tl.store(p_dk + row[:, None] * D + o_d[None, :], b_dk.to(p_dk.dtype.element_ty), m_k)


@Kernel
def search_grad_small_kernel(
    p_query,  # [B, N, D]
    p_key,  # [B, M, D]
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_tiles,  # [programs, ROWS, columns], in the dtype of query: rows of E
    p_columns,  # [B, N, SLOTS] int16: rows of key, -1 for none
    p_ds,  # [B, N, SLOTS] float32
    p_pairs,  # [B, N * k] int32, as list_pairs.py has them; so the one below; or None
    p_ends,  # [B, key_blocks] int32
    p_inverse_q,  # [B, N] float32; None where the metric is dot; so those below
    p_inverse_k,  # [B, M] float32
    p_along_q,  # [B, N] float32: sum_j ds_ij s_ij
    p_along_k,  # [B, M] float32: the sum of ds_ij s_ij over the pairs of a key
    p_query_grad,  # [B, N, D] contiguous, or None
    p_key_grad,  # [B, M, D] contiguous, or None
    N,
    M,
    D,
    k,
    B2,
    columns,  # M or more, a multiple of 16
    key_blocks,
    search_blocks,  # of channels
    pieces,  # of work: of channels of all batch elements
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_kb1,
    stride_kb2,
    stride_km,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    METRIC: tl.constexpr,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq and dk of blocks of channels of batch elements."""
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    columns = aligned(columns, 16)
    pid = tl.program_id(0)
    p_tile = p_tiles + pid.to(tl.int64) * ROWS * columns
    o_m = tl.arange(0, COLUMNS)[None, :]
    p = p_tile + tl.arange(0, ROWS)[:, None] * columns + o_m
    tl.store(p, tl.zeros(p.shape, p_tile.dtype.element_ty), o_m < columns)
    for piece in tl.range(pid, pieces, tl.num_programs(0), disable_licm=True):
        b = (piece // search_blocks).to(tl.int64)
        d0 = piece % search_blocks * BLOCK_D
        m_d = (d0 + tl.arange(0, BLOCK_D) < D)[None, :]
        p_q = p_query + (b // B2) * stride_qb1 + (b % B2) * stride_qb2 + d0
        p_k = p_key + (b // B2) * stride_kb1 + (b % B2) * stride_kb2 + d0
        p_iq, p_ik, p_aq, p_ak, p_dq, p_dk = None, None, None, None, None, None
        if METRIC == COSINE:
            p_iq, p_ik = p_inverse_q + b * N, p_inverse_k + b * M
            if p_query_grad is not None:
                p_aq = p_along_q + b * N
            if p_key_grad is not None:
                p_ak = p_along_k + b * M
        if p_query_grad is not None:
            p_dq = p_query_grad + b * N * D + d0
        if p_key_grad is not None:
            p_dk = p_key_grad + b * M * D + d0
        test = _differentiate(
            p_q,
            p_k,
            p_tile,
            p_columns + b * N * SLOTS,
            p_ds + b * N * SLOTS,
            p_iq,
            p_ik,
            p_aq,
            p_ak,
            p_dq,
            p_dk,
            m_d,
            N,
            M,
            D,
            columns,
            stride_qn,
            stride_km,
            METRIC,
            SLOTS,
            ROWS,
            COLUMNS,
            BLOCK_D,
        )
        if test != 0.0:
            # What has been stored must not come after what is stored now.
            tl.debug_barrier()
            if p_query_grad is not None:
                _differentiate_query(
                    p_q,
                    p_k,
                    p_similarities + b * N * k,
                    p_indices + b * N * k,
                    p_ds + b * N * SLOTS,
                    p_iq,
                    p_ik,
                    p_aq,
                    p_dq,
                    m_d,
                    N,
                    M,
                    D,
                    stride_qn,
                    stride_km,
                    K,
                    SLOTS,
                    METRIC,
                    16,
                    BLOCK_D,
                )
            if p_key_grad is not None:
                _differentiate_key(
                    p_q,
                    p_k,
                    p_pairs + b * N * k,
                    p_ends + b * key_blocks,
                    p_ds + b * N * SLOTS,
                    p_iq,
                    p_ik,
                    p_ak,
                    p_dk,
                    m_d,
                    M,
                    D,
                    stride_qn,
                    stride_km,
                    METRIC,
                    KEYS,
                    TILE,
                    BLOCK_D,
                )
