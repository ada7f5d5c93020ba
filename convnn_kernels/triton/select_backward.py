# SPDX-License-Identifier: MIT
"""Gradients of the similarities s_ij of the chosen pairs, with g_ij the gradient of s_ij.

    dot        dq_i = sum_j g_ij k_j                     dk_m = sum g_ij q_i
    euclidean  dq_i = sum_j -2 g_ij (q_i - k_j)          dk_m = sum 2 g_ij (q_i - k_m)
    cosine     dq_i = (sum_j g_ij (u_j - s_ij u_i)) / ||q_i||, with u the unit vectors, and dk alike

The sums of dk are over the pairs (i, j) with I_ij = m, by the inverse neighbor list
(inverse_list.py). Nothing is added atomically. A row that counts as zero gets 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, hardware
from .integers import aligned
from .inverse_list import invert, list_numbers, run_of_chunk, run_of_key
from .launch import Kernel, Plan, Pointers, cache_plans
from .metrics import COSINE, EUCLIDEAN, METRICS
from .modulate import load_neighbors
from .norms import prepare_norms
from .tensors import Layout, alignment, cdiv, empty_gradient, is_same, rows_of


@triton.jit
def _unit(b_x, b_scale, b_norm):
    """Unit vectors of the rows of b_x; b_scale and b_norm as `norms_kernel` has them."""
    return tl.where(
        b_norm == 0.0, 0.0, tl.div_rn(b_x * b_scale, tl.where(b_norm == 0.0, 1.0, b_norm))
    )


@triton.jit
def _through_norm(b_sum, b_weight, b_unit, b_scale, b_norm):
    """(b_sum - b_weight b_unit) / norm: the part of b_sum along the unit vector has no effect."""
    b_grad = tl.div_rn(b_sum - b_weight * b_unit, tl.where(b_norm == 0.0, 1.0, b_norm)) * b_scale
    return tl.where(b_norm == 0.0, 0.0, b_grad)


@Kernel
def query_grad_kernel(
    p_grad,  # [B, N, k] float32, contiguous
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_query,  # [B, N, D]
    p_key,  # [B, M, D]
    p_query_norm,  # [B, N] float32, or None: no cosine; so the three below
    p_query_scale,
    p_key_norm,  # [B, M] float32
    p_key_scale,
    p_query_grad,  # [B, N, D] contiguous
    N,
    M,
    D,
    k,
    B2,
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_kb1,
    stride_kb2,
    stride_km,
    ALIGN: tl.constexpr,
    METRIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dq of BLOCK_N queries and BLOCK_D columns."""
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    row_blocks = tl.cdiv(N, BLOCK_N)
    column_blocks = tl.cdiv(D, BLOCK_D)
    block = pid // column_blocks
    b = block // row_blocks
    o_n = (block % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_r = b * N + o_n
    o_d = (pid % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p = p_query + (b // B2) * stride_qb1 + (b % B2) * stride_qb2
    p = p + o_n[:, None] * stride_qn + o_d[None, :]
    b_q = tl.load(p, m_n[:, None] & m_d[None, :], 0.0).to(tl.float32)
    p_k = p_key + (b // B2) * stride_kb1 + (b % B2) * stride_kb2
    b_dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_along = tl.zeros([BLOCK_N], tl.float32)
    # Sums of BLOCK_K terms first: rounding errors grow with the longest sum.
    for start in range(0, k, BLOCK_K):
        b_part = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        b_part_along = tl.zeros([BLOCK_N], tl.float32)
        for j in range(start, tl.minimum(start + BLOCK_K, k)):
            b_s, b_row, m = load_neighbors(p_similarities, p_indices, o_r * k + j, m_n, M)
            b_g = tl.load(p_grad + o_r * k + j, m, 0.0)
            o_k = b_row[:, None] * stride_km + o_d[None, :]
            b_k = tl.load(p_k + o_k, m[:, None] & m_d[None, :], 0.0).to(tl.float32)
            if METRIC == EUCLIDEAN:
                b_part += tl.where(m[:, None], -2.0 * b_g[:, None] * (b_q - b_k), 0.0)
            else:
                if METRIC == COSINE:
                    norm_k = tl.load(p_key_norm + b * M + b_row, m, 1.0)
                    scale_k = tl.load(p_key_scale + b * M + b_row, m, 1.0)
                    b_k = _unit(b_k, scale_k[:, None], norm_k[:, None])
                    b_part_along += tl.where(m, b_g * b_s, 0.0)
                b_part += b_g[:, None] * b_k
        b_dq += b_part
        b_along += b_part_along
    if METRIC == COSINE:
        norm = tl.load(p_query_norm + o_r, m_n, 1.0)[:, None]
        scale = tl.load(p_query_scale + o_r, m_n, 1.0)[:, None]
        b_dq = _through_norm(b_dq, b_along[:, None], _unit(b_q, scale, norm), scale, norm)
    p = p_query_grad + o_r[:, None] * D + o_d[None, :]
    tl.store(p, b_dq.to(p_query_grad.dtype.element_ty), m_n[:, None] & m_d[None, :])


@Kernel
def key_grad_kernel(
    p_grad,  # [B, N, k] float32, contiguous
    p_similarities,  # [B, N, k] float32, contiguous
    p_query,  # [B, N, D]
    p_key,  # [B, M, D]
    p_query_norm,  # [B, N] float32, or None: no cosine; so the three below
    p_query_scale,
    p_key_norm,  # [B, M] float32
    p_key_scale,
    p_pairs,  # [pairs], sorted by key
    p_keys,  # [pairs]: the key of each, b * M + m, or (b * M + m) * slots + j
    p_offsets,  # [B * M + 1] of stride stride_o
    p_part,  # [pairs // CHUNK, D] float32: sums over the chunks within one key
    p_along,  # [pairs // CHUNK] float32: of those, sum g_ij s_ij; cosine only
    p_key_grad,  # [B, M, D] contiguous
    keys,
    N,
    M,
    D,
    k,
    pairs,
    stride_o,
    slots,
    B2,
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_kb1,
    stride_kb2,
    stride_km,
    ALIGN: tl.constexpr,
    METRIC: tl.constexpr,
    OF_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk of ROWS keys, or the part of ROWS chunks, and BLOCK_D columns, PAIRS pairs at a time."""
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    column_blocks = tl.cdiv(D, BLOCK_D)
    o_r = (pid // column_blocks) * ROWS + tl.arange(0, ROWS)
    o_d = (pid % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    if OF_CHUNKS:
        m_r = o_r < pairs // CHUNK
        key, first, last = run_of_chunk(p_keys, o_r, pairs // CHUNK, keys, slots, CHUNK)
        begin, end = last, last
    else:
        m_r = o_r < keys
        key = tl.where(m_r, o_r, 0)
        first, last, begin, end = run_of_key(p_offsets, o_r, m_r, stride_o, CHUNK)
    b = key // M
    p = p_key + (b // B2) * stride_kb1 + (b % B2) * stride_kb2 + (key % M) * stride_km
    p = p[:, None] + o_d[None, :]
    b_k = tl.load(p, m_r[:, None] & m_d[None, :], 0.0).to(tl.float32)
    p_q = p_query + (b // B2) * stride_qb1 + (b % B2) * stride_qb2
    b_dk = tl.zeros([ROWS, BLOCK_D], tl.float32)
    b_along = tl.zeros([ROWS], tl.float32)
    for start in range(0, tl.max(last - first - (end - begin), 0), PAIRS):
        o_p = first[:, None] + start + tl.arange(0, PAIRS)[None, :]
        o_p += tl.where(o_p < begin[:, None], 0, (end - begin)[:, None])
        m_p = o_p < last[:, None]
        b_pair = tl.load(p_pairs + o_p, m_p, 0)
        b_g = tl.load(p_grad + b_pair, m_p, 0.0)
        b_query = tl.where(m_p, (b_pair // k).to(tl.int64), (b * N)[:, None])
        m = m_p[:, :, None] & m_d[None, None, :]
        p_row = p_q[:, None] + (b_query - (b * N)[:, None]) * stride_qn
        b_q = tl.load(p_row[:, :, None] + o_d[None, None, :], m, 0.0).to(tl.float32)
        if METRIC == EUCLIDEAN:
            b_q = tl.where(m, 2.0 * (b_q - b_k[:, None, :]), 0.0)
        if METRIC == COSINE:
            norm = tl.load(p_query_norm + b_query, m_p, 1.0)
            scale = tl.load(p_query_scale + b_query, m_p, 1.0)
            b_q = _unit(b_q, scale[:, :, None], norm[:, :, None])
            b_along += tl.sum(b_g * tl.load(p_similarities + b_pair, m_p, 0.0), 1)
        b_dk += tl.sum(b_g[:, :, None] * b_q, 1)
    p_out = o_r[:, None] * D + o_d[None, :]
    m_out = m_r[:, None] & m_d[None, :]
    if OF_CHUNKS:
        tl.store(p_part + p_out, b_dk, m_out)
        if METRIC == COSINE:
            tl.store(p_along + o_r, b_along, m_r & (pid % column_blocks == 0))
    else:
        for start in range(0, tl.max(end - begin, 0) // CHUNK, PAIRS):
            o_p = (begin // CHUNK)[:, None] + start + tl.arange(0, PAIRS)[None, :]
            m_p = o_p < (end // CHUNK)[:, None]
            p_sums = p_part + o_p[:, :, None] * D + o_d[None, None, :]
            b_dk += tl.sum(tl.load(p_sums, m_p[:, :, None] & m_d[None, None, :], 0.0), 1)
            if METRIC == COSINE:
                b_along += tl.sum(tl.load(p_along + o_p, m_p, 0.0), 1)
        if METRIC == COSINE:
            norm = tl.load(p_key_norm + o_r, m_r, 1.0)[:, None]
            scale = tl.load(p_key_scale + o_r, m_r, 1.0)[:, None]
            b_dk = _through_norm(b_dk, b_along[:, None], _unit(b_k, scale, norm), scale, norm)
        tl.store(p_key_grad + p_out, b_dk.to(p_key_grad.dtype.element_ty), m_out)


class Gradient(NamedTuple):
    """The gradients of a `select`, but for the tensors."""

    Q: Layout  # [B, N, D]
    K: Layout  # [B, M, D]
    one_tensor: bool  # whether query is key
    k: int
    metric: str
    dtype: torch.dtype
    by_slot: bool
    need_query: bool
    need_key: bool
    arch: int


@cache_plans
def plan_select_backward(call: Gradient) -> Plan:
    """dq and dk, from pointers that have the inverse neighbor list if there is dk."""
    Q, K, D, k = call.Q, call.K, call.Q.D, call.k
    norms = prepare_norms(Q, K, call.dtype, call.metric, call.one_tensor, False, call.arch)
    numbers = {
        "N": Q.N,
        "M": K.N,
        "D": D,
        "k": k,
        "B2": Q.B2,
        **Q.strides("q"),
        **K.strides("k"),
        "ALIGN": alignment(Q, K),
        "METRIC": METRICS[call.metric],
        **list_numbers(Q.B, Q.N, K.N, k),
        "keys": K.B * K.N,
        "slots": k if call.by_slot else 1,
    }
    launches, buffers = [*norms.launches], norms.buffers
    if call.need_query:
        config = configs.query_grad(call.arch, D, k)
        programs = Q.B * cdiv(Q.N, config["BLOCK_N"]) * cdiv(D, config["BLOCK_D"])
        launches.append(query_grad_kernel.prepare(programs, config, norms.names, **numbers))
    if call.need_key:
        config = configs.key_grad(call.arch, D)
        chunks = Q.B * Q.N * k // config["CHUNK"]
        launches += [
            key_grad_kernel.prepare(
                cdiv(count, config["ROWS"]) * cdiv(D, config["BLOCK_D"]),
                config,
                norms.names,
                **numbers,
                OF_CHUNKS=of_chunks,
            )
            for of_chunks, count in ((True, chunks), (False, K.B * K.N))
            if count
        ]
        parts = {"p_part": (chunks * D, torch.float32), "p_along": (chunks, torch.float32)}
        buffers = buffers | parts
    return Plan(launches, **buffers)


def select_backward(
    grad_similarities: Tensor,
    query: Tensor,
    key: Tensor,
    similarities: Tensor,
    indices: Tensor,
    metric: str,
    need_query: bool,
    need_key: bool,
    inverse: Callable[[], Pointers] | None = None,
    by_slot: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and key; see schemas.py.

    `inverse` returns the inverse neighbor list where the caller needs it as well; `by_slot` says
    how it is sorted.
    """
    grad_query, grad_key = empty_gradient(query, need_query), empty_gradient(key, need_key)
    if grad_query.numel() == grad_key.numel() == 0:
        return grad_query, grad_key
    if indices.numel() == 0 or key.shape[-2] == 0:
        return grad_query.zero_(), grad_key.zero_()
    s, I = similarities.contiguous(), indices.contiguous()
    K, K_layout = rows_of(key)
    one_tensor = is_same(query, key)
    Q, Q_layout = (K, K_layout) if one_tensor else rows_of(query)
    pointers = Pointers(
        query.device,
        p_grad=grad_similarities.contiguous(),
        p_similarities=s,
        p_indices=I,
        p_query=Q,
        p_key=K,
        p_query_grad=grad_query,
        p_key_grad=grad_key,
    )
    if need_key:
        pairs = inverse() if inverse else invert(s, I, key.shape[-2], by_slot)
        pointers.take(pairs, "p_pairs", "p_keys", "p_offsets")
    call = Gradient(
        Q_layout,
        K_layout,
        one_tensor,
        indices.shape[-1],
        metric,
        query.dtype,
        by_slot,
        need_query,
        need_key,
        hardware.architecture(query),
    )
    plan_select_backward(call)(pointers)
    return grad_query, grad_key
