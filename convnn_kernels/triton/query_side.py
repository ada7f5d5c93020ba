# SPDX-License-Identifier: MIT
"""Gradients query by query, with G the gradient of the output and W depthwise, or 1 (Eq. 6).

    drho_ij = sum_c G_i[c] W[c, j] V[I_ij, c]         dW[c, j] = sum_i rho_ij G_i[c] V[I_ij, c]
    ds_i    = the derivative of rho (section 4.1) times drho_i, + the gradient of the returned s_i
    dot        dq_i = sum_j ds_ij k_j
    euclidean  dq_i = sum_j -2 ds_ij (q_i - k_j)
    cosine     dq_i = (sum_j ds_ij (u_j - s_ij u_i)) / ||q_i||, with u the unit vectors

A program has a tile of `rows_each` queries and needs no other program. ROWS queries at a time, it
computes rho; then drho and dW, for which rows of G stay in registers while it goes through the
neighbors; then ds; and dq, BLOCK_N queries at a time. rho, drho and ds go through memory, where
the key side needs rho and ds anyway. All products are float32. What ROWS queries add to dW is
summed first, and then added to the part of dW that the tile has. Parts of dW and of db are added up
in pairs.py. Where queries are divided (backward.py), a tile of the next ones adds to the same part.

For the key side it also stores the rows of key, -1 for a missing neighbor, counts the pairs of each
block of keys in the tile, and transposes W, which it reads by j itself.
"""

import triton
import triton.language as tl

from .integers import aligned, as_int64
from .inverse_norms import has_no_gradient, inverse_norm, inverse_norm_at
from .launch import Kernel
from .metrics import COSINE, EUCLIDEAN
from .modulate import SOFTMAX, load_neighbors, modulate


@triton.jit
def _count_no_pairs(p_count, key_blocks):
    for start in range(0, key_blocks, 128):
        o_b = start + tl.arange(0, 128)
        tl.store(p_count + o_b, 0, o_b < key_blocks)
    tl.debug_barrier()


@triton.jit
def _modulate_rows(
    p_similarities,
    p_indices,
    p_rows,
    p_rho,
    p_count,
    o_s,  # [ROWS]: where the similarities and indices of a query begin
    o_t,  # [ROWS]: where it has its slot 0 in a tile
    m_n,
    M,
    k,
    scale,
    rows_each,
    RHO: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows of key and rho of ROWS queries, and which of them have a neighbor."""
    m_any = m_n & False
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    for j in range(0, k):
        b_s, b_row, m = load_neighbors(p_similarities, p_indices, o_s + j, m_n, M)
        b_row = b_row.to(tl.int32)
        tl.store(p_rows + o_t + as_int64(j) * rows_each, tl.where(m, b_row, -1))
        m_any |= m
        if p_count is not None:
            # Integers: one result in any order.
            tl.atomic_add(p_count + b_row // KEYS, 1, m, sem="relaxed")
        # A maximum over NaN does not matter: the sum is NaN.
        b_max = tl.maximum(b_max, tl.where(m & (b_s == b_s), scale * b_s, float("-inf")))
    # Every thread may read what another one has stored.
    tl.debug_barrier()
    if p_rho is not None:
        b_sum = tl.zeros([ROWS], tl.float32)
        if RHO == SOFTMAX:
            for j in range(0, k):
                m = tl.load(p_rows + o_t + as_int64(j) * rows_each) >= 0
                b_s = tl.load(p_similarities + o_s + j, m, 0.0)
                b_sum += tl.where(m, tl.exp(scale * b_s - b_max), 0.0)
        for j in range(0, k):
            m = tl.load(p_rows + o_t + as_int64(j) * rows_each) >= 0
            b_rho = modulate(tl.load(p_similarities + o_s + j, m, 0.0), m, b_max, b_sum, scale, RHO)
            tl.store(p_rho + o_t + as_int64(j) * rows_each, b_rho)
    return m_any


@triton.jit
def transpose_weight(p_weight, p_weight_rows, C, k, BLOCK_C: tl.constexpr):
    """All of W: every program stores the same, and needs none of the others."""
    for j in range(0, k):
        for c0 in range(0, C, BLOCK_C):
            o_c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
            b_w = tl.load(p_weight + o_c * k + j, o_c < C, 0.0)
            tl.store(p_weight_rows + as_int64(j) * C + o_c, b_w, o_c < C)


@triton.jit
def differentiate_output(
    p_grad,  # [ROWS]: rows of G
    m_n,
    p_v,  # the rows of V of this batch element
    p_weight_rows,  # [k, C], or None
    p_rows,
    p_rho,
    p_grad_s,
    p_part,  # [k, C] of this tile, or None
    o_t,  # [ROWS]: where a query has its slot 0 in a tile
    is_first,  # whether nothing has been added to the tile's part of dW
    C,
    k,
    rows_each,
    stride_vm,
    RHO_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """drho of ROWS queries, in the place of ds, and what they add to this tile's part of dW."""
    for c0 in range(0, C, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        m_c = o_c < C
        b_g = tl.load(p_grad[:, None] + o_c[None, :], m_n[:, None] & m_c[None, :], 0.0)
        b_g = b_g.to(tl.float32)
        for j in range(0, k):
            o_p = o_t + as_int64(j) * rows_each
            b_row = tl.load(p_rows + o_p)
            m = (b_row >= 0)[:, None] & m_c[None, :]
            b_v = tl.load(p_v + b_row[:, None] * stride_vm + o_c[None, :], m, 0.0)
            # Of a missing neighbor nothing is added, also where G is not finite.
            b_x = tl.where(m, b_v.to(tl.float32) * b_g, 0.0)
            if RHO_GRAD:
                b_p = b_x
                if p_weight_rows is not None:
                    b_w = tl.load(p_weight_rows + as_int64(j) * C + o_c, m_c, 0.0)
                    b_p = b_x * b_w.to(tl.float32)[None, :]
                b_drho = tl.sum(b_p, 1)
                if c0 > 0:
                    b_drho += tl.load(p_grad_s + o_p)
                tl.store(p_grad_s + o_p, b_drho)
            if p_part is not None:
                b_dw = tl.sum(tl.load(p_rho + o_p)[:, None] * b_x, 0)
                p = p_part + as_int64(j) * C + o_c
                b_dw += tl.load(p, m_c & (is_first == 0), 0.0)
                tl.store(p, b_dw, m_c)
        tl.debug_barrier()


@triton.jit
def _sum_grad(
    p_grad,  # the rows of G of this tile
    p_bias_part,
    rows,
    is_first,  # whether there is no sum of an earlier part of the queries
    C,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds G to this tile's part of db."""
    o_b = tl.arange(0, BLOCK_N).to(tl.int64)
    for c0 in range(0, C, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_db = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for start in range(0, rows, BLOCK_N):
            m = (start + o_b < rows)[:, None] & m_c[None, :]
            b_g = tl.load(p_grad + (start + o_b)[:, None] * C + o_c[None, :], m, 0.0)
            b_db += b_g.to(tl.float32)
        b_db = tl.sum(b_db, 0) + tl.load(p_bias_part + o_c, m_c & (is_first == 0), 0.0)
        tl.store(p_bias_part + o_c, b_db, m_c)


@triton.jit
def _differentiate_rho(
    p_similarities,
    p_direct,
    p_similarities_grad,
    p_rows,
    p_rho,
    p_grad_s,
    o_s,  # [ROWS]: where the similarities of a query begin
    o_t,  # [ROWS]: where it has its slot 0 in a tile
    m_n,
    k,
    scale,
    rows_each,
    RHO: tl.constexpr,
    RHO_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ds of ROWS queries, and sum_j ds_ij s_ij of each."""
    b_sum = tl.zeros([ROWS], tl.float32)
    if RHO_GRAD and RHO == SOFTMAX:
        for j in range(0, k):
            b_drho = tl.load(p_grad_s + o_t + as_int64(j) * rows_each)
            b_sum += tl.load(p_rho + o_t + as_int64(j) * rows_each) * b_drho
    b_along = tl.zeros([ROWS], tl.float32)
    for j in range(0, k):
        m = tl.load(p_rows + o_t + as_int64(j) * rows_each) >= 0
        b_ds = tl.zeros([ROWS], tl.float32)
        if RHO_GRAD:
            b_ds = tl.load(p_grad_s + o_t + as_int64(j) * rows_each)
            if RHO == SOFTMAX:
                b_ds = scale * tl.load(p_rho + o_t + as_int64(j) * rows_each) * (b_ds - b_sum)
        if p_direct is not None:
            b_ds += tl.load(p_direct + o_s + j, m, 0.0)
        b_ds = tl.where(m, b_ds, 0.0)
        tl.store(p_grad_s + o_t + as_int64(j) * rows_each, b_ds)
        if p_similarities_grad is not None:
            tl.store(p_similarities_grad + o_s + j, b_ds, m_n)
        b_along += b_ds * tl.load(p_similarities + o_s + j, m, 0.0)
    return b_along


@triton.jit
def _scale_by_keys(
    p_k,
    p_rows,
    p_grad_s,
    p_unit,
    o_t,  # [BLOCK_N]: where a query has its slot 0 in a tile
    k,
    D,
    rows_each,
    stride_km,
    RESCALE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ds_ij / ||k_j||, for keys of several blocks of channels."""
    for j in range(0, k):
        b_row = tl.load(p_rows + o_t + as_int64(j) * rows_each)
        b_inverse = inverse_norm_at(p_k + b_row * stride_km, b_row >= 0, D, RESCALE, BLOCK_D)
        tl.store(
            p_unit + o_t + as_int64(j) * rows_each,
            tl.load(p_grad_s + o_t + as_int64(j) * rows_each) * b_inverse,
        )
    tl.debug_barrier()


@triton.jit
def _differentiate_query(
    p_q,  # [BLOCK_N]: rows of query
    p_dq,  # [BLOCK_N]: rows of dq
    m_n,
    p_k,  # the rows of key of this batch element
    p_rows,
    p_grad_s,
    p_unit,
    o_t,  # [BLOCK_N]: where a query has its slot 0 in a tile
    inverse_q,
    b_along,
    k,
    D,
    rows_each,
    stride_km,
    METRIC: tl.constexpr,
    RESCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq of BLOCK_N queries; inverse_q, which is given for several blocks of channels."""
    if p_unit is not None:
        _scale_by_keys(
            p_k, p_rows, p_grad_s, p_unit, o_t, k, D, rows_each, stride_km, RESCALE, BLOCK_D
        )
    for d0 in range(0, D, BLOCK_D):
        o_d = d0 + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        m_q = m_n[:, None] & m_d[None, :]
        if METRIC == EUCLIDEAN:
            b_q = tl.load(p_q[:, None] + o_d[None, :], m_q, 0.0).to(tl.float32)
        b_dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        # Sums of BLOCK_K terms first: rounding errors grow with the longest sum.
        for start in range(0, k, BLOCK_K):
            b_part = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for j in range(start, tl.minimum(start + BLOCK_K, k)):
                b_row = tl.load(p_rows + o_t + as_int64(j) * rows_each)
                m = (b_row >= 0)[:, None] & m_d[None, :]
                b_k = tl.load(p_k + b_row[:, None] * stride_km + o_d[None, :], m, 0.0)
                b_k = b_k.to(tl.float32)
                if p_unit is not None:
                    b_ds = tl.load(p_unit + o_t + as_int64(j) * rows_each)
                else:
                    b_ds = tl.load(p_grad_s + o_t + as_int64(j) * rows_each)
                    if METRIC == COSINE:
                        b_ds = b_ds * inverse_norm(b_k, RESCALE)
                if METRIC == EUCLIDEAN:
                    b_part += tl.where(m, -2.0 * b_ds[:, None] * (b_q - b_k), 0.0)
                else:
                    b_part += b_ds[:, None] * b_k
            b_dq += b_part
        if METRIC == COSINE:
            b_q = tl.load(p_q[:, None] + o_d[None, :], m_q, 0.0).to(tl.float32)
            if p_unit is None:
                inverse_q = inverse_norm(b_q, RESCALE)
            b_dq = inverse_q[:, None] * (b_dq - b_along[:, None] * (inverse_q[:, None] * b_q))
            b_dq = tl.where(has_no_gradient(inverse_q, b_along)[:, None], 0.0, b_dq)
        tl.store(p_dq[:, None] + o_d[None, :], b_dq.to(p_dq.dtype.element_ty), m_q)
    return inverse_q


@Kernel
def query_side_kernel(
    p_grad,  # [B, N, C] contiguous; so the three below, None where nothing depends on them
    p_value,  # [B, M, C]
    p_weight,  # [C, 1, k] contiguous, or None
    p_query,  # [B, N, D], or None
    p_key,  # [B, M, D], or None
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_direct,  # [B, N, k] float32, contiguous: the gradient of the returned similarities; or None
    p_rows,  # [B * tiles, k, rows_each] int32: the row of key of each pair, or -1
    p_rho,  # [B * tiles, k, rows_each] float32, or None
    p_grad_s,  # [B * tiles, k, rows_each] float32: ds; or None
    p_unit,  # [B * tiles, k, rows_each] float32: ds_ij / ||k_j||; None for a single block of D
    p_along,  # [B * tiles, rows_each] float32: sum_j ds_ij s_ij; or None: no cosine
    p_inverse,  # [B, N] float32: 1 / ||q_i||; None without ds or cosine
    p_similarities_grad,  # [B, N, k] float32: ds, as a result; or None
    p_query_grad,  # [B, N, D] contiguous, or None
    p_weight_part,  # [B * tiles, k, C] float32, or None
    p_bias_part,  # [B * tiles, C] float32, or None
    p_weight_rows,  # [k, C]: W, transposed; or None
    p_counts,  # [B * tiles, key_blocks] integers: pairs of each block of keys; or None
    N,
    M,
    C,
    D,
    k,
    scale,
    B2,
    first_n,
    tiles,
    rows_each,
    key_blocks,
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
    RHO: tl.constexpr,
    METRIC: tl.constexpr,
    RESCALE: tl.constexpr,
    RHO_GRAD: tl.constexpr,  # whether ds depends on drho
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of `rows_each` queries of a batch element, from the query first_n on."""
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    stride_vb1 = aligned(stride_vb1, ALIGN)
    stride_vb2 = aligned(stride_vb2, ALIGN)
    stride_vm = aligned(stride_vm, ALIGN)
    tile = tl.program_id(0).to(tl.int64)
    b = tile // tiles
    first = first_n + (tile % tiles) * rows_each
    rows = tl.minimum(rows_each, N - first).to(tl.int32)
    first += b * N
    p_count = None
    if p_counts is not None:
        p_count = p_counts + tile * key_blocks
        _count_no_pairs(p_count, key_blocks)
    if p_weight_rows is not None:
        transpose_weight(p_weight, p_weight_rows, C, k, BLOCK_C)
    if p_bias_part is not None:
        p = p_bias_part + tile * C
        _sum_grad(p_grad + first * C, p, rows, first_n == 0, C, BLOCK_N, BLOCK_C)
    tl.debug_barrier()
    o_r = tl.arange(0, ROWS)
    o_b = tl.arange(0, BLOCK_N)
    for begin in range(0, rows_each, ROWS):
        m_r = begin + o_r < rows
        o_s = (first + begin + o_r) * k
        o_t = tile * k * rows_each + begin + o_r
        m_any = _modulate_rows(
            p_similarities,
            p_indices,
            p_rows,
            p_rho,
            p_count,
            o_s,
            o_t,
            m_r,
            M,
            k,
            scale,
            rows_each,
            RHO,
            KEYS,
            ROWS,
        )
        tl.debug_barrier()
        if p_value is not None:
            p_v = p_value + (b // B2) * stride_vb1 + (b % B2) * stride_vb2
            p_part = None
            if p_weight_part is not None:
                p_part = p_weight_part + tile * k * C
            differentiate_output(
                p_grad + (first + begin + o_r) * C,
                m_any,
                p_v,
                p_weight_rows,
                p_rows,
                p_rho,
                p_grad_s,
                p_part,
                tile * k * rows_each + begin + o_r,
                (begin == 0) & (first_n == 0),
                C,
                k,
                rows_each,
                stride_vm,
                RHO_GRAD,
                ROWS,
                BLOCK_C,
            )
        if p_grad_s is not None:
            b_sum = _differentiate_rho(
                p_similarities,
                p_direct,
                p_similarities_grad,
                p_rows,
                p_rho,
                p_grad_s,
                o_s,
                o_t,
                m_r,
                k,
                scale,
                rows_each,
                RHO,
                RHO_GRAD,
                ROWS,
            )
            if p_along is not None:
                tl.store(p_along + tile * rows_each + begin + o_r, b_sum)
            tl.debug_barrier()
        if p_query is not None:
            p_q = p_query + (b // B2) * stride_qb1 + (b % B2) * stride_qb2
            p_k = p_key + (b // B2) * stride_kb1 + (b % B2) * stride_kb2
            for start in range(begin, begin + ROWS, BLOCK_N):
                o_n = first + start + o_b
                m_n = start + o_b < rows
                b_along = tl.zeros([BLOCK_N], tl.float32)
                inverse_q = tl.zeros([BLOCK_N], tl.float32)
                p_row = p_q + (o_n - b * N) * stride_qn
                if METRIC == COSINE:
                    b_along = tl.load(p_along + tile * rows_each + start + o_b)
                    if p_query_grad is None or p_unit is not None:
                        inverse_q = inverse_norm_at(p_row, m_n, D, RESCALE, BLOCK_D)
                if p_query_grad is not None:
                    inverse_q = _differentiate_query(
                        p_row,
                        p_query_grad + o_n * D,
                        m_n,
                        p_k,
                        p_rows,
                        p_grad_s,
                        p_unit,
                        tile * k * rows_each + start + o_b,
                        inverse_q,
                        b_along,
                        k,
                        D,
                        rows_each,
                        stride_km,
                        METRIC,
                        RESCALE,
                        BLOCK_N,
                        BLOCK_K,
                        BLOCK_D,
                    )
                if METRIC == COSINE:
                    tl.store(p_inverse + o_n, inverse_q, m_n)
