# SPDX-License-Identifier: MIT
"""Gradients query by query as in query_side.py, for few tokens, up to 16 neighbors and 16 bits; and
the lists of pairs of list_pairs.py, by programs of their own.

With t_ij = V[I_ij] * G_i, elementwise, drho_ij is the product of t_ij and W_j, and dW_j the sum of
rho_ij t_ij. Both are products on tensor cores: of t [ROWS, channels], for the j-th neighbors of
ROWS queries, with W [channels, SLOTS], and of t, transposed, with rho [ROWS, SLOTS]. Of both,
column j is what belongs to the j-th neighbors; it is added to a sum that has all columns.

A program has ROWS queries, which may be of several batch elements, and needs no other one. It takes
a block of channels for all neighbors before the next block: of few tokens, such a block of V stays
in L1, from which rows are gathered. dq is left to search_grad_small.py.

t, and rho in products, are rounded to 16 bits once. In float16, each row of G, and rho times what
that has taken from the row, are first brought near a power of two, so that neither large nor small
ones leave its range. Where a sum of products is not finite, also because t
has left that range, the program computes drho and dW again in float32, each neighbor by itself.
"""

import triton
import triton.language as tl

from .float16 import near_power
from .integers import aligned, as_int64
from .launch import Kernel
from .list_pairs import list_pairs, store_ones, store_weight_row
from .modulate import SOFTMAX, load_neighbors, modulate
from .query_side import differentiate_output, transpose_weight


@triton.jit
def _modulate_rows(b_s, m, scale, RHO: tl.constexpr):
    """rho of the similarities of some queries, [ROWS, SLOTS]."""
    # A maximum over NaN does not matter: the sum is NaN.
    b_max = tl.max(tl.where(m & (b_s == b_s), scale * b_s, float("-inf")), 1)[:, None]
    b_sum = tl.sum(tl.where(m, tl.exp(scale * b_s - b_max), 0.0), 1)[:, None]
    return modulate(b_s, m, b_max, b_sum, scale, RHO)


@triton.jit
def _rows_of_value(p_v, p_offset, m_c, ALIGN: tl.constexpr, WHOLE: tl.constexpr):
    """V of one neighbor of each query; where there is none, some row of V."""
    p = p_v + tl.load(p_offset)[:, None] * ALIGN
    return tl.load(p) if WHOLE else tl.load(p, m_c[None, :], 0.0)


@triton.jit
def _add_products(
    b_p,  # [ROWS, SLOTS]
    b_dw,  # [BLOCK_C, SLOTS]
    b_x,  # [ROWS, BLOCK_C]: t of the j-th neighbors
    b_w,  # [BLOCK_C, SLOTS]
    b_factor,  # [ROWS, SLOTS]
    j,
    RHO_GRAD: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
):
    m_j = (tl.arange(0, b_w.shape[1]) == j)[None, :]
    if RHO_GRAD:
        b_p += tl.where(m_j, tl.dot(b_x, b_w), 0.0)
    if WEIGHT_GRAD:
        b_dw += tl.where(m_j, tl.dot(tl.trans(b_x), b_factor), 0.0)
    return b_p, b_dw


@triton.jit
def _differentiate_output(
    p_g,  # [ROWS]: rows of G
    m_n,  # [ROWS]: which have a neighbor
    p_v,  # [ROWS]: the first rows of V of their batch elements
    p_weight,  # [C, 1, k], or None
    p_offset,  # [ROWS]: where the offsets of the neighbors of a query begin
    b_rho,  # [ROWS, SLOTS]
    p_part,  # [k, C] of this program, or None
    C,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    RHO_GRAD: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """drho [ROWS, SLOTS], this program's part of dW; and 0, or NaN where one is not finite.

    Where there is no neighbor, drho is that of some row of V.
    """
    dtype: tl.constexpr = p_g.dtype.element_ty
    WEIGHT_GRAD: tl.constexpr = p_part is not None
    o_j = tl.arange(0, SLOTS)
    b_drho = tl.zeros([ROWS, SLOTS], tl.float32)
    b_test = tl.zeros([BLOCK_C, SLOTS], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C)
        m_c = (o_c < C) | WHOLE
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
        p_block = p_v[:, None] + o_c[None, :]
        b_x = b_g * _rows_of_value(p_block, p_offset, m_c, ALIGN, WHOLE)
        for j in range(0, K - 1):
            b_p, b_dw = _add_products(b_p, b_dw, b_x, b_w, b_factor, j, RHO_GRAD, WEIGHT_GRAD)
            b_x = b_g * _rows_of_value(p_block, p_offset + j + 1, m_c, ALIGN, WHOLE)
        b_p, b_dw = _add_products(b_p, b_dw, b_x, b_w, b_factor, K - 1, RHO_GRAD, WEIGHT_GRAD)
        b_drho += b_p * unit
        if WEIGHT_GRAD:
            b_dw = b_dw * unit_of_dw
            b_test += b_dw * 0.0
            tl.store(p_part + o_j[None, :] * C + o_c[:, None], b_dw, m_w)
    test = tl.sum(b_drho * 0.0) + tl.sum(b_test)
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


@Kernel
def query_side_small_kernel(
    p_grad,  # [B, N, C] contiguous; so the two below, None where nothing depends on them
    p_value,  # [B, M, C]
    p_weight,  # [C, 1, k] contiguous, or None
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_direct,  # [B, N, k] float32, contiguous: the gradient of the returned similarities; or None
    p_offset,  # [tiles * ROWS, SLOTS] int32: where a row of V begins, over ALIGN; or 0
    p_rows,  # [tiles * ROWS, SLOTS] int32, may be p_offset: rows of key, -1 for none, where drho is
    # computed again
    p_weight_rows,  # [k, WIDTH]: W, transposed, in longer rows; or None
    p_weight_again,  # [k, C]: so, where drho is computed again; or None
    p_rho,  # [tiles * ROWS, SLOTS] float32, or None
    p_drho,  # [tiles * ROWS, SLOTS] float32, may be p_ds: where drho is computed again; or None
    p_ds,  # [tiles * ROWS, SLOTS] float32, or None: so those below
    p_columns,  # [tiles * ROWS, SLOTS] int16: rows of key, -1 for none
    p_along_q,  # [tiles * ROWS] float32: sum_j ds_ij s_ij; None where the metric is dot
    p_weight_part,  # [tiles, k, C] float32, or None
    p_bias_part,  # [tiles, C] float32, or None
    p_pairs,  # [B, N * k] int32, as list_pairs.py has them; so the two below; or None
    p_next,
    p_ends,
    p_ones,  # [TILE + 1, TILE]: ones on the diagonal; or None
    N,
    M,
    C,
    scale,
    B,
    B2,
    key_blocks,
    lists,  # programs that list pairs
    first_tile,  # those, and of ones and of W
    stride_vb1,
    stride_vb2,
    stride_vm,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    RHO: tl.constexpr,
    RHO_GRAD: tl.constexpr,  # whether ds depends on drho
    WHOLE_C: tl.constexpr,  # whether blocks of channels are full
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The pairs of a batch element; or else ones, or a row of W; or else a tile of ROWS queries."""
    stride_vb1 = aligned(stride_vb1, ALIGN)
    stride_vb2 = aligned(stride_vb2, ALIGN)
    stride_vm = aligned(stride_vm, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    if pid < lists:
        if p_pairs is not None:
            o = pid * N * K
            list_pairs(
                p_similarities + o,
                p_indices + o,
                p_pairs + o,
                p_next + pid * QUERIES * BLOCKS,
                p_ends + pid * key_blocks,
                N,
                M,
                K,
                key_blocks,
                KEYS,
                TILE,
                BLOCKS,
                QUERIES,
            )
    elif pid < first_tile:
        if pid > lists:
            if p_weight_rows is not None:
                store_weight_row(p_weight, p_weight_rows, pid - lists - 1, C, K, WIDTH)
        elif p_ones is not None:
            store_ones(p_ones, TILE)
    else:
        tile = pid - first_tile
        o_t = tile * ROWS + tl.arange(0, ROWS)
        m_n = o_t < as_int64(N) * B
        # Batch elements of the queries, counted from the one of the first.
        first = tile * ROWS // N
        b_b = (
            first.to(tl.int32) + ((tile * ROWS - first * N).to(tl.int32) + tl.arange(0, ROWS)) // N
        )
        o_j = tl.arange(0, SLOTS)
        o_s = o_t[:, None] * K + o_j[None, :]
        m_s = m_n[:, None] & (o_j < K)[None, :]
        o_p = o_t[:, None] * SLOTS + o_j[None, :]
        b_s, b_row, m = load_neighbors(p_similarities, p_indices, o_s, m_s, M)
        b_row = tl.where(m, b_row, 0).to(tl.int32)
        b_rho = _modulate_rows(tl.where(m, b_s, 0.0), m, scale, RHO)
        if p_rho is not None:
            tl.store(p_rho + o_p, b_rho)
        if p_bias_part is not None:
            _sum_grad(p_grad + o_t * C, m_n, p_bias_part + tile * C, C, BLOCK_C)
        b_ds = tl.zeros([ROWS, SLOTS], tl.float32)
        if p_value is not None:
            # A row of V begins at a number of 32 bits.
            tl.store(p_offset + o_p, (b_row * (stride_vm // ALIGN)).to(tl.int32))
            # Every thread may read what another one has stored.
            tl.debug_barrier()
            b_b = tl.minimum(b_b, B - 1).to(tl.int64)
            p_v = p_value + (b_b // B2) * stride_vb1 + (b_b % B2) * stride_vb2
            p_part = None
            if p_weight_part is not None:
                p_part = p_weight_part + tile * K * C
            b_ds, test = _differentiate_output(
                p_grad + o_t * C,
                tl.max(m.to(tl.int32), 1) > 0,
                p_v,
                p_weight,
                p_offset + o_t * SLOTS,
                b_rho,
                p_part,
                C,
                ALIGN,
                K,
                RHO_GRAD,
                WHOLE_C,
                ROWS,
                SLOTS,
                BLOCK_C,
            )
            if test != 0.0:
                tl.store(p_rows + o_p, tl.where(m, b_row, -1))
                if p_weight is not None:
                    transpose_weight(p_weight, p_weight_again, C, K, BLOCK_C)
                tl.debug_barrier()
                for begin in range(0, ROWS, 16):
                    o_16 = tile * ROWS + begin + tl.arange(0, 16)
                    b_16 = tl.minimum(o_16 // N, B - 1)
                    p_16 = p_value + (b_16 // B2) * stride_vb1 + (b_16 % B2) * stride_vb2
                    differentiate_output(
                        p_grad + o_16 * C,
                        o_16 < as_int64(N) * B,
                        p_16[:, None],
                        p_weight_again,
                        p_rows,
                        p_rho,
                        p_drho,
                        p_part,
                        o_16 * SLOTS,
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
                    b_ds = tl.load(p_drho + o_p, m, 0.0)
            if not RHO_GRAD:
                b_ds = tl.zeros([ROWS, SLOTS], tl.float32)
        # Loaded again, rather than kept in registers.
        b_s, b_row, m = load_neighbors(p_similarities, p_indices, o_s, m_s, M)
        if RHO_GRAD and RHO == SOFTMAX:
            b_rho = tl.load(p_rho + o_p)
            b_ds = scale * b_rho * (b_ds - tl.sum(b_rho * b_ds, 1)[:, None])
        if p_direct is not None:
            b_ds += tl.load(p_direct + o_s, m, 0.0)
        b_ds = tl.where(m, b_ds, 0.0)
        if p_ds is not None:
            tl.store(p_ds + o_p, b_ds)
            if p_along_q is not None:
                tl.store(p_along_q + o_t, tl.sum(b_ds * tl.where(m, b_s, 0.0), 1))
            tl.store(p_columns + o_p, tl.where(m, b_row, -1).to(tl.int16))
