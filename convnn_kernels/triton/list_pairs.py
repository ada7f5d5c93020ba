# SPDX-License-Identifier: MIT
"""What the key side of the backward for few tokens (key_side_small.py) reads, for programs of the
query side.

Of each batch element, the pairs (i, j) of queries and neighbors, sorted by blocks of KEYS keys: one
program has them all, and finds the place of each by counting. Of W, its rows by j. And rows of a
single one.
"""

import triton
import triton.language as tl

from .modulate import load_neighbors


@triton.jit
def list_pairs(
    p_similarities,  # of this batch element; so the pointers below
    p_indices,
    p_pairs,  # [N * k] int32: i << 12 | j << 8 | key % TILE, by blocks of keys, then i, j
    p_next,  # [QUERIES, BLOCKS] int16: where the next pair of a query and a block of keys goes
    p_ends,  # [key_blocks] int32: where the pairs of a block end
    N,
    M,
    k,
    key_blocks,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """The pairs of a batch element that have a neighbor."""
    i = tl.arange(0, QUERIES)
    o_b = tl.arange(0, BLOCKS)
    m_n = i < N
    p_tile = p_next + i[:, None] * BLOCKS + o_b[None, :]
    tl.store(p_tile, tl.zeros([QUERIES, BLOCKS], tl.int16))
    o_s = i.to(tl.int64) * k
    for j in range(0, k):
        _, b_row, m = load_neighbors(p_similarities, p_indices, o_s + j, m_n, M)
        # Every thread may read what another one has stored.
        tl.debug_barrier()
        _add_one(p_next + i * BLOCKS + b_row.to(tl.int32) // KEYS, m)
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
        _, b_row, m = load_neighbors(p_similarities, p_indices, o_s + j, m_n, M)
        b_row = b_row.to(tl.int32)
        b_place = _add_one(p_next + i * BLOCKS + b_row // KEYS, m)
        tl.store(p_pairs + b_place, (i << 12) | (j << 8) | (b_row % TILE), m)


@triton.jit
def _add_one(p, m):
    """Counts, each at a place of its own; what was there."""
    b_count = tl.load(p, m, 0, volatile=True)
    # All threads that have the same element have read it.
    tl.debug_barrier()
    tl.store(p, b_count + 1, m)
    return b_count.to(tl.int32)


@triton.jit
def store_ones(p_ones, TILE: tl.constexpr):
    o_k = tl.arange(0, TILE)
    for row in range(0, TILE + 1):
        tl.store(p_ones + row * TILE + o_k, (o_k == row).to(p_ones.dtype.element_ty))


@triton.jit
def store_weight_row(p_weight, p_weight_rows, j, C, k, WIDTH: tl.constexpr):
    for c0 in range(0, WIDTH, 128):
        o_c = c0 + tl.arange(0, 128).to(tl.int64)
        b_w = tl.load(p_weight + o_c * k + j, o_c < C, 0.0)
        tl.store(p_weight_rows + j * WIDTH + o_c, b_w, o_c < WIDTH)
