# SPDX-License-Identifier: MIT
"""Slips of the Triton kernels."""

SLIPS = {
    "convnn_kernels/triton/order.py": [
        (
            "bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)",
            "bits = x.to(tl.int32, bitcast=True)",
            "minus zero is below zero",
        ),
        (
            "return tl.where(x != x, ORDER_OF_NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))",
            "return bits ^ ((bits >> 31) & 0x7FFFFFFF)",
            "negative NaN is below every number",
        ),
        (
            "return (order.to(tl.int64) << 32) | (0xFFFFFFFF - index)",
            "return (order.to(tl.int64) << 32) | index",
            "ties go to the higher row",
        ),
        (
            "b_index = tl.where(b_missing, missing_index, b_index)",
            "",
            "missing neighbors keep an index",
        ),
    ],
    "convnn_kernels/triton/norms.py": [
        (
            "norm = tl.where(norm <= 1e-12 * scale, 0.0, norm)",
            "norm = tl.where(norm <= 1e-12, 0.0, norm)",
            "epsilon is not scaled",
        ),
        (
            'norm = tl.where(norm < float("inf"), norm, float("nan"))',
            "",
            "infinite rows have an infinite norm",
        ),
        (
            "p_row = p_x + (b // B2) * stride_b1 + (b % B2) * stride_b2 + (o_r % N) * stride_n",
            "p_row = p_x + (b // B2) * stride_b1 + (o_r % N) * stride_n",
            "the second leading dimension has no stride",
        ),
        (
            "exponent = tl.minimum(tl.maximum(exponent, 1), 253)",
            "exponent = tl.minimum(exponent, 253)",
            "the scale of a row of denormal numbers is infinite",
        ),
    ],
    "convnn_kernels/triton/modulate.py": [
        (
            "b_sum += tl.sum(tl.where(m, tl.exp(scale * b_s - b_max[:, None]), 0.0), 1)",
            "b_sum = tl.sum(tl.where(m, tl.exp(scale * b_s - b_max[:, None]), 0.0), 1)",
            "softmax sums the last block of neighbors only",
        ),
        (
            "b_grad = scale * tl.load(p_rho + o, m, 0.0) * (b_grad - b_sum[:, None])",
            "b_grad = tl.load(p_rho + o, m, 0.0) * (b_grad - b_sum[:, None])",
            "the gradient through softmax lacks the scale",
        ),
        (
            'return b_s, b_row, (b_s != float("-inf")) & (b_row >= 0) & (b_row < M)',
            'return b_s, b_row, b_s != float("-inf")',
            "indices out of range are read",
        ),
    ],
    "convnn_kernels/triton/sweep.py": [
        (
            "threshold -= tl.abs(threshold) * 9.5e-7 + 7.5e-37",
            "threshold += tl.abs(threshold) * 9.5e-7 + 7.5e-37",
            "neighbors near the threshold are lost",
        ),
        (
            "m_short = m_n & (tl.max(b_count, 1) > CAP)",
            "m_short = m_n & (tl.max(b_count, 1) > 2 * CAP)",
            "a queue that has overflowed passes for whole",
        ),
        (
            'b_x = tl.where(o_c < row_end[:, None], b_x, float("-inf"))',
            "",
            "the threshold counts columns behind the range",
        ),
    ],
    "convnn_kernels/triton/inverse_list.py": [
        (
            "rank = tl.sum((m_same & (o_p[:, None] < o_p[None, :])).to(tl.int32), 0)",
            "rank = tl.sum((m_same & (o_p[:, None] <= o_p[None, :])).to(tl.int32), 0)",
            "pairs of a key leave out its first place",
        ),
        (
            "m_same = (b_row[:, None] == b_row[None, :]) & m[:, None]",
            "m_same = b_row[:, None] == b_row[None, :]",
            "pairs that there are not take places",
        ),
    ],
}
