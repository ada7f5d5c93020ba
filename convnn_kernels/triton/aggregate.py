# SPDX-License-Identifier: MIT
"""The convolution over modulated neighbors (Eq. 6 and section 4.1).

    dense      y_i[o] = b[o] + sum_j rho_ij sum_c W[o, c, j] V[I_ij, c]
    depthwise  y_i[c] = b[c] + sum_j rho_ij W[c, 0, j] V[I_ij, c]
    no weight  y_i[c] = b[c] + sum_j rho_ij V[I_ij, c]

A program has BLOCK_N queries and a block of outputs, whose sums stay in registers. It gathers rows
of V as it needs them: X_nn [N, k, C] is never stored.

With a dense weight, queries of all batch elements are one after the other, so that blocks are full
however few a batch element has. rho is applied in float32 to the product of a block of rows with
W_j rather than to the rows, which go from memory to the tensor cores unchanged. Only rows of few
channels are multiplied by rho before, where one product has several neighbors.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .aggregation import Aggregation, prepare
from .dense_inputs import prepare_dense_inputs
from .integers import aligned, as_int64
from .launch import Kernel, Plan, Pointers, cache_plans
from .modulate import load_neighbors, modulate, softmax_terms
from .tensors import cdiv


@triton.jit
def begin_of_value(
    p_value,  # [B, M, C]
    first,  # scalar: a row of the flattened [B, N]
    o_n,  # [BLOCK]: rows after it
    N,
    B2,
    stride_vb1,
    stride_vb2,
):
    """Where V of their batch elements begins, for rows first + o_n: [BLOCK]."""
    o_n = (first % N).to(tl.int32) + o_n
    b = (first // N).to(tl.int32) + o_n // N
    return p_value + (b // B2) * stride_vb1 + (b % B2) * stride_vb2


@Kernel
def aggregate_dense_kernel(
    p_value,  # [B, M, C]
    p_rows,  # [k, B * N] int32: rows of V within their batch elements; -1 if missing
    p_rho,  # [B, N, k] float32, or None: 1
    p_weight,  # [k, C, O] contiguous
    p_bias,  # [O] contiguous, or None
    p_output,  # [B, N, O] contiguous
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
    FEW_CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_N queries of the flattened [B, N] and BLOCK_O outputs.

    One step of the loop has one j and BLOCK_C channels. With FEW_CHANNELS, of which a block would
    be almost empty, it has BLOCK_C of the k C channels of all neighbors; rho V is rounded.
    """
    stride_vb1 = aligned(stride_vb1, ALIGN)
    stride_vb2 = aligned(stride_vb2, ALIGN)
    stride_vm = aligned(stride_vm, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    output_blocks = tl.cdiv(O, BLOCK_O)
    first = (pid // output_blocks) * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)
    o_r = first + o_n
    m_r = o_r < rows
    o_o = (pid % output_blocks).to(tl.int32) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < O
    o_c = tl.arange(0, BLOCK_C)
    p_v = begin_of_value(p_value, first, o_n, N, B2, stride_vb1, stride_vb2)
    b_y = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    if FEW_CHANNELS:
        for t0 in range(0, k * C, BLOCK_C):
            o_t = t0 + o_c  # j * C + c
            m_t = o_t < k * C
            p = p_rows + (o_t // C)[None, :].to(tl.int64) * rows + o_r[:, None]
            b_row = tl.load(p, m_r[:, None] & m_t[None, :], -1)
            p = p_v[:, None] + b_row.to(tl.int64) * stride_vm + (o_t % C)[None, :]
            b_v = tl.load(p, b_row >= 0, 0.0)
            if p_rho is not None:
                p = p_rho + (o_r * k)[:, None] + (o_t // C)[None, :]
                b_rho = tl.load(p, b_row >= 0, 0.0)
                b_v = (b_rho * b_v.to(tl.float32)).to(b_v.dtype)
            p = p_weight + o_t.to(tl.int64)[:, None] * O + o_o[None, :]
            b_w = tl.load(p, m_t[:, None] & m_o[None, :], 0.0)
            b_y = tl.dot(b_v, b_w, b_y, input_precision=PRECISION)
    else:
        channel_blocks = tl.cdiv(C, BLOCK_C)
        for step in range(0, k * channel_blocks):
            j = as_int64(step // channel_blocks)
            c = (step % channel_blocks) * BLOCK_C + o_c
            b_row = tl.load(p_rows + j * rows + o_r, m_r, -1)
            p = p_v[:, None] + b_row.to(tl.int64)[:, None] * stride_vm + c[None, :]
            b_v = tl.load(p, (b_row >= 0)[:, None] & (c < C)[None, :], 0.0)
            p = p_weight + (c + j * C)[:, None] * O + o_o[None, :]
            b_w = tl.load(p, (c < C)[:, None] & m_o[None, :], 0.0)
            if p_rho is None:
                b_y = tl.dot(b_v, b_w, b_y, input_precision=PRECISION)
            else:
                b_rho = tl.load(p_rho + o_r * k + j, m_r, 0.0)
                b_y += b_rho[:, None] * tl.dot(b_v, b_w, input_precision=PRECISION)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_o, m_o, 0.0).to(tl.float32)[None, :]
    p = p_output + o_r[:, None] * O + o_o[None, :]
    tl.store(p, b_y.to(p_output.dtype.element_ty), m_r[:, None] & m_o[None, :])


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
        few = configs.has_few_channels(V.D, call.rho)
        numbers = call.numbers() | {"FEW_CHANNELS": few}
        config = configs.aggregate_dense(
            call.arch, call.bits, call.rows, V.D, O, few_channels=few, has_rho=call.has_rho
        )
        programs = cdiv(call.rows, config["BLOCK_N"]) * cdiv(O, config["BLOCK_O"])
        launch = aggregate_dense_kernel.prepare(programs, config, **numbers)
        inputs, buffers = prepare_dense_inputs(call)
        return Plan([inputs, launch], **buffers)
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
        outputs = {"p_rho": None, "p_bias": bias, "p_output": output}
        plan_aggregate(call)(Pointers(value.device, **tensors, **outputs))
    return output
