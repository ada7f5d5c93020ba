# SPDX-License-Identifier: MIT
"""Gradients key by key as in key_side.py, for few tokens and 16 bits, over lists of pairs sorted by
blocks of keys (list_pairs.py).

A program has `keys_each` keys and a block of channels, of V or of key. It goes through its keys
KEYS at a time, and through their pairs PAIRS at a time, with the products of key_side.py. Of few
tokens, the block of channels of G, or of query, stays in L1, from which rows are gathered.

The remaining programs add up the parts of the gradients of weight and bias, as in pairs.py.
"""

import triton
import triton.language as tl

from .float16 import near_power
from .integers import aligned, as_int64
from .launch import Kernel
from .pairs import add_parts


@triton.jit
def _here(b_x):
    """b_x. The compiler moves loaded blocks through shared memory to where tensor cores need them,
    and multiplies there; but not where something else than a load is involved, so that only the
    product is moved."""
    return tl.where((tl.arange(0, b_x.shape[1]) >= 0)[None, :], b_x, 0.0)


@triton.jit
def _rows_of_pairs(
    p_x,
    p_weight_rows,
    p_pairs,
    o_p,  # [PAIRS]
    last,
    o_c,  # [BLOCK]
    C,
    stride_n,
    WHOLE: tl.constexpr,
):
    """Pairs as they are listed, and their rows; from `last` on, a pair without a key."""
    b_pair = tl.load(p_pairs + o_p, o_p < last, 256 << 12)
    i = ((b_pair >> 4) & 255).to(tl.uint32)
    m_c = ((o_c < C) | WHOLE)[None, :]
    b_x = tl.load(p_x + i[:, None] * stride_n + o_c[None, :], m_c, 0.0)
    if p_weight_rows is not None:
        j = (b_pair & 15).to(tl.uint32)
        b_x = b_x * tl.load(p_weight_rows + j[:, None] * as_int64(C) + o_c[None, :], m_c, 0.0)
        b_x = _here(b_x)
    return b_pair, b_x


@triton.jit
def _sum_pairs(
    p_x,  # rows of G, or of query, of this batch element
    p_weight_rows,  # [k, C]; None where rows are not those of G, or there is no weight
    p_pairs,  # of this batch element; so the two below
    p_factor,  # rho, or ds
    p_along,  # or None
    p_ones,
    first,
    last,
    first_key,  # of KEYS keys
    o_c,  # [BLOCK]
    C,  # of the rows
    stride_n,
    WHOLE: tl.constexpr,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Sums over the pairs from `first` to `last`, of KEYS keys: of rows, and of p_along."""
    o_p = tl.arange(0, PAIRS)
    b_sum = tl.zeros([KEYS, o_c.shape[0]], tl.float32)
    b_along = tl.zeros([PAIRS, KEYS], tl.float32)
    for start in range(first, last, PAIRS):
        b_pair, b_x = _rows_of_pairs(
            p_x, p_weight_rows, p_pairs, start + o_p, last, o_c, C, stride_n, WHOLE
        )
        o_f = b_pair & 4095
        # A row of ones has a 1 in the place of the key, or none where there is no key.
        b_key = tl.minimum((b_pair >> 12) - first_key, KEYS)
        m_p = b_key < KEYS
        b_one = tl.load(p_ones + b_key[:, None] * KEYS + tl.arange(0, KEYS)[None, :])
        b_factor = tl.load(p_factor + o_f, m_p, 0.0)
        b_factor, unit = near_power(b_factor, b_x.dtype, 14)
        b_product = tl.dot(tl.trans(_here(b_one * b_factor[:, None])), b_x)
        b_sum += b_product * unit
        if p_along is not None:
            b_along += b_one.to(tl.float32) * tl.load(p_along + o_f, m_p, 0.0)[:, None]
    return b_sum, tl.sum(b_along, 0)


@triton.jit
def _sum_one_by_one(
    p_x,  # as above
    p_weight_rows,
    p_pairs,
    p_factor,
    p_along,
    first,
    last,
    first_key,
    o_c,
    C,
    stride_n,
    KEYS: tl.constexpr,
):
    """The same in float32, without adding a product with 0 to any other key."""
    o_m = first_key + tl.arange(0, KEYS)
    m_c = o_c < C
    b_sum = tl.zeros([KEYS, o_c.shape[0]], tl.float32)
    b_along = tl.zeros([KEYS], tl.float32)
    for position in range(first, last):
        pair = tl.load(p_pairs + position)
        i, j, o_f = (pair >> 4) & 255, pair & 15, pair & 4095
        m = o_m == pair >> 12
        b_row = tl.load(p_x + i.to(tl.int64) * stride_n + o_c, m_c, 0.0).to(tl.float32)
        if p_weight_rows is not None:
            b_row = b_row * tl.load(p_weight_rows + j.to(tl.int64) * C + o_c, m_c, 0.0)
        b_row = b_row * tl.load(p_factor + o_f)
        b_sum += tl.where(m[:, None], b_row[None, :], 0.0)
        if p_along is not None:
            b_along += tl.where(m, tl.load(p_along + o_f), 0.0)
    return b_sum, b_along


@triton.jit
def _sum_keys(
    p_x,  # rows of G, or of query, of this batch element
    p_weight_rows,
    p_pairs,  # of this batch element; so the pointers below
    p_ends,
    p_factor,
    p_along,
    p_ones,
    p_k,  # the rows of key where they are projected out (cosine); or None
    p_inverse,  # [M]
    p_out,  # [M, C] contiguous
    begin,  # the first key
    end,
    o_c,  # [BLOCK]
    M,
    C,
    stride_n,
    stride_km,
    WHOLE: tl.constexpr,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """dV, or dk, of the keys from `begin` to `end`."""
    for first_key in range(begin, end, KEYS):
        first = tl.load(p_ends + first_key // KEYS - 1, first_key > 0, 0)
        last = tl.load(p_ends + first_key // KEYS)
        b_sum, b_along = _sum_pairs(
            p_x,
            p_weight_rows,
            p_pairs,
            p_factor,
            p_along,
            p_ones,
            first,
            last,
            first_key,
            o_c,
            C,
            stride_n,
            WHOLE,
            KEYS,
            PAIRS,
        )
        # 0, or NaN where a sum is not finite.
        test = tl.sum(tl.sum(b_sum * 0.0, 1) + b_along * 0.0, 0)
        if test != 0.0:
            b_sum, b_along = _sum_one_by_one(
                p_x,
                p_weight_rows,
                p_pairs,
                p_factor,
                p_along,
                first,
                last,
                first_key,
                o_c,
                C,
                stride_n,
                KEYS,
            )
        row = first_key + tl.arange(0, KEYS).to(tl.int64)
        m = (row < M)[:, None] & (o_c < C)[None, :]
        if p_k is not None:
            inverse = tl.load(p_inverse + row, row < M, 0.0)[:, None]
            b_k = tl.load(p_k + row[:, None] * stride_km + o_c[None, :], m, 0.0).to(tl.float32)
            b_sum = inverse * (b_sum - b_along[:, None] * (inverse * b_k))
            b_sum = tl.where(inverse == 0.0, 0.0, b_sum)
        b_sum = b_sum.to(p_out.dtype.element_ty)
        tl.store(p_out + row[:, None] * C + o_c[None, :], b_sum, m)


@Kernel
def key_side_small_kernel(
    p_grad,  # [B, N, C] contiguous, or None
    p_weight_rows,  # [k, C], or None
    p_query,  # [B, N, D], or None
    p_key,  # [B, M, D], or None
    p_pairs,  # [B, N * k] int32, as list_pairs.py has them; so the two below; or None
    p_ends,  # [B, key_blocks] int32
    p_ones,  # [KEYS + 1, KEYS]: ones on the diagonal
    p_inverse_k,  # [B, M] float32, or None
    p_rho,  # [B, rows, SLOTS] float32, or None
    p_factor,  # [B, rows, SLOTS] float32: ds_ij, cosine: ds_ij / ||q_i||; or None
    p_along,  # [B, rows, SLOTS] float32: ds_ij s_ij; None without ds or cosine
    p_value_grad,  # [B, M, C] contiguous, or None
    p_key_grad,  # [B, M, D] contiguous, or None
    p_weight_part,  # [B * tiles, k, C] float32, or None
    p_bias_part,  # [B * tiles, C] float32, or None
    p_weight_grad,  # [C, 1, k] contiguous, or None
    p_bias_grad,  # [C], or None
    N,
    M,
    C,
    D,
    k,
    B2,
    rows,
    parts,  # B * tiles
    groups,
    keys_each,
    value_blocks,  # of channels of V; 0 without dV
    blocks,  # those and the ones of key
    sum_programs,  # B * groups * blocks
    weight_programs,
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_kb1,
    stride_kb2,
    stride_km,
    ALIGN: tl.constexpr,
    SLOTS: tl.constexpr,
    WHOLE: tl.constexpr,  # whether blocks of channels are full
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dV, or dk, of `keys_each` keys and BLOCK channels; or else COLUMNS columns of dW or of db."""
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    if pid >= sum_programs:
        program = pid - sum_programs
        if program < weight_programs:
            if p_weight_part is not None:
                add_parts(p_weight_part, p_weight_grad, program, parts, k, C, PARTS, COLUMNS)
        elif p_bias_part is not None:
            program -= weight_programs
            add_parts(p_bias_part, p_bias_grad, program, parts, 1, C, PARTS, COLUMNS)
    elif p_pairs is not None:
        # Programs of one batch element and block of channels are neighbors.
        begin = (pid % groups).to(tl.int32) * keys_each
        end = tl.minimum(begin + keys_each, M)
        pid = pid // groups
        block = (pid % blocks).to(tl.int32)
        b = pid // blocks
        p_list, p_end = p_pairs + b * N * k, p_ends + b * tl.cdiv(M, KEYS)
        if block < value_blocks:
            if p_value_grad is not None:
                _sum_keys(
                    p_grad + b * N * C,
                    p_weight_rows,
                    p_list,
                    p_end,
                    p_rho + b * rows * SLOTS,
                    None,
                    p_ones,
                    None,
                    None,
                    p_value_grad + b * M * C,
                    begin,
                    end,
                    block * BLOCK + tl.arange(0, BLOCK),
                    M,
                    C,
                    as_int64(C),
                    0,
                    WHOLE,
                    KEYS,
                    PAIRS,
                )
        elif p_key_grad is not None:
            p_k, p_inverse, p_a = None, None, None
            if p_along is not None:
                p_k = p_key + (b // B2) * stride_kb1 + (b % B2) * stride_kb2
                p_inverse = p_inverse_k + b * M
                p_a = p_along + b * rows * SLOTS
            _sum_keys(
                p_query + (b // B2) * stride_qb1 + (b % B2) * stride_qb2,
                None,
                p_list,
                p_end,
                p_factor + b * rows * SLOTS,
                p_a,
                p_ones,
                p_k,
                p_inverse,
                p_key_grad + b * M * D,
                begin,
                end,
                (block - value_blocks) * BLOCK + tl.arange(0, BLOCK),
                M,
                D,
                stride_qn,
                stride_km,
                WHOLE,
                KEYS,
                PAIRS,
            )
