# SPDX-License-Identifier: MIT
"""The gradient of value under a dense weight (Eq. 6) in 16 bits, where there are few keys.

    P_j  = rho_j (G W_j^T)        [queries, C], with G the gradient of the output; rho_ij of row i
    dV   = sum_j T_j P_j          T_j [keys, queries] is 1 where the key is I_ij, else 0

Both are products on tensor cores. The second one multiplies all keys of a batch element with all of
its queries, most of them by 0; with few keys, that takes less than finding the pairs of each key
(value_grad.py). Nothing is added atomically, and there is no list.

A program has the keys of one or several whole batch elements, or a block of those of one, and a
block of channels. dV stays in registers, in float32. The program goes over all queries of its batch
elements, a block at a time, whose G is read once for all j if one block has all outputs. P_j and
T_j never leave the chip. P_j is rounded to 16 bits once, as the sum over all outputs.

0 times what is not finite is NaN. Where dV has become NaN or infinite, the program starts again and
adds rows of P_j that are not finite, also because they have left the range of float16, one by one,
in float32 and each to its own key.
"""

import triton
import triton.language as tl

from . import configs
from .aggregation import Aggregation
from .integers import as_int64
from .launch import Kernel, Launch
from .tensors import cdiv


@triton.jit
def _add_rows(
    b_dv,  # [keys, channels] float32
    b_p,  # [queries, channels] float32
    b_key,  # [queries]: to which key a row is added, if it is one of these
    m,  # [queries]: whether it is added at all
):
    """b_dv and rows of b_p, one after the other, without a product."""
    o_m = tl.arange(0, b_dv.shape[0])
    o_n = tl.arange(0, b_p.shape[0])
    while tl.max(m.to(tl.int32), 0) > 0:
        m_row = o_n == tl.max(tl.where(m, o_n, -1), 0)
        b_row = tl.sum(tl.where(m_row[:, None], b_p, 0.0), 0)
        m_key = o_m == tl.max(tl.where(m_row, b_key, -1), 0)
        b_dv += tl.where(m_key[:, None], b_row[None, :], 0.0)
        m = m & (m_row == 0)
    return b_dv


@triton.jit
def _sum_pairs(
    p_grad,
    p_weight,
    p_rows,
    p_rho,
    first_row,  # of the flattened [B, N]
    queries,  # from there on
    first_key,  # of the keys of these batch elements
    o_c,  # [BLOCK_C]
    rows,
    N,
    M,
    C,
    O,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ONE_BLOCK_O: tl.constexpr,
    ONE_BY_ONE: tl.constexpr,
):
    """dV [BLOCK_M, BLOCK_C] float32. ONE_BY_ONE: what is not finite is added without a product."""
    dtype: tl.constexpr = p_weight.dtype.element_ty
    o_m = tl.arange(0, BLOCK_M)
    m_c = o_c < C
    b_dv = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, queries, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < queries
        o_r = first_row + o_n
        # Where the keys of a query's batch element begin.
        begin = (o_n // N * M.to(tl.int64)).to(tl.int32) - first_key
        p_g = p_grad + o_r[:, None] * O
        if ONE_BLOCK_O:
            o_o = tl.arange(0, BLOCK_O)
            b_g = tl.load(p_g + o_o[None, :], m_n[:, None] & (o_o < O)[None, :], 0.0)
        for step in range(0, k):
            j = as_int64(step)
            b_row = tl.load(p_rows + j * rows + o_r, m_n, -1)
            b_key = tl.where(b_row >= 0, begin + b_row, -1)
            b_t = tl.where(o_m[:, None] == b_key[None, :], 1.0, 0.0).to(dtype)
            p_w = p_weight + (o_c + j * C)[None, :] * O
            if ONE_BLOCK_O:
                m_w = (o_o < O)[:, None] & m_c[None, :]
                b_p = tl.dot(b_g, tl.load(p_w + o_o[:, None], m_w, 0.0))
            else:
                b_p = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
                for o0 in range(0, O, BLOCK_O):
                    o_o = o0 + tl.arange(0, BLOCK_O)
                    m_o = o_o < O
                    b_g = tl.load(p_g + o_o[None, :], m_n[:, None] & m_o[None, :], 0.0)
                    b_w = tl.load(p_w + o_o[:, None], m_o[:, None] & m_c[None, :], 0.0)
                    b_p = tl.dot(b_g, b_w, b_p)
            if p_rho is not None:
                b_p *= tl.load(p_rho + o_r * k + j, m_n, 0.0)[:, None]
            b_x = b_p.to(dtype)
            if ONE_BY_ONE:
                # 0, or NaN where it is not finite.
                m_one = tl.sum(b_x.to(tl.float32) * 0.0, 1) != 0.0
                b_x = tl.where(m_one[:, None], 0.0, b_x)
                b_dv = _add_rows(b_dv, b_p, b_key, m_one)
            b_dv = tl.dot(b_t, b_x, b_dv)
    return b_dv


@Kernel
def value_grad_one_hot_kernel(
    p_grad,  # [B, N, O] contiguous
    p_weight,  # [k, C, O] contiguous
    p_rows,  # [k, B * N] int32: rows of V within their batch elements; -1 if missing
    p_rho,  # [B, N, k] float32, or None: 1
    p_value_grad,  # [B, M, C] contiguous
    rows,
    N,
    M,
    C,
    O,
    k,
    elements,
    key_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ONE_BLOCK_O: tl.constexpr,
):
    """dV of BLOCK_M keys of `elements` batch elements, which are all of them unless it is one, and
    BLOCK_C channels."""
    pid = tl.program_id(0).to(tl.int64)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    block = pid // channel_blocks
    first = (block // key_blocks) * elements
    first_row = first * N
    first_key = (block % key_blocks).to(tl.int32) * BLOCK_M
    # The last program may have fewer.
    queries = tl.minimum(elements * N, rows - first_row).to(tl.int32)
    o_c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_dv = _sum_pairs(
        p_grad,
        p_weight,
        p_rows,
        p_rho,
        first_row,
        queries,
        first_key,
        o_c,
        rows,
        N,
        M,
        C,
        O,
        k,
        BLOCK_M,
        BLOCK_N,
        BLOCK_O,
        BLOCK_C,
        ONE_BLOCK_O,
        False,
    )
    # 0, or NaN where a sum is not finite.
    test = tl.sum(tl.sum(b_dv * 0.0, 1), 0)
    if test != 0.0:
        b_dv = _sum_pairs(
            p_grad,
            p_weight,
            p_rows,
            p_rho,
            first_row,
            queries,
            first_key,
            o_c,
            rows,
            N,
            M,
            C,
            O,
            k,
            BLOCK_M,
            BLOCK_N,
            BLOCK_O,
            BLOCK_C,
            ONE_BLOCK_O,
            True,
        )
    o_m = first_key + tl.arange(0, BLOCK_M)
    m = (o_m < queries // N * M)[:, None] & (o_c < C)[None, :]
    p = p_value_grad + (first * M + o_m)[:, None] * C + o_c[None, :]
    tl.store(p, b_dv.to(p_value_grad.dtype.element_ty), m)


def prepare_value_grad_one_hot(call: Aggregation) -> Launch:
    B, N, M, C = call.V.B, call.N, call.V.N, call.V.D
    config = configs.value_grad_one_hot(call.arch, M, C, call.O)
    elements = max(1, config["BLOCK_M"] // max(N, M))
    key_blocks = cdiv(elements * M, config["BLOCK_M"])
    programs = cdiv(B, elements) * key_blocks * cdiv(C, config["BLOCK_C"])
    numbers = call.numbers() | {"elements": elements, "key_blocks": key_blocks}
    return value_grad_one_hot_kernel.prepare(programs, config, **numbers)
