# SPDX-License-Identifier: MIT
"""Gradients of the convolution over neighbors, with G the gradient of the output.

    P_ij[c]  = sum_o G_i[o] W[o, c, j]; depthwise G_i[c] W[c, 0, j]; no weight G_i[c]
    drho_ij  = sum_c P_ij[c] V[I_ij, c]
    dV[m]    = sum of rho_ij P_ij over the pairs (i, j) with I_ij = m
    dW[:, :, j] = sum_i G_i (rho_ij V[I_ij])^T

Nothing is added atomically, so results do not depend on the order of programs. dV follows the
inverse neighbor list (inverse_list.py), in which key m has the pairs offsets[m] to offsets[m + 1].
dW is summed in parts of a fixed number of queries, which the host adds.

P is never stored. For the dense dV, sums over pairs come first, H_j[m] = sum of rho_ij G_i, and
then the product of H_j with W_j, on tensor cores. A factor that has been multiplied by rho is
not rounded to 16 bits: it goes in as the sum of two tf32 numbers.
"""

import triton
import triton.language as tl

from .inverse_list import run_of_chunk, run_of_key
from .modulate import load_neighbors
from .offsets import SIZES, aligned, wide


@triton.jit
def _dot_of_float(b_a, b_b, b_sum, PRECISION: tl.constexpr):
    """b_sum + b_a b_b for float32 b_a and b_b of any dtype.

    A b_b of 16 bits is exact in tf32, and b_a nearly so as a sum of two such numbers: what is
    left is 2^-22 of it. Their range is that of float32, which float16 would not have.
    """
    if b_b.dtype == tl.float32:
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
    else:
        b_high = (b_a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        b_low = tl.where(tl.abs(b_a) < float("inf"), b_a - b_high, 0.0)
        b_b = b_b.to(tl.float32)
        b_sum = tl.dot(b_low, b_b, b_sum, input_precision="tf32")
        b_sum = tl.dot(b_high, b_b, b_sum, input_precision="tf32")
    return b_sum


@triton.jit(do_not_specialize=SIZES)
def rho_grad_dense_kernel(
    p_grad,  # [B, N, O] contiguous
    p_value,  # [B, M, C]
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_weight,  # [k, C, O] contiguous
    p_rho_grad,  # [B, N, k] float32
    N,
    M,
    C,
    O,
    k,
    B2,
    stride_vb1,
    stride_vb2,
    stride_vm,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """drho of BLOCK_N queries and one j; P stays in registers, BLOCK_C channels at a time."""
    stride_vb1 = aligned(stride_vb1, ALIGN)
    stride_vb2 = aligned(stride_vb2, ALIGN)
    stride_vm = aligned(stride_vm, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    row_blocks = tl.cdiv(N, BLOCK_N)
    j = pid % k
    block = pid // k
    b = block // row_blocks
    o_n = (block % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_r = b * N + o_n
    p_g = p_grad + o_r * O
    p_v = p_value + (b // B2) * stride_vb1 + (b % B2) * stride_vb2
    _, b_row, m = load_neighbors(p_similarities, p_indices, o_r * k + j, m_n, M)
    b_drho = tl.zeros([BLOCK_N], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_p = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for o0 in range(0, O, BLOCK_O):
            o_o = o0 + tl.arange(0, BLOCK_O)
            m_o = o_o < O
            p = p_g[:, None] + o_o[None, :]
            b_g = tl.load(p, m[:, None] & m_o[None, :], 0.0)
            p = p_weight + (j * C + o_c)[None, :] * O + o_o[:, None]
            b_w = tl.load(p, m_o[:, None] & m_c[None, :], 0.0)
            b_p = tl.dot(b_g, b_w, b_p, input_precision=PRECISION)
        p = p_v + b_row[:, None] * stride_vm + o_c[None, :]
        b_v = tl.load(p, m[:, None] & m_c[None, :], 0.0).to(tl.float32)
        b_drho += tl.sum(b_p * b_v, 1)
    tl.store(p_rho_grad + o_r * k + j, b_drho, m_n)


@triton.jit(do_not_specialize=SIZES)
def rho_grad_depthwise_kernel(
    p_grad,  # [B, N, C] contiguous
    p_value,  # [B, M, C]
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_weight,  # [C, 1, k] contiguous, or unused
    p_rho_grad,  # [B, N, k] float32
    N,
    M,
    C,
    k,
    B2,
    stride_vb1,
    stride_vb2,
    stride_vm,
    ALIGN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """drho of BLOCK_N queries and one j."""
    stride_vb1 = aligned(stride_vb1, ALIGN)
    stride_vb2 = aligned(stride_vb2, ALIGN)
    stride_vm = aligned(stride_vm, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    row_blocks = tl.cdiv(N, BLOCK_N)
    j = pid % k
    block = pid // k
    b = block // row_blocks
    o_n = (block % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_r = b * N + o_n
    p_g = p_grad + o_r * C
    p_v = p_value + (b // B2) * stride_vb1 + (b % B2) * stride_vb2
    _, b_row, m = load_neighbors(p_similarities, p_indices, o_r * k + j, m_n, M)
    b_drho = tl.zeros([BLOCK_N], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        m_c = o_c < C
        m_v = m[:, None] & m_c[None, :]
        p = p_g[:, None] + o_c[None, :]
        b_p = tl.load(p, m_v, 0.0).to(tl.float32)
        if HAS_WEIGHT:
            b_w = tl.load(p_weight + o_c * k + j, m_c, 0.0)
            b_p = b_p * b_w.to(tl.float32)[None, :]
        p = p_v + b_row[:, None] * stride_vm + o_c[None, :]
        b_drho += tl.sum(b_p * tl.load(p, m_v, 0.0).to(tl.float32), 1)
    tl.store(p_rho_grad + o_r * k + j, b_drho, m_n)


@triton.jit(do_not_specialize=SIZES)
def value_grad_dense_kernel(
    p_grad,  # [B, N, O] contiguous
    p_rho,  # [B, N, k] float32
    p_weight,  # [k, C, O] contiguous
    p_pairs,  # [pairs], sorted by key and j
    p_keys,  # [pairs]: (b * M + key) * k + j of each
    p_offsets,  # [B * M + 1]
    p_part,  # [pairs // CHUNK, O] float32: H_j over the chunks within one key and j
    p_value_grad,  # [B, M, C] contiguous
    M,
    C,
    O,
    k,
    pairs,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dV of BLOCK_M keys and BLOCK_C channels. H_j and the sum stay in registers.

    Each key has a cursor in its pairs; all keys advance through those of one j together, each by a
    pair or by a whole chunk.
    """
    pid = tl.program_id(0).to(tl.int64)
    key_blocks = tl.cdiv(M, BLOCK_M)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    block = pid // channel_blocks
    b = block // key_blocks
    o_m = (block % key_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    o_c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    first = tl.load(p_offsets + b * M + o_m, m_m, 0).to(tl.int64)
    b_dv = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for turn in range(0, k):
        j = wide(turn)
        key = (b * M + o_m) * k + j
        cursor = first
        for o0 in range(0, O, BLOCK_O):
            o_o = o0 + tl.arange(0, BLOCK_O)
            m_o = o_o < O
            b_h = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
            cursor = first
            m = m_m & (tl.load(p_keys + cursor, m_m & (cursor < pairs), -1) == key)
            while tl.max(m.to(tl.int32), 0) > 0:
                end = cursor + CHUNK
                m_chunk = m & (cursor % CHUNK == 0) & (end <= pairs)
                m_chunk = m_chunk & (tl.load(p_keys + end - 1, m_chunk, -1) == key)
                m_pair = m & (m_chunk == 0)
                pair = tl.load(p_pairs + cursor, m_pair, 0)
                b_rho = tl.load(p_rho + pair, m_pair, 0.0)
                p = p_grad + (pair // k).to(tl.int64)[:, None] * O + o_o[None, :]
                b_g = tl.load(p, m_pair[:, None] & m_o[None, :], 0.0).to(tl.float32)
                p = p_part + (cursor // CHUNK)[:, None] * O + o_o[None, :]
                b_part = tl.load(p, m_chunk[:, None] & m_o[None, :], 0.0)
                b_h += b_rho[:, None] * b_g + b_part
                cursor = tl.where(m_chunk, end, cursor + m.to(tl.int64))
                m = m & (tl.load(p_keys + cursor, m & (cursor < pairs), -1) == key)
            p = p_weight + (o_c + j * C)[None, :] * O + o_o[:, None]
            b_w = tl.load(p, m_o[:, None] & m_c[None, :], 0.0)
            b_dv = _dot_of_float(b_h, b_w, b_dv, PRECISION)
        first = cursor
    p = p_value_grad + (b * M + o_m)[:, None] * C + o_c[None, :]
    tl.store(p, b_dv.to(p_value_grad.dtype.element_ty), m_m[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=SIZES)
def value_grad_depthwise_kernel(
    p_grad,  # [B, N, C] contiguous
    p_rho,  # [B, N, k] float32
    p_weight,  # [C, 1, k] contiguous, or unused
    p_pairs,  # [pairs], sorted by key
    p_keys,  # [pairs]: the key of each
    p_offsets,  # [keys + 1]
    p_part,  # [pairs // CHUNK, C] float32: dV over the chunks within one key
    p_value_grad,  # [B, M, C] contiguous
    keys,
    C,
    k,
    pairs,
    HAS_WEIGHT: tl.constexpr,
    OF_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dV of ROWS keys, or the part of ROWS chunks, and BLOCK_C channels, PAIRS pairs at a time.

    Chunks of pairs that are sorted by (key, j), without a weight, give parts of H_j: the "keys" are
    then M * k in a batch element.
    """
    pid = tl.program_id(0).to(tl.int64)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    o_r = (pid // channel_blocks) * ROWS + tl.arange(0, ROWS)
    o_c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if OF_CHUNKS:
        m_r = o_r < pairs // CHUNK
        _, first, last = run_of_chunk(p_keys, o_r, pairs // CHUNK, keys, CHUNK)
        begin, end = last, last
    else:
        m_r = o_r < keys
        first, last, begin, end = run_of_key(p_offsets, o_r, m_r, CHUNK)
    b_dv = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(0, tl.max(last - first - (end - begin), 0), PAIRS):
        o_p = first[:, None] + start + tl.arange(0, PAIRS)[None, :]
        o_p += tl.where(o_p < begin[:, None], 0, (end - begin)[:, None])
        m_p = o_p < last[:, None]
        b_pair = tl.load(p_pairs + o_p, m_p, 0)
        m = m_p[:, :, None] & m_c[None, None, :]
        p = p_grad + (b_pair // k).to(tl.int64)[:, :, None] * C + o_c[None, None, :]
        b_p = tl.load(p, m, 0.0).to(tl.float32)
        if HAS_WEIGHT:
            b_j = b_pair % k
            p = p_weight + o_c[None, None, :] * k + b_j[:, :, None]
            b_p = b_p * tl.load(p, m, 0.0).to(tl.float32)
        b_dv += tl.sum(tl.load(p_rho + b_pair, m_p, 0.0)[:, :, None] * b_p, 1)
    p_out = o_r[:, None] * C + o_c[None, :]
    m_out = m_r[:, None] & m_c[None, :]
    if OF_CHUNKS:
        tl.store(p_part + p_out, b_dv, m_out)
    else:
        for start in range(0, tl.max(end - begin, 0) // CHUNK, PAIRS):
            o_p = (begin // CHUNK)[:, None] + start + tl.arange(0, PAIRS)[None, :]
            m_p = o_p < (end // CHUNK)[:, None]
            p = p_part + o_p[:, :, None] * C + o_c[None, None, :]
            b_dv += tl.sum(tl.load(p, m_p[:, :, None] & m_c[None, None, :], 0.0), 1)
        tl.store(p_value_grad + p_out, b_dv.to(p_value_grad.dtype.element_ty), m_out)


@triton.jit(do_not_specialize=SIZES)
def weight_grad_dense_kernel(
    p_grad,  # [B, N, O] contiguous
    p_value,  # [B, M, C]
    p_rho,  # [B, N, k] float32
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_part,  # [parts, k, C, O] float32
    rows,
    N,
    M,
    C,
    O,
    k,
    B2,
    rows_each,
    stride_vb1,
    stride_vb2,
    stride_vm,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dW of one j, BLOCK_C channels and BLOCK_O outputs, over `rows_each` of the B * N queries."""
    stride_vb1 = aligned(stride_vb1, ALIGN)
    stride_vb2 = aligned(stride_vb2, ALIGN)
    stride_vm = aligned(stride_vm, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    output_blocks = tl.cdiv(O, BLOCK_O)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    o_o = (pid % output_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    pid = pid // output_blocks
    o_c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // channel_blocks
    j = pid % k
    part = pid // k
    m_o = o_o < O
    m_c = o_c < C
    b_dw = tl.zeros([BLOCK_C, BLOCK_O], tl.float32)
    for start in range(0, rows_each, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        o_r = part * rows_each + o_n
        m_r = (o_n < rows_each) & (o_r < rows)
        # Of fewer batch elements than programs, so that divisions by B2 may have 32 bits.
        b = (o_r // N).to(tl.int32)
        b_rho = tl.load(p_rho + o_r * k + j, m_r, 0.0)
        _, b_row, m = load_neighbors(p_similarities, p_indices, o_r * k + j, m_r, M)
        p = p_value + (b // B2) * stride_vb1 + (b % B2) * stride_vb2 + b_row * stride_vm
        p = p[None, :] + o_c[:, None]
        b_v = tl.load(p, m_c[:, None] & m[None, :], 0.0)
        p = p_grad + o_r[:, None] * O + o_o[None, :]
        b_g = tl.load(p, m[:, None] & m_o[None, :], 0.0)
        b_x = b_rho[None, :] * b_v.to(tl.float32)
        b_dw = _dot_of_float(b_x, b_g, b_dw, PRECISION)
    p = p_part + ((part * k + j) * C + o_c)[:, None] * O + o_o[None, :]
    tl.store(p, b_dw, m_c[:, None] & m_o[None, :])


@triton.jit(do_not_specialize=SIZES)
def weight_grad_depthwise_kernel(
    p_grad,  # [B, N, C] contiguous
    p_value,  # [B, M, C]
    p_rho,  # [B, N, k] float32
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_part,  # [parts, k, C] float32
    rows,
    N,
    M,
    C,
    k,
    B2,
    rows_each,
    stride_vb1,
    stride_vb2,
    stride_vm,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dW of one j and BLOCK_C channels, over `rows_each` of the B * N queries."""
    stride_vb1 = aligned(stride_vb1, ALIGN)
    stride_vb2 = aligned(stride_vb2, ALIGN)
    stride_vm = aligned(stride_vm, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    o_c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // channel_blocks
    j = pid % k
    part = pid // k
    m_c = o_c < C
    b_dw = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, rows_each, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        o_r = part * rows_each + o_n
        m_r = (o_n < rows_each) & (o_r < rows)
        # Of fewer batch elements than programs, so that divisions by B2 may have 32 bits.
        b = (o_r // N).to(tl.int32)
        b_rho = tl.load(p_rho + o_r * k + j, m_r, 0.0)
        _, b_row, m_r = load_neighbors(p_similarities, p_indices, o_r * k + j, m_r, M)
        m = m_r[:, None] & m_c[None, :]
        p = p_value + (b // B2) * stride_vb1 + (b % B2) * stride_vb2 + b_row * stride_vm
        b_v = tl.load(p[:, None] + o_c[None, :], m, 0.0).to(tl.float32)
        p = p_grad + o_r[:, None] * C + o_c[None, :]
        b_g = tl.load(p, m, 0.0).to(tl.float32)
        b_dw += tl.sum(b_rho[:, None] * b_v * b_g, 0)
    tl.store(p_part + (part * k + j) * C + o_c, b_dw, m_c)
