# SPDX-License-Identifier: MIT
"""The gradient of value, with G the gradient of the output (Eq. 6).

    P_ij[c]  = sum_o G_i[o] W[o, c, j]; depthwise G_i[c] W[c, 0, j]; no weight G_i[c]
    dV[m]    = sum of rho_ij P_ij over the pairs (i, j) with I_ij = m

The pairs of key m come from the inverse neighbor list (inverse_list.py): offsets[m] to
offsets[m + 1]. Nothing is added atomically, so the result does not depend on the order of programs.

P is never stored. In the dense case sums over pairs come first, H_j[m] = sum of rho_ij G_i, and
then the product of H_j with W_j on tensor cores. H_j is not rounded to 16 bits: it enters the
product as the sum of two tf32 numbers.
"""

import torch
import triton.language as tl

from . import configs
from .aggregation import Aggregation
from .dot_of_float import dot_of_float
from .integers import as_int64
from .inverse_list import list_numbers, run_of_chunk, run_of_key
from .launch import Kernel, Plan, cache_plans
from .tensors import cdiv


@Kernel
def value_grad_dense_kernel(
    p_grad,  # [B, N, O] contiguous
    p_rho,  # [B, N, k] float32
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
            b_dv = dot_of_float(b_h, b_w, b_dv, PRECISION)
        first = cursor
    p = p_value_grad + (b * M + o_m)[:, None] * C + o_c[None, :]
    tl.store(p, b_dv.to(p_value_grad.dtype.element_ty), m_m[:, None] & m_c[None, :])


@Kernel
def value_grad_depthwise_kernel(
    p_grad,  # [B, N, C] contiguous
    p_rho,  # [B, N, k] float32
    p_weight,  # [C, 1, k] contiguous, or None
    p_pairs,  # [pairs], sorted by key
    p_keys,  # [pairs]: the key of each
    p_offsets,  # [keys + 1] of stride stride_o
    p_part,  # [pairs // CHUNK, C] float32: dV over the chunks within one key
    p_value_grad,  # [B, M, C] contiguous
    keys,
    C,
    k,
    pairs,
    stride_o,
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
        _, first, last = run_of_chunk(p_keys, o_r, pairs // CHUNK, keys, 1, CHUNK)
        begin, end = last, last
    else:
        m_r = o_r < keys
        first, last, begin, end = run_of_key(p_offsets, o_r, m_r, stride_o, CHUNK)
    b_dv = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(0, tl.max(last - first - (end - begin), 0), PAIRS):
        o_p = first[:, None] + start + tl.arange(0, PAIRS)[None, :]
        o_p += tl.where(o_p < begin[:, None], 0, (end - begin)[:, None])
        m_p = o_p < last[:, None]
        b_pair = tl.load(p_pairs + o_p, m_p, 0)
        m = m_p[:, :, None] & m_c[None, None, :]
        p = p_grad + (b_pair // k).to(tl.int64)[:, :, None] * C + o_c[None, None, :]
        b_p = tl.load(p, m, 0.0).to(tl.float32)
        if p_weight is not None:
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


@cache_plans
def plan_value_grad(call: Aggregation) -> Plan:
    """dV, from pointers that have the inverse neighbor list.

    The list, of inverse_list.py, must be sorted by slot if the weight is dense. Dense weights do
    not enter the sums of chunks.
    """
    B, M, C, O, k = call.V.B, call.V.N, call.V.D, call.O, call.k
    config = configs.value_grad_depthwise(call.arch, O)
    chunks = call.rows * k // config["CHUNK"]
    numbers = call.numbers() | list_numbers(B, call.N, M, k) | {"C": O, "OF_CHUNKS": True}
    numbers["keys"] = B * M * k if call.is_dense else B * M
    launches = []
    if chunks:
        programs = cdiv(chunks, config["ROWS"]) * cdiv(O, config["BLOCK_C"])
        names = {"p_weight": None} if call.is_dense else {}
        launches.append(value_grad_depthwise_kernel.prepare(programs, config, names, **numbers))
    if call.is_dense:
        dense = configs.value_grad_dense(call.arch, call.bits, C, O)
        programs = B * cdiv(M, dense["BLOCK_M"]) * cdiv(C, dense["BLOCK_C"])
        numbers |= {"C": C, "CHUNK": config["CHUNK"]}
        launches.append(value_grad_dense_kernel.prepare(programs, dense, **numbers))
    else:
        numbers["OF_CHUNKS"] = False
        programs = cdiv(B * M, config["ROWS"]) * cdiv(O, config["BLOCK_C"])
        launches.append(value_grad_depthwise_kernel.prepare(programs, config, **numbers))
    return Plan(launches, p_part=(chunks * O, torch.float32))
