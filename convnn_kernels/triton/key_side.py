# SPDX-License-Identifier: MIT
"""Gradients key by key, over the pairs (i, j) with I_ij = m, sorted by blocks of keys (pairs.py).

    value       dV[m]  = sum rho_ij W_j * G_i, with G the gradient of the output and W depthwise
    dot         dk_m   = sum ds_ij q_i
    euclidean   dk_m   = sum 2 ds_ij (q_i - k_m)
    cosine      dk_m   = (sum ds_ij (u_i - s_ij u_m)) / ||k_m||, with u the unit vectors

A program has KEYS keys and a block of channels. PAIRS pairs at a time, it gathers rows X of
W_j * G_i, or of q, and multiplies them on tensor cores by the factors rho_ij, or ds_ij, which stand
in the matrix [KEYS, PAIRS] where the pair belongs to the key, beside zeros. The sums stay in
registers, in float32.

Factors and W_j * G_i are rounded to the dtype of the rows, once each; float32 is multiplied as
three products of tf32 numbers. In float16 the factors of a step are first brought near 2^14 by a
power of two, so that neither large nor small ones leave its range. A factor of 0 gives 0 unless the
row is infinite or NaN: where a sum is not finite, also because a row has left the range of float16,
the program adds the pairs one by one instead, in float32 and each to its own key.

A block of keys that many queries chose has a long list, on which one program would work for long.
So lists are divided, without regard to blocks, into chunks of CHUNK pairs. A first launch sums each
chunk that lies within one block; a second one adds to these sums the pairs before the first chunk
of a block and after its last: always the same terms in the same order.

Where queries are divided (backward.py), the launches for a part of them add to sums in float32, and
the last ones finish.
"""

import triton
import triton.language as tl

from .float16 import near_power
from .integers import aligned
from .inverse_norms import has_no_gradient, inverse_norm_at
from .launch import Kernel
from .metrics import COSINE, EUCLIDEAN


@triton.jit
def add_terms(
    b_sum,  # [KEYS, channels] float32
    b_hit,  # [KEYS, pairs]: whether the pair belongs to the key
    b_factor,  # [pairs] float32
    b_x,  # [pairs, channels], 16 bits or float32
    PRECISION: tl.constexpr,
    ONE: tl.constexpr,
):
    """b_sum + (b_factor where b_hit) b_x; of a single pair, without a product."""
    if ONE:
        b_sum += tl.where(b_hit, b_factor[None, :] * b_x.to(tl.float32), 0.0)
    elif b_x.dtype == tl.float16:
        b_factor, unit = near_power(b_factor, tl.float16, 14)
        b_a = tl.where(b_hit, b_factor[None, :], 0.0)
        b_sum += tl.dot(b_a, b_x) * unit
    else:
        b_a = tl.where(b_hit, b_factor[None, :], 0.0).to(b_x.dtype)
        b_sum = tl.dot(b_a, b_x, b_sum, input_precision=PRECISION)
    return b_sum


@triton.jit
def _sum_pairs(
    p_grad,  # [N, C] of this batch element; so the pointers below
    p_weight_rows,
    p_q,
    p_k,  # the first row of this block of keys
    p_pairs,
    p_pair_rho,
    p_pair_ds,
    p_pair_along,
    first,
    last,
    begin,
    end,
    c0,
    C,
    D,
    stride_qn,
    stride_km,
    METRIC: tl.constexpr,
    VALUE: tl.constexpr,
    KEY: tl.constexpr,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION_V: tl.constexpr,
    PRECISION_K: tl.constexpr,
):
    """Sums over the pairs from `first` to `last`, without those from `begin` to `end`: dV; dk,
    cosine: before it is projected; and, cosine, ds_ij s_ij, of which columns are to be added."""
    o_m = tl.arange(0, KEYS)
    o_c = c0 + tl.arange(0, BLOCK)
    ONE: tl.constexpr = PAIRS == 1
    b_dv = tl.zeros([KEYS, BLOCK], tl.float32)
    b_dk = tl.zeros([KEYS, BLOCK], tl.float32)
    b_along = tl.zeros([KEYS, PAIRS], tl.float32)
    for start in range(first, last - (end - begin), PAIRS):
        o_p = start + tl.arange(0, PAIRS)
        o_p += tl.where(o_p < begin, 0, end - begin)
        m_p = o_p < last
        b_pair = tl.load(p_pairs + o_p, m_p, 0)
        i = b_pair >> 32
        b_low = b_pair.to(tl.int32)
        b_key = b_low % KEYS
        b_hit = o_m[:, None] == tl.where(m_p, b_key, -1)[None, :]
        if VALUE:
            m = m_p[:, None] & (o_c < C)[None, :]
            b_x = tl.load(p_grad + i[:, None] * C + o_c[None, :], m, 0.0)
            if ONE:
                b_x = b_x.to(tl.float32)
            if p_weight_rows is not None:
                j = (b_low // KEYS).to(tl.int64)
                b_x = b_x * tl.load(p_weight_rows + j[:, None] * C + o_c[None, :], m, 0.0)
            b_rho = tl.load(p_pair_rho + o_p, m_p, 0.0)
            b_dv = add_terms(b_dv, b_hit, b_rho, b_x, PRECISION_V, ONE)
        if KEY:
            m = m_p[:, None] & (o_c < D)[None, :]
            b_x = tl.load(p_q + i[:, None] * stride_qn + o_c[None, :], m, 0.0)
            b_ds = tl.load(p_pair_ds + o_p, m_p, 0.0)
            if METRIC == EUCLIDEAN:
                b_k = tl.load(p_k + b_key[:, None] * stride_km + o_c[None, :], m, 0.0)
                b_difference = b_x.to(tl.float32) - b_k.to(tl.float32)
                b_x = b_difference if ONE else b_difference.to(b_x.dtype)
                b_ds = 2.0 * b_ds
            b_dk = add_terms(b_dk, b_hit, b_ds, b_x, PRECISION_K, ONE)
            if METRIC == COSINE:
                b_a = tl.load(p_pair_along + o_p, m_p, 0.0)
                b_along += tl.where(b_hit, b_a[None, :], 0.0)
    return b_dv, b_dk, b_along


@triton.jit
def _find_block(
    p_end,  # [key_blocks]: where the pairs of a block of keys end
    position,
    key_blocks,
    BINS: tl.constexpr,
):
    """The block of keys that has the pair at a position; key_blocks if there is no such pair."""
    block = tl.full([], 0, tl.int64)
    for start in range(0, key_blocks, BINS):
        o_b = start + tl.arange(0, BINS)
        m_b = o_b < key_blocks
        m_b = m_b & (tl.load(p_end + o_b, m_b, 0) <= position)
        block += tl.sum(m_b.to(tl.int32), 0)
    return block


@triton.jit
def _add_to_sum(p_sum, b_x, m, m_before, m_after):
    """b_x and the sum so far, if there is one; stores it if more is to come."""
    b_x += tl.load(p_sum, m & m_before, 0.0)
    tl.store(p_sum, b_x, m & m_after)
    return b_x


@Kernel
def key_side_kernel(
    p_grad,  # [B, N, C] contiguous, or None
    p_weight_rows,  # [k, C], or None
    p_query,  # [B, N, D], or None
    p_key,  # [B, M, D], or None
    p_next,  # [B, tiles, key_blocks]: of the last tile, where the pairs of a block of keys end
    p_pairs,  # [B, pairs] int64, as pairs.py has them; so the three below
    p_pair_rho,  # [B, pairs] float32
    p_pair_ds,  # [B, pairs] float32
    p_pair_along,  # [B, pairs] float32, or None
    p_value_part,  # [B * chunks, KEYS, C] float32: sums over the chunks within one block
    p_key_part,  # [B * chunks, KEYS, D] float32
    p_along_part,  # [B * chunks, KEYS] float32
    p_value_sum,  # [B, M, C] float32: sums of the parts of queries so far; None if there is one
    p_key_sum,  # [B, M, D] float32, or None
    p_along_sum,  # [B, channel_blocks, M] float32, or None
    p_value_grad,  # [B, M, C] contiguous, or None
    p_key_grad,  # [B, M, D] contiguous, or None
    N,
    M,
    C,
    D,
    pairs,  # room for those of a batch element
    query_part,  # of the parts of the queries, from 0 on
    query_parts,
    B2,
    tiles,
    key_blocks,
    chunks,  # of a batch element
    channel_blocks,
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_kb1,
    stride_kb2,
    stride_km,
    ALIGN: tl.constexpr,
    METRIC: tl.constexpr,
    RESCALE: tl.constexpr,
    OF_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION_V: tl.constexpr,
    PRECISION_K: tl.constexpr,
):
    """dV and dk of KEYS keys, or their part of one chunk, and BLOCK channels."""
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    VALUE: tl.constexpr = p_value_grad is not None
    KEY: tl.constexpr = p_key_grad is not None
    SEVERAL: tl.constexpr = p_value_sum is not None or p_key_sum is not None
    pid = tl.program_id(0).to(tl.int64)
    c0 = (pid % channel_blocks) * BLOCK
    pid = pid // channel_blocks
    programs = chunks if OF_CHUNKS else key_blocks
    b = pid // programs
    p_end = p_next + ((b + 1) * tiles - 1) * key_blocks
    if OF_CHUNKS:
        first = (pid % programs) * CHUNK
        last = first + CHUNK
        block = _find_block(p_end, first, key_blocks, 128)
        is_whole = last <= tl.load(p_end + block, block < key_blocks, 0)
        last = tl.where(is_whole, last, first)
        begin, end = last, last
    else:
        block = pid % programs
        first = tl.load(p_end + block - 1, block > 0, 0).to(tl.int64)
        last = tl.load(p_end + block).to(tl.int64)
        begin = (first + CHUNK - 1) // CHUNK * CHUNK
        end = last // CHUNK * CHUNK
        begin, end = tl.where(begin < end, begin, last), tl.where(begin < end, end, last)
    o_m = tl.arange(0, KEYS)
    row = block * KEYS + o_m
    m_m = row < M
    o_c = c0 + tl.arange(0, BLOCK)
    p_g, p_q, p_k, p_ds, p_along = p_grad, p_query, p_key, p_pair_ds, p_pair_along
    first_pair = b * pairs
    p_rho = p_pair_rho
    if VALUE:
        p_g = p_grad + b * N * C
        p_rho = p_pair_rho + first_pair
    if KEY:
        p_q = p_query + (b // B2) * stride_qb1 + (b % B2) * stride_qb2
        p_k = p_key + (b // B2) * stride_kb1 + (b % B2) * stride_kb2 + block * KEYS * stride_km
        p_ds = p_pair_ds + first_pair
        if METRIC == COSINE:
            p_along = p_pair_along + first_pair
    b_dv, b_dk, b_columns = _sum_pairs(
        p_g,
        p_weight_rows,
        p_q,
        p_k,
        p_pairs + first_pair,
        p_rho,
        p_ds,
        p_along,
        first,
        last,
        begin,
        end,
        c0,
        C,
        D,
        stride_qn,
        stride_km,
        METRIC,
        VALUE,
        KEY,
        KEYS,
        PAIRS,
        BLOCK,
        PRECISION_V,
        PRECISION_K,
    )
    # 0, or NaN where a sum is not finite.
    b_along = tl.sum(b_columns, 1)
    test = tl.sum(tl.sum(b_dv * 0.0 + b_dk * 0.0, 1) + b_along * 0.0, 0)
    if test != 0.0:
        b_dv, b_dk, b_one = _sum_pairs(
            p_g,
            p_weight_rows,
            p_q,
            p_k,
            p_pairs + first_pair,
            p_rho,
            p_ds,
            p_along,
            first,
            last,
            begin,
            end,
            c0,
            C,
            D,
            stride_qn,
            stride_km,
            METRIC,
            VALUE,
            KEY,
            KEYS,
            1,
            BLOCK,
            PRECISION_V,
            PRECISION_K,
        )
        b_along = tl.sum(b_one, 1)
    if OF_CHUNKS:
        m_m = m_m & is_whole
    m_v = m_m[:, None] & (o_c < C)[None, :]
    m_k = m_m[:, None] & (o_c < D)[None, :]
    if OF_CHUNKS:
        o_part = pid * KEYS + o_m
        if VALUE:
            tl.store(p_value_part + o_part[:, None] * C + o_c[None, :], b_dv, m_v)
        if KEY:
            tl.store(p_key_part + o_part[:, None] * D + o_c[None, :], b_dk, m_k)
            if METRIC == COSINE:
                tl.store(p_along_part + o_part, b_along, m_m & (c0 == 0))
    else:
        for chunk in range(begin // CHUNK, end // CHUNK):
            o_part = (b * chunks + chunk) * KEYS + o_m
            if VALUE:
                b_dv += tl.load(p_value_part + o_part[:, None] * C + o_c[None, :], m_v, 0.0)
            if KEY:
                b_dk += tl.load(p_key_part + o_part[:, None] * D + o_c[None, :], m_k, 0.0)
                if METRIC == COSINE:
                    b_along += tl.load(p_along_part + o_part, m_m, 0.0)
        o_out = b * M + row
        if SEVERAL:
            m_before, m_after = query_part > 0, query_part + 1 < query_parts
            if VALUE:
                p = p_value_sum + o_out[:, None] * C + o_c[None, :]
                b_dv = _add_to_sum(p, b_dv, m_v, m_before, m_after)
                m_v = m_v & (m_after == 0)
            if KEY:
                p = p_key_sum + o_out[:, None] * D + o_c[None, :]
                b_dk = _add_to_sum(p, b_dk, m_k, m_before, m_after)
                if METRIC == COSINE:
                    p = p_along_sum + (b * channel_blocks + c0 // BLOCK) * M + row
                    b_along = _add_to_sum(p, b_along, m_m, m_before, m_after)
                m_k = m_k & (m_after == 0)
        if VALUE:
            p = p_value_grad + o_out[:, None] * C + o_c[None, :]
            tl.store(p, b_dv.to(p_value_grad.dtype.element_ty), m_v)
        if KEY:
            if METRIC == COSINE:
                p = p_k + o_m * stride_km
                inverse = inverse_norm_at(p, m_m, D, RESCALE, BLOCK)
                m_zero = has_no_gradient(inverse, b_along)[:, None]
                inverse = inverse[:, None]
                b_k = tl.load(p[:, None] + o_c[None, :], m_k, 0.0).to(tl.float32)
                b_dk = inverse * (b_dk - b_along[:, None] * (inverse * b_k))
                b_dk = tl.where(m_zero, 0.0, b_dk)
            p = p_key_grad + o_out[:, None] * D + o_c[None, :]
            tl.store(p, b_dk.to(p_key_grad.dtype.element_ty), m_k)
