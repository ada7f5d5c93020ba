# SPDX-License-Identifier: MIT
"""The pairs (i, j) of queries and neighbors, sorted by blocks of KEYS keys, for the key side.

A counting sort, stable: the pairs of a block of keys keep the order of the tiles, and within one
that of (j, i). The query side (query_side.py) has counted the pairs of each block in each tile of
queries. A program here has one such tile. It adds up the counts to find where its pairs of each
block go, and puts them there, PAIRS at a time. A batch element has the part of the list from
b * pairs on, without missing neighbors.

The remaining programs add up the parts of the gradients of weight and bias, always in one order.
"""

import triton
import triton.language as tl

from .launch import Kernel


@triton.jit
def _find_begins(
    p_counts,  # [tiles, key_blocks] of a batch element
    p_next,  # [key_blocks] of this tile
    tile,
    tiles,
    key_blocks,
    TILES: tl.constexpr,
    BINS: tl.constexpr,
):
    """Where the first pair of each block of keys in this tile goes."""
    dtype: tl.constexpr = p_next.dtype.element_ty
    base = tl.full([], 0, dtype)
    for start in range(0, key_blocks, BINS):
        o_b = start + tl.arange(0, BINS)
        m_b = o_b < key_blocks
        b_all = tl.zeros([BINS], dtype)
        b_before = tl.zeros([BINS], dtype)
        for t in range(0, tiles, TILES):
            o_t = t + tl.arange(0, TILES).to(tl.int64)
            m = (o_t < tiles)[:, None] & m_b[None, :]
            b_count = tl.load(p_counts + o_t[:, None] * key_blocks + o_b[None, :], m, 0)
            b_all += tl.sum(b_count, 0)
            b_before += tl.sum(tl.where((o_t < tile)[:, None], b_count, 0), 0)
        tl.store(p_next + o_b, base + tl.cumsum(b_all, 0) - b_all + b_before, m_b)
        base += tl.sum(b_all, 0)
    tl.debug_barrier()


@triton.jit
def add_parts(
    p_part,  # [parts, J, C] float32
    p_sum,  # [C, J]
    program,
    parts,
    J,
    C,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum over parts, transposed, of COLUMNS columns."""
    o_c = program * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < J * C
    b_sum = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in range(0, parts, PARTS):
        o_p = start + tl.arange(0, PARTS).to(tl.int64)
        m = (o_p < parts)[:, None] & m_c[None, :]
        b_sum += tl.load(p_part + o_p[:, None] * J * C + o_c[None, :], m, 0.0)
    b_sum = tl.sum(b_sum, 0).to(p_sum.dtype.element_ty)
    tl.store(p_sum + (o_c % C) * J + o_c // C, b_sum, m_c)


@Kernel
def sort_pairs_kernel(
    p_rows,  # [B * tiles, k, rows_each] int32, as query_side.py has them; so those below
    p_rho,  # [B * tiles, k, rows_each] float32, or None
    p_grad_s,  # [B * tiles, k, rows_each] float32, or None
    p_inverse,  # [B, N] float32, or None
    p_similarities,  # [B, N, k] float32
    p_counts,  # [B, tiles, key_blocks], or None
    p_next,  # [B, tiles, key_blocks]: where the next pair of each goes; in the end, where it ends
    p_pairs,  # [B, pairs] int64: i in the high 32 bits, j * KEYS + key % KEYS in the low ones
    p_pair_rho,  # [B, pairs] float32: rho_ij; or None
    p_pair_ds,  # [B, pairs] float32: ds_ij, cosine: ds_ij / ||q_i||; or None
    p_pair_along,  # [B, pairs] float32: ds_ij s_ij; None without ds or cosine
    p_weight_part,  # [B * tiles, k, C] float32, or None
    p_bias_part,  # [B * tiles, C] float32, or None
    p_weight_grad,  # [C, 1, k] contiguous, or None
    p_bias_grad,  # [C], or None
    N,
    C,
    k,
    pairs,  # room for those of a batch element
    first_n,  # the first query of the tiles
    tiles,
    rows_each,
    key_blocks,
    parts,
    sort_programs,  # B * tiles, or 0 where there is no sort
    weight_programs,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
    TILES: tl.constexpr,
    BINS: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The pairs of one tile of queries; or else COLUMNS columns of dW or of db."""
    pid = tl.program_id(0).to(tl.int64)
    if pid >= sort_programs:
        program = pid - sort_programs
        if program < weight_programs:
            if p_weight_part is not None:
                add_parts(p_weight_part, p_weight_grad, program, parts, k, C, PARTS, COLUMNS)
        elif p_bias_part is not None:
            program -= weight_programs
            add_parts(p_bias_part, p_bias_grad, program, parts, 1, C, PARTS, COLUMNS)
    elif p_counts is not None:
        b = pid // tiles
        tile = pid % tiles
        p_begin = p_next + pid * key_blocks
        _find_begins(
            p_counts + b * tiles * key_blocks, p_begin, tile, tiles, key_blocks, TILES, BINS
        )
        first = first_n + tile * rows_each
        o_l = tl.arange(0, PAIRS)
        for step in range(0, k * rows_each, PAIRS):
            j = step // rows_each
            i = first + step % rows_each + o_l
            o_t = pid * k * rows_each + step + o_l
            b_row = tl.load(p_rows + o_t)
            m = b_row >= 0
            b_block = tl.where(m, b_row // KEYS, -1)
            m_before = (b_block[:, None] == b_block[None, :]) & (o_l[:, None] < o_l[None, :])
            place = tl.load(p_begin + b_block, m, 0, volatile=True)
            place += tl.sum(m_before.to(tl.int32), 0)
            # The largest place of a block of keys, whatever the order.
            tl.debug_barrier()
            tl.atomic_max(p_begin + b_block, place + 1, m, sem="relaxed")
            place = b * pairs + place
            tl.store(p_pairs + place, (i << 32) | (j * KEYS + b_row % KEYS), m)
            if p_pair_rho is not None:
                tl.store(p_pair_rho + place, tl.load(p_rho + o_t), m)
            if p_pair_ds is not None:
                b_ds = tl.load(p_grad_s + o_t)
                if p_pair_along is not None:
                    b_s = tl.load(p_similarities + (b * N + i) * k + j, m, 0.0)
                    tl.store(p_pair_along + place, b_ds * b_s, m)
                    b_ds = b_ds * tl.load(p_inverse + b * N + i, m, 0.0)
                tl.store(p_pair_ds + place, b_ds, m)
            tl.debug_barrier()
