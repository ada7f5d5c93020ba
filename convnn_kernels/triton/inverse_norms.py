# SPDX-License-Identifier: MIT
"""1 / norm of rows, for gradients of the cosine (Eq. 3).

A row whose norm is at most 1e-12 counts as zero: its inverse is 0. That of a row that is not finite
is NaN. Squares are summed as they are, and only where a sum is large, again for rows scaled by a
power of two. Squares too small for float32 belong to rows that count as zero, or do not matter.
"""

import triton
import triton.language as tl

# The largest sum of squares whose root is at most 1e-12 in float32.
_ZERO = tl.constexpr(1e-24)
_LARGE = tl.constexpr(1e36)
_SCALE = tl.constexpr(2.0**-80)


@triton.jit
def _root(b_sum):
    """1 / sqrt(b_sum); NaN for infinity."""
    return tl.where(b_sum < float("inf"), tl.rsqrt(b_sum), float("nan"))


@triton.jit
def inverse_norm(b_x, RESCALE: tl.constexpr):
    """For all channels of some rows, b_x [rows, D] float32."""
    b_sum = tl.sum(b_x * b_x, 1)
    b_inverse = _root(b_sum)
    if RESCALE:  # noqa: SIM102
        if tl.max(b_sum, 0) > _LARGE:
            b_x = b_x * _SCALE
            b_inverse = tl.where(b_sum > _LARGE, _root(tl.sum(b_x * b_x, 1)) * _SCALE, b_inverse)
    return tl.where(b_sum <= _ZERO, 0.0, b_inverse)


@triton.jit
def _sum_of_squares(p_x, m_r, D, scale, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    b_sum = tl.zeros(p_x.shape, tl.float32)
    for d in range(0, D, BLOCK_D):
        m = m_r[:, None] & (d + o_d < D)[None, :]
        b_x = tl.load(p_x[:, None] + (d + o_d)[None, :], m, 0.0).to(tl.float32) * scale
        b_sum += tl.sum(b_x * b_x, 1)
    return b_sum


@triton.jit
def inverse_of_sum(b_sum, p_x, m_r, D, RESCALE: tl.constexpr, BLOCK_D: tl.constexpr):
    """For rows in memory, from the sums of their squares, b_sum [rows]."""
    b_inverse = _root(b_sum)
    if RESCALE:  # noqa: SIM102
        if tl.max(b_sum, 0) > _LARGE:
            b_large = _sum_of_squares(p_x, m_r, D, _SCALE, BLOCK_D)
            b_inverse = tl.where(b_sum > _LARGE, _root(b_large) * _SCALE, b_inverse)
    return tl.where(b_sum <= _ZERO, 0.0, b_inverse)


@triton.jit
def inverse_norm_at(p_x, m_r, D, RESCALE: tl.constexpr, BLOCK_D: tl.constexpr):
    """For rows in memory: pointers to them, p_x [rows], and which there are, m_r [rows]."""
    b_sum = _sum_of_squares(p_x, m_r, D, 1.0, BLOCK_D)
    return inverse_of_sum(b_sum, p_x, m_r, D, RESCALE, BLOCK_D)


@triton.jit
def has_no_gradient(inverse, b_along):
    """Of rows, given 1 / norm and the sum of ds s over their pairs: whether a row counts as zero,
    or is not finite but in no pair, as padding is. In a pair, it has a sum of NaN."""
    return (inverse == 0.0) | ((inverse != inverse) & (b_along == 0.0))
