# SPDX-License-Identifier: MIT
"""Norms of the rows of query and key, for the cosine (Eq. 3).

A row is first scaled by the power of two that brings its largest element near 1, which is exact and
keeps squares finite. A row whose norm is at most 1e-12 counts as zero. One program has ROWS rows,
of key or of query.
"""

from itertools import chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import configs
from .integers import aligned
from .launch import Buffer, Kernel, Launch
from .tensors import Layout, alignment, cdiv

_NORMS = ("norm", "scale", "inverse")


@triton.jit
def norms_of_rows(
    p_row,  # [ROWS]: rows of D elements
    p_to,  # [ROWS]: where the scaled rows go, zero if they count as zero; or None
    m_r,  # [ROWS]: which rows there are
    m_to,  # [ROWS]: which rows are stored
    D,
    RESCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Norms of the scaled rows, 0 where one counts as zero, or NaN; and the powers of two."""
    o_d = tl.arange(0, BLOCK_D)
    scale = tl.full([ROWS], 1.0, tl.float32)
    m_x = m_r[:, None] & (o_d < D)[None, :]
    b_first = tl.load(p_row[:, None] + o_d[None, :], m_x, 0.0)
    if RESCALE:
        # A maximum ignores NaN.
        b_largest = tl.max(tl.abs(b_first.to(tl.float32)), 1)
        for d in range(BLOCK_D, D, BLOCK_D):
            m_x = m_r[:, None] & (d + o_d < D)[None, :]
            b_x = tl.load(p_row[:, None] + (d + o_d)[None, :], m_x, 0.0).to(tl.float32)
            b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_x), 1))
        exponent = (b_largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
        # 2^-(exponent - 127), for which the exponent must be between 1 and 253.
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)

    b_x = b_first.to(tl.float32) * scale[:, None]
    b_sum = tl.sum(b_x * b_x, 1)
    for d in range(BLOCK_D, D, BLOCK_D):
        m_x = m_r[:, None] & (d + o_d < D)[None, :]
        b_x = tl.load(p_row[:, None] + (d + o_d)[None, :], m_x, 0.0).to(tl.float32)
        b_x = b_x * scale[:, None]
        b_sum += tl.sum(b_x * b_x, 1)
    norm = tl.sqrt_rn(b_sum)
    # Not finite: the unit vector is NaN.
    norm = tl.where(norm < float("inf"), norm, float("nan"))
    norm = tl.where(norm <= 1e-12 * scale, 0.0, norm)
    if p_to is not None:
        # Products of a row that counts as zero are zero.
        b_scale = tl.where(norm == 0.0, 0.0, scale)[:, None]
        for d in range(0, D, BLOCK_D):
            m_x = m_r[:, None] & (d + o_d < D)[None, :]
            b_row = b_first
            if d > 0:
                b_row = tl.load(p_row[:, None] + (d + o_d)[None, :], m_x, 0.0)
            b_row = (b_row.to(tl.float32) * b_scale).to(p_to.dtype.element_ty)
            tl.store(p_to[:, None] + (d + o_d)[None, :], b_row, m_to[:, None] & m_x)
    return norm, scale


@triton.jit
def _row_norms(
    program,
    p_x,  # [B, N, D]
    p_norm,  # [B, N] float32: the norm of the scaled row, 0 where it counts as zero, or NaN
    p_scale,  # [B, N] float32: the power of two that brings the row near 1
    p_inverse,  # [B, N] float32: 1 / norm, or 0
    p_scaled,  # [B, N, D] contiguous: the scaled row, of the dtype of x; or None
    rows,
    N,
    D,
    B2,
    stride_b1,
    stride_b2,
    stride_n,
    ALIGN: tl.constexpr,
    RESCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    stride_b1 = aligned(stride_b1, ALIGN)
    stride_b2 = aligned(stride_b2, ALIGN)
    stride_n = aligned(stride_n, ALIGN)
    o_r = program * ROWS + tl.arange(0, ROWS)
    m_r = o_r < rows
    b = o_r // N
    p_row = p_x + (b // B2) * stride_b1 + (b % B2) * stride_b2 + (o_r % N) * stride_n
    p_to = p_scaled
    if p_scaled is not None:
        p_to = p_scaled + o_r * D
    norm, scale = norms_of_rows(p_row, p_to, m_r, m_r, D, RESCALE, ROWS, BLOCK_D)
    tl.store(p_norm + o_r, norm, m_r)
    tl.store(p_scale + o_r, scale, m_r)
    is_zero = norm == 0.0
    inverse = tl.where(is_zero, 0.0, tl.div_rn(1.0, tl.where(is_zero, 1.0, norm)))
    tl.store(p_inverse + o_r, inverse, m_r)


@Kernel
def norms_kernel(
    p_query,  # [B, N, D]
    p_key,  # [B, M, D]
    p_query_norm,  # [B, N] float32, as p_norm above; those of query are None where it is key
    p_key_norm,  # [B, M] float32
    p_query_scale,
    p_key_scale,
    p_query_inverse,
    p_key_inverse,
    p_query_scaled,  # [B, N, D] contiguous, or None
    p_key_scaled,  # [B, M, D] contiguous, or None
    query_rows,  # B * N
    key_rows,  # B * M
    N,
    M,
    D,
    B2,
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_kb1,
    stride_kb2,
    stride_km,
    ALIGN: tl.constexpr,
    RESCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Norms of ROWS rows of key; the remaining programs compute those of query."""
    pid = tl.program_id(0).to(tl.int64)
    key_programs = tl.cdiv(key_rows, ROWS)
    if pid < key_programs:
        _row_norms(
            pid,
            p_key,
            p_key_norm,
            p_key_scale,
            p_key_inverse,
            p_key_scaled,
            key_rows,
            M,
            D,
            B2,
            stride_kb1,
            stride_kb2,
            stride_km,
            ALIGN,
            RESCALE,
            ROWS,
            BLOCK_D,
        )
    elif p_query_norm is not None:
        _row_norms(
            pid - key_programs,
            p_query,
            p_query_norm,
            p_query_scale,
            p_query_inverse,
            p_query_scaled,
            query_rows,
            N,
            D,
            B2,
            stride_qb1,
            stride_qb2,
            stride_qn,
            ALIGN,
            RESCALE,
            ROWS,
            BLOCK_D,
        )


class Norms(NamedTuple):
    """The norms of query and key: how to compute them, and where other kernels find them."""

    launches: tuple[Launch, ...]
    buffers: dict[str, Buffer]
    # The pointers of other kernels, by parameter.
    names: dict[str, str | None]


# Of a metric that has no norms.
_NONE = Norms((), {}, {f"p_{name}_{what}": None for name in ("query", "key") for what in _NORMS})


def prepare_norms(
    Q: Layout,
    K: Layout,
    dtype: torch.dtype,
    metric: str,
    one_tensor: bool,
    scale_rows: bool,
    arch: int,
) -> Norms:
    """Norms for the cosine, once if query and key are one tensor.

    scale_rows: other kernels read scaled rows, contiguous, in the place of query and key.
    """
    if metric != "cosine":
        return _NONE
    config = configs.norms(arch, K.D)
    layouts = {"key": K} if one_tensor else {"key": K, "query": Q}
    wanted = (*_NORMS, "scaled") if scale_rows else _NORMS
    buffers: dict[str, Buffer] = {}
    names: dict[str, str | None] = {}
    own_names: dict[str, str | None] = {}
    for name in ("key", "query"):
        source = name if name in layouts else "key"
        for what in (*_NORMS, "scaled"):
            if name in layouts and what in wanted:
                buffers[f"p_{name}_{what}"] = _buffer(what, layouts[name], dtype)
            else:
                own_names[f"p_{name}_{what}"] = None
        names |= {f"p_{name}_{what}": f"p_{source}_{what}" for what in _NORMS}
        if scale_rows:
            names[f"p_{name}"] = f"p_{source}_scaled"
    if scale_rows and any(X.distinct() != X for X in layouts.values()):
        of_each = (_prepare_shared(name, X, dtype, config) for name, X in layouts.items())
        return Norms(tuple(chain(*of_each)), buffers, names)
    launch = norms_kernel.prepare(
        sum(cdiv(X.B * X.N, config["ROWS"]) for X in layouts.values()),
        config,
        own_names,
        query_rows=0 if one_tensor else Q.B * Q.N,
        key_rows=K.B * K.N,
        N=Q.N,
        M=K.N,
        D=K.D,
        B2=K.B2,
        **Q.strides("q"),
        **K.strides("k"),
        ALIGN=alignment(Q, K),
        RESCALE=rescales(dtype),
    )
    return Norms((launch,), buffers, names)


def _buffer(what: str, X: Layout, dtype: torch.dtype) -> Buffer:
    if what != "scaled":
        return X.B * X.N, torch.float32
    once = X.distinct()
    return once.B * once.N * once.D, dtype


def _prepare_shared(
    name: str, X: Layout, dtype: torch.dtype, config: configs.Config
) -> tuple[Launch, Launch]:
    """Launches for a query or key of which batch elements share rows.

    The first scales each distinct row once. The second computes the norms, of which every batch
    element has its own, because that is where kernels look for them.
    """
    only_one: dict[str, str | None] = {"p_query": f"p_{name}", "p_key": f"p_{name}"}
    for what in (*_NORMS, "scaled"):
        only_one |= {f"p_key_{what}": f"p_{name}_{what}", f"p_query_{what}": None}

    def prepare(X: Layout, names: dict[str, str | None]) -> Launch:
        return norms_kernel.prepare(
            cdiv(X.B * X.N, config["ROWS"]),
            config,
            names,
            query_rows=0,
            key_rows=X.B * X.N,
            N=X.N,
            M=X.N,
            D=X.D,
            B2=X.B2,
            **X.strides("q"),
            **X.strides("k"),
            ALIGN=alignment(X),
            RESCALE=rescales(dtype),
        )

    return prepare(X.distinct(), only_one), prepare(X, only_one | {"p_key_scaled": None})


def rescales(dtype: torch.dtype) -> bool:
    """Whether rows are scaled. The range of float16 is too small for a norm to overflow."""
    return dtype != torch.float16
