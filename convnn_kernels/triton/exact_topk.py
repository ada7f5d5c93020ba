# SPDX-License-Identifier: MIT
"""Select by exact similarities: those of the members of some groups, or of all columns.

A similarity is one fixed sum over D in float32, and the list of a query, its k largest keys so far
(order.py), stays in registers. One program has ROWS queries. Where k exceeds the longest list, the
kernel runs again for the next neighbors, with the last key that it returned as a bound.
"""

import torch
import triton.language as tl
from torch import Tensor

from . import configs
from .integers import aligned
from .launch import Kernel, Launch, Plan, Pointers, cache_plans
from .metrics import COSINE, EUCLIDEAN
from .order import NOTHING, ORDER_OF_SELF, merge, orderable, pack, store_list
from .search import Search
from .tensors import cdiv


@Kernel
def exact_topk_kernel(
    p_query,  # [B, N, D]
    p_key,  # [B, M, D]
    p_query_norm,  # [B, N] float32, or None: no cosine
    p_key_norm,  # [B, M] float32, or None: no cosine
    p_columns,  # [R] int64, or None
    p_mask,  # [B, M] bool, or None
    p_self,  # [N] int64, or None
    p_groups,  # [blocks of the launch * BLOCK_N, 2**LOG_LIST] int32, or None
    p_bound,  # [B, N] int64, or None
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    first_block,
    N,
    M,
    D,
    columns,
    k,
    first_rank,
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
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_LIST: tl.constexpr,
    LOG_TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Neighbors number `first_rank` to `first_rank + 2**LOG_LIST - 1`, at most k, of ROWS queries.

    The columns are the members of k groups, or all. One more step of the loop has the token itself,
    whose key is above all others.
    """
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    HAS_SELF: tl.constexpr = p_self is not None
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
    if p_mask is not None:
        p_m = p_mask + (b // B2) * stride_mb1 + (b % B2) * stride_mb2
    o_d = tl.arange(0, BLOCK_D)

    norm_q = tl.full([ROWS], 1.0, tl.float32)
    if METRIC == COSINE:
        norm_q = tl.load(p_query_norm + b * N + o_n, m_n, 1.0)
    self_row = tl.full([ROWS], -1, tl.int64)
    if p_self is not None:
        self_row = tl.load(p_self + o_n, m_n, -1)
        self_row = tl.where(self_row < M, self_row, -1)
    b_s_self = tl.zeros([ROWS], tl.float32)
    if p_bound is not None:
        bound = tl.load(p_bound + b * N + o_n, m_n, NOTHING)

    members = columns
    if p_groups is not None:
        members = k * GROUP
    tiles = tl.cdiv(members, TILE)
    b_list = tl.full([ROWS, LIST], NOTHING, tl.int64)
    for tile in range(0, tiles + HAS_SELF):
        o_t = tl.arange(0, TILE)
        o_p = tl.full([TILE], TILE, tl.int64) * tile + o_t
        if p_groups is not None:
            o_slot = o_p // GROUP
            p_slot = p_groups + o_r[:, None] * LIST + o_slot[None, :]
            b_group = tl.load(p_slot, m_n[:, None] & (o_slot < k)[None, :], -1).to(tl.int64)
            o_c = b_group * GROUP + (o_p % GROUP)[None, :]
            m_c = (b_group >= 0) & (o_c < columns)
        else:
            o_c = o_p[None, :] + tl.zeros([ROWS, 1], tl.int64)
            m_c = o_c < columns
        row = o_c
        if p_columns is not None:
            row = tl.load(p_columns + o_c, m_c, -1)
            m_c = m_c & (row >= 0) & (row < M)
        if p_self is not None:
            is_self = tile == tiles
            m_self = (self_row >= 0)[:, None] & (o_t == 0)[None, :]
            m_c = tl.where(is_self, m_self, m_c & (row != self_row[:, None]))
            row = tl.where(is_self, self_row[:, None], row)
        m_c = m_c & m_n[:, None]
        if p_mask is not None:
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
        if p_self is not None:
            b_s_self += tl.where(is_self, tl.sum(tl.where(m_c & is_self, b_s, 0.0), 1), 0.0)
            b_order = tl.where(is_self, ORDER_OF_SELF, b_order)
        b_key = tl.where(m_c, pack(b_order, row), NOTHING)
        if p_bound is not None:
            b_key = tl.where((b_key < bound[:, None]) | (first_rank == 0), b_key, NOTHING)
        b_list = merge(b_list, b_key, LOG_TILE, LOG_LIST)

    if p_bound is not None:
        tl.store(p_bound + b * N + o_n, tl.min(b_list, 1), m_n)
    # After several passes the host orders the neighbors, and must recognize missing ones.
    missing_index: tl.constexpr = -1 if p_bound is not None else 0
    p_s = p_similarities + (b * N + o_n) * k + first_rank
    p_i = p_indices + (b * N + o_n) * k + first_rank
    store_list(
        b_list, b_s_self, p_s, p_i, m_n, k - first_rank, missing_index, HAS_SELF, BY_INDEX, LOG_LIST
    )


def prepare_exact_topk(
    search: Search,
    blocks: int,
    block_n: int,
    group: int = 1,
    first_block: int = 0,
    first_rank: int = 0,
) -> Launch:
    """For blocks of `block_n` rows, from `first_block` on, and neighbors from `first_rank` on.

    There are groups of `group` columns, or it is 1 and every column is a member.
    """
    names = search.norms().names
    if group == 1:
        names = names | {"p_groups": None}
    if search.k <= configs.LONGEST_LIST:
        names = names | {"p_bound": None}
    config = configs.exact_topk(search.arch, search.Q.D, search.k)
    numbers = search.numbers()
    if search.k > configs.LONGEST_LIST:
        # The passes are put in order afterwards.
        numbers["BY_INDEX"] = False
    return exact_topk_kernel.prepare(
        blocks * block_n // config["ROWS"],
        config,
        names,
        **numbers,
        first_block=first_block,
        first_rank=first_rank,
        row_blocks=cdiv(search.Q.N, block_n),
        GROUP=group,
        BLOCK_N=block_n,
    )


@cache_plans
def plan_all_columns(search: Search) -> Plan:
    """A launch for each LONGEST_LIST neighbors."""
    norms = search.norms()
    rows = configs.exact_topk(search.arch, search.Q.D, search.k)["ROWS"]
    blocks = search.Q.B * cdiv(search.Q.N, rows)
    ranks = range(0, search.k, configs.LONGEST_LIST)
    launches = [prepare_exact_topk(search, blocks, rows, first_rank=rank) for rank in ranks]
    buffers = norms.buffers
    if len(launches) > 1:
        buffers = buffers | {"p_bound": (search.Q.B * search.Q.N, torch.int64)}
    return Plan((*norms.launches, *launches), **buffers)


def select_all_columns(search: Search, pointers: Pointers) -> None:
    """Select where there are few columns: every similarity is computed by `exact_topk_kernel`."""
    plan_all_columns(search)(pointers)


def select_in_passes(search: Search, pointers: Pointers, s: Tensor, I: Tensor) -> None:
    """Select where k exceeds the longest list: LONGEST_LIST neighbors in each pass."""
    plan_all_columns(search)(pointers)
    # Until here, missing neighbors have index -1.
    if search.by_index:
        M = search.K.N
        ordered, at = torch.where(I < 0, M, I).sort(dim=-1, stable=True)
        s.copy_(s.gather(-1, at))
        I.copy_(torch.where(ordered == M, 0, ordered))
    else:
        I.clamp_(min=0)
