# SPDX-License-Identifier: MIT
"""rho(s_i) of section 4.1 and its derivative, for rows of k similarities.

A similarity of -inf, or an index outside of V, marks a missing neighbor: its rho is 0.
"""

import triton
import triton.language as tl

from . import configs
from .aggregation import Aggregation
from .launch import Kernel, Launch
from .tensors import cdiv

SOFTMAX = tl.constexpr(0)
ONES = tl.constexpr(1)
SIMILARITY = tl.constexpr(2)


@triton.jit
def load_neighbors(p_similarities, p_indices, offsets, mask, M):
    """s, the row of V and whether there is a neighbor, at `offsets` into [B, N, k]."""
    b_s = tl.load(p_similarities + offsets, mask, float("-inf"))
    b_row = tl.load(p_indices + offsets, mask, 0)
    return b_s, b_row, (b_s != float("-inf")) & (b_row >= 0) & (b_row < M)


@triton.jit
def softmax_terms(
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    o_r,  # [rows]: rows of the flattened [B, N]
    m_r,  # [rows]
    M,
    k,
    scale,
    RHO: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What the softmax of a row needs: the maximum of scale s and the sum of exponentials."""
    ROWS: tl.constexpr = o_r.shape[0]
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.full([ROWS], 0.0, tl.float32)
    if RHO == SOFTMAX:
        o_k = tl.arange(0, BLOCK_K)
        for j in range(0, k, BLOCK_K):
            m = m_r[:, None] & (j + o_k < k)[None, :]
            o = o_r[:, None] * k + (j + o_k)[None, :]
            b_s, _, m = load_neighbors(p_similarities, p_indices, o, m, M)
            # A maximum over NaN does not matter: the sum is NaN.
            b_logit = tl.where(m & (b_s == b_s), scale * b_s, float("-inf"))
            b_max = tl.maximum(b_max, tl.max(b_logit, 1))
        for j in range(0, k, BLOCK_K):
            m = m_r[:, None] & (j + o_k < k)[None, :]
            o = o_r[:, None] * k + (j + o_k)[None, :]
            b_s, _, m = load_neighbors(p_similarities, p_indices, o, m, M)
            b_sum += tl.sum(tl.where(m, tl.exp(scale * b_s - b_max[:, None]), 0.0), 1)
    return b_max, b_sum


@triton.jit
def modulate(b_s, m, b_max, b_sum, scale, RHO: tl.constexpr):
    """rho of similarities b_s; all arguments but the last two have one shape."""
    if RHO == SOFTMAX:
        b_rho = tl.exp(scale * b_s - b_max) / b_sum
    elif RHO == ONES:
        b_rho = tl.where(m, 1.0, 0.0)
    else:
        b_rho = b_s
    return tl.where(m, b_rho, 0.0)


@triton.jit
def _add_parts(p_part, o, m, size, parts):
    """The sum of parts [parts, size] at `o`."""
    b_sum = tl.load(p_part + o, m, 0.0)
    for part in range(1, parts):
        b_sum += tl.load(p_part + part * size + o, m, 0.0)
    return b_sum


@Kernel
def modulate_backward_kernel(
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_rho,  # [B, N, k] float32; None if rho is s
    p_rho_part,  # [parts, B, N, k] float32: parts of the gradient of rho
    p_similarities_grad,  # [B, N, k] float32; may be p_rho_part
    rows,
    M,
    k,
    scale,
    parts,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """ds_j = drho_j, which is a sum of parts, or, through the softmax,
    ds_j = scale rho_j (drho_j - sum_l rho_l drho_l), for ROWS queries."""
    size = rows.to(tl.int64) * k
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < rows
    o_k = tl.arange(0, BLOCK_K)
    b_sum = tl.zeros([ROWS], tl.float32)
    if p_rho is not None:
        for j in range(0, k, BLOCK_K):
            m = m_r[:, None] & (j + o_k < k)[None, :]
            o = o_r[:, None] * k + (j + o_k)[None, :]
            b_grad = _add_parts(p_rho_part, o, m, size, parts)
            b_sum += tl.sum(tl.load(p_rho + o, m, 0.0) * b_grad, 1)
    for j in range(0, k, BLOCK_K):
        m = m_r[:, None] & (j + o_k < k)[None, :]
        o = o_r[:, None] * k + (j + o_k)[None, :]
        b_grad = _add_parts(p_rho_part, o, m, size, parts)
        if p_rho is not None:
            # rho of a missing neighbor is 0, but the sum may be NaN.
            _, _, m_any = load_neighbors(p_similarities, p_indices, o, m, M)
            b_grad = scale * tl.load(p_rho + o, m, 0.0) * (b_grad - b_sum[:, None])
            b_grad = tl.where(m_any, b_grad, 0.0)
        tl.store(p_similarities_grad + o, b_grad, m)


def prepare_modulate_backward(call: Aggregation, parts: int) -> Launch:
    """From so many parts of drho; 1: it is in the place of the gradient of similarities."""
    config = configs.modulate(call.arch, call.k)
    programs = cdiv(call.rows, config["ROWS"])
    names: dict[str, str | None] = {"p_similarities_grad": "p_rho_grad"}
    if parts == 1:
        names["p_rho_part"] = "p_rho_grad"
    if call.rho != "softmax":
        names["p_rho"] = None
    return modulate_backward_kernel.prepare(programs, config, names, **call.numbers(), parts=parts)
