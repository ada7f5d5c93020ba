# SPDX-License-Identifier: MIT
"""Gradients query by query as in query_side_small.py, where the neighbors of all queries are among
few candidates, rows X_c of V and u_c of key, but for one row of its own that a query may have.

A query i has candidate c at most once, as its neighbor j = slot_ic. What belongs to its neighbors
is a row of COLUMNS numbers, one for each candidate, and a number for its own row:

    drho_ic = G_i . (W_j * X_c), j = slot_ic        a product of G with W_j * X for each j, of which
                                                    a column is kept where the slot is j
    drho_i  = t_i . W_j, t_i = V[own_i] * G_i       as in query_side_small.py, for one neighbor
    dW_j    = sum_i rho_i t_i over own_i in slot j  the other part is in key_side_candidates.py

A program has ROWS queries. Of them it stores what key_side_candidates.py needs: dense slots, rho
and ds / ||q||, the own rows and their numbers; and whether all is finite.

W_j * X, t, and rho in products are rounded to 16 bits once; in float16 rows are first brought near
a power of two. Only a product over queries mixes their rows, that of dW: where it is not finite, or
where t has left the range of float16, the own rows' part is computed again in float32.
"""

import triton
import triton.language as tl

from .float16 import near_power, to_float32
from .integers import aligned, as_int64
from .inverse_norms import inverse_of_sum
from .launch import Kernel
from .metrics import COSINE
from .modulate import SOFTMAX, load_neighbors, modulate

# What a query has in p_numbers.
OWN_RHO = tl.constexpr(0)
OWN_UNIT = tl.constexpr(1)  # ds of the own row, cosine: over both norms, 0 where one is 0
OWN_ALONG = tl.constexpr(2)  # ds s of the own row over ||k||^2, 0 where a norm is 0
ALONG = tl.constexpr(3)  # the sum of ds s over all neighbors, over ||q||^2; 0 where that is 0
NUMBERS = tl.constexpr(4)
# Instead of an own row: none, and no neighbor at all.
NO_OWN = tl.constexpr(-1)
NO_NEIGHBOR = tl.constexpr(-2)


@triton.jit
def load_candidates(p_candidates, R, M, COLUMNS: tl.constexpr):
    """[COLUMNS] rows of key; -1 behind the last one, or for what is not a row."""
    o_c = tl.arange(0, COLUMNS)
    b_row = tl.load(p_candidates + o_c, o_c < R, -1)
    return tl.where((b_row >= 0) & (b_row < M), b_row, -1).to(tl.int32)


@triton.jit
def _find_columns(p_positions, b_candidate, b_row, m, COLUMNS: tl.constexpr):
    """The columns of neighbors, those of the candidates that they are; or -1."""
    tl.store(p_positions + tl.arange(0, 256), tl.full([256], -1, tl.int8))
    # Every thread may read what another one has stored.
    tl.debug_barrier()
    o_c = tl.arange(0, COLUMNS).to(tl.int8)
    tl.store(p_positions + b_candidate, o_c, b_candidate >= 0)
    tl.debug_barrier()
    return tl.load(p_positions + b_row, m, -1)


@triton.jit
def _find_slots(p_slots, o_r, b_column, COLUMNS: tl.constexpr):
    """The slots of candidates, [ROWS, COLUMNS], from the columns of slots; -1 if not chosen."""
    p_dense = p_slots + o_r[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(p_dense, tl.full([o_r.shape[0], COLUMNS], -1, tl.int16))
    tl.debug_barrier()
    o_j = tl.arange(0, b_column.shape[1]).to(tl.int16)
    p = p_slots + o_r[:, None] * COLUMNS + b_column
    tl.store(p, tl.broadcast_to(o_j[None, :], b_column.shape), b_column >= 0)
    tl.debug_barrier()
    return tl.load(p_dense).to(tl.int32)


@triton.jit
def _softmax_terms(b_s, m, scale):
    """Of [ROWS, SLOTS] similarities: the maximum, and the sum of exponentials, [ROWS]."""
    # A maximum over NaN does not matter: the sum is NaN.
    b_max = tl.max(tl.where(m & (b_s == b_s), scale * b_s, float("-inf")), 1)
    return b_max, tl.sum(tl.where(m, tl.exp(scale * b_s - b_max[:, None]), 0.0), 1)


@triton.jit
def _weighted(b_v, p_row, m_c, o_c):
    """W_j * X in 16 bits, and by what to multiply products with it, [1, COLUMNS]."""
    dtype: tl.constexpr = b_v.dtype
    b_w = tl.load(p_row + o_c, m_c, 0.0)[None, :]
    if dtype == tl.float16:
        b_v = b_v.to(tl.float32)
    b_x, unit = near_power(b_v * b_w, dtype, 4, OF_ROWS=True)
    if dtype == tl.float16:
        unit = tl.trans(unit)
    return b_x, unit


@triton.jit
def _transpose_weight(p_weight, p_weight_rows, C, K: tl.constexpr):
    """All of W: every program stores the same, and needs none of the others. 0, or NaN where W is
    not finite."""
    b_test = tl.zeros([2048], tl.float32)
    for start in range(0, C * K, 2048):
        o_w = start + tl.arange(0, 2048)
        m = o_w < C * K
        b_w = tl.load(p_weight + o_w, m, 0.0)
        tl.store(p_weight_rows + (o_w % K).to(tl.int64) * C + o_w // K, b_w, m)
        b_test += b_w.to(tl.float32) * 0.0
    # Every thread may read what another one has stored.
    tl.debug_barrier()
    return tl.sum(b_test, 0)


@triton.jit
def _differentiate_candidates(
    b_gs,  # rows of G, [ROWS, BLOCK_C] of each block of channels
    b_vs,  # rows of V, [COLUMNS, BLOCK_C]
    p_weight_rows,
    p_columns,
    first,  # channel
    C,
    rows,
    b_drho,
    m_s,
    K: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds what these channels have to drho, [ROWS, COLUMNS]."""
    dtype: tl.constexpr = b_gs[0].dtype
    if p_weight_rows is None:
        for i in tl.static_range(BLOCKS):
            b_drho += tl.where(m_s, tl.dot(b_gs[i], tl.trans(b_vs[i])), 0.0)
    else:
        o_k = tl.arange(0, b_drho.shape[1])
        for j in range(0, K):
            b_p = tl.zeros(b_drho.shape, tl.float32)
            for i in tl.static_range(BLOCKS):
                o_c = first + i * BLOCK_C + tl.arange(0, BLOCK_C)
                p_row = p_weight_rows + as_int64(j) * C
                b_x, unit = _weighted(b_vs[i], p_row, (o_c < C) | WHOLE, o_c)
                if dtype == tl.float16:
                    b_p += tl.dot(b_gs[i], tl.trans(b_x)) * unit
                else:
                    b_p = tl.dot(b_gs[i], tl.trans(b_x), b_p)
            m = tl.load(p_columns + as_int64(j) * rows)[:, None] == o_k[None, :]
            b_drho = tl.where(m, b_drho + b_p, b_drho)
    return b_drho


@triton.jit
def _load_weight(p_weight, o_c, m_c, dtype: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr):
    """[channels, SLOTS] of W; ones without one."""
    o_j = tl.arange(0, SLOTS)
    m = m_c[:, None] & (o_j < K)[None, :]
    b_w = m.to(dtype)
    if p_weight is not None:
        b_w = tl.load(p_weight + o_c[:, None] * K + o_j[None, :], m, 0.0)
    return b_w


@triton.jit
def _here(b_x):
    """b_x. Otherwise the compiler moves what it is a product of through shared memory to where
    tensor cores need it, twice, and multiplies there."""
    return tl.where((tl.arange(0, b_x.shape[1]) >= 0)[None, :], b_x, 0.0)


@triton.jit
def _differentiate_output(
    p_g,  # [ROWS]: rows of G
    m_n,  # [ROWS]: which have a neighbor
    p_v,  # the rows of V of this batch element
    p_weight,  # [C, 1, k], or None
    p_weight_rows,  # [k, C], or None
    p_columns,  # [ROWS] of slot 0
    b_candidate,  # [COLUMNS]
    m_s,  # [ROWS, COLUMNS]
    b_own,  # [ROWS]: own rows, or -1
    b_own_slot,
    b_own_rho,
    p_part,  # [k, C] of this program, or None
    C,
    rows,
    stride_vm,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """drho of candidates and of own rows, the own rows' part of dW; 0, or NaN where one of the
    latter two is not finite; and the same for rows of candidates."""
    dtype: tl.constexpr = p_g.dtype.element_ty
    o_j = tl.arange(0, SLOTS)
    m_j = o_j[None, :] == b_own_slot[:, None]
    b_drho = tl.zeros(m_s.shape, tl.float32)
    b_own_drho = tl.zeros([ROWS, SLOTS], tl.float32)
    b_test = tl.zeros([BLOCK_C, SLOTS], tl.float32)
    b_inputs = tl.zeros([m_s.shape[1], BLOCK_C], dtype)
    for first in range(0, C, BLOCKS * BLOCK_C):
        b_gs, b_vs = (), ()
        for block in tl.static_range(BLOCKS):
            o_c = first + block * BLOCK_C + tl.arange(0, BLOCK_C)
            m_c = o_c < C
            b_g = tl.load(p_g[:, None] + o_c[None, :], m_n[:, None] & m_c[None, :], 0.0)
            m = (b_own >= 0)[:, None] & m_c[None, :]
            b_t, unit = near_power(b_g, dtype, 4, OF_ROWS=True)
            b_t = b_t * tl.load(p_v + b_own[:, None] * stride_vm + o_c[None, :], m, 0.0)
            b_t = _here(b_t)
            b_w = _load_weight(p_weight, o_c, m_c, dtype, K, SLOTS)
            b_own_drho += tl.dot(b_t, b_w) * unit
            if p_part is not None:
                b_rho = tl.where(m_j, b_own_rho[:, None] * unit, 0.0)
                b_rho, unit_of_dw = near_power(b_rho, dtype, 14)
                b_dw = tl.dot(tl.trans(b_t), b_rho) * unit_of_dw
                b_test += b_dw * 0.0
                m = m_c[:, None] & (o_j < K)[None, :]
                tl.store(p_part + o_j[None, :] * C + o_c[:, None], b_dw, m)
            m = (b_candidate >= 0)[:, None] & m_c[None, :]
            b_v = tl.load(p_v + b_candidate[:, None] * stride_vm + o_c[None, :], m, 0.0)
            b_inputs += b_v * 0.0
            b_gs, b_vs = b_gs + (b_g,), b_vs + (b_v,)  # type: ignore[assignment]  # noqa: RUF005
        b_drho = _differentiate_candidates(
            b_gs,
            b_vs,
            p_weight_rows,
            p_columns,
            first,
            C,
            rows,
            b_drho,
            m_s,
            K,
            WHOLE,
            BLOCKS,
            BLOCK_C,
        )
    b_sum = tl.sum(tl.where(m_j, b_own_drho, 0.0), 1)
    test = tl.sum(tl.sum(b_test, 1), 0) + tl.sum(b_sum * 0.0, 0)
    return b_drho, b_sum, test, tl.sum(tl.sum(b_inputs.to(tl.float32), 1), 0)


@triton.jit
def _differentiate_own(
    p_g,  # as above
    p_v,
    p_weight,
    b_own,
    b_own_slot,
    b_own_rho,
    p_part,
    C,
    stride_vm,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The same of own rows in float32, without adding a product with 0 to another sum."""
    m_own = (b_own >= 0)[:, None]
    b_drho = tl.zeros([ROWS], tl.float32)
    for c0 in range(0, C, 16):
        o_c = c0 + tl.arange(0, 16)
        m = m_own & (o_c < C)[None, :]
        b_x = tl.load(p_g[:, None] + o_c[None, :], m, 0.0).to(tl.float32)
        b_x *= tl.load(p_v + b_own[:, None] * stride_vm + o_c[None, :], m, 0.0)
        b_p = b_x
        if p_weight is not None:
            b_p = b_x * tl.load(p_weight + o_c[None, :] * K + b_own_slot[:, None], m, 0.0)
        b_drho += tl.sum(tl.where(m, b_p, 0.0), 1)
        if p_part is not None:
            for slot in range(0, K):
                m_j = m & (b_own_slot == slot)[:, None]
                b_dw = tl.sum(tl.where(m_j, b_own_rho[:, None] * b_x, 0.0), 0)
                tl.store(p_part + as_int64(slot) * C + o_c, b_dw, o_c < C)
    return b_drho


@triton.jit
def _inverse_norms(
    p_q,  # [ROWS]: rows of query
    p_k,  # [ROWS]: own rows of key
    m_n,
    m_own,
    D,
    RESCALE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """1 / norm of these rows."""
    b_q = tl.zeros([p_q.shape[0], BLOCK_D], tl.float32)
    b_k = tl.zeros([p_q.shape[0], BLOCK_D], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        o_d = d0 + tl.arange(0, BLOCK_D)
        m_d = (o_d < D)[None, :]
        b_x = tl.load(p_q[:, None] + o_d[None, :], m_n[:, None] & m_d, 0.0)
        b_q += to_float32(b_x) * to_float32(b_x)
        b_x = tl.load(p_k[:, None] + o_d[None, :], m_own[:, None] & m_d, 0.0)
        b_k += to_float32(b_x) * to_float32(b_x)
    return (
        inverse_of_sum(tl.sum(b_q, 1), p_q, m_n, D, RESCALE, BLOCK_D),
        inverse_of_sum(tl.sum(b_k, 1), p_k, m_own, D, RESCALE, BLOCK_D),
    )


@triton.jit
def _store_inverse_norms(p_u, m_u, p_inverse, D, RESCALE: tl.constexpr, BLOCK_D: tl.constexpr):
    """1 / norm of candidates; and 0, or NaN where one is not finite."""
    b_u = tl.zeros([p_u.shape[0], BLOCK_D], tl.float32)
    for start_d in range(0, D, BLOCK_D):
        o_d = start_d + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_u[:, None] + o_d[None, :], m_u[:, None] & (o_d < D)[None, :], 0.0)
        b_u += to_float32(b_x) * to_float32(b_x)
    inverse = inverse_of_sum(tl.sum(b_u, 1), p_u, m_u, D, RESCALE, BLOCK_D)
    if p_inverse is not None:
        tl.store(p_inverse + tl.arange(0, p_u.shape[0]), inverse)
    return tl.sum(inverse * 0.0, 0)


@triton.jit
def _store_ranges(p_ranges, b_own, ROWS: tl.constexpr, TILE: tl.constexpr):
    """The first and the last own row of each TILE queries; M or more, and -1, without one."""
    b_first = tl.where(b_own >= 0, b_own, 2**30)
    b_last = tl.where(b_own >= 0, b_own, -1)
    o_t = tl.arange(0, ROWS // TILE)
    tl.store(p_ranges + 2 * o_t, tl.min(tl.reshape(b_first, [ROWS // TILE, TILE]), 1))
    tl.store(p_ranges + 2 * o_t + 1, tl.max(tl.reshape(b_last, [ROWS // TILE, TILE]), 1))


@Kernel
def query_side_candidates_kernel(
    p_grad,  # [B, N, C] contiguous
    p_value,  # [B, M, C]
    p_weight,  # [C, 1, k] contiguous, or None
    p_query,  # [B, N, D]
    p_key,  # [B, M, D]
    p_similarities,  # [B, N, k] float32, contiguous
    p_indices,  # [B, N, k] int64, contiguous
    p_direct,  # [B, N, k] float32, contiguous: the gradient of the returned similarities; or None
    p_candidates,  # [R] int64
    p_positions,  # [B * tiles, 256] int8: the column of a row of key, or -1
    p_columns,  # [B, k, rows] int8: the column of a neighbor, or -1
    p_slots,  # [B, rows, COLUMNS] int16: j of a candidate, or -1
    p_rho,  # [B, rows, COLUMNS] in 16 bits, in float16 2^14 rho; 0 where there is no slot
    p_factor,  # [B, rows, COLUMNS] in 16 bits, float32 for float16: ds_ic, cosine: ds_ic / ||q_i||
    p_own,  # [B, rows] int32: own row << 4 | slot; or NO_OWN, NO_NEIGHBOR
    p_numbers,  # [B, NUMBERS, rows] float32
    p_ranges,  # [B, rows / TILE, 2] int32: the first and the last own row
    p_along,  # [B * tiles, COLUMNS] float32: the sum of ds_ic s_ic over i
    p_inverse,  # [B, COLUMNS] float32: 1 / ||k_c||
    p_flags,  # [B * tiles, 2] float32: 0, or NaN where V and G, or query and key, are not finite
    p_weight_rows,  # [k, C], or None
    p_weight_part,  # [B * tiles + B, k, C] float32: of this kernel, then of the other; or None
    N,
    M,
    C,
    D,
    R,
    scale,
    B2,
    tiles,
    rows,  # tiles * ROWS
    stride_qb1,
    stride_qb2,
    stride_qn,
    stride_kb1,
    stride_kb2,
    stride_km,
    stride_vb1,
    stride_vb2,
    stride_vm,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    RHO: tl.constexpr,
    METRIC: tl.constexpr,
    RESCALE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SLOTS: tl.constexpr,
    WHOLE: tl.constexpr,  # whether blocks of channels are full
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of ROWS queries of a batch element."""
    stride_qb1 = aligned(stride_qb1, ALIGN)
    stride_qb2 = aligned(stride_qb2, ALIGN)
    stride_qn = aligned(stride_qn, ALIGN)
    stride_kb1 = aligned(stride_kb1, ALIGN)
    stride_kb2 = aligned(stride_kb2, ALIGN)
    stride_km = aligned(stride_km, ALIGN)
    stride_vb1 = aligned(stride_vb1, ALIGN)
    stride_vb2 = aligned(stride_vb2, ALIGN)
    stride_vm = aligned(stride_vm, ALIGN)
    tile = tl.program_id(0).to(tl.int64)
    b = tile // tiles
    # Row numbers have 32 bits, and what is multiplied by a stride no sign.
    i = (tile % tiles).to(tl.int32) * ROWS + tl.arange(0, ROWS)
    m_n = i < N
    p_similarities += b * N * K
    p_indices += b * N * K
    inputs = tl.full([], 0.0, tl.float32)
    if p_weight_rows is not None:
        inputs += _transpose_weight(p_weight, p_weight_rows, C, K)
    o_t = tile * ROWS + tl.arange(0, ROWS)
    o_j = tl.arange(0, SLOTS)
    b_candidate = load_candidates(p_candidates, R, M, COLUMNS)
    m_p = m_n[:, None] & (o_j < K)[None, :]
    o_p = i[:, None] * K + o_j[None, :]
    b_s, b_row, m_p = load_neighbors(p_similarities, p_indices, o_p, m_p, M)
    b_column = _find_columns(p_positions + tile * 256, b_candidate, b_row, m_p, COLUMNS)
    # Of a query that has more rows which are no candidates, the last one.
    b_own_slot = tl.max(tl.where(m_p & (b_column < 0), o_j[None, :], -1), 1)
    m_j = o_j[None, :] == b_own_slot[:, None]
    b_own = tl.max(tl.where(m_j, b_row.to(tl.int32), NO_OWN), 1)
    m_own = b_own >= 0
    b_own_s = tl.sum(tl.where(m_j, b_s, 0.0), 1)
    m_p &= m_j | (b_column >= 0)
    b_max, b_sum = _softmax_terms(b_s, m_p, scale)
    b_own_rho = modulate(b_own_s, m_own, b_max, b_sum, scale, RHO)
    p_column = p_columns + b * K * rows + i
    o_p = i[:, None] + o_j.to(tl.int64)[None, :] * rows
    tl.store(p_columns + b * K * rows + o_p, b_column, (o_j < K)[None, :])
    m_any = tl.max(m_p.to(tl.int32), 1) > 0
    b_slot = _find_slots(p_slots, o_t, b_column, COLUMNS)
    m_s = b_slot >= 0
    o_s = i[:, None] * K + b_slot
    b_s = tl.load(p_similarities + o_s, m_s, 0.0)
    b_rho = modulate(b_s, m_s, b_max[:, None], 1.0, scale, RHO)
    if RHO == SOFTMAX:
        # The sum of a query without neighbors is 0.
        b_rho = tl.where(m_s, b_rho * (1.0 / b_sum)[:, None], 0.0)
    p_part = None
    if p_weight_part is not None:
        p_part = p_weight_part + tile * K * C
    p_g = p_grad + b * N * C + i.to(tl.uint32) * as_int64(C)
    p_v = p_value + (b // B2) * stride_vb1 + (b % B2) * stride_vb2
    b_ds, b_own_ds, test, inputs_of_v = _differentiate_output(
        p_g,
        m_any,
        p_v,
        p_weight,
        p_weight_rows,
        p_column,
        b_candidate,
        m_s,
        b_own,
        b_own_slot,
        b_own_rho,
        p_part,
        C,
        rows,
        stride_vm,
        K,
        ROWS,
        SLOTS,
        WHOLE,
        BLOCKS,
        BLOCK_C,
    )
    if test != 0.0:
        # What other threads have stored is stored again.
        tl.debug_barrier()
        b_own_ds = _differentiate_own(
            p_g, p_v, p_weight, b_own, b_own_slot, b_own_rho, p_part, C, stride_vm, K, ROWS
        )
    # Of finite numbers, these sums and products are finite.
    b_total = tl.sum(b_rho * b_ds, 1) + b_own_rho * b_own_ds
    tl.store(p_flags + 2 * tile, tl.sum(b_total * 0.0, 0) + inputs + inputs_of_v)
    if RHO == SOFTMAX:
        b_ds = scale * b_rho * (b_ds - b_total[:, None])
        b_own_ds = scale * b_own_rho * (b_own_ds - b_total)
    if p_direct is not None:
        b_ds += tl.load(p_direct + b * N * K + o_s, m_s, 0.0)
        b_own_ds += tl.load(p_direct + b * N * K + i * K + b_own_slot, m_own, 0.0)
    b_ds, b_own_ds = tl.where(m_s, b_ds, 0.0), tl.where(m_own, b_own_ds, 0.0)
    b_along = b_ds * b_s
    b_own_along = b_own_ds * tl.where(m_own, b_own_s, 0.0)
    b_sum_along = tl.sum(b_along, 1) + b_own_along
    p_u = p_key + (b // B2) * stride_kb1 + (b % B2) * stride_kb2
    inverse, inverse_own = _inverse_norms(
        p_query + (b // B2) * stride_qb1 + (b % B2) * stride_qb2 + i.to(tl.uint32) * stride_qn,
        p_u + b_own * stride_km,
        m_n,
        m_own,
        D,
        RESCALE,
        BLOCK_D,
    )
    o_k = tl.arange(0, COLUMNS)
    flag = tl.sum((b_sum_along + b_own_along + inverse + inverse_own) * 0.0, 0)
    if tile % tiles == 0:
        p_i = None
        if METRIC == COSINE:
            p_i = p_inverse + b * COLUMNS
        flag += _store_inverse_norms(
            p_u + b_candidate * stride_km, b_candidate >= 0, p_i, D, RESCALE, BLOCK_D
        )
    tl.store(p_flags + 2 * tile + 1, flag)
    p_n = p_numbers + b * NUMBERS * rows + i
    if METRIC == COSINE:
        tl.store(p_along + tile * COLUMNS + o_k, tl.sum(b_along, 0))
        m = inverse == 0.0
        b_sum_along = tl.where(m, 0.0, inverse * (inverse * b_sum_along))
        b_ds = tl.where(m[:, None], 0.0, b_ds * inverse[:, None])
        m |= inverse_own == 0.0
        b_own_along = tl.where(m, 0.0, inverse_own * (inverse_own * b_own_along))
        b_own_ds = tl.where(m, 0.0, inverse * (inverse_own * b_own_ds))
        tl.store(p_n + ALONG * rows, b_sum_along)
    else:
        b_own_along = tl.zeros([ROWS], tl.float32)
    tl.store(p_n + OWN_ALONG * rows, b_own_along)
    tl.store(p_n + OWN_RHO * rows, b_own_rho)
    tl.store(p_n + OWN_UNIT * rows, b_own_ds)
    o_d = o_t[:, None] * COLUMNS + o_k[None, :]
    if p_rho.dtype.element_ty == tl.float16:
        b_rho = b_rho * 2.0**14
    tl.store(p_rho + o_d, b_rho.to(p_rho.dtype.element_ty))
    tl.store(p_factor + o_d, b_ds.to(p_factor.dtype.element_ty))
    b_code = tl.where(m_own, (b_own << 4) | b_own_slot, tl.where(m_any, NO_OWN, NO_NEIGHBOR))
    tl.store(p_own + o_t, b_code)
    _store_ranges(p_ranges + tile * (ROWS // TILE) * 2, b_own, ROWS, TILE)
