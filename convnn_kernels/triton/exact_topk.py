# SPDX-License-Identifier: MIT
"""Select from all columns: few columns, k beyond the sweep's, and rows whose queues were too short.

A program has ROWS queries of one batch element and takes tiles of S [ROWS, TILE] from tensor cores;
what they would not sum accurately enough, float32 and short sums, is summed in float32 by FMA, and
`euclidean` is a sum of squared differences. The list of a query, its k largest keys so far
(order.py), stays in registers. A tile is looked at only if one of its columns belongs in a list.
The best of each row is then taken out, over and over, until none belongs; a long list is merged
with the sorted tile. Columns that tie with the last neighbor cost no more than others.

Where queries have ranges (`key_range`), the tiles are those from the least begin to the greatest
end of the program's queries; of candidates, whose rows have no order, all tiles.

Where rows are listed, programs of a batch element share its list: how long it is, only the device
knows. Where k exceeds the longest list, the kernel runs again for the next neighbors, with the
last key that it returned as a bound.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .integers import aligned, as_int64
from .launch import Kernel, Launch, Plan, Pointers, cache_plans
from .metrics import COSINE, EUCLIDEAN, sums_of_pairs
from .order import (
    FIXED,
    NO_ORDER,
    NOTHING,
    ORDER_OF_SELF,
    from_orderable,
    insert,
    largest,
    merge,
    order_of,
    orderable,
    pack,
    store_list,
)
from .ranges import in_ranges, load_ranges
from .search import Search
from .tensors import cdiv


@triton.jit
def _inverse(norm):
    """1 / norm, 0 of 0."""
    return tl.where(norm == 0.0, 0.0, tl.div_rn(1.0, tl.where(norm == 0.0, 1.0, norm)))


@triton.jit
def _product(
    p_row,  # [TILE]: rows of key
    b_q,  # [BLOCK_D, ROWS]
    b_s,  # [TILE, ROWS] float32
    m_c,  # [TILE]
    D,
    d,
    IN_FLOAT32: tl.constexpr,
    WHOLE_TILE: tl.constexpr,
    WHOLE_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds the products of channels d to d + BLOCK_D - 1 to b_s."""
    o_d = d + tl.arange(0, BLOCK_D)[None, :]
    if WHOLE_TILE and WHOLE_D:
        b_k = tl.load(p_row[:, None] + o_d)
    elif WHOLE_TILE:
        b_k = tl.load(p_row[:, None] + o_d, o_d < D, 0.0)
    else:
        b_k = tl.load(p_row[:, None] + o_d, m_c[:, None] & (o_d < D), 0.0)
    if IN_FLOAT32:
        b_k, b_q = b_k.to(tl.float32), b_q.to(tl.float32)
    return tl.dot(b_k, b_q, b_s, input_precision="ieee")


@Kernel
def exact_topk_kernel(
    p_query,  # [B, N, D]
    p_key,  # [B, M, D]
    p_query_norm,  # [B, N] float32, or None: no cosine
    p_key_norm,  # [B, M] float32, or None: no cosine
    p_columns,  # [R] or [B, R] int64, or None
    p_mask,  # [B, M] bool, or None
    p_self,  # [N] or [B, N] int64, or None
    p_range,  # [N, 2] or [B, N, 2] int64, or None
    p_listed,  # [lists, B] int32: how many rows are listed; or None: all rows
    p_rows,  # [B, N] int32: these rows, or None
    p_bound,  # [B, N] int64, or None
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    N,
    M,
    D,
    columns,
    k,
    first_rank,
    B,
    B2,
    list_number,
    slots,  # programs of a batch element
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_kb1,
    stride_kb2,
    stride_km,
    stride_mb1,
    stride_mb2,
    stride_columns,
    stride_self,
    stride_range,
    ALIGN: tl.constexpr,
    METRIC: tl.constexpr,
    BY_INDEX: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    ONE_BY_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_LIST: tl.constexpr,
    LOG_TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr,
    WHOLE_TILE: tl.constexpr,
):
    """Neighbors number `first_rank` to `first_rank + 2**LOG_LIST - 1`, at most k."""
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    HAS_SELF: tl.constexpr = p_self is not None
    INCLUDES_SELF: tl.constexpr = HAS_SELF and not EXCLUDE_SELF
    TILE: tl.constexpr = 1 << LOG_TILE
    LIST: tl.constexpr = 1 << LOG_LIST
    pid = tl.program_id(0)
    b = pid // slots
    b1, b2 = b // B2, b % B2
    b = b.to(tl.int64)
    p_k = p_key + b1 * stride_kb1 + b2 * stride_kb2
    p_m = p_mask
    if p_mask is not None:
        p_m = p_mask + b1 * as_int64(stride_mb1) + b2 * as_int64(stride_mb2)
    p_c = p_columns
    if p_columns is not None:
        p_c = p_columns + b * as_int64(stride_columns)
    o_l = tl.arange(0, LIST)[None, :]
    o_t = tl.arange(0, TILE)
    o_d = tl.arange(0, BLOCK_D)
    count = N
    if p_listed is not None:
        count = tl.load(p_listed + as_int64(list_number) * B + b)

    for block in range(pid % slots, tl.cdiv(count, ROWS), slots):
        o_n = block * ROWS + tl.arange(0, ROWS)
        m_n = o_n < count
        if p_listed is not None:
            o_n = tl.load(p_rows + b * N + o_n, m_n, 0)
        else:
            # Loads of queries have no mask.
            o_n = tl.where(m_n, o_n, 0)
        p_q = p_query + b1 * stride_qb1 + b2 * stride_qb2 + o_n * stride_qn
        if METRIC == COSINE:
            inverse_q = _inverse(tl.load(p_query_norm + b * N + o_n, m_n, 0.0))
        if p_bound is not None:
            bound = tl.load(p_bound + b * N + o_n, m_n, NOTHING)
        first, last = 0, columns
        if p_range is not None:
            p_r = p_range + (b * as_int64(stride_range) + o_n) * 2
            row_begin, row_end = load_ranges(p_r, m_n, M)
            if p_columns is None:
                first, last = tl.min(row_begin, 0), tl.max(row_end, 0)

        b_list = tl.full([ROWS, LIST], NOTHING, tl.int64)
        if ONE_BY_ONE:
            # Empty entries differ, so that each can be found as the lowest one.
            b_list = tl.where(o_l < k, b_list + o_l, FIXED)
        b_s_self = tl.zeros([ROWS], tl.float32)
        if HAS_SELF:
            self_row = tl.load(p_self + b * as_int64(stride_self) + o_n, m_n, -1)
            has_self = (self_row >= 0) & (self_row < M) & m_n
            # Rows are compared in 32 bits below, where a larger index must not look like one.
            self_row = tl.where(has_self, self_row, -1)
        if INCLUDES_SELF:
            if p_range is not None:
                has_self = has_self & (self_row >= row_begin) & (self_row < row_end)
            if p_mask is not None:
                has_self = has_self & (tl.load(p_m + self_row, has_self, 0) != 0)
            p = (p_k + self_row * stride_km)[:, None]
            b_own = sums_of_pairs(p_q[:, None], p, has_self[:, None], D, METRIC, BLOCK_D)
            if METRIC == COSINE:
                norm_k = tl.load(p_key_norm + b * M + self_row, has_self, 0.0)
                b_own = b_own * (_inverse(norm_k) * inverse_q)[:, None]
            b_s_self = tl.sum(b_own, 1)
            key_of_self = pack(tl.full([ROWS], ORDER_OF_SELF, tl.int32), self_row)
            m_self = (o_l == 0) & (has_self & (first_rank == 0))[:, None]
            b_list = tl.where(m_self, key_of_self[:, None], b_list)
        b_lowest = tl.min(b_list, 1)
        if ONE_BLOCK_D:
            b_q = tl.load(p_q[None, :] + o_d[:, None], (o_d < D)[:, None], 0.0)

        for start in range(first, last, TILE):
            begin = start
            if WHOLE_TILE:
                # The last tile may have columns of the one before.
                begin = tl.minimum(start, columns - TILE)
            o_c = begin + o_t
            m_c = (o_c >= start) & (o_c < columns)
            b_row = o_c
            p_row = p_k + as_int64(begin) * stride_km + o_t * stride_km
            if p_columns is not None:
                row = tl.load(p_c + o_c, m_c, -1)
                m_c = m_c & (row >= 0) & (row < M)
                b_row = tl.where(m_c, row, 0).to(tl.int32)
                p_row = p_k + b_row.to(tl.int64) * stride_km
            if p_mask is not None:
                m_c = m_c & (tl.load(p_m + b_row, m_c, 0) != 0)
            m_x = m_c[None, :]
            if p_range is not None:
                m_x = m_x & in_ranges(b_row, row_begin, row_end)
            if METRIC == EUCLIDEAN:
                b_s = sums_of_pairs(p_q[:, None], p_row[None, :], m_c[None, :], D, METRIC, BLOCK_D)
            else:
                # Tensor cores take 8 queries as columns, of rows they would take 16.
                b_s = tl.zeros([TILE, ROWS], tl.float32)
                if ONE_BLOCK_D:
                    b_s = _product(
                        p_row, b_q, b_s, m_c, D, 0, IN_FLOAT32, WHOLE_TILE, WHOLE_D, BLOCK_D
                    )
                else:
                    for d in range(0, D, BLOCK_D):
                        m_d = d + o_d < D
                        b_q = tl.load(p_q[None, :] + (d + o_d)[:, None], m_d[:, None], 0.0)
                        b_s = _product(
                            p_row, b_q, b_s, m_c, D, d, IN_FLOAT32, WHOLE_TILE, WHOLE_D, BLOCK_D
                        )
                b_s = tl.trans(b_s)

            if METRIC == COSINE:
                inverse_k = _inverse(tl.load(p_key_norm + b * M + b_row, m_c, 0.0))
                b_s = b_s * inverse_k[None, :] * inverse_q[:, None]
            # Without candidates, columns ascend: of those that tie with the lowest, none enters.
            lowest = from_orderable(order_of(b_lowest))[:, None]
            if p_columns is None:
                b_enters = tl.where(b_s <= lowest, 0, 1)
            else:
                b_enters = tl.where(b_s < lowest, 0, 1)
            if p_columns is not None or p_mask is not None or p_range is not None:
                b_enters = tl.where(m_x, b_enters, 0)
            if tl.max(tl.max(b_enters, 1) * m_n, 0) > 0:
                m = m_n[:, None] & m_x
                if HAS_SELF:
                    m = m & (b_row[None, :] != self_row.to(tl.int32)[:, None])
                b_order = orderable(b_s)
                if ONE_BY_ONE:
                    b_order = tl.where(m, b_order, NO_ORDER)
                    b_list, b_lowest = insert(b_list, b_lowest, b_order, b_row)
                else:
                    b_key = tl.where(m, pack(b_order, b_row.to(tl.int64)[None, :]), NOTHING)
                    if p_bound is not None:
                        is_next = (b_key < bound[:, None]) | (first_rank == 0)
                        b_key = tl.where(is_next, b_key, NOTHING)
                    b_list = merge(b_list, b_key, LOG_TILE, LOG_LIST)
                    b_lowest = tl.min(b_list, 1)

        if ONE_BY_ONE:
            b_list = tl.where((o_l < k) & (b_list >= NOTHING + LIST), b_list, NOTHING)
            b_list = largest(b_list, LOG_LIST, LOG_LIST, 0)
        if p_bound is not None:
            tl.store(p_bound + b * N + o_n, b_lowest, m_n)
        # After several passes the host orders the neighbors, and must recognize missing ones.
        missing_index: tl.constexpr = -1 if p_bound is not None else 0
        p_s = p_similarities + (b * N + o_n) * k + first_rank
        p_i = p_indices + (b * N + o_n) * k + first_rank
        left = k - first_rank
        store_list(
            b_list, b_s_self, p_s, p_i, m_n, left, missing_index, INCLUDES_SELF, BY_INDEX, LOG_LIST
        )


def prepare_exact_topk(
    search: Search,
    names: dict[str, str | None],
    list_number: int | None = None,
    first_rank: int = 0,
) -> Launch:
    """For all rows, or those that a sweep has listed; and neighbors from `first_rank` on."""
    Q, k = search.Q, search.k
    config = configs.exact_topk(search.arch, search.bits, Q.D, k, search.metric)
    slots = cdiv(Q.N, config["ROWS"])
    if list_number is None:
        names = names | {"p_listed": None, "p_rows": None}
    else:
        slots = min(slots, configs.slots_of_listed_rows(search.arch, Q.B))
    numbers = search.numbers()
    if k <= configs.LONGEST_LIST:
        names = names | {"p_bound": None}
    else:
        # The passes are put in order afterwards.
        numbers["BY_INDEX"] = False
    return exact_topk_kernel.prepare(
        Q.B * slots,
        config,
        names,
        **numbers,
        B=Q.B,
        list_number=list_number or 0,
        first_rank=first_rank,
        slots=slots,
        ONE_BLOCK_D=0 < Q.D <= config["BLOCK_D"],
        WHOLE_D=Q.D % config["BLOCK_D"] == 0,
        WHOLE_TILE=search.columns >= 1 << config["LOG_TILE"],
        IN_FLOAT32=search.bits == 32
        or configs.needs_bounds(search.bits, Q.D, search.metric, search.tf32),
    )


@cache_plans
def plan_all_columns(search: Search) -> Plan:
    """A launch for each LONGEST_LIST neighbors."""
    norms = search.norms()
    ranks = range(0, search.k, configs.LONGEST_LIST)
    launches = [prepare_exact_topk(search, norms.names, first_rank=rank) for rank in ranks]
    buffers = norms.buffers
    if len(launches) > 1:
        buffers = buffers | {"p_bound": (search.Q.B * search.Q.N, torch.int64)}
    return Plan((*norms.launches, *launches), **buffers)


def select_all_columns(search: Search, pointers: Pointers) -> None:
    """Select where there are few columns."""
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
