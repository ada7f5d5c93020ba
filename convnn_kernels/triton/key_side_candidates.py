# SPDX-License-Identifier: MIT
"""Gradients key by key, and dq, where the neighbors of all queries are among few candidates, or
else rows of their own, from what query_side_candidates.py has stored.

Of candidates, with P_j [N, COLUMNS] that has rho_ic where slot_ic is j, else 0, and F = ds / ||q||
(cosine; else ds), products over all queries on tensor cores:

    S_j  = G^T P_j                        [channels, COLUMNS]
    dV_c = sum_j W_j * S_jc
    dW_j = sum_c V_c * S_jc               the own rows' part is in query_side_candidates.py
    dk_c = Q^T F_c, cosine: (Q^T F_c - (sum_i ds_ic s_ic) u_c) / ||k_c||
    dq   = F U, U the candidates' u = k / ||k|| (dot: k), + the own row; cosine: - (...) u_i / ||q||

Of the other rows of key, TILE at a time, the same sums over the queries whose own row they are: a
matrix that has rho where own_i is the row, times rows of W_slot * G; or one of ones, times what a
query has for dk of its own row. Tiles of queries with no own row among them are skipped.

A program has a batch element, and of V or of query BLOCK channels after the other. Factors have 16
bits in products. A row that is not finite would make sums NaN to which it adds a product with 0:
where there is one, as p_flags says, all is computed in float32, query by query, without such
products.
"""

import triton
import triton.language as tl

from .float16 import near_power, to_float32
from .hardware import interpreted
from .integers import aligned, as_int64
from .inverse_norms import has_no_gradient
from .launch import Kernel
from .metrics import COSINE
from .pairs import add_parts
from .query_side_candidates import (
    ALONG,
    NO_NEIGHBOR,
    NUMBERS,
    OWN_ALONG,
    OWN_RHO,
    OWN_UNIT,
    load_candidates,
)

if interpreted():
    from . import ptx_interpreter

    ptx_interpreter.install()


@triton.jit
def _rows(p_x, o_n, o_c, stride_n):
    # Of an unsigned factor, a product with 64 bits takes fewer instructions.
    return p_x + o_n.to(tl.uint32)[:, None] * stride_n + o_c[None, :]


@triton.jit
def _load_candidate_rows(p_x, b_candidate, o_c, C, stride_m):
    m = (b_candidate >= 0)[:, None] & (o_c < C)[None, :]
    return tl.load(_rows(p_x, b_candidate, o_c, stride_m), m, 0.0)


@triton.jit
def _where_equal(b_x, b_one, b_other):
    """b_x of 16 bits where two int16 up to 255 are equal, else 0: two at a time. Compiled from
    Triton, it takes three times as many instructions. As float16, such integers are small numbers,
    and those from -256 to -1 are NaN, which equals nothing."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 m;
        set.eq.u32.f16x2 m, $2, $3;
        and.b32 $0, $1, m;
        }""",
        "=r,r,r,r",
        [b_x, b_one, b_other],
        dtype=b_x.dtype,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _sum_by_slot(
    b_x,  # [QUERIES, BLOCK]: rows of G
    b_rho,  # [QUERIES, COLUMNS]
    b_slot,  # [QUERIES, COLUMNS]
    b_v,  # [BLOCK, COLUMNS] float32: rows of V, transposed; None without dW
    p_weight,  # [C, 1, k], or None
    p_part,  # [k, C], or None
    o_c,  # [BLOCK]
    C,
    K: tl.constexpr,
):
    """dV of candidates, transposed, and their part of dW."""
    # In float16 what is stored is 2^14 rho.
    unit: tl.constexpr = 2.0**-14 if b_x.dtype == tl.float16 else 1.0
    if p_weight is None:
        b_sum = tl.dot(tl.trans(b_x), b_rho) * unit
    else:
        b_sum = tl.zeros([b_x.shape[1], b_rho.shape[1]], tl.float32)
        for j in range(0, K):
            o_j = tl.full([], j, tl.int16)
            b_s = tl.dot(tl.trans(b_x), _where_equal(b_rho, b_slot, o_j))
            b_w = tl.load(p_weight + o_c * K + j, o_c < C, 0.0).to(tl.float32)
            b_sum += (unit * b_w)[:, None] * b_s
            if p_part is not None:
                b_dw = unit * tl.sum(b_v * b_s, 1)
                tl.store(p_part + as_int64(j) * C + o_c, b_dw, o_c < C)
    return b_sum


@triton.jit
def _sum_by_query(
    p_x,  # rows of G, or of query, of this batch element; so the pointers below
    p_factor,  # [rows, COLUMNS]
    p_slots,
    b_v,  # as above
    p_weight,  # None where rows are those of query, or without one
    p_part,
    o_c,
    N,
    C,
    stride_n,
    unit: tl.constexpr,  # of the factor
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The same, or F^T Q transposed, in float32, without adding a product with 0 to any sum."""
    o_k = tl.arange(0, COLUMNS)
    b_sum = tl.zeros([o_c.shape[0], COLUMNS], tl.float32)
    for slot in range(0, 1 if p_weight is None else K):
        b_dw = tl.zeros(o_c.shape, tl.float32)
        for i in range(0, N):
            b_slot = tl.load(p_slots + i * COLUMNS + o_k).to(tl.int32)
            m = (b_slot >= 0)[None, :]
            if p_weight is not None:
                m = (b_slot == slot)[None, :]
            b_x = tl.load(p_x + as_int64(i) * stride_n + o_c, o_c < C, 0.0).to(tl.float32)
            b_factor = tl.load(p_factor + i * COLUMNS + o_k).to(tl.float32) * unit
            b_p = b_x[:, None] * b_factor[None, :]
            if p_part is not None:
                b_dw += tl.sum(tl.where(m, b_p * b_v, 0.0), 1)
            if p_weight is not None:
                b_p *= tl.load(p_weight + o_c * K + slot, o_c < C, 0.0)[:, None]
            b_sum += tl.where(m, b_p, 0.0)
        if p_part is not None:
            tl.store(p_part + as_int64(slot) * C + o_c, b_dw, o_c < C)
    return b_sum


@triton.jit
def _sum_grad(p_g, p_part, o_c, N, C, QUERIES: tl.constexpr):
    """This batch element's part of db."""
    o_n = tl.arange(0, QUERIES)
    m = (o_n < N)[:, None] & (o_c < C)[None, :]
    b_g = tl.load(_rows(p_g, o_n, o_c, as_int64(C)), m, 0.0)
    tl.store(p_part + o_c, tl.sum(b_g.to(tl.float32), 0), o_c < C)


@triton.jit
def _own_tiles(p_ranges, first_key, N, TILE: tl.constexpr):
    """The first tile of queries whose own rows are among TILE rows of key, and behind the last."""
    o_t = tl.arange(0, 16)
    m_t = o_t < tl.cdiv(N, TILE)
    m_t &= tl.load(p_ranges + 2 * o_t, m_t, 0) < first_key + TILE
    m_t &= tl.load(p_ranges + 2 * o_t + 1, m_t, -1) >= first_key
    return tl.min(tl.where(m_t, o_t, 16), 0), tl.max(tl.where(m_t, o_t + 1, 0), 0)


@triton.jit
def _sum_own_values(
    p_g,  # rows of G of this batch element; so the pointers below
    p_weight_rows,  # [k, C], or None
    p_own,
    p_rho,  # [rows]
    p_ranges,
    first_key,
    o_c,
    N,
    C,
    TILE: tl.constexpr,
):
    """dV of TILE rows from the queries whose own rows they are, [TILE, BLOCK]."""
    dtype: tl.constexpr = p_g.dtype.element_ty
    o_m = tl.arange(0, TILE).to(tl.int16)
    b_sum = tl.zeros([TILE, o_c.shape[0]], tl.float32)
    begin, end = _own_tiles(p_ranges, first_key, N, TILE)
    for tile in range(begin, end):
        o_n = tile * TILE + tl.arange(0, TILE)
        b_own = tl.load(p_own + o_n)
        m = (b_own >= 0)[:, None] & (o_c < C)[None, :]
        b_x = tl.load(_rows(p_g, o_n, o_c, as_int64(C)), m, 0.0)
        b_rho = tl.load(p_rho + o_n)
        if p_weight_rows is not None:
            b_w = tl.load(_rows(p_weight_rows, b_own & 15, o_c, as_int64(C)), m, 0.0)
            if dtype == tl.float16:
                # Products may be beyond its range.
                b_x, unit_of_x = near_power(b_x.to(tl.float32) * b_w, dtype, 4, OF_ROWS=True)
                b_rho *= tl.reshape(unit_of_x, [TILE])
            else:
                b_x = b_x * b_w
        b_rho, unit = near_power(b_rho, dtype, 14)
        b_own = ((b_own >> 4) - first_key).to(tl.int16)
        b_p = _where_equal(b_rho[None, :], b_own[None, :], o_m[:, None])
        if dtype == tl.float16:
            b_sum += tl.dot(b_p, b_x) * unit
        else:
            b_sum = tl.dot(b_p, b_x, b_sum)
    return b_sum


@triton.jit
def _own_keys(b_q, b_k, b_own, b_unit, b_along, first_key, b_sum, dtype: tl.constexpr):
    """Adds to dk of TILE rows what queries have for their own rows, [TILE, BLOCK]."""
    TILE: tl.constexpr = b_sum.shape[0]
    b_x, unit = near_power(b_unit[:, None] * b_q - b_along[:, None] * b_k, dtype, 14)
    b_one = tl.full([TILE, TILE], 1.0, dtype)
    b_own = ((b_own >> 4) - first_key).to(tl.int16)
    b_p = _where_equal(b_one, b_own[None, :], tl.arange(0, TILE).to(tl.int16)[:, None])
    if dtype == tl.float16:
        b_sum += tl.dot(b_p, b_x) * unit
    else:
        b_sum = tl.dot(b_p, b_x, b_sum)
    return b_sum


@triton.jit
def _sum_own_keys(
    p_q,  # rows of query of this batch element; so the pointers below
    p_k,
    p_own,
    p_numbers,
    begin,  # tile of queries
    end,
    first_key,
    o_c,
    D,
    rows,
    stride_qn,
    stride_km,
    TILE: tl.constexpr,
):
    """dk of TILE rows from the queries of some tiles whose own rows they are, [TILE, BLOCK]."""
    b_sum = tl.zeros([TILE, o_c.shape[0]], tl.float32)
    for tile in range(begin, end):
        o_n = tile * TILE + tl.arange(0, TILE)
        b_own = tl.load(p_own + o_n)
        m = (b_own >= 0)[:, None] & (o_c < D)[None, :]
        b_q = to_float32(tl.load(_rows(p_q, o_n, o_c, stride_qn), m, 0.0))
        b_k = to_float32(tl.load(_rows(p_k, b_own >> 4, o_c, stride_km), m, 0.0))
        b_unit = tl.load(p_numbers + OWN_UNIT * rows + o_n)
        b_along = tl.load(p_numbers + OWN_ALONG * rows + o_n)
        b_sum = _own_keys(b_q, b_k, b_own, b_unit, b_along, first_key, b_sum, p_q.dtype.element_ty)
    return b_sum


@triton.jit
def _sum_own_by_query(
    p_x,  # rows of G, or of query, of this batch element; so the pointers below
    p_weight_rows,  # None where rows are those of query, or without a weight
    p_k,  # the rows of key where they are projected out (cosine); or None
    p_own,
    p_factor,  # [rows]
    p_along,
    first_key,
    o_c,
    N,
    C,
    stride_n,
    stride_km,
    TILE: tl.constexpr,
):
    """The same in float32, without adding a product with 0 to any sum."""
    o_m = first_key + tl.arange(0, TILE)
    b_sum = tl.zeros([TILE, o_c.shape[0]], tl.float32)
    for i in range(0, N):
        own = tl.load(p_own + i)
        m_c = (o_c < C) & (own >= 0)
        b_x = tl.load(p_x + as_int64(i) * stride_n + o_c, m_c, 0.0).to(tl.float32)
        if p_weight_rows is not None:
            b_x *= tl.load(p_weight_rows + (own & 15) * as_int64(C) + o_c, m_c, 0.0)
        b_x *= tl.load(p_factor + i)
        if p_k is not None:
            b_k = tl.load(p_k + (own >> 4) * stride_km + o_c, m_c, 0.0).to(tl.float32)
            b_x -= tl.load(p_along + i) * b_k
        b_sum += tl.where((o_m == (own >> 4))[:, None], b_x[None, :], 0.0)
    return b_sum


@triton.jit
def _store_own(p_positions, p_out, b_own, first_key, o_c, M, C, TILE: tl.constexpr):
    """Stores TILE rows of dV, or of dk, but for candidates."""
    o_m = first_key + tl.arange(0, TILE)
    m = tl.load(p_positions + o_m, o_m < M, 0) < 0
    p = _rows(p_out, o_m, o_c, as_int64(C))
    tl.store(p, b_own.to(p_out.dtype.element_ty), m[:, None] & (o_c < C)[None, :])


@triton.jit
def _store_candidates(p_out, b_candidate, b_sum, o_c, C):
    p = _rows(p_out, b_candidate, o_c, as_int64(C))
    m = (b_candidate >= 0)[:, None] & (o_c < C)[None, :]
    tl.store(p, b_sum.to(p_out.dtype.element_ty), m)


@triton.jit
def _differentiate_value(
    p_g,  # of this batch element; so the pointers below but for W
    p_v,
    p_weight,
    p_weight_rows,
    p_own,
    p_numbers,
    p_ranges,
    p_positions,
    p_rho,
    p_slots,
    p_dv,
    p_part,
    p_bias_part,
    is_finite,
    b_candidate,
    o_c,
    N,
    M,
    C,
    rows,
    stride_vm,
    K: tl.constexpr,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """dV of a block of channels, and its parts of dW and db."""
    stride_n = as_int64(C)
    unit: tl.constexpr = 2.0**-14 if p_g.dtype.element_ty == tl.float16 else 1.0
    p_own_rho = p_numbers + OWN_RHO * rows
    if p_bias_part is not None:
        _sum_grad(p_g, p_bias_part, o_c, N, C, QUERIES)
    b_v = None
    if p_part is not None:
        b_v = tl.trans(to_float32(_load_candidate_rows(p_v, b_candidate, o_c, C, stride_vm)))
    if is_finite:
        for first_key in range(0, M, TILE):
            b_own = _sum_own_values(
                p_g, p_weight_rows, p_own, p_own_rho, p_ranges, first_key, o_c, N, C, TILE
            )
            _store_own(p_positions, p_dv, b_own, first_key, o_c, M, C, TILE)
        o_n = tl.arange(0, QUERIES)
        # Of a query without neighbors nothing is added, also where it is not finite.
        m_n = tl.load(p_own + o_n, o_n < N, NO_NEIGHBOR) != NO_NEIGHBOR
        m = m_n[:, None] & (o_c < C)[None, :]
        b_x = tl.load(_rows(p_g, o_n, o_c, stride_n), m, 0.0)
        o_d = o_n[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        b_rho = tl.load(p_rho + o_d, (o_n < N)[:, None], 0.0)
        b_slot = tl.load(p_slots + o_d, (o_n < N)[:, None], -1)
        b_sum = _sum_by_slot(b_x, b_rho, b_slot, b_v, p_weight, p_part, o_c, C, K)
        _store_candidates(p_dv, b_candidate, tl.trans(b_sum), o_c, C)
    else:
        for start in range(0, M, TILE):
            b_own = _sum_own_by_query(
                p_g,
                p_weight_rows,
                None,
                p_own,
                p_own_rho,
                None,
                start,
                o_c,
                N,
                C,
                stride_n,
                0,
                TILE,
            )
            _store_own(p_positions, p_dv, b_own, start, o_c, M, C, TILE)
        b_sum = _sum_by_query(
            p_g, p_rho, p_slots, b_v, p_weight, p_part, o_c, N, C, stride_n, unit, K, COLUMNS
        )
        _store_candidates(p_dv, b_candidate, tl.trans(b_sum), o_c, C)


@triton.jit
def _sum_by_candidate(b_factor, b_slot, b_u):
    """sum_c factor_ic u_c over the neighbors of each query, without adding a product with 0."""
    o_k = tl.arange(0, b_u.shape[0])
    b_sum = tl.zeros([b_slot.shape[0], b_u.shape[1]], tl.float32)
    for c in range(0, b_u.shape[0]):
        m = (o_k == c)[None, :] & (b_slot >= 0)
        b_f = tl.sum(tl.where(m, b_factor, 0.0), 1)
        b_row = tl.sum(tl.where((o_k == c)[:, None], b_u, 0.0), 0)
        b_p = b_f[:, None] * b_row[None, :]
        b_sum += tl.where(tl.max(m.to(tl.int32), 1)[:, None] > 0, b_p, 0.0)
    return b_sum


@triton.jit
def _differentiate_key(
    p_q,  # of this batch element; so the pointers below
    p_k,
    p_own,
    p_numbers,
    p_ranges,
    p_positions,
    p_factor,
    p_slots,
    p_along,  # [tiles, COLUMNS], None but for cosine; so the one below
    p_inverse,  # [COLUMNS]
    p_dq,
    p_dk,
    is_finite,
    b_candidate,
    o_c,
    N,
    M,
    D,
    rows,
    tiles,
    stride_qn,
    stride_km,
    K: tl.constexpr,
    METRIC: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """dk and dq of a block of channels."""
    dtype: tl.constexpr = p_q.dtype.element_ty
    o_k = tl.arange(0, COLUMNS)
    b_u = _load_candidate_rows(p_k, b_candidate, o_c, D, stride_km).to(tl.float32)
    inverse = tl.full([COLUMNS], 1.0, tl.float32)
    b_along = tl.zeros([COLUMNS], tl.float32)
    if METRIC == COSINE:
        inverse = tl.load(p_inverse + o_k)
        for tile in range(0, tiles):
            b_along += tl.load(p_along + tile * COLUMNS + o_k)
        b_u = b_u * inverse[:, None]
    b_u = b_u.to(dtype)
    b_sum = tl.zeros([o_c.shape[0], COLUMNS], tl.float32)
    for first in range(0, tl.maximum(N, M), TILE):
        o_n = first + tl.arange(0, TILE)
        m_n = o_n < N
        m = m_n[:, None] & (o_c < D)[None, :]
        b_q = tl.load(_rows(p_q, o_n, o_c, stride_qn), m, 0.0)
        b_own = tl.load(p_own + o_n, m_n, NO_NEIGHBOR)
        m_own = (b_own >= 0)[:, None] & (o_c < D)[None, :]
        b_k = to_float32(tl.load(_rows(p_k, b_own >> 4, o_c, stride_km), m_own, 0.0))
        b_unit = tl.load(p_numbers + OWN_UNIT * rows + o_n, m_n, 0.0)
        b_own_along = tl.load(p_numbers + OWN_ALONG * rows + o_n, m_n, 0.0)
        o_d = o_n[:, None] * COLUMNS + o_k[None, :]
        b_factor = tl.load(p_factor + o_d, m_n[:, None], 0.0)
        if is_finite:
            b_f, unit = near_power(b_factor, dtype, 14)
            b_sum += tl.dot(tl.trans(b_q), b_f) * unit
            b_f, unit_of_rows = near_power(b_factor, dtype, 14, OF_ROWS=True)
            b_dq = tl.dot(b_f, b_u) * unit_of_rows
        else:
            b_slot = tl.load(p_slots + o_d, m_n[:, None], -1)
            b_dq = _sum_by_candidate(b_factor.to(tl.float32), b_slot, b_u.to(tl.float32))
        b_dq += b_unit[:, None] * b_k
        if METRIC == COSINE:
            b_all_along = tl.load(p_numbers + ALONG * rows + o_n, m_n, 0.0)
            b_dq -= b_all_along[:, None] * to_float32(b_q)
            # Even of a query that is not finite.
            b_dq = tl.where((b_own == NO_NEIGHBOR)[:, None], 0.0, b_dq)
        tl.store(_rows(p_dq, o_n, o_c, as_int64(D)), b_dq.to(dtype), m)
        if is_finite:
            begin, end = _own_tiles(p_ranges, first, N, TILE)
            b_dk = tl.zeros([TILE, o_c.shape[0]], tl.float32)
            if (begin * TILE != first) | (end * TILE != first + TILE):
                b_dk = _sum_own_keys(
                    p_q,
                    p_k,
                    p_own,
                    p_numbers,
                    begin,
                    end,
                    first,
                    o_c,
                    D,
                    rows,
                    stride_qn,
                    stride_km,
                    TILE,
                )
            else:
                b_dk = _own_keys(
                    to_float32(b_q), b_k, b_own, b_unit, b_own_along, first, b_dk, dtype
                )
        else:
            b_dk = _sum_own_by_query(
                p_q,
                None,
                p_k,
                p_own,
                p_numbers + OWN_UNIT * rows,
                p_numbers + OWN_ALONG * rows,
                first,
                o_c,
                N,
                D,
                stride_qn,
                stride_km,
                TILE,
            )
        _store_own(p_positions, p_dk, b_dk, first, o_c, M, D, TILE)
    if not is_finite:
        b_sum = _sum_by_query(
            p_q, p_factor, p_slots, None, None, None, o_c, N, D, stride_qn, 1.0, K, COLUMNS
        )
    b_sum = tl.trans(b_sum)
    if METRIC == COSINE:
        b_sum = inverse[:, None] * (b_sum - b_along[:, None] * b_u.to(tl.float32))
        b_sum = tl.where(has_no_gradient(inverse, b_along)[:, None], 0.0, b_sum)
    _store_candidates(p_dk, b_candidate, b_sum, o_c, D)


@Kernel
def key_side_candidates_kernel(
    p_grad,  # [B, N, C] contiguous
    p_value,  # [B, M, C]
    p_weight,  # [C, 1, k] contiguous, or None
    p_query,  # [B, N, D]
    p_key,  # [B, M, D]
    p_candidates,  # [R] int64
    p_weight_rows,  # [k, C], or None; this and those below as query_side_candidates.py has them
    p_positions,  # [B * tiles, 256] int8
    p_slots,  # [B, rows, COLUMNS] int16
    p_rho,  # [B, rows, COLUMNS] in 16 bits
    p_factor,  # [B, rows, COLUMNS]
    p_own,  # [B, rows] int32
    p_numbers,  # [B, NUMBERS, rows] float32
    p_ranges,  # [B, rows / TILE, 2] int32
    p_along,  # [B * tiles, COLUMNS] float32
    p_inverse,  # [B, COLUMNS] float32
    p_flags,  # [B * tiles, 2] float32
    p_query_grad,  # [B, N, D] contiguous
    p_key_grad,  # [B, M, D] contiguous
    p_value_grad,  # [B, M, C] contiguous
    p_weight_part,  # [B * tiles + B, k, C] float32, or None
    p_bias_part,  # [B, C] float32, or None
    N,
    M,
    C,
    D,
    R,
    B,
    B2,
    tiles,
    rows,
    value_blocks,  # of channels of V
    blocks,  # those and the ones of query
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_kb1,
    stride_kb2,
    stride_km,
    stride_vb1,
    stride_vb2,
    stride_vm,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    METRIC: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK channels of a batch element: dV, or dk and dq."""
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    stride_vb1 = aligned(stride_vb1, ALIGN)
    stride_vb2 = aligned(stride_vb2, ALIGN)
    stride_vm = aligned(stride_vm, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    block = (pid % blocks).to(tl.int32)
    b = pid // blocks
    b_candidate = load_candidates(p_candidates, R, M, COLUMNS)
    p_positions += b * tiles * 256
    p_slots += b * rows * COLUMNS
    p_own += b * rows
    p_numbers += b * NUMBERS * rows
    p_ranges += b * (rows // TILE) * 2
    kind = (block >= value_blocks).to(tl.int32)
    flags = tl.zeros([], tl.float32)
    for tile in range(0, tiles):
        flags += tl.load(p_flags + (b * tiles + tile) * 2 + kind)
    is_finite = flags == 0.0
    if block < value_blocks:
        p_part, p_db = None, None
        if p_weight_part is not None:
            p_part = p_weight_part + (B * tiles.to(tl.int64) + b) * K * C
        if p_bias_part is not None:
            p_db = p_bias_part + b * C
        _differentiate_value(
            p_grad + b * N * C,
            p_value + (b // B2) * stride_vb1 + (b % B2) * stride_vb2,
            p_weight,
            p_weight_rows,
            p_own,
            p_numbers,
            p_ranges,
            p_positions,
            p_rho + b * rows * COLUMNS,
            p_slots,
            p_value_grad + b * M * C,
            p_part,
            p_db,
            is_finite,
            b_candidate,
            block * BLOCK + tl.arange(0, BLOCK),
            N,
            M,
            C,
            rows,
            stride_vm,
            K,
            QUERIES,
            COLUMNS,
            TILE,
        )
    else:
        p_a, p_i = None, None
        if METRIC == COSINE:
            p_a, p_i = p_along + b * tiles * COLUMNS, p_inverse + b * COLUMNS
        _differentiate_key(
            p_query + (b // B2) * stride_qb1 + (b % B2) * stride_qb2,
            p_key + (b // B2) * stride_kb1 + (b % B2) * stride_kb2,
            p_own,
            p_numbers,
            p_ranges,
            p_positions,
            p_factor + b * rows * COLUMNS,
            p_slots,
            p_a,
            p_i,
            p_query_grad + b * N * D,
            p_key_grad + b * M * D,
            is_finite,
            b_candidate,
            (block - value_blocks) * BLOCK + tl.arange(0, BLOCK),
            N,
            M,
            D,
            rows,
            tiles,
            stride_qn,
            stride_km,
            K,
            METRIC,
            COLUMNS,
            TILE,
        )


@Kernel
def sum_parts_kernel(
    p_weight_part,  # [weight_parts, k, C] float32, or None
    p_bias_part,  # [B, C] float32, or None
    p_weight_grad,  # [C, 1, k] contiguous, or None
    p_bias_grad,  # [C], or None
    C,
    k,
    B,
    weight_parts,
    weight_programs,
    PARTS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """SUMS elements of dW, or of db."""
    program = tl.program_id(0).to(tl.int64)
    if program < weight_programs:
        if p_weight_part is not None:
            add_parts(p_weight_part, p_weight_grad, program, weight_parts, k, C, PARTS, SUMS)
    elif p_bias_part is not None:
        program -= weight_programs
        add_parts(p_bias_part, p_bias_grad, program, B, 1, C, PARTS, SUMS)
