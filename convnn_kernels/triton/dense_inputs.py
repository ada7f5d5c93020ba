# SPDX-License-Identifier: MIT
"""What the kernels of a dense weight read, in the order in which they read it.

They take one j at a time: of many queries, whose rows of V are adjacent here; and of W, whose
outputs are. rho (section 4.1) is computed once, not for every block of outputs.

The first programs have ROWS queries each, the others a block of W.
"""

import torch
import triton.language as tl

from . import configs
from .aggregation import Aggregation
from .integers import as_int64
from .launch import Buffer, Kernel, Launch
from .modulate import load_neighbors, modulate, softmax_terms
from .tensors import cdiv


@Kernel
def dense_inputs_kernel(
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_given_weight,  # [O, C, k] contiguous
    p_rows,  # [k, B * N] int32: the row of V, within its batch element; -1 if missing
    p_rho,  # [B, N, k] float32; None if rho is 1 of every neighbor
    p_weight,  # [k, C, O]
    rows,
    M,
    C,
    O,
    k,
    scale,
    row_programs,
    RHO: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """ROWS queries, BLOCK_K neighbors at a time; or BLOCK of the C k weights of BLOCK_O outputs."""
    pid = tl.program_id(0).to(tl.int64)
    if pid < row_programs:
        o_r = pid * ROWS + tl.arange(0, ROWS)
        m_r = o_r < rows
        b_max, b_sum = softmax_terms(p_similarities, p_indices, o_r, m_r, M, k, scale, RHO, BLOCK_K)
        o_k = tl.arange(0, BLOCK_K)
        for j in range(0, k, BLOCK_K):
            m_k = m_r[:, None] & (j + o_k < k)[None, :]
            o = o_r[:, None] * k + (j + o_k)[None, :]
            b_s, b_row, m = load_neighbors(p_similarities, p_indices, o, m_k, M)
            p = p_rows + (j + o_k).to(tl.int64)[None, :] * rows + o_r[:, None]
            tl.store(p, tl.where(m, b_row, -1).to(tl.int32), m_k)
            if p_rho is not None:
                b_rho = modulate(b_s, m, b_max[:, None], b_sum[:, None], scale, RHO)
                tl.store(p_rho + o, b_rho, m_k)
    else:
        output_blocks = tl.cdiv(O, BLOCK_O)
        block = pid - row_programs
        o_o = (block % output_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
        o_w = (block // output_blocks) * BLOCK + tl.arange(0, BLOCK)  # c * k + j
        m = (o_w < as_int64(C) * k)[:, None] & (o_o < O)[None, :]
        b_w = tl.load(p_given_weight + o_o[None, :] * C * k + o_w[:, None], m)
        tl.store(p_weight + ((o_w % k) * C + o_w // k)[:, None] * O + o_o[None, :], b_w, m)


def prepare_dense_inputs(call: Aggregation) -> tuple[Launch, dict[str, Buffer]]:
    """The launch, and what it writes."""
    C, O, k = call.V.D, call.O, call.k
    config = configs.dense_inputs(call.arch, k)
    row_programs = cdiv(call.rows, config["ROWS"])
    programs = row_programs + cdiv(C * k, config["BLOCK"]) * cdiv(O, config["BLOCK_O"])
    numbers = call.numbers() | {"row_programs": row_programs}
    pairs = call.rows * k
    buffers: dict[str, Buffer] = {
        "p_rows": (pairs, torch.int32),
        "p_weight": (k * C * O, call.dtype),
    }
    if call.has_rho:
        buffers["p_rho"] = (pairs, torch.float32)
    return dense_inputs_kernel.prepare(programs, config, **numbers), buffers
