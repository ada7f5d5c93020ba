# SPDX-License-Identifier: MIT
"""Select where there are few columns, in one launch.

A program has BLOCK_N queries and all columns. It computes a tile of S, [BLOCK_N, BLOCK_M], on
tensor cores and keeps it in registers. The best column of each row is taken out of the tile, over
and over, and replaces the lowest entry in the list of the row, until no row has a column left that
belongs in its list. Lists stay in registers as well; there is no workspace. A row costs a few
instructions per column and neighbor, and no similarity is computed twice.

For 16 bits only: products are exact, and their sums are rounded to float32 every BLOCK_D channels,
so the result of the tensor cores is the similarity that is returned.

Shapes as in select.py. With candidates, self_indices must be None.
"""

import triton.language as tl

from . import configs
from .integers import aligned
from .launch import Kernel, Plan, Pointers, cache_plans
from .metrics import COSINE
from .order import (
    FIXED,
    NO_ORDER,
    NOTHING,
    ORDER_OF_SELF,
    insert,
    largest,
    orderable,
    store_list,
)
from .search import Search
from .tensors import cdiv


@Kernel
def select_small_kernel(
    p_query,  # [B, N, D]
    p_key,  # [B, M, D]
    p_query_inverse,  # [B, N] float32, or None: no cosine
    p_key_inverse,  # [B, M] float32, or None: no cosine
    p_columns,  # [R] int64, or None
    p_mask,  # [B, M] bool, or None
    p_self,  # [N] int64, or None
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    N,
    M,
    D,
    columns,
    k,
    B2,
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
    LOG_LIST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All of `select` for BLOCK_N queries."""
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    LIST: tl.constexpr = 1 << LOG_LIST
    pid = tl.program_id(0).to(tl.int64)
    row_blocks = tl.cdiv(N, BLOCK_N)
    b = pid // row_blocks
    o_n = (pid % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_d = tl.arange(0, BLOCK_D)
    p_q = p_query + (b // B2) * stride_qb1 + (b % B2) * stride_qb2 + o_n * stride_qn
    p_k = p_key + (b // B2) * stride_kb1 + (b % B2) * stride_kb2
    if p_mask is not None:
        p_m = p_mask + (b // B2) * stride_mb1 + (b % B2) * stride_mb2
    if METRIC == COSINE:
        inverse_q = tl.load(p_query_inverse + b * N + o_n, m_n, 0.0)
    self_row = tl.full([BLOCK_N], -1, tl.int64)
    if p_self is not None:
        self_row = tl.load(p_self + o_n, m_n, -1)
    b_s_self = tl.zeros([BLOCK_N], tl.float32)

    # Empty entries differ, so that each can be found as the lowest one.
    o_l = tl.arange(0, LIST)[None, :]
    b_list = tl.full([BLOCK_N, LIST], NOTHING, tl.int64) + o_l
    b_list = tl.where(o_l < k, b_list, FIXED)
    b_lowest = tl.min(b_list, 1)
    for start in range(0, columns, BLOCK_M):
        o_c = start + tl.arange(0, BLOCK_M).to(tl.int64)
        m_c = o_c < columns
        row = o_c
        if p_columns is not None:
            row = tl.load(p_columns + o_c, m_c, -1)
            m_c = m_c & (row >= 0) & (row < M)
        b_s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for d in range(0, D, BLOCK_D):
            o_x = d + o_d
            m_d = o_x < D
            p = p_q[:, None] + o_x[None, :]
            b_q = tl.load(p, m_n[:, None] & m_d[None, :], 0.0)
            p = p_k + row[None, :] * stride_km + o_x[:, None]
            b_k = tl.load(p, m_c[None, :] & m_d[:, None], 0.0)
            b_s += tl.dot(b_q, b_k)
        if METRIC == COSINE:
            inverse_k = tl.load(p_key_inverse + b * M + row, m_c, 0.0)
            b_s = b_s * inverse_k[None, :] * inverse_q[:, None]
        if p_mask is not None:
            m_c = m_c & (tl.load(p_m + row, m_c, 0) != 0)
        m = m_n[:, None] & m_c[None, :]
        b_order = tl.where(m, orderable(b_s), NO_ORDER)
        if p_self is not None:
            is_self = m & (row[None, :] == self_row[:, None])
            b_s_self += tl.sum(tl.where(is_self, b_s, 0.0), 1)
            b_order = tl.where(is_self, ORDER_OF_SELF, b_order)
        b_list, b_lowest = insert(b_list, b_lowest, b_order, row.to(tl.int32))

    b_list = tl.where((o_l < k) & (b_list >= NOTHING + LIST), b_list, NOTHING)
    b_list = largest(b_list, LOG_LIST, LOG_LIST, 0)
    o_r = b * N + o_n
    p_s = p_similarities + o_r * k
    p_i = p_indices + o_r * k
    store_list(b_list, b_s_self, p_s, p_i, m_n, k, 0, p_self is not None, BY_INDEX, LOG_LIST)


@cache_plans
def plan_select_small(search: Search) -> Plan:
    Q, norms = search.Q, search.norms()
    config = configs.select_small(search.arch, Q.D, search.k, Q.B * Q.N)
    programs = Q.B * cdiv(Q.N, config["BLOCK_N"])
    launch = select_small_kernel.prepare(programs, config, norms.names, **search.numbers())
    return Plan((*norms.launches, launch), **norms.buffers)


def select_small(search: Search, pointers: Pointers) -> None:
    plan_select_small(search)(pointers)
