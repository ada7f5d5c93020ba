# SPDX-License-Identifier: MIT
"""The gradient of a dense weight, with G the gradient of the output (Eq. 6).

    dW[:, :, j] = sum_i G_i (rho_ij V[I_ij])^T

It is summed in parts of a fixed number of queries, which are then added: no atomics, and the same
result in any order of programs. rho V is not rounded to 16 bits: it enters the product as the sum
of two tf32 numbers.
"""

import torch
import triton.language as tl
from torch import Tensor

from . import configs
from .aggregation import Aggregation
from .dot_of_float import dot_of_float
from .integers import aligned
from .launch import Kernel, Launch
from .modulate import load_neighbors
from .tensors import cdiv


@Kernel
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
        b_dw = dot_of_float(b_x, b_g, b_dw, PRECISION)
    p = p_part + ((part * k + j) * C + o_c)[:, None] * O + o_o[None, :]
    tl.store(p, b_dw, m_c[:, None] & m_o[None, :])


def prepare_weight_grad(call: Aggregation) -> tuple[Launch, tuple[int, ...]]:
    """The launch, and the shape of all parts, which it writes to p_part."""
    C, O, k = call.V.D, call.O, call.k
    bound = call.rows * min(call.V.N, k * C)
    parts, rows_each = configs.parts(call.rows, k * C * O, bound)
    numbers = call.numbers() | {"rows_each": rows_each}
    config = configs.weight_grad_dense(call.arch, call.bits, C, O)
    programs = parts * k * cdiv(C, config["BLOCK_C"]) * cdiv(O, config["BLOCK_O"])
    launch = weight_grad_dense_kernel.prepare(programs, config, **numbers)
    return launch, (parts, k, C, O)


def add_parts(part: Tensor, dtype: torch.dtype) -> Tensor:
    """dW [O, C, k], of parts [parts, k, C, O]."""
    grad = part.sum(dim=0).permute(2, 1, 0)
    return grad.to(dtype, memory_format=torch.contiguous_format)
