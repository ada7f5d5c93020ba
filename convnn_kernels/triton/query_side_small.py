# SPDX-License-Identifier: MIT
"""Gradients query by query as in query_side.py, for few tokens, up to 16 neighbors and 16 bits.

With t_ij = V[I_ij] * G_i, elementwise, drho_ij is the product of t_ij and W_j, and dW_j the sum of
rho_ij t_ij. Both are products on tensor cores: of t [ROWS, channels], for the j-th neighbors of
ROWS queries, with W [channels, SLOTS], and of t, transposed, with rho [ROWS, SLOTS]. Of both,
column j is what belongs to the j-th neighbors; it is added to a sum that has all columns.

    dot      dq_i = sum_j ds_ij k_j
    cosine   dq_i = (sum_j (ds_ij / ||k_j||) k_j - (sum_j ds_ij s_ij) u_i) / ||q_i||

A program has ROWS queries and needs no other one. It takes a block of channels for all neighbors
before the next block: of few tokens, such a block of V or of key stays in L1, from which rows are
gathered.

t, and rho in products, are rounded to 16 bits once. In float16, each row of G, and rho times what
that has taken from the row, are first brought near a power of two, so that neither large nor small
ones leave its range. Where a sum of
products is not finite, also because t has left that range, the program computes drho and dW again
in float32, each neighbor by itself.
"""

import triton
import triton.language as tl

from .float16 import near_power, to_float32
from .integers import aligned
from .launch import Kernel
from .metrics import COSINE
from .modulate import SOFTMAX, modulate
from .query_side import differentiate_output


@triton.jit
def _modulate_rows(b_s, m, scale, RHO: tl.constexpr):
    """rho of the similarities of some queries, [ROWS, SLOTS]."""
    # A maximum over NaN does not matter: the sum is NaN.
    b_max = tl.max(tl.where(m & (b_s == b_s), scale * b_s, float("-inf")), 1)[:, None]
    b_sum = tl.sum(tl.where(m, tl.exp(scale * b_s - b_max), 0.0), 1)[:, None]
    return modulate(b_s, m, b_max, b_sum, scale, RHO)


@triton.jit
def _products(p_rows, p_v, b_g, o_c, m_c, M, stride_vm):
    """t of one neighbor of each query; 0 or NaN where there is none."""
    b_row = tl.load(p_rows).to(tl.uint32, bitcast=True)
    m = (b_row < M)[:, None] & m_c[None, :]
    return b_g * tl.load(p_v + b_row[:, None] * stride_vm + o_c[None, :], m, 0.0)


@triton.jit
def _differentiate_output(
    p_g,  # [ROWS]: rows of G
    m_n,  # [ROWS]: which have a neighbor
    p_v,  # the rows of V of this batch element
    p_weight,  # [C, 1, k], or None
    p_rows,  # [ROWS]: where the rows of the neighbors of a query begin
    b_rho,  # [ROWS, SLOTS]
    p_part,  # [k, C] of this program, or None
    M,
    C,
    stride_vm,
    K: tl.constexpr,
    RHO_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """drho [ROWS, SLOTS], this program's part of dW; and 0, or NaN where one is not finite."""
    dtype: tl.constexpr = p_g.dtype.element_ty
    o_j = tl.arange(0, SLOTS)
    b_drho = tl.zeros([ROWS, SLOTS], tl.float32)
    b_test = tl.zeros([BLOCK_C, SLOTS], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        m_w = m_c[:, None] & (o_j < K)[None, :]
        b_w = m_w.to(dtype)
        if p_weight is not None:
            b_w = tl.load(p_weight + o_c[:, None] * K + o_j[None, :], m_w, 0.0)
        b_g = tl.load(p_g[:, None] + o_c[None, :], m_n[:, None] & m_c[None, :], 0.0)
        b_g, unit = near_power(b_g, dtype, 4, OF_ROWS=True)
        b_factor, unit_of_dw = near_power(b_rho * unit, dtype, 14)
        b_p = tl.zeros([ROWS, SLOTS], tl.float32)
        b_dw = tl.zeros([BLOCK_C, SLOTS], tl.float32)
        # t is a variable of the loop: so both products take the same t from shared memory.
        b_x = _products(p_rows, p_v, b_g, o_c, m_c, M, stride_vm)
        for j in range(0, K):
            m_j = (o_j == j)[None, :]
            if RHO_GRAD:
                b_p += tl.where(m_j, tl.dot(b_x, b_w), 0.0)
            if p_part is not None:
                b_dw += tl.where(m_j, tl.dot(tl.trans(b_x), b_factor), 0.0)
            following = tl.minimum(j + 1, K - 1)
            b_x = _products(p_rows + following, p_v, b_g, o_c, m_c, M, stride_vm)
        b_drho += b_p * unit
        if p_part is not None:
            b_dw = b_dw * unit_of_dw
            b_test += b_dw * 0.0
            tl.store(p_part + o_j[None, :] * C + o_c[:, None], b_dw, m_w)
    test = tl.sum(tl.sum(b_drho * 0.0, 1), 0) + tl.sum(tl.sum(b_test, 1), 0)
    return b_drho, test


@triton.jit
def _sum_grad(
    p_g,  # [ROWS]: rows of G
    m_n,
    p_part,  # [C] of this program
    C,
    BLOCK_C: tl.constexpr,
):
    """This program's part of db."""
    for c0 in range(0, C, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_g = tl.load(p_g[:, None] + o_c[None, :], m_n[:, None] & m_c[None, :], 0.0)
        tl.store(p_part + o_c, tl.sum(b_g.to(tl.float32), 0), m_c)


@triton.jit
def _differentiate_query(
    p_q,  # [ROWS]: rows of query
    p_dq,  # [ROWS]: rows of dq
    m_n,
    p_k,  # the rows of key of this batch element
    p_unit,  # [ROWS]: where the factors of a query begin
    inverse_q,
    b_along,
    M,
    D,
    stride_km,
    K: tl.constexpr,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq of ROWS queries."""
    for d0 in range(0, D, BLOCK_D):
        o_d = d0 + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        m_q = m_n[:, None] & m_d[None, :]
        b_dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for j in tl.range(0, K, loop_unroll_factor=3):
            b_unit = tl.load(p_unit + j)
            b_row = (b_unit >> 32).to(tl.uint32)
            m = (b_row < M)[:, None] & m_d[None, :]
            b_k = tl.load(p_k + b_row[:, None] * stride_km + o_d[None, :], m, 0.0)
            b_dq += b_unit.to(tl.int32).to(tl.float32, bitcast=True)[:, None] * to_float32(b_k)
        if METRIC == COSINE:
            b_q = tl.load(p_q[:, None] + o_d[None, :], m_q, 0.0).to(tl.float32)
            b_dq = inverse_q[:, None] * (b_dq - b_along[:, None] * (inverse_q[:, None] * b_q))
            b_dq = tl.where(inverse_q[:, None] == 0.0, 0.0, b_dq)
        tl.store(p_dq[:, None] + o_d[None, :], b_dq.to(p_dq.dtype.element_ty), m_q)


@Kernel
def query_side_small_kernel(
    p_grad,  # [B, N, C] contiguous; so the two below, None where nothing depends on them
    p_value,  # [B, M, C]
    p_weight,  # [C, 1, k] contiguous, or None
    p_query,  # [B, N, D], or None
    p_key,  # [B, M, D], or None
    p_similarities,  # [B, N, k] float32, contiguous
    p_direct,  # [B, N, k] float32, contiguous: the gradient of the returned similarities; or None
    p_rows,  # [B, tiles * ROWS, SLOTS] int32, as list_pairs.py has them
    p_inverse_q,  # [B, N] float32, or None
    p_inverse_k,  # [B, M] float32, or None
    p_weight_rows,  # [k, C], or None
    p_rho,  # [B, tiles * ROWS, SLOTS] float32, or None
    p_drho,  # [B, tiles * ROWS, SLOTS] float32: where drho is computed again; or None
    p_unit,  # [B, tiles * ROWS, SLOTS] int64: in the high 32 bits the row of key, in the low ones
    # float32: ds_ij, cosine: ds_ij / ||k_j||; or None
    p_factor,  # [B, tiles * ROWS, SLOTS] float32: ds_ij, cosine: ds_ij / ||q_i||; or None
    p_along,  # [B, tiles * ROWS, SLOTS] float32: ds_ij s_ij; None without ds or cosine
    p_query_grad,  # [B, N, D] contiguous, or None
    p_weight_part,  # [B * tiles, k, C] float32, or None
    p_bias_part,  # [B * tiles, C] float32, or None
    N,
    M,
    C,
    D,
    scale,
    B2,
    tiles,
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
    RHO: tl.constexpr,
    METRIC: tl.constexpr,
    RHO_GRAD: tl.constexpr,  # whether ds depends on drho
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of ROWS queries of a batch element."""
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
    begin_n = (tile % tiles) * ROWS
    i = begin_n + tl.arange(0, ROWS)
    o_n = b * N + i
    m_n = i < N
    o_j = tl.arange(0, SLOTS)
    o_s = o_n[:, None] * K + o_j[None, :]
    m_s = m_n[:, None] & (o_j < K)[None, :]
    # In the temporaries, where the pairs of each query begin.
    o_r = (tile * ROWS + tl.arange(0, ROWS)) * SLOTS
    o_t = o_r[:, None] + o_j[None, :]
    b_row = tl.load(p_rows + o_t, m_s, -1)
    m = b_row >= 0
    b_rho = _modulate_rows(tl.load(p_similarities + o_s, m, 0.0), m, scale, RHO)
    if p_rho is not None:
        tl.store(p_rho + o_t, b_rho)
    if p_bias_part is not None:
        _sum_grad(p_grad + o_n * C, m_n, p_bias_part + tile * C, C, BLOCK_C)
    b_ds = tl.zeros([ROWS, SLOTS], tl.float32)
    if p_value is not None:
        p_v = p_value + (b // B2) * stride_vb1 + (b % B2) * stride_vb2
        p_part = None
        if p_weight_part is not None:
            p_part = p_weight_part + tile * K * C
        b_ds, test = _differentiate_output(
            p_grad + o_n * C,
            tl.max(m.to(tl.int32), 1) > 0,
            p_v,
            p_weight,
            p_rows + o_r,
            b_rho,
            p_part,
            M,
            C,
            stride_vm,
            K,
            RHO_GRAD,
            ROWS,
            SLOTS,
            BLOCK_C,
        )
        if test != 0.0:
            # Every thread may read what another one has stored.
            tl.debug_barrier()
            for begin in range(0, ROWS, 16):
                o_16 = begin + tl.arange(0, 16)
                differentiate_output(
                    p_grad + (b * N + begin_n + o_16) * C,
                    begin_n + o_16 < N,
                    p_v,
                    p_weight_rows,
                    p_rows,
                    p_rho,
                    p_drho,
                    p_part,
                    (tile * ROWS + o_16) * SLOTS,
                    begin == 0,
                    C,
                    K,
                    1,
                    stride_vm,
                    RHO_GRAD,
                    16,
                    BLOCK_C,
                )
            if RHO_GRAD:
                b_ds = tl.load(p_drho + o_t, m, 0.0)
        if RHO_GRAD and RHO == SOFTMAX:
            b_ds = scale * b_rho * (b_ds - tl.sum(b_rho * b_ds, 1)[:, None])
        if not RHO_GRAD:
            b_ds = tl.zeros([ROWS, SLOTS], tl.float32)
    if p_direct is not None:
        b_ds += tl.load(p_direct + o_s, m, 0.0)
    b_ds = tl.where(m, b_ds, 0.0)
    if p_query is not None:
        b_along = b_ds * tl.load(p_similarities + o_s, m, 0.0)
        inverse_q = tl.zeros([ROWS], tl.float32)
        b_unit, b_factor = b_ds, b_ds
        if METRIC == COSINE:
            inverse_q = tl.load(p_inverse_q + o_n, m_n, 0.0)
            b_unit = b_ds * tl.load(p_inverse_k + b * M + b_row, m, 0.0)
            b_factor = b_ds * inverse_q[:, None]
        if p_factor is not None:
            tl.store(p_factor + o_t, b_factor)
        if p_along is not None:
            tl.store(p_along + o_t, b_along)
        if p_query_grad is not None:
            b_unit = b_unit.to(tl.uint32, bitcast=True).to(tl.int64)
            tl.store(p_unit + o_t, (b_row.to(tl.int64) << 32) | b_unit)
            tl.debug_barrier()
            _differentiate_query(
                p_query + (b // B2) * stride_qb1 + (b % B2) * stride_qb2 + i * stride_qn,
                p_query_grad + o_n * D,
                m_n,
                p_key + (b // B2) * stride_kb1 + (b % B2) * stride_kb2,
                p_unit + o_r,
                inverse_q,
                tl.sum(b_along, 1),
                M,
                D,
                stride_km,
                K,
                METRIC,
                ROWS,
                BLOCK_D,
            )
