# SPDX-License-Identifier: MIT
"""The metrics of a similarity (Eq. 3, section 3.2): constants of kernels, and sums over D."""

import triton
import triton.language as tl

METRICS = {"cosine": 0, "dot": 1, "euclidean": 2}

COSINE = tl.constexpr(0)
EUCLIDEAN = tl.constexpr(2)


@triton.jit
def sums_of_pairs(
    p_q,  # [rows, 1]: rows of query
    p_k,  # [rows or 1, n]: rows of key
    m_k,  # [rows or 1, n]
    D,
    METRIC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """q k of each pair, or -||q - k||^2, [rows, n], by one fixed float32 sum over D."""
    b_s = tl.zeros([p_q.shape[0], p_k.shape[1]], tl.float32)
    o_d = tl.arange(0, BLOCK_D)[None, None, :]
    for d in range(0, D, BLOCK_D):
        m_d = d + o_d < D
        b_q = tl.load(p_q[:, :, None] + (d + o_d), m_d, 0.0).to(tl.float32)
        b_k = tl.load(p_k[:, :, None] + (d + o_d), m_k[:, :, None] & m_d, 0.0).to(tl.float32)
        if METRIC == EUCLIDEAN:
            b_diff = b_q - b_k
            b_s -= tl.sum(b_diff * b_diff, 2)
        else:
            b_s += tl.sum(b_q * b_k, 2)
    return b_s


@triton.jit
def cosine(b_s, b_norm):
    """The cosine of products and the products of the norms, 0 where one of those is 0."""
    return tl.where(b_norm == 0.0, 0.0, tl.div_rn(b_s, tl.where(b_norm == 0.0, 1.0, b_norm)))
