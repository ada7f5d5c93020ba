# SPDX-License-Identifier: MIT
"""Norms of rows, for the cosine (Eq. 3).

A row is first scaled by the power of two that brings its largest element near 1, which is exact and
keeps squares finite. A row whose norm is at most 1e-12 counts as zero. One program has ROWS rows.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import configs
from .integers import aligned
from .launch import Buffer, Kernel, Launch, cache_plans, workspace
from .tensors import Layout, alignment, cdiv


@Kernel
def norms_kernel(
    p_x,  # [B, N, D]
    p_norm,  # [B, N] float32: the norm of the scaled row, 0 where it counts as zero, or NaN
    p_scale,  # [B, N] float32: the power of two that brings the row near 1
    p_inverse,  # [B, N] float32: 1 / norm, or 0
    p_scaled,  # [B, N, D] contiguous: the scaled row, of the dtype of x; or None: do not scale
    rows,
    N,
    D,
    B2,
    stride_xb1,
    stride_xb2,
    stride_xn,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Norms of the rows of x."""
    stride_xb1 = aligned(stride_xb1, ALIGN)
    stride_xb2 = aligned(stride_xb2, ALIGN)
    stride_xn = aligned(stride_xn, ALIGN)
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < rows
    b = o_r // N
    p_row = p_x + (b // B2) * stride_xb1 + (b % B2) * stride_xb2 + (o_r % N) * stride_xn
    o_d = tl.arange(0, BLOCK_D)

    scale = tl.full([ROWS], 1.0, tl.float32)
    if p_scaled is not None:
        b_largest = tl.zeros([ROWS], tl.float32)
        for d in range(0, D, BLOCK_D):
            m_x = m_r[:, None] & (d + o_d < D)[None, :]
            b_x = tl.load(p_row[:, None] + (d + o_d)[None, :], m_x, 0.0).to(tl.float32)
            b_largest = tl.maximum(b_largest, tl.max(tl.abs(tl.where(b_x == b_x, b_x, 0.0)), 1))
        exponent = (b_largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
        # 2^-(exponent - 127), for which the exponent must be between 1 and 253.
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)

    b_sum = tl.zeros([ROWS], tl.float32)
    for d in range(0, D, BLOCK_D):
        m_x = m_r[:, None] & (d + o_d < D)[None, :]
        b_x = tl.load(p_row[:, None] + (d + o_d)[None, :], m_x, 0.0).to(tl.float32)
        b_x = b_x * scale[:, None]
        if p_scaled is not None:
            p_out = p_scaled + o_r[:, None] * D + (d + o_d)[None, :]
            tl.store(p_out, b_x.to(p_scaled.dtype.element_ty), m_x)
        b_sum += tl.sum(b_x * b_x, 1)
    norm = tl.sqrt_rn(b_sum)
    # Not finite: the unit vector is NaN.
    norm = tl.where(norm < float("inf"), norm, float("nan"))
    norm = tl.where(tl.div_rn(norm, scale) <= 1e-12, 0.0, norm)
    tl.store(p_norm + o_r, norm, m_r)
    tl.store(p_scale + o_r, scale, m_r)
    is_zero = norm == 0.0
    inverse = tl.where(is_zero, 0.0, tl.div_rn(1.0, tl.where(is_zero, 1.0, norm)))
    tl.store(p_inverse + o_r, inverse, m_r)


class Norms(NamedTuple):
    """What `norms_kernel` computes of rows [B, N, D], and the rows to multiply."""

    norm: Buffer
    scale: Buffer
    inverse: Buffer
    rows: Tensor | Buffer
    layout: Layout


@cache_plans
def plan_norms(X: Layout, arch: int) -> Launch:
    config = configs.norms(arch, X.D)
    rows = X.B * X.N
    return norms_kernel.prepare(
        cdiv(rows, config["ROWS"]),
        config,
        rows=rows,
        N=X.N,
        D=X.D,
        B2=X.B2,
        **X.strides("x"),
        ALIGN=alignment(X),
    )


def compute_norms(X: Tensor, layout: Layout, arch: int) -> Norms:
    """The norms of X. The range of float16 is too small for one to overflow: it is not scaled."""
    rows, is_scaled = layout.B * layout.N, X.dtype != torch.float16
    scaled_size = rows * layout.D if is_scaled else 0
    sizes = [(rows, torch.float32)] * 3
    norm, scale, inverse, scaled = workspace(X.device, *sizes, (scaled_size, X.dtype))
    plan_norms(layout, arch)(
        p_x=X,
        p_norm=norm,
        p_scale=scale,
        p_inverse=inverse,
        p_scaled=scaled if is_scaled else None,
    )
    if not is_scaled:
        return Norms(norm, scale, inverse, X, layout)
    return Norms(norm, scale, inverse, scaled, layout.contiguous())
