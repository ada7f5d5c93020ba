# SPDX-License-Identifier: MIT
"""The end of the forward: the k best hits of every row (Eq. 4, 5), and the convolution over them.

The sweep (sweep.py) has left the hits of a row, the columns whose products reach its threshold, in
queues, in no order. A program has ROWS queries of one batch element:

- it reads the hits of a row, LIST at a time, and computes their similarities s from the products
  and norms, or (RESCORE) from the rows of query and key, by one float32 sum over D;
- it takes the k best in the total order (order.py), the token itself first, and stores s and I. As
  similarities seldom tie, it ranks hits by similarity alone; where that is not enough, for ties or
  missing neighbors in one of the rows, a network sorts them;
- with AGGREGATE it reads them back and computes rho and, depthwise or without a weight,
  y_i[c] = b[c] + sum_j rho_ij W[c, 0, j] V[I_ij, c]; no row of V is stored.

Hits, lists and sums stay in registers. A row has rarely more than LIST hits; then the lists of
further hits are merged. Rows of which a queue was too short have been listed, and
`exact_topk_kernel` has stored their s and I: only the convolution remains.
"""

from typing import Any

import triton
import triton.language as tl

from . import configs
from .aggregation import RHOS, Aggregation
from .integers import aligned, as_int64, wide
from .launch import Kernel, Launch
from .metrics import COSINE, cosine, sums_of_pairs
from .modulate import SOFTMAX, modulate
from .order import (
    NO_ORDER,
    NOTHING,
    ORDER_OF_MINUS_INFINITY,
    ORDER_OF_SELF,
    from_orderable,
    index_of,
    largest,
    merge,
    order_of,
    orderable,
    pack,
    store_list,
)
from .search import Search
from .tensors import alignment, cdiv


@triton.jit
def _quotient(a, b):
    """a // b of int32 that are not negative: fewer instructions than with signs."""
    return (a.to(tl.uint32) // b.to(tl.uint32)).to(tl.int32)


@triton.jit
def _gather(p, b_o, m, other):
    """p[b_o] of a block [rows, n]. As one row: where neither dimension of addresses is contiguous,
    Triton 3.6 would have consecutive lanes take consecutive rows."""
    ALL: tl.constexpr = b_o.shape[0] * b_o.shape[1]
    b_x = tl.load(p + tl.reshape(b_o, [ALL]), tl.reshape(m, [ALL]), other)
    return tl.reshape(b_x, b_o.shape)


@triton.jit
def _find(p_counts, o_e, splits, ROWS: tl.constexpr, QUEUES: tl.constexpr, CAP: tl.constexpr):
    """Where entry o_e [1, n] is in the queues of the program's rows; all of [rows, n].

    With it, the hits of a row, and the most that one of its queues had: each in all columns of a
    block, as this saves exchanges between threads.
    """
    o_i = tl.arange(0, ROWS)[:, None]
    p_first = p_counts + o_i * (splits * QUEUES)
    # Entry e of a row is number e - total of the queue behind those with `total` entries.
    b_begin = tl.zeros([ROWS, o_e.shape[1]], tl.int32)
    b_total = tl.zeros([ROWS, o_e.shape[1]], tl.int32)
    b_most = tl.zeros([ROWS, o_e.shape[1]], tl.int32)
    for split in range(splits):
        for q in tl.static_range(QUEUES):
            count = tl.load(p_first + q)
            b_total += count
            b_most = tl.maximum(b_most, count)
            begin = (split * QUEUES + q + 1) * CAP - b_total
            b_begin = tl.where(o_e >= b_total, begin, b_begin)
        p_first += QUEUES
    b_place = o_i * (splits * QUEUES * CAP) + b_begin + o_e
    return b_place, b_total, b_most


@triton.jit
def _keys(
    p_queues,  # the queues of the program's rows
    p_counts,  # their counts
    p_q,  # [rows]: rows of query
    p_k,  # [M, D]: key of the batch element
    p_norm,  # [M], or None: no cosine
    p_columns,  # [R] int64, or None
    p_mask,  # [M], or None
    norm_q,  # [rows]
    self_row,  # [rows] int64, or None
    o_e,  # [1, n]: entries; one below 0 is none
    splits,
    columns,
    M,
    D,
    stride_km,
    METRIC: tl.constexpr,
    RESCORE: tl.constexpr,
    QUEUES: tl.constexpr,
    CAP: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ADVANCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Hits as keys of the total order (order.py), how many a row has, and the most that one of its
    queues had; all of [rows, n].
    """
    LEAVES: tl.constexpr = BLOCK_M // QUEUES
    b_place, b_total, b_most = _find(p_counts, o_e, splits, norm_q.shape[0], QUEUES, CAP)
    # A row that has been listed is not this kernel's.
    b_total = tl.where(b_most > CAP, 0, b_total)
    m = (o_e >= 0) & (o_e < b_total)
    b_hit = _gather(p_queues, b_place, m, 0)
    # The column: sweep.py says which of the BLOCK_M columns of a tile a queue has.
    b_x = b_hit.to(tl.int32).to(tl.uint32, bitcast=True)
    b_leaf = b_x % LEAVES
    # The last tile ends with the last column.
    b_row = tl.minimum((b_x // LEAVES).to(tl.int32) * ADVANCE, columns - BLOCK_M)
    b_row += ((b_leaf // PAIR) * (QUEUES * PAIR) + b_leaf % PAIR).to(tl.int32)
    b_row = b_row + (b_place.to(tl.uint32) // CAP % QUEUES).to(tl.int32) * PAIR
    if p_columns is not None:
        row = _gather(p_columns, b_row, m, -1)
        m = m & (row >= 0) & (row < M)
        b_row = row.to(tl.int32)
    if self_row is not None:
        m = m & (b_row != self_row.to(tl.int32)[:, None])
    if p_mask is not None:
        m = m & (_gather(p_mask, b_row, m, 0) != 0)
    if RESCORE:
        p = p_k + b_row.to(tl.int64) * stride_km
        b_s = sums_of_pairs(p_q[:, None], p, m, D, METRIC, BLOCK_D)
    else:
        b_s = (b_hit >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    if METRIC == COSINE:
        b_s = cosine(b_s, norm_q[:, None] * _gather(p_norm, b_row, m, 1.0))
    b_key = tl.where(m, pack(orderable(b_s), b_row.to(tl.int64)), NOTHING)
    return b_key, b_total, b_most


@triton.jit
def _ranks(b_order, k):
    """The place of each entry of b_order [rows, n] in its row's descending order, from k on any
    number.

    What is equal has one place: then more than k entries of a row have one below k, as long as
    there are different ones left. After these, all its entries take each place, the last of which
    is k for odd k: n > k or none have one below k.
    """
    b_rank = tl.full(b_order.shape, 2**31 - 1, tl.int32)
    for start in range(0, k, 2):
        for i in tl.static_range(2):
            m = b_order == tl.max(b_order, 1)[:, None]
            b_rank = tl.where(m, start + i, b_rank)
            b_order = tl.where(m, NO_ORDER, b_order)
    return b_rank


@triton.jit
def rho_of_rows(b_s, m, scale, RHO: tl.constexpr):
    """rho of all neighbors of rows b_s [rows, n], and 0 where m is false."""
    b_max, b_sum = 0.0, 1.0
    if RHO == SOFTMAX:
        # A maximum over NaN does not matter: the sum is NaN.
        b_logit = tl.where(m & (b_s == b_s), scale * b_s, float("-inf"))
        b_max = tl.max(b_logit, 1)[:, None]
        b_sum = tl.sum(tl.where(m, tl.exp(scale * b_s - b_max), 0.0), 1)[:, None]
    return modulate(b_s, m, b_max, b_sum, scale, RHO)


@triton.jit
def store_terms(
    p_s,  # of the program's rows: similarities [rows, k]
    p_i,  # [rows, k] int64
    p_terms,  # [rows, k] int64: rho, and the row of value or -1, 32 bits each
    left,  # how many rows there are
    k,
    scale,
    RHO: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_K: tl.constexpr,
):
    """rho of all neighbors at once. A missing one has the similarity -inf; if there is one, the
    result is 1."""
    o_i = tl.arange(0, ROWS)[:, None]
    if ROWS > 16:
        o_i = o_i.to(tl.int64)
    o_k = tl.arange(0, 1 << LOG_K)[None, :]
    o, m_k = o_i * k + o_k, (o_k < k) & (o_i < left)
    b_s = tl.load(p_s + o, m_k, float("-inf"))
    m = b_s != float("-inf")
    b_row = tl.where(m, tl.load(p_i + o, m_k, 0), 0xFFFFFFFF)
    b_rho = rho_of_rows(b_s, m, scale, RHO)
    b_term = (b_rho.to(tl.int32, bitcast=True).to(tl.int64) << 32) | b_row
    tl.store(p_terms + o, b_term, m_k)
    return tl.max(tl.max((m_k & (b_s == float("-inf"))).to(tl.int32), 1), 0)


@triton.jit
def as_float32(b_x):
    """Of bfloat16 in pairs, as they are loaded: Triton takes them apart first."""
    if b_x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [b_x], tl.float32, True, 2
        )
    else:
        return b_x.to(tl.float32)


@triton.jit
def _aggregate(
    p_v,  # a pointer, or [rows * AT_ONCE, 1]: V of the batch element of a row
    p_terms,  # of the program's rows: [rows, k] int64
    p_weight_rows,  # [k, C] contiguous: the weight; or None
    p_bias,  # [C] contiguous, or None
    p_y,  # of the program's rows: [rows, C]
    C,
    k,
    bytes_vm,  # from row to row of V, so that an address is one product and sum
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE_C: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Stores the output of rows, from AT_ONCE neighbors of each at a time.

    Blocks of the weight have the GROUP rows that one load of a warp has of V: then each thread has
    the same channels of both, once for all rows. MASKED: there may be missing neighbors, or fewer
    than AT_ONCE in the last step.
    """
    BYTES: tl.constexpr = p_y.dtype.element_ty.primitive_bitwidth // 8
    ALL: tl.constexpr = ROWS * AT_ONCE
    GROUP: tl.constexpr = min(ALL, max(AT_ONCE, 512 // BYTES // BLOCK_C))
    o_x = tl.arange(0, ALL)[:, None]
    o_i, o_j = o_x // AT_ONCE, o_x % AT_ONCE
    o_c = tl.arange(0, BLOCK_C)[None, :]
    o_g = tl.arange(0, GROUP)[None, :, None] % AT_ONCE
    o_d = tl.arange(0, BLOCK_C)[None, None, :]
    for c in range(0, C, BLOCK_C):
        m_c = o_c < C - c
        b_y = tl.zeros([ALL, BLOCK_C], tl.float32)
        for j in range(0, k, AT_ONCE):
            if MASKED:
                b_term = tl.load(p_terms + (o_i * k + o_j) + j, o_j < k - j, 0xFFFFFFFF)
            else:
                b_term = tl.load(p_terms + o_i * k + j)
            b_rho = (b_term >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            b_row = b_term.to(tl.int32)
            b_bytes = tl.multiple_of(wide(b_row) * wide(bytes_vm), [1, ALIGN * BYTES])
            p = p_v.to(tl.pointer_type(tl.int8)) + b_bytes
            p = p.to(tl.pointer_type(p_y.dtype.element_ty)) + c + o_c
            if MASKED:
                b_v = tl.load(p, (b_row >= 0) & m_c, 0.0)
            elif WHOLE_C:
                b_v = tl.load(p)
            else:
                b_v = tl.load(p, m_c, 0.0)
            b_v = b_rho * as_float32(b_v)
            if p_weight_rows is not None:
                p_w = p_weight_rows + (as_int64(j) * C + c) + (o_g * C + o_d)
                if MASKED:
                    b_w = tl.load(p_w, (o_g < k - j) & (o_d < C - c), 0.0)
                elif WHOLE_C:
                    b_w = tl.load(p_w)
                else:
                    b_w = tl.load(p_w, o_d < C - c, 0.0)
                b_w = tl.broadcast_to(as_float32(b_w), [ALL // GROUP, GROUP, BLOCK_C])
                b_v *= tl.reshape(b_w, [ALL, BLOCK_C])
            b_y += b_v
        b_y = tl.sum(tl.reshape(b_y, [ROWS, AT_ONCE, BLOCK_C]), 1)
        o_y = c + tl.arange(0, BLOCK_C)[None, :]
        if p_bias is not None:
            b_y += tl.load(p_bias + o_y, o_y < C, 0.0).to(tl.float32)
        p = p_y + tl.arange(0, ROWS)[:, None] * C + o_y
        tl.store(p, b_y.to(p_y.dtype.element_ty), o_y < C)


@Kernel
def finish_kernel(
    p_query,  # [B, N, D]
    p_key,  # [B, M, D]
    p_query_norm,  # [B, N] float32, or None: no cosine
    p_key_norm,  # [B, M] float32, or None: no cosine
    p_columns,  # [R] or [B, R] int64, or None
    p_mask,  # [B, M] bool, or None
    p_self,  # [N] or [B, N] int64, or None
    p_range,  # [N, 2] or [B, N, 2] int64; or None: not needed for the token itself
    p_queue,  # [queries of the launch, splits, QUEUES, CAP] int64: product and column of a hit
    p_count,  # [queries of the launch, splits, QUEUES] int32: hits; above CAP: the row was listed
    p_value,  # [B, M, C], or None
    p_weight_rows,  # [k, C] contiguous: the weight; or None
    p_bias,  # [C] contiguous, or None
    p_terms,  # [B, N, k] int64: what is multiplied by rows of value, or None
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_output,  # [B, N, C] contiguous, or None
    first_b,
    first_n,
    rows_n,
    N,
    M,
    D,
    C,
    k,
    columns,
    splits,
    scale,
    B2,
    N_value,  # the queries of a batch element of value, several of which may be one of query
    B2_value,
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
    stride_vb1,
    stride_vb2,
    bytes_vm,  # from row to row of value
    ALIGN: tl.constexpr,
    ALIGN_VALUE: tl.constexpr,
    METRIC: tl.constexpr,
    BY_INDEX: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    RESCORE: tl.constexpr,
    AGGREGATE: tl.constexpr,
    FOLDED: tl.constexpr,
    RHO: tl.constexpr,
    QUEUES: tl.constexpr,
    CAP: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ADVANCE: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_LIST: tl.constexpr,
    LOG_K: tl.constexpr,
    ONE_BY_ONE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE_C: tl.constexpr,
):
    """s and I of ROWS queries, and with AGGREGATE their output.

    A launch has `rows_n` queries, from number `first_n` on, of batch elements from `first_b` on.
    """
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    stride_vb1 = aligned(stride_vb1, ALIGN_VALUE)
    stride_vb2 = aligned(stride_vb2, ALIGN_VALUE)
    HAS_SELF: tl.constexpr = p_self is not None
    INCLUDES_SELF: tl.constexpr = HAS_SELF and not EXCLUDE_SELF
    LIST: tl.constexpr = 1 << LOG_LIST
    row_blocks = tl.cdiv(rows_n, ROWS)
    pid = tl.program_id(0)
    block = _quotient(pid, row_blocks)
    b = first_b + block
    b1 = _quotient(b, B2)
    b2 = (b - as_int64(b1) * B2).to(tl.int32)
    # Whole blocks: the last one may have rows of the one before, which are the same again.
    n = tl.minimum((pid - as_int64(block) * row_blocks).to(tl.int32) * ROWS, rows_n - ROWS)
    o_i = tl.arange(0, ROWS)
    # The first row is a scalar of 64 bits; to the others, there are offsets of 32.
    queue = block.to(tl.int64) * rows_n + n
    n += first_n
    first = b.to(tl.int64) * N + n
    p_q = p_query + b1 * stride_qb1 + b2 * stride_qb2 + n * stride_qn + o_i * stride_qn
    p_k = p_key + b1 * stride_kb1 + b2 * stride_kb2
    p_m = p_mask
    if p_mask is not None:
        p_m = p_mask + b1 * as_int64(stride_mb1) + b2 * as_int64(stride_mb2)
    p_queues = p_queue + queue * (splits * QUEUES * CAP)
    p_counts = p_count + queue * (splits * QUEUES)
    p_s = p_similarities + first * k
    p_i = p_indices + first * k
    p_norm = p_key_norm
    norm_q = tl.full([ROWS], 1.0, tl.float32)
    if METRIC == COSINE:
        p_norm = p_key_norm + b.to(tl.int64) * M
        norm_q = tl.load(p_query_norm + first + o_i)
    self_row = p_self
    if HAS_SELF:
        self_row = tl.load(p_self + b * as_int64(stride_self) + n + o_i)
        has_self = (self_row >= 0) & (self_row < M)
        # Of an index that is out of range, the lower half may be a row.
        self_row = tl.where(has_self, self_row, -1)
    if INCLUDES_SELF:
        # The token itself is the first entry of its row.
        if p_range is not None:
            p_r = p_range + (b * as_int64(stride_range) + n + o_i) * 2
            has_self = has_self & (self_row >= tl.load(p_r)) & (self_row < tl.load(p_r + 1))
        if p_mask is not None:
            has_self = has_self & (tl.load(p_m + self_row, has_self, 0) != 0)

    p_c = p_columns
    if p_columns is not None:
        p_c = p_columns + b * as_int64(stride_columns)
    o_l = tl.arange(0, LIST)[None, :]
    b_list, total, most = _keys(
        p_queues,
        p_counts,
        p_q,
        p_k,
        p_norm,
        p_c,
        p_m,
        norm_q,
        self_row,
        o_l - INCLUDES_SELF,
        splits,
        columns,
        M,
        D,
        stride_km,
        METRIC,
        RESCORE,
        QUEUES,
        CAP,
        PAIR,
        BLOCK_M,
        ADVANCE,
        BLOCK_D,
    )
    if INCLUDES_SELF:
        key_of_self = pack(tl.full([ROWS], ORDER_OF_SELF, tl.int32), self_row)
        # A row that has been listed has no entries.
        m_self = (o_l == 0) & has_self[:, None] & (most <= CAP)
        b_list = tl.where(m_self, key_of_self[:, None], b_list)
    end = tl.max(tl.max(total, 1), 0) + INCLUDES_SELF
    if end > LIST:
        b_list = largest(b_list, LOG_LIST, LOG_LIST, 0)
        for start in range(LIST, end, LIST):
            b_key, _, _ = _keys(
                p_queues,
                p_counts,
                p_q,
                p_k,
                p_norm,
                p_c,
                p_m,
                norm_q,
                self_row,
                o_l + (start - INCLUDES_SELF),
                splits,
                columns,
                M,
                D,
                stride_km,
                METRIC,
                RESCORE,
                QUEUES,
                CAP,
                PAIR,
                BLOCK_M,
                ADVANCE,
                BLOCK_D,
            )
            b_list = merge(b_list, b_key, LOG_LIST, LOG_LIST)

    b_s_self = tl.zeros([ROWS], tl.float32)
    if INCLUDES_SELF:
        p = (p_k + self_row * stride_km)[:, None]
        b_s = sums_of_pairs(p_q[:, None], p, has_self[:, None], D, METRIC, BLOCK_D)
        if METRIC == COSINE:
            norm = norm_q * tl.load(p_norm + self_row, has_self, 1.0)
            b_s = cosine(b_s, norm[:, None])
        b_s_self = tl.sum(b_s, 1)
    # Whether all rows have k neighbors, no two of them equally near, none infinitely far.
    complete = False
    if ONE_BY_ONE and not BY_INDEX:
        b_order = order_of(b_list)
        b_rank = _ranks(b_order, k)
        if INCLUDES_SELF:
            b_order = tl.where(b_order == ORDER_OF_SELF, orderable(b_s_self)[:, None], b_order)
        b_count = tl.where(b_order == ORDER_OF_MINUS_INFINITY, 2**16, 1)
        b_count = tl.where(b_rank < k, b_count, 0)
        # Row by row: where one has too few, another may have too many.
        complete = tl.max((tl.sum(b_count, 1) != k).to(tl.int32), 0) == 0
        if complete:
            ALL: tl.constexpr = ROWS * LIST
            o = tl.reshape(o_i[:, None] * k + b_rank, [ALL])
            m = tl.reshape(b_rank < k, [ALL])
            tl.store(p_s + o, tl.reshape(from_orderable(b_order), [ALL]), m)
            tl.store(p_i + o, tl.reshape(index_of(b_list), [ALL]), m)
    if not complete:
        b_first = largest(b_list, LOG_LIST, LOG_K, 0)
        m_found = tl.max(most, 1) <= CAP
        p_s_rows, p_i_rows = p_s + o_i * k, p_i + o_i * k
        store_list(
            b_first, b_s_self, p_s_rows, p_i_rows, m_found, k, 0, INCLUDES_SELF, BY_INDEX, LOG_K
        )

    if AGGREGATE:
        # Every thread may read what another one has stored.
        tl.debug_barrier()
        b_value = b
        if FOLDED:
            o_x = tl.arange(0, ROWS * AT_ONCE)[:, None] // AT_ONCE
            b_value = b * _quotient(N, N_value) + _quotient(n + o_x, N_value)
        v1 = _quotient(b_value, B2_value)
        v2 = (b_value - v1.to(tl.int64) * B2_value).to(tl.int32)
        p_v = p_value + v1 * stride_vb1 + v2 * stride_vb2
        p_y = p_output + first * C
        p_t = p_terms + first * k
        store_terms(p_s, p_i, p_t, ROWS, k, scale, RHO, ROWS, LOG_K)
        tl.debug_barrier()
        if complete:
            _aggregate(
                p_v,
                p_t,
                p_weight_rows,
                p_bias,
                p_y,
                C,
                k,
                bytes_vm,
                ALIGN_VALUE,
                ROWS,
                AT_ONCE,
                BLOCK_C,
                WHOLE_C,
                AT_ONCE > 1,
            )
        else:
            _aggregate(
                p_v,
                p_t,
                p_weight_rows,
                p_bias,
                p_y,
                C,
                k,
                bytes_vm,
                ALIGN_VALUE,
                ROWS,
                AT_ONCE,
                BLOCK_C,
                WHOLE_C,
                True,
            )


def numbers_of_value(aggregation: Aggregation | None, N: int) -> dict[str, Any]:
    """Numbers and constants of a kernel that may aggregate, for N queries of a batch element."""
    if aggregation is None:
        zeros = ("C", "stride_vb1", "stride_vb2", "bytes_vm", "RHO")
        ones = {"scale": 1.0, "B2_value": 1, "ALIGN_VALUE": 1}
        return dict.fromkeys(zeros, 0) | ones | {"N_value": N, "AGGREGATE": False, "FOLDED": False}
    V = aggregation.V
    return {
        "C": V.D,
        "scale": aggregation.scale,
        "N_value": aggregation.N,
        "B2_value": V.B2,
        **V.strides("v"),
        "bytes_vm": V.strides("v")["stride_vm"] * aggregation.dtype.itemsize,
        "ALIGN_VALUE": alignment(V),
        "AGGREGATE": True,
        "FOLDED": aggregation.N != N,
        "RHO": RHOS[aggregation.rho],
    }


def prepare_finish(
    search: Search,
    rescore: bool,
    numbers: dict[str, Any],
    names: dict[str, str | None],
    aggregation: Aggregation | None,
) -> Launch:
    """Takes the hits of the queries that `numbers` describes, which also has the sweep's blocks.

    With an aggregation, depthwise or without a weight, its output is computed, too. `rescore`:
    similarities are not products, and are computed from rows.
    """
    Q, C = search.Q, 0 if aggregation is None else aggregation.V.D
    config = configs.finish(
        search.arch, numbers["rows_n"], C, search.k, numbers["sample_step"], rescore
    )
    if not (search.has_self and search.has_range) or search.exclude_self:
        names = names | {"p_range": None}
    numbers = numbers | numbers_of_value(aggregation, Q.N)
    numbers |= {"RESCORE": rescore, "WHOLE_C": C % config["BLOCK_C"] == 0}
    if aggregation is None:
        names = names | dict.fromkeys(("p_value", "p_weight_rows", "p_bias", "p_terms", "p_output"))
    programs = numbers["count_b"] * cdiv(numbers["rows_n"], config["ROWS"])
    return finish_kernel.prepare(programs, config, names, **numbers)
