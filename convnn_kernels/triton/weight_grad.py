# SPDX-License-Identifier: MIT
"""The gradient of a dense weight, with G the gradient of the output (Eq. 6).

    dW[:, :, j] = sum_i G_i (rho_ij V[I_ij])^T

It is summed in parts of a fixed number of queries, which are then added: no atomics, and the same
result in any order of programs. Where rho is 1, V goes to the tensor cores as it is; of a softmax,
rho V is rounded to the dtype of V. A similarity may be beyond the range of float16: there, rho V
enters the product as the sum of two tf32 numbers.
"""

import torch
import triton.language as tl

from . import configs
from .aggregate import begin_of_value
from .aggregation import Aggregation
from .dot_of_float import dot_of_float
from .integers import aligned, as_int64
from .launch import Kernel, Plan, cache_plans
from .modulate import SIMILARITY
from .tensors import cdiv


@Kernel
def weight_grad_dense_kernel(
    p_grad,  # [B, N, O] contiguous
    p_value,  # [B, M, C]
    p_rows,  # [k, B * N] int32: rows of V within their batch elements; -1 if missing
    p_rho,  # [B, N, k] float32, or None: 1
    p_part,  # [parts, k, C, O] float32
    rows,
    N,
    C,
    O,
    k,
    B2,
    rows_each,
    channel_blocks,
    stride_vb1,
    stride_vb2,
    stride_vm,
    ALIGN: tl.constexpr,
    RHO: tl.constexpr,
    PRECISION: tl.constexpr,
    FEW_CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dW of BLOCK_C channels of one j and BLOCK_O outputs, over `rows_each` of the B * N queries.

    With FEW_CHANNELS, of BLOCK_C of all k C.
    """
    stride_vb1 = aligned(stride_vb1, ALIGN)
    stride_vb2 = aligned(stride_vb2, ALIGN)
    stride_vm = aligned(stride_vm, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    output_blocks = tl.cdiv(O, BLOCK_O)
    o_o = (pid % output_blocks).to(tl.int32) * BLOCK_O + tl.arange(0, BLOCK_O)
    block = pid // output_blocks % channel_blocks
    part = pid // (output_blocks * channel_blocks)
    first = part * rows_each
    if FEW_CHANNELS:
        o_t = block.to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)  # j * C + c
        m_t = o_t < k * C
        j = (o_t // C)[None, :].to(tl.int64)
        o_c = (o_t % C)[None, :]
    else:
        of_slot = tl.cdiv(C, BLOCK_C)
        j = block // of_slot
        o_c = (block % of_slot).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
        m_t = o_c < C
        o_t = j * C + o_c
        o_c = o_c[None, :]
    m_o = o_o < O
    o_n = tl.arange(0, BLOCK_N)
    b_dw = tl.zeros([BLOCK_C, BLOCK_O], tl.float32)
    for start in range(0, rows_each, BLOCK_N):
        o_r = first + start + o_n
        m_r = (start + o_n < rows_each) & (o_r < rows)
        p_v = begin_of_value(p_value, first, start + o_n, N, B2, stride_vb1, stride_vb2)
        # [BLOCK_N, 1], or [BLOCK_N, BLOCK_C] of few channels.
        m = m_r[:, None] & m_t[None, :] if FEW_CHANNELS else m_r[:, None]
        b_row = tl.load(p_rows + j * rows + o_r[:, None], m, -1)
        p = p_v[:, None] + b_row.to(tl.int64) * stride_vm + o_c
        b_v = tl.load(p, (b_row >= 0) & m_t[None, :], 0.0)
        # 0 of a missing neighbor, lest an infinite G make it NaN; not where others share the row.
        m_g = m_r[:, None] if FEW_CHANNELS else b_row >= 0
        b_g = tl.load(p_grad + o_r[:, None] * O + o_o[None, :], m_g & m_o[None, :], 0.0)
        b_x = b_v
        if p_rho is not None:
            b_x = tl.load(p_rho + (o_r * k)[:, None] + j, m, 0.0) * b_v.to(tl.float32)
        if RHO == SIMILARITY:
            b_dw = dot_of_float(tl.trans(b_x), b_g, b_dw, PRECISION)
        else:
            b_x = tl.trans(b_x.to(b_v.dtype))
            b_dw = tl.dot(b_x, b_g, b_dw, input_precision=PRECISION)
    p = p_part + (part * k * C + o_t)[:, None] * O + o_o[None, :]
    tl.store(p, b_dw, m_t[:, None] & m_o[None, :])


@Kernel
def add_parts_kernel(
    p_part,  # [parts, k, C, O] float32
    p_weight_grad,  # [O, C, k] contiguous
    C,
    O,
    k,
    parts,
    BLOCK: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """dW of BLOCK of the C k weights of each of BLOCK_O outputs: its parts, in their order."""
    pid = tl.program_id(0).to(tl.int64)
    output_blocks = tl.cdiv(O, BLOCK_O)
    o_o = (pid % output_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_w = (pid // output_blocks) * BLOCK + tl.arange(0, BLOCK)  # c * k + j
    m = (o_w < C * k)[:, None] & (o_o < O)[None, :]
    p = p_part + ((o_w % k) * C + o_w // k)[:, None] * O + o_o[None, :]
    b_dw = tl.zeros([BLOCK, BLOCK_O], tl.float32)
    for _ in range(0, parts):
        b_dw += tl.load(p, m, 0.0)
        p += as_int64(k) * C * O
    p = p_weight_grad + o_o[None, :] * C * k + o_w[:, None]
    tl.store(p, b_dw.to(p_weight_grad.dtype.element_ty), m)


@cache_plans
def plan_weight_grad(call: Aggregation) -> Plan:
    """dW, from pointers that have p_rows and p_rho."""
    C, O, k = call.V.D, call.O, call.k
    few = configs.has_few_channels(C, call.rho)
    config = configs.weight_grad_dense(
        call.arch, call.bits, C, O, few_channels=few, in_float=call.rho == "similarity"
    )
    blocks = cdiv(k * C, config["BLOCK_C"]) if few else k * cdiv(C, config["BLOCK_C"])
    programs = blocks * cdiv(O, config["BLOCK_O"])
    bound = call.rows * min(call.V.N, k * C)
    parts, rows_each = configs.parts(call.rows, k * C * O, bound, programs)
    numbers = call.numbers() | {"rows_each": rows_each, "channel_blocks": blocks, "parts": parts}
    numbers |= {"FEW_CHANNELS": few}
    sums = weight_grad_dense_kernel.prepare(parts * programs, config, **numbers)
    config = configs.add_parts()
    programs = cdiv(k * C, config["BLOCK"]) * cdiv(O, config["BLOCK_O"])
    total = add_parts_kernel.prepare(programs, config, **numbers)
    return Plan([sums, total], p_part=(parts * k * C * O, torch.float32))
