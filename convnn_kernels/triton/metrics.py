# SPDX-License-Identifier: MIT
"""The metrics of a similarity (Eq. 3, section 3.2) as constants of kernels."""

import triton.language as tl

METRICS = {"cosine": 0, "dot": 1, "euclidean": 2}

COSINE = tl.constexpr(0)
EUCLIDEAN = tl.constexpr(2)
