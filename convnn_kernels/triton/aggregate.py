# SPDX-License-Identifier: MIT
"""The convolution over modulated neighbors (Eq. 6 and section 4.1).

    dense      y_i[o] = b[o] + sum_j rho_ij sum_c W[o, c, j] V[I_ij, c]
    depthwise  y_i[c] = b[c] + sum_j rho_ij W[c, 0, j] V[I_ij, c]
    no weight  y_i[c] = b[c] + sum_j rho_ij V[I_ij, c]

A program has BLOCK_N queries of one batch element and a block of outputs. It gathers rows of V as
it needs them: X_nn [N, k, C] is never stored. rho is applied in float32 to the product of a block
of rows with W_j rather than to the rows, which go from memory to the tensor cores unchanged. The
sum stays in registers.
"""

import triton.language as tl
from torch import Tensor

from . import configs
from .aggregation import Aggregation, prepare
from .integers import aligned, as_int64
from .launch import Kernel, Plan, Pointers, cache_plans
from .modulate import load_neighbors, modulate, softmax_terms
from .tensors import cdiv


@Kernel
def aggregate_dense_kernel(
    p_value,  # [B, M, C]
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_weight,  # [k, C, O] contiguous
    p_bias,  # [O] contiguous, or None
    p_output,  # [B, N, O] contiguous
    N,
    M,
    C,
    O,
    k,
    scale,
    B2,
    stride_vb1,
    stride_vb2,
    stride_vm,
    ALIGN: tl.constexpr,
    RHO: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N queries and BLOCK_O outputs. One step of the loop has one j and BLOCK_C channels."""
    stride_vb1 = aligned(stride_vb1, ALIGN)
    stride_vb2 = aligned(stride_vb2, ALIGN)
    stride_vm = aligned(stride_vm, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    row_blocks = tl.cdiv(N, BLOCK_N)
    output_blocks = tl.cdiv(O, BLOCK_O)
    block = pid // output_blocks
    b = block // row_blocks
    o_n = (block % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_r = b * N + o_n
    o_o = (pid % output_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < O
    o_c = tl.arange(0, BLOCK_C)
    p_v = p_value + (b // B2) * stride_vb1 + (b % B2) * stride_vb2

    b_max, b_sum = softmax_terms(p_similarities, p_indices, o_r, m_n, M, k, scale, RHO, BLOCK_K)
    b_y = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    for step in range(0, k * channel_blocks):
        j = as_int64(step // channel_blocks)
        c = (step % channel_blocks) * BLOCK_C + o_c
        b_s, b_row, m = load_neighbors(p_similarities, p_indices, o_r * k + j, m_n, M)
        p = p_v + b_row[:, None] * stride_vm + c[None, :]
        b_v = tl.load(p, m[:, None] & (c < C)[None, :], 0.0)
        p = p_weight + (c + j * C)[:, None] * O + o_o[None, :]
        b_w = tl.load(p, (c < C)[:, None] & m_o[None, :], 0.0)
        b_rho = modulate(b_s, m, b_max, b_sum, scale, RHO)
        b_y += b_rho[:, None] * tl.dot(b_v, b_w, input_precision=PRECISION)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_o, m_o, 0.0).to(tl.float32)[None, :]
    p = p_output + o_r[:, None] * O + o_o[None, :]
    tl.store(p, b_y.to(p_output.dtype.element_ty), m_n[:, None] & m_o[None, :])


@Kernel
def aggregate_depthwise_kernel(
    p_value,  # [B, M, C]
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_weight,  # [C, 1, k] contiguous, or None
    p_bias,  # [C] contiguous, or None
    p_output,  # [B, N, C] contiguous
    N,
    M,
    C,
    k,
    scale,
    B2,
    stride_vb1,
    stride_vb2,
    stride_vm,
    ALIGN: tl.constexpr,
    RHO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N queries and BLOCK_C channels, depthwise or without a weight."""
    stride_vb1 = aligned(stride_vb1, ALIGN)
    stride_vb2 = aligned(stride_vb2, ALIGN)
    stride_vm = aligned(stride_vm, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    row_blocks = tl.cdiv(N, BLOCK_N)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    block = pid // channel_blocks
    b = block // row_blocks
    o_n = (block % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_r = b * N + o_n
    o_c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    p_v = p_value + (b // B2) * stride_vb1 + (b % B2) * stride_vb2

    b_max, b_sum = softmax_terms(p_similarities, p_indices, o_r, m_n, M, k, scale, RHO, BLOCK_K)
    b_y = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    # Sums of BLOCK_K terms first: rounding errors grow with the longest sum.
    for start in range(0, k, BLOCK_K):
        b_part = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for j in range(start, tl.minimum(start + BLOCK_K, k)):
            b_s, b_row, m = load_neighbors(p_similarities, p_indices, o_r * k + j, m_n, M)
            p = p_v + b_row[:, None] * stride_vm + o_c[None, :]
            b_v = tl.load(p, m[:, None] & m_c[None, :], 0.0).to(tl.float32)
            b_x = modulate(b_s, m, b_max, b_sum, scale, RHO)[:, None] * b_v
            if p_weight is not None:
                b_w = tl.load(p_weight + o_c * k + j, m_c, 0.0)
                b_x = b_x * b_w.to(tl.float32)[None, :]
            b_part += b_x
        b_y += b_part
    if p_bias is not None:
        b_y += tl.load(p_bias + o_c, m_c, 0.0).to(tl.float32)[None, :]
    p = p_output + o_r[:, None] * C + o_c[None, :]
    tl.store(p, b_y.to(p_output.dtype.element_ty), m_n[:, None] & m_c[None, :])


@cache_plans
def plan_aggregate(call: Aggregation) -> Plan:
    V, N, O = call.V, call.N, call.O
    if call.is_dense:
        config = configs.aggregate_dense(call.arch, call.bits, V.D, O, call.k)
        programs = V.B * cdiv(N, config["BLOCK_N"]) * cdiv(O, config["BLOCK_O"])
        return Plan([aggregate_dense_kernel.prepare(programs, config, **call.numbers())])
    config = configs.aggregate_depthwise(call.arch, V.D, call.k)
    programs = V.B * cdiv(N, config["BLOCK_N"]) * cdiv(V.D, config["BLOCK_C"])
    return Plan([aggregate_depthwise_kernel.prepare(programs, config, **call.numbers())])


def aggregate(
    value: Tensor,
    similarities: Tensor,
    indices: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rho: str,
    scale: float,
) -> Tensor:
    """The output [..., N, O]; see schemas.py."""
    call, tensors = prepare(value, similarities, indices, weight, rho, scale)
    output = value.new_empty((*indices.shape[:-1], call.O))
    if output.numel():
        bias = None if bias is None else bias.contiguous()
        plan_aggregate(call)(Pointers(value.device, **tensors, p_bias=bias, p_output=output))
    return output
