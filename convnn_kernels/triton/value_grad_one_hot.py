# SPDX-License-Identifier: MIT
"""The gradients of value and rho under a dense weight (Eq. 6) in 16 bits, where there are few keys.

    P_j      = G W_j^T              [queries, C], with G the gradient of the output
    dV       = sum_j T_j rho_j P_j  T_j [keys, queries] is 1 where the key is I_ij, else 0
    drho_ij  = sum_c P_j[i, c] V[I_ij, c]

The first two are products on tensor cores. The second one multiplies all keys of a batch element
with all of its queries, most of them by 0; with few keys, that takes less than finding the pairs of
each key (value_grad.py). Nothing is added atomically, and there is no list.

A program has the keys of one or several whole batch elements, or a block of those of one, and a
block of channels. dV stays in registers, in float32. The program goes over all queries of its batch
elements, a block at a time, whose G is read once for all j if one block has all outputs. P_j and
T_j never leave the chip. rho_j P_j is rounded to 16 bits once, as the sum over all outputs. drho is
not rounded: of the pairs of its own keys, a program stores the sum over its own channels, and
modulate.py adds these parts.

0 times what is not finite is NaN. Where dV has become NaN or infinite, the program starts again and
adds rows of P_j that are not finite, also because they have left the range of float16, one by one,
in float32 and each to its own key.
"""

import triton
import triton.language as tl

from . import configs
from .aggregate import begin_of_value
from .aggregation import Aggregation
from .integers import aligned, as_int64
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
def _product(
    p_g,  # [queries, 1]: rows of G
    b_g,  # [queries, BLOCK_O]: these rows, with ONE_BLOCK_O; else None
    p_w,  # [1, channels]: rows of W_j
    m_n,  # [queries]
    m_c,  # [channels]
    O,
    BLOCK_O: tl.constexpr,
    ONE_BLOCK_O: tl.constexpr,
):
    """P_j [queries, channels] float32."""
    if ONE_BLOCK_O:
        o_o = tl.arange(0, BLOCK_O)
        b_w = tl.load(p_w + o_o[:, None], (o_o < O)[:, None] & m_c[None, :], 0.0)
        b_p = tl.dot(b_g, b_w)
    else:
        b_p = tl.zeros([m_n.shape[0], m_c.shape[0]], tl.float32)
        for o0 in range(0, O, BLOCK_O):
            o_o = o0 + tl.arange(0, BLOCK_O)
            m_o = o_o < O
            b_block = tl.load(p_g + o_o[None, :], m_n[:, None] & m_o[None, :], 0.0)
            b_w = tl.load(p_w + o_o[:, None], m_o[:, None] & m_c[None, :], 0.0)
            b_p = tl.dot(b_block, b_w, b_p)
    return b_p


@triton.jit
def _store_rho_grad(
    p_part,  # [queries]: where this part of drho_ij goes
    p_v,  # [queries]: V of their batch elements
    b_p,  # [queries, channels] float32: P_j
    b_row,  # [queries]: I_ij, or -1
    b_key,  # [queries]: the same among the keys of the program, if it is one of these
    m_n,
    o_c,  # [channels]
    m_c,
    stride_vm,
    is_first,  # whether these keys are the first ones
    BLOCK_M: tl.constexpr,
):
    """Of each pair whose key is one of these: the part of drho of these channels. A missing
    neighbor belongs to the first keys."""
    m = (b_row >= 0) & (b_key >= 0) & (b_key < BLOCK_M)
    p = (p_v + b_row.to(tl.int64) * stride_vm)[:, None] + o_c[None, :]
    b_v = tl.load(p, m[:, None] & m_c[None, :], 0.0).to(tl.float32)
    b_drho = tl.where(m, tl.sum(b_p * b_v, 1), 0.0)
    tl.store(p_part, b_drho, m_n & (m | ((b_row < 0) & is_first)))


@triton.jit
def _sum_pairs(
    p_grad,
    p_weight,
    p_rows,
    p_rho,
    p_value,
    p_part,  # drho of this block of channels [rows, k], or None
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
    B2,
    stride_vb1,
    stride_vb2,
    stride_vm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    ONE_BLOCK_O: tl.constexpr,
    ONE_BY_ONE: tl.constexpr,
):
    """dV [BLOCK_M, BLOCK_C] float32. ONE_BY_ONE: what is not finite is added without a product."""
    dtype: tl.constexpr = p_weight.dtype.element_ty
    o_m = tl.arange(0, BLOCK_M)
    o_o = tl.arange(0, BLOCK_O)
    m_c = o_c < C
    b_dv = tl.zeros([BLOCK_M, o_c.shape[0]], tl.float32)
    for start in range(0, queries, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < queries
        o_r = first_row + o_n
        # Where the keys of a query's batch element begin.
        begin = (o_n // N * M.to(tl.int64)).to(tl.int32) - first_key
        p_g = p_grad + o_r[:, None] * O
        b_g = None
        if ONE_BLOCK_O:
            b_g = tl.load(p_g + o_o[None, :], m_n[:, None] & (o_o < O)[None, :], 0.0)
        if p_part is not None:
            p_v = begin_of_value(p_value, first_row, o_n, N, B2, stride_vb1, stride_vb2)
        for step in range(0, k):
            j = as_int64(step)
            b_row = tl.load(p_rows + j * rows + o_r, m_n, -1)
            b_key = tl.where(b_row >= 0, begin + b_row, -1)
            b_t = tl.where(o_m[:, None] == b_key[None, :], 1.0, 0.0).to(dtype)
            p_w = p_weight + (o_c + j * C)[None, :] * O
            b_p = _product(p_g, b_g, p_w, m_n, m_c, O, BLOCK_O, ONE_BLOCK_O)
            if p_part is not None:
                p = p_part + o_r * k + j
                is_first = first_key == 0
                _store_rho_grad(
                    p, p_v, b_p, b_row, b_key, m_n, o_c, m_c, stride_vm, is_first, BLOCK_M
                )
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
    p_value,  # [B, M, C]; None without drho
    p_rho_part,  # [blocks of channels, B, N, k] float32: parts of drho; or None
    p_value_grad,  # [B, M, C] contiguous
    rows,
    N,
    M,
    C,
    O,
    k,
    B2,
    elements,
    key_blocks,
    stride_vb1,
    stride_vb2,
    stride_vm,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ONE_BLOCK_O: tl.constexpr,
):
    """dV of BLOCK_M keys of `elements` batch elements, which are all of them unless it is one, and
    BLOCK_C channels; and what these channels add to drho of the pairs of these keys."""
    stride_vb1 = aligned(stride_vb1, ALIGN)
    stride_vb2 = aligned(stride_vb2, ALIGN)
    stride_vm = aligned(stride_vm, ALIGN)
    pid = tl.program_id(0).to(tl.int64)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    block, c = pid // channel_blocks, pid % channel_blocks
    first = (block // key_blocks) * elements
    first_row = first * N
    first_key = (block % key_blocks).to(tl.int32) * BLOCK_M
    # The last program may have fewer.
    queries = tl.minimum(elements * N, rows - first_row).to(tl.int32)
    o_c = c * BLOCK_C + tl.arange(0, BLOCK_C)
    p_part = None
    if p_rho_part is not None:
        p_part = p_rho_part + c * rows * k
    b_dv = _sum_pairs(
        p_grad,
        p_weight,
        p_rows,
        p_rho,
        p_value,
        p_part,
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
        B2,
        stride_vb1,
        stride_vb2,
        stride_vm,
        BLOCK_M,
        BLOCK_N,
        BLOCK_O,
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
            None,
            None,
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
            B2,
            stride_vb1,
            stride_vb2,
            stride_vm,
            BLOCK_M,
            BLOCK_N,
            BLOCK_O,
            ONE_BLOCK_O,
            True,
        )
    o_m = first_key + tl.arange(0, BLOCK_M)
    m = (o_m < queries // N * M)[:, None] & (o_c < C)[None, :]
    p = p_value_grad + (first * M + o_m)[:, None] * C + o_c[None, :]
    tl.store(p, b_dv.to(p_value_grad.dtype.element_ty), m)


def rho_parts(call: Aggregation) -> int:
    """In how many parts the kernel leaves drho; 0 if they would take too much memory."""
    parts = cdiv(call.V.D, _config(call, True)["BLOCK_C"])
    return parts if 4 * parts * call.rows * call.k <= configs.WORKSPACE // 2 else 0


def prepare_value_grad_one_hot(call: Aggregation, rho_parts: int) -> Launch:
    """With so many parts of drho; one is the gradient of rho itself."""
    B, N, M, C = call.V.B, call.N, call.V.N, call.V.D
    config = _config(call, rho_parts > 0)
    elements = max(1, config["BLOCK_M"] // max(N, M))
    key_blocks = cdiv(elements * M, config["BLOCK_M"])
    programs = cdiv(B, elements) * key_blocks * cdiv(C, config["BLOCK_C"])
    numbers = call.numbers() | {"elements": elements, "key_blocks": key_blocks}
    names: dict[str, str | None] = {}
    if rho_parts == 0:
        names = {"p_value": None, "p_rho_part": None}
    elif rho_parts == 1:
        names["p_rho_part"] = "p_rho_grad"
    return value_grad_one_hot_kernel.prepare(programs, config, names, **numbers)


def _config(call: Aggregation, with_rho: bool) -> configs.Config:
    return configs.value_grad_one_hot(call.arch, call.V.N, call.V.D, call.O, with_rho)
