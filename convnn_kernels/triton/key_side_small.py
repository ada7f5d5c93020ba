# SPDX-License-Identifier: MIT
"""dV key by key as in key_side.py, for few tokens and 16 bits, over lists of pairs sorted by blocks
of keys (list_pairs.py); and what dq and dk need of each row (search_grad_small.py).

A program of dV has `keys_each` keys and up to three blocks of channels. It goes through its keys
TILE at a time, and through their pairs PAIRS at a time: the sum is a product of a matrix of ones
[TILE, PAIRS], where a pair has the key, with the rows rho_ij W_j * G_i [PAIRS, channels], which are
rounded to 16 bits. In float16 the largest of them is brought near a power of two. Of few tokens,
these channels of G stay in L1, from which rows are gathered. Where a sum is not finite, the tile is
summed again pair by pair in float32.

The remaining programs have 1 / norm of ROWS rows of query or of key; or, of a batch element, the
sum of ds_ij s_ij of each key; or they add up parts of the gradients of weight and bias, as in
pairs.py.
"""

import triton
import triton.language as tl

from .float16 import near_power
from .integers import aligned
from .inverse_norms import inverse_norm_at
from .launch import Kernel
from .pairs import add_parts


@triton.jit
def _add_rows(
    b_sum,  # [TILE, BLOCK]
    p_x,  # [PAIRS, BLOCK]: rows of G
    p_weight_row,  # [PAIRS, BLOCK], or None
    b_rho,  # [PAIRS, 1]
    b_one,  # [PAIRS, TILE]
    m_c,  # [1, BLOCK]
):
    """Adds rho_ij W_j * G_i to the keys of some pairs."""
    dtype: tl.constexpr = b_one.dtype
    b_x = tl.load(p_x, m_c, 0.0)
    if p_weight_row is not None:
        b_x = b_x * tl.load(p_weight_row)
    if dtype == tl.float16:
        b_x, unit = near_power(b_x.to(tl.float32) * b_rho, dtype, 14)
        b_sum += tl.dot(tl.trans(b_one), b_x) * unit
    else:
        b_sum = tl.dot(tl.trans(b_one), b_x * b_rho.to(dtype), b_sum)
    return b_sum


@triton.jit
def _store_sum(p_out, b_sum, m):
    """Returns 0, or NaN where a sum is not finite."""
    tl.store(p_out, b_sum.to(p_out.dtype.element_ty), m)
    return tl.sum(b_sum * 0.0)


@triton.jit
def _sum_pairs(
    p_x,  # rows of G of this batch element
    p_weight_rows,  # [k, WIDTH], or None
    p_pairs,  # of this batch element; so the one below
    p_rho,
    p_ones,
    p_out,  # [TILE, BLOCK]
    first,
    last,
    m_m,  # [TILE, 1]: which keys there are
    c0,
    C,
    WHOLE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """dV of TILE keys and CHUNKS * BLOCK channels, over the pairs from `first` to `last`; returns
    0, or NaN where a sum is not finite."""
    o_c = c0 + tl.arange(0, BLOCK)
    m_0 = ((o_c < C) | WHOLE)[None, :]
    m_1 = ((o_c + BLOCK < C) | WHOLE)[None, :]
    m_2 = ((o_c + 2 * BLOCK < C) | WHOLE)[None, :]
    b_0 = tl.zeros([TILE, BLOCK], tl.float32)
    b_1, b_2 = b_0, b_0
    for start in range(first, last, PAIRS):
        o_p = start + tl.arange(0, PAIRS)
        # From `last` on, a pair without a key.
        b_pair = tl.load(p_pairs + o_p, o_p < last, TILE).to(tl.uint32, bitcast=True)
        o_f = b_pair >> 8
        # A product of 32 bits by 32 is one instruction.
        i = (b_pair >> 12).to(tl.uint64) * tl.full([], C, tl.uint32)
        p_row = p_x + i[:, None] + o_c[None, :]
        p_w, p_w1, p_w2 = None, None, None
        if p_weight_rows is not None:
            p_w = p_weight_rows + (o_f & 15)[:, None] * WIDTH + o_c[None, :]
            p_w1, p_w2 = p_w + BLOCK, p_w + 2 * BLOCK
        b_rho = tl.load(p_rho + o_f)[:, None]
        # A row of ones has a 1 in the place of the key, or none where there is no key.
        b_one = tl.load(p_ones + (b_pair & 255)[:, None] * TILE + tl.arange(0, TILE)[None, :])
        b_0 = _add_rows(b_0, p_row, p_w, b_rho, b_one, m_0)
        if CHUNKS > 1:
            b_1 = _add_rows(b_1, p_row + BLOCK, p_w1, b_rho, b_one, m_1)
        if CHUNKS > 2:
            b_2 = _add_rows(b_2, p_row + 2 * BLOCK, p_w2, b_rho, b_one, m_2)
    test = _store_sum(p_out, b_0, m_m & m_0)
    if CHUNKS > 1:
        test += _store_sum(p_out + BLOCK, b_1, m_m & m_1)
    if CHUNKS > 2:
        test += _store_sum(p_out + 2 * BLOCK, b_2, m_m & m_2)
    return test


@triton.jit
def _sum_one_by_one(
    p_x,  # as above
    p_weight_rows,
    p_pairs,
    p_rho,
    p_out,
    first,
    last,
    m_m,
    c0,
    C,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same for BLOCK channels in float32, without adding a product with 0 to any other key."""
    o_c = c0 + tl.arange(0, BLOCK)
    m_c = o_c < C
    b_sum = tl.zeros([TILE, BLOCK], tl.float32)
    for position in range(first, last):
        pair = tl.load(p_pairs + position)
        i, j, o_f = pair >> 12, (pair >> 8) & 15, pair >> 8
        b_row = tl.load(p_x + i.to(tl.int64) * C + o_c, m_c, 0.0).to(tl.float32)
        if p_weight_rows is not None:
            b_row = b_row * tl.load(p_weight_rows + j * WIDTH + o_c, m_c, 0.0)
        b_row = b_row * tl.load(p_rho + o_f)
        b_sum += tl.where((tl.arange(0, TILE) == pair & 255)[:, None], b_row[None, :], 0.0)
    tl.store(p_out, b_sum.to(p_out.dtype.element_ty), m_m & m_c[None, :])


@triton.jit
def _sum_keys(
    p_x,  # rows of G of this batch element
    p_weight_rows,
    p_pairs,  # of this batch element; so the pointers below
    p_ends,
    p_rho,
    p_ones,
    p_out,  # [M, C] contiguous
    begin,  # the first key
    end,
    c0,  # the first channel
    M,
    C,
    key_blocks,
    WHOLE: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """dV of the keys from `begin` to `end` and CHUNKS * BLOCK channels."""
    for first_key in range(begin, end, TILE):
        first = tl.load(p_ends + first_key // KEYS - 1, first_key > 0, 0)
        last = tl.load(p_ends + tl.minimum((first_key + TILE) // KEYS, key_blocks) - 1)
        row = first_key + tl.arange(0, TILE).to(tl.int64)
        m_m = (row < M)[:, None]
        p_tile = p_out + row[:, None] * C + (c0 + tl.arange(0, BLOCK))[None, :]
        test = _sum_pairs(
            p_x,
            p_weight_rows,
            p_pairs,
            p_rho,
            p_ones,
            p_tile,
            first,
            last,
            m_m,
            c0,
            C,
            WHOLE,
            WIDTH,
            TILE,
            PAIRS,
            BLOCK,
            CHUNKS,
        )
        if test != 0.0:
            # What has been stored must not come after what is stored now.
            tl.debug_barrier()
            for chunk in range(0, CHUNKS):
                _sum_one_by_one(
                    p_x,
                    p_weight_rows,
                    p_pairs,
                    p_rho,
                    p_tile + chunk * BLOCK,
                    first,
                    last,
                    m_m,
                    c0 + chunk * BLOCK,
                    C,
                    WIDTH,
                    TILE,
                    BLOCK,
                )


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


@triton.jit
def _sum_along(
    p_similarities,  # [N, k] of this batch element; so the pointers below
    p_pairs,
    p_ends,
    p_ds,  # [N, SLOTS]
    p_along,  # [M]
    M,
    k,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,
    MORE: tl.constexpr,
):
    """The sums of ds_ij s_ij over the pairs of each key."""
    first = 0
    for first_key in range(0, M, KEYS):
        last = tl.load(p_ends + first_key // KEYS)
        row = first_key + tl.arange(0, KEYS)
        b_sum = tl.zeros([KEYS, MORE], tl.float32)
        for start in range(first, last, MORE):
            o_p = start + tl.arange(0, MORE)
            m_p = o_p < last
            b_pair = tl.load(p_pairs + o_p, m_p, 0)
            b_ds = tl.load(p_ds + (b_pair >> 8), m_p, 0.0)
            b_ds *= tl.load(
                p_similarities + (b_pair >> 12).to(tl.int64) * k + ((b_pair >> 8) & 15), m_p, 0.0
            )
            b_sum += tl.where((row % TILE)[:, None] == (b_pair & 255)[None, :], b_ds[None, :], 0.0)
        tl.store(p_along + row, tl.sum(b_sum, 1), row < M)
        first = last


@Kernel
def key_side_small_kernel(
    p_grad,  # [B, N, C] contiguous, or None
    p_weight_rows,  # [k, WIDTH], or None
    p_query,  # [B, N, D], or None
    p_key,  # [B, M, D], or None
    p_similarities,  # [B, N, k] float32, contiguous
    p_pairs,  # [B, N * k] int32, as list_pairs.py has them; so the one below; or None
    p_ends,  # [B, key_blocks] int32
    p_ones,  # [TILE + 1, TILE]: ones on the diagonal
    p_rho,  # [B, N, SLOTS] float32, or None
    p_ds,  # [B, N, SLOTS] float32, or None
    p_inverse_q,  # [B, N] float32; None where there is no cosine to differentiate
    p_inverse_k,  # [B, M] float32, or None
    p_along_k,  # [B, M] float32, or None
    p_value_grad,  # [B, M, C] contiguous, or None
    p_weight_part,  # [parts, k, C] float32, or None
    p_bias_part,  # [parts, C] float32, or None
    p_weight_grad,  # [C, 1, k] contiguous, or None
    p_bias_grad,  # [C], or None
    N,
    M,
    C,
    D,
    k,
    B2,
    parts,
    groups,
    keys_each,
    value_blocks,  # of CHUNKS * BLOCK channels
    key_blocks,
    first_norm,  # programs of dV: B * groups * value_blocks
    first_norm_k,  # those and the ones before
    first_along,
    first_weight,
    first_bias,
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_kb1,
    stride_kb2,
    stride_km,
    ALIGN: tl.constexpr,
    RESCALE: tl.constexpr,
    SLOTS: tl.constexpr,
    WHOLE_C: tl.constexpr,  # whether blocks of channels are full
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,  # at most 3
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dV of `keys_each` keys and CHUNKS * BLOCK channels; or else one of the things named above."""
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    if pid < first_norm:
        if p_value_grad is not None:
            # Programs of one batch element and block of channels are neighbors.
            begin = (pid % groups).to(tl.int32) * keys_each
            end = tl.minimum(begin + keys_each, M)
            pid = pid // groups
            block = (pid % value_blocks).to(tl.int32)
            b = pid // value_blocks
            _sum_keys(
                p_grad + b * N * C,
                p_weight_rows,
                p_pairs + b * N * k,
                p_ends + b * key_blocks,
                p_rho + b * N * SLOTS,
                p_ones,
                p_value_grad + b * M * C,
                begin,
                end,
                block * (CHUNKS * BLOCK),
                M,
                C,
                key_blocks,
                WHOLE_C,
                WIDTH,
                KEYS,
                TILE,
                PAIRS,
                BLOCK,
                CHUNKS,
            )
    elif pid < first_norm_k:
        if p_inverse_q is not None:
            tiles = tl.cdiv(N, ROWS)
            b = (pid - first_norm) // tiles
            _store_inverse_norms(
                p_query + (b // B2) * stride_qb1 + (b % B2) * stride_qb2,
                p_inverse_q + b * N,
                (pid - first_norm) % tiles * ROWS,
                N,
                D,
                stride_qn,
                RESCALE,
                ROWS,
                BLOCK_D,
            )
    elif pid < first_along:
        if p_inverse_k is not None:
            tiles = tl.cdiv(M, ROWS)
            b = (pid - first_norm_k) // tiles
            _store_inverse_norms(
                p_key + (b // B2) * stride_kb1 + (b % B2) * stride_kb2,
                p_inverse_k + b * M,
                (pid - first_norm_k) % tiles * ROWS,
                M,
                D,
                stride_km,
                RESCALE,
                ROWS,
                BLOCK_D,
            )
    elif pid < first_weight:
        if p_along_k is not None:
            b = pid - first_along
            _sum_along(
                p_similarities + b * N * k,
                p_pairs + b * N * k,
                p_ends + b * key_blocks,
                p_ds + b * N * SLOTS,
                p_along_k + b * M,
                M,
                k,
                KEYS,
                TILE,
                32,
            )
    elif pid < first_bias:
        if p_weight_part is not None:
            program = pid - first_weight
            add_parts(p_weight_part, p_weight_grad, program, parts, k, C, PARTS, COLUMNS)
    elif p_bias_part is not None:
        program = pid - first_bias
        add_parts(p_bias_part, p_bias_grad, program, parts, 1, C, PARTS, COLUMNS)
