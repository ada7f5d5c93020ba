# SPDX-License-Identifier: MIT
"""The gradient of rho under a dense weight, with G the gradient of the output (Eq. 6).

    P_ij[c]  = sum_o G_i[o] W[o, c, j]
    drho_ij  = sum_c P_ij[c] V[I_ij, c]

A program has BLOCK_N queries of the flattened [B, N] and one j. P is never stored.
"""

import triton.language as tl

from . import configs
from .aggregate import begin_of_value
from .aggregation import Aggregation
from .integers import aligned
from .launch import Kernel, Launch
from .tensors import cdiv


@Kernel
def rho_grad_dense_kernel(
    p_grad,  # [B, N, O] contiguous
    p_value,  # [B, M, C]
    p_rows,  # [k, B * N] int32: rows of V within their batch elements; -1 if missing
    p_weight,  # [k, C, O] contiguous
    p_rho_grad,  # [B, N, k] float32
    rows,
    N,
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
    j = pid % k
    first = (pid // k) * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)
    o_r = first + o_n
    m_r = o_r < rows
    p_g = p_grad + o_r * O
    p_v = begin_of_value(p_value, first, o_n, N, B2, stride_vb1, stride_vb2)
    b_row = tl.load(p_rows + j * rows + o_r, m_r, -1)
    p_v += b_row.to(tl.int64) * stride_vm
    m = b_row >= 0
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
        p = p_v[:, None] + o_c[None, :]
        b_v = tl.load(p, m[:, None] & m_c[None, :], 0.0).to(tl.float32)
        b_drho += tl.sum(b_p * b_v, 1)
    tl.store(p_rho_grad + o_r * k + j, b_drho, m_r)


def prepare_rho_grad(call: Aggregation) -> Launch:
    config = configs.rho_grad_dense(call.arch, call.bits, call.V.D, call.O)
    programs = cdiv(call.rows, config["BLOCK_N"]) * call.k
    return rho_grad_dense_kernel.prepare(programs, config, **call.numbers())
