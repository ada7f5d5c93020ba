# SPDX-License-Identifier: MIT
"""What the backward for few tokens (backward_small.py) needs of its inputs first.

Of each batch element, the pairs (i, j) of queries and neighbors, sorted by blocks of KEYS keys: one
program has them all, and finds the place of each by counting. Of query and key, 1 / norm of each
row. Of W, its rows by j, as the key side reads them. Each has programs of its own.
"""

import triton
import triton.language as tl

from .integers import aligned
from .inverse_norms import inverse_norm_at
from .launch import Kernel
from .modulate import load_neighbors


@triton.jit
def _list(
    p_similarities,  # of this batch element; so the pointers below
    p_indices,
    p_rows,
    p_pairs,  # or None
    p_next,
    p_ends,
    N,
    M,
    k,
    rows,
    key_blocks,
    SLOTS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCKS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    i = tl.arange(0, QUERIES)
    o_b = tl.arange(0, BLOCKS)
    m_n = i < N
    if p_pairs is not None:
        p_tile = p_next + i[:, None] * BLOCKS + o_b[None, :]
        tl.store(p_tile, tl.zeros([QUERIES, BLOCKS], tl.int16))
    o_s = i.to(tl.int64) * k
    for j in range(0, k):
        _, b_row, m = load_neighbors(p_similarities, p_indices, o_s + j, m_n, M)
        b_row = b_row.to(tl.int32)
        tl.store(p_rows + i * SLOTS + j, tl.where(m, b_row, -1), i < rows)
        if p_pairs is not None:
            # Every thread may read what another one has stored.
            tl.debug_barrier()
            _add_one(p_next + i * BLOCKS + b_row // KEYS, m)
    if p_pairs is not None:
        tl.debug_barrier()
        b_count = tl.load(p_tile).to(tl.int32)
        b_total = tl.sum(b_count, 0)
        b_end = tl.cumsum(b_total, 0)
        tl.store(p_ends + o_b, b_end, o_b < key_blocks)
        tl.debug_barrier()
        b_next = tl.cumsum(b_count, 0) - b_count + (b_end - b_total)[None, :]
        tl.store(p_tile, b_next.to(tl.int16))
        for j in range(0, k):
            tl.debug_barrier()
            b_row = tl.load(p_rows + i * SLOTS + j, m_n, -1)
            m = b_row >= 0
            b_place = _add_one(p_next + i * BLOCKS + b_row // KEYS, m)
            tl.store(p_pairs + b_place, (b_row << 12) | (i << 4) | j, m)


@triton.jit
def _add_one(p, m):
    """Counts, each at a place of its own; what was there."""
    b_count = tl.load(p, m, 0, volatile=True)
    # All threads that have the same element have read it.
    tl.debug_barrier()
    tl.store(p, b_count + 1, m)
    return b_count.to(tl.int32)


@triton.jit
def _store_inverse_norms(
    p_x,  # the rows of a batch element
    p_inverse,
    first,
    N,
    D,
    stride_n,
    RESCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_r = first + tl.arange(0, ROWS)
    m_r = o_r < N
    b_inverse = inverse_norm_at(p_x + o_r * stride_n, m_r, D, RESCALE, BLOCK_D)
    tl.store(p_inverse + o_r, b_inverse, m_r)


@Kernel
def list_pairs_kernel(
    p_query,  # [B, N, D], or None
    p_key,  # [B, M, D], or None
    p_weight,  # [C, 1, k] contiguous, or None
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_rows,  # [B, rows, SLOTS] int32: the row of key of each pair, or -1
    p_pairs,  # [B, N * k] int32: key << 12 | i << 4 | j, by blocks of keys, then i, j; or None
    p_next,  # [B, QUERIES, BLOCKS] int16: where the next pair of a query and a block of keys goes
    p_ends,  # [B, key_blocks] int32: where the pairs of a block end
    p_inverse_q,  # [B, N] float32; None where there is no cosine to differentiate
    p_inverse_k,  # [B, M] float32, or None
    p_ones,  # [KEYS + 1, KEYS]: ones on the diagonal; or None
    p_weight_rows,  # [k, C], or None
    N,
    M,
    C,
    D,
    k,
    B,
    B2,
    rows,  # of queries in temporaries, at most QUERIES
    key_blocks,
    first_key,  # programs before those of key
    first_other,  # those of ones and of W
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_kb1,
    stride_kb2,
    stride_km,
    ALIGN: tl.constexpr,
    RESCALE: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLOTS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The pairs of a batch element; or else ROWS inverse norms; or else the ones, or a row of W."""
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    if pid < B:
        o = pid * N * k
        p_list, p_first, p_end = None, None, None
        if p_pairs is not None:
            p_list, p_end = p_pairs + o, p_ends + pid * key_blocks
            p_first = p_next + pid * QUERIES * BLOCKS
        _list(
            p_similarities + o,
            p_indices + o,
            p_rows + pid * rows * SLOTS,
            p_list,
            p_first,
            p_end,
            N,
            M,
            k,
            rows,
            key_blocks,
            SLOTS,
            KEYS,
            BLOCKS,
            QUERIES,
        )
    elif pid < first_key:
        if p_inverse_q is not None:
            tiles = tl.cdiv(N, ROWS)
            b = (pid - B) // tiles
            _store_inverse_norms(
                p_query + (b // B2) * stride_qb1 + (b % B2) * stride_qb2,
                p_inverse_q + b * N,
                (pid - B) % tiles * ROWS,
                N,
                D,
                stride_qn,
                RESCALE,
                ROWS,
                BLOCK_D,
            )
    elif pid < first_other:
        if p_inverse_k is not None:
            tiles = tl.cdiv(M, ROWS)
            b = (pid - first_key) // tiles
            _store_inverse_norms(
                p_key + (b // B2) * stride_kb1 + (b % B2) * stride_kb2,
                p_inverse_k + b * M,
                (pid - first_key) % tiles * ROWS,
                M,
                D,
                stride_km,
                RESCALE,
                ROWS,
                BLOCK_D,
            )
    elif pid == first_other:
        if p_ones is not None:
            o_k = tl.arange(0, KEYS)
            for row in range(0, KEYS + 1):
                tl.store(p_ones + row * KEYS + o_k, (o_k == row).to(p_ones.dtype.element_ty))
    elif p_weight_rows is not None:
        j = pid - first_other - 1
        for c0 in range(0, C, 128):
            o_c = c0 + tl.arange(0, 128).to(tl.int64)
            b_w = tl.load(p_weight + o_c * k + j, o_c < C, 0.0)
            tl.store(p_weight_rows + j * C + o_c, b_w, o_c < C)
