# SPDX-License-Identifier: MIT
"""The gradient of value under a dense weight, with G the gradient of the output (Eq. 6).

    P_ij[c]  = sum_o G_i[o] W[o, c, j]
    dV[m]    = sum of rho_ij P_ij over the pairs (i, j) with I_ij = m

The pairs of key m come from the inverse neighbor list (inverse_list.py): offsets[m] to
offsets[m + 1]. Nothing is added atomically, so the result does not depend on the order of programs.

P is never stored. Sums over pairs come first, H_j[m] = sum of rho_ij G_i, and then the product of
H_j with W_j on tensor cores. H_j is not rounded to 16 bits: it enters the product as the sum of two
tf32 numbers.
"""

import torch
import triton.language as tl

from . import configs
from .aggregation import Aggregation
from .dot_of_float import dot_of_float
from .integers import as_int64
from .inverse_list import list_numbers
from .launch import Kernel, Plan, cache_plans
from .tensors import cdiv


@Kernel
def value_grad_dense_kernel(
    p_grad,  # [B, N, O] contiguous
    p_rho,  # [B, N, k] float32, or None: 1
    p_weight,  # [k, C, O] contiguous
    p_pairs,  # [pairs], sorted by key and j
    p_keys,  # [pairs]: (b * M + key) * k + j of each
    p_offsets,  # [B * M + 1] of stride stride_o
    p_part,  # [pairs // CHUNK, O] float32: H_j over the chunks within one key and j
    p_value_grad,  # [B, M, C] contiguous
    M,
    C,
    O,
    k,
    pairs,
    stride_o,
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
    first = tl.load(p_offsets + (b * M + o_m) * stride_o, m_m, 0).to(tl.int64)
    b_dv = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for step in range(0, k):
        j = as_int64(step)
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
                p = p_grad + (pair // k).to(tl.int64)[:, None] * O + o_o[None, :]
                b_g = tl.load(p, m_pair[:, None] & m_o[None, :], 0.0).to(tl.float32)
                if p_rho is not None:
                    b_g = tl.load(p_rho + pair, m_pair, 0.0)[:, None] * b_g
                p = p_part + (cursor // CHUNK)[:, None] * O + o_o[None, :]
                b_part = tl.load(p, m_chunk[:, None] & m_o[None, :], 0.0)
                b_h += b_g + b_part
                cursor = tl.where(m_chunk, end, cursor + m.to(tl.int64))
                m = m & (tl.load(p_keys + cursor, m & (cursor < pairs), -1) == key)
            p = p_weight + (o_c + j * C)[None, :] * O + o_o[:, None]
            b_w = tl.load(p, m_o[:, None] & m_c[None, :], 0.0)
            b_dv = dot_of_float(b_h, b_w, b_dv, PRECISION)
        first = cursor
    p = p_value_grad + (b * M + o_m)[:, None] * C + o_c[None, :]
    tl.store(p, b_dv.to(p_value_grad.dtype.element_ty), m_m[:, None] & m_c[None, :])


@Kernel
def value_grad_chunks_kernel(
    p_grad,  # [B, N, O] contiguous
    p_rho,  # [B, N, k] float32, or None: 1
    p_pairs,  # [pairs], sorted by key and j
    p_keys,  # [pairs]: (b * M + key) * k + j of each
    p_part,  # [pairs // CHUNK, O] float32
    keys,  # B * M * k
    O,
    k,
    pairs,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """H_j over ROWS chunks and BLOCK_O outputs, PAIRS pairs at a time; 0 of chunks that do not lie
    within one key and j."""
    pid = tl.program_id(0).to(tl.int64)
    output_blocks = tl.cdiv(O, BLOCK_O)
    o_r = (pid // output_blocks) * ROWS + tl.arange(0, ROWS)
    o_o = (pid % output_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < O
    m_r = o_r < pairs // CHUNK
    first = o_r * CHUNK
    key = tl.load(p_keys + first, m_r, 0)
    m_one = m_r & (key == tl.load(p_keys + first + CHUNK - 1, m_r, 0)) & (key < keys)
    b_h = tl.zeros([ROWS, BLOCK_O], tl.float32)
    for start in range(0, CHUNK, PAIRS):
        o_p = first[:, None] + start + tl.arange(0, PAIRS)[None, :]
        b_pair = tl.load(p_pairs + o_p, m_one[:, None], 0)
        m = m_one[:, None, None] & m_o[None, None, :]
        p = p_grad + (b_pair // k).to(tl.int64)[:, :, None] * O + o_o[None, None, :]
        b_g = tl.load(p, m, 0.0).to(tl.float32)
        if p_rho is not None:
            b_g = tl.load(p_rho + b_pair, m_one[:, None], 0.0)[:, :, None] * b_g
        b_h += tl.sum(b_g, 1)
    tl.store(p_part + o_r[:, None] * O + o_o[None, :], b_h, m_r[:, None] & m_o[None, :])


@cache_plans
def plan_value_grad(call: Aggregation) -> Plan:
    """dV, from pointers that have the inverse neighbor list."""
    B, M, C, O, k = call.V.B, call.V.N, call.V.D, call.O, call.k
    chunk = configs.value_grad_chunks(call.arch, O)
    chunks = call.rows * k // chunk["CHUNK"]
    numbers = call.numbers() | list_numbers(B, call.N, M, k)
    numbers |= {"keys": B * M * k, "CHUNK": chunk["CHUNK"]}
    launches = []
    if chunks:
        programs = cdiv(chunks, chunk["ROWS"]) * cdiv(O, chunk["BLOCK_O"])
        launches.append(value_grad_chunks_kernel.prepare(programs, chunk, **numbers))
    config = configs.value_grad_dense(call.arch, call.bits, C, O)
    programs = B * cdiv(M, config["BLOCK_M"]) * cdiv(C, config["BLOCK_C"])
    launches.append(value_grad_dense_kernel.prepare(programs, config, **numbers))
    return Plan(launches, p_part=(chunks * O, torch.float32))
