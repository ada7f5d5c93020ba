# SPDX-License-Identifier: MIT
"""Slips of the CUDA kernels."""

SLIPS = {
    "csrc/cuda/normalize.cuh": [
        (
            "A result = norm / scale <= A(kCosineEpsilon) ? A(0) : 1 / norm;",
            "A result = norm <= A(kCosineEpsilon) ? A(0) : 1 / norm;",
            "epsilon is not scaled",
        ),
        (
            "if (norm == kInfinity<A>) result = kNan<A>;",
            "",
            "infinite rows are normalized to zero",
        ),
    ],
    "csrc/cuda/select.cuh": [
        (
            "(!w.p.key_mask || w.p.key_mask[at.batch * w.p.m + own_row_])),",
            "(!w.p.key_mask || w.p.key_mask[own_row_])),",
            "whether the token itself may be a neighbor follows the mask of the first element",
        ),
        (
            "w.p.self_indices[at.batch * w.p.self_stride + at.row] : -1),",
            "w.p.self_indices[at.row] : -1),",
            "tokens of later batch elements are those of the first",
        ),
        (
            "list.push(precedes(last, key) ? key : no_key<A>());",
            "list.push(key);",
            "later rounds find the neighbors of the first again",
        ),
        (
            "if (counts && order > largest) largest = order;",
            "if (order > largest) largest = order;",
            "groups count keys that may not be neighbors",
        ),
        (
            "return row == own_row_ ? -1 : row;",
            "return row;",
            "the token itself is found twice",
        ),
    ],
    "csrc/cuda/select.cu": [
        (
            "w.chosen = p.k + p.exclude_self;",
            "w.chosen = p.k;",
            "an excluded token takes the place of a group",
        ),
        (
            "w.rows_stride = p.candidates_stride;",
            "w.rows_stride = 0;",
            "all batch elements have the candidates of the first",
        ),
        (
            "for (w.first = 0; w.first < blocks; w.first += at_once) {",
            "for (w.first = 0; w.first < at_once; w.first += at_once) {",
            "only the first of several launches runs",
        ),
    ],
    "csrc/cuda/modulate.cuh": [
        (
            "if (!missing(j) && logit(j) > largest) largest = logit(j);",
            "if (!missing(j) && logit(j) < largest) largest = logit(j);",
            "softmax subtracts nothing that keeps it finite",
        ),
        (
            "if (!isfinite(origin)) origin = 0;",
            "",
            "a gradient that is not finite makes all NaN",
        ),
        (
            "grad = p.scale * double(rho[entry]) * (double(grad_rho[entry]) - origin - mean);",
            "grad = p.scale * double(rho[entry]) * (double(grad_rho[entry]) - mean);",
            "the gradient through softmax is shifted",
        ),
    ],
    "csrc/cuda/aggregate.cuh": [
        (
            "return row / p.n * p.m + p.indices[entry];",
            "return p.indices[entry];",
            "all batch elements have the values of the first",
        ),
        (
            "if (!isfinite(sum)) {",
            "if (false) {",
            "products that only rho keeps finite overflow",
        ),
        (
            "A(widen(weight[c * p.k + j])) : A(1);",
            "A(widen(weight[c + j])) : A(1);",
            "depthwise weights are those of other channels",
        ),
    ],
    "csrc/cuda/pairs.cuh": [
        (
            "if (int(threadIdx.x) >= span) sum += sums[threadIdx.x - span];",
            "if (int(threadIdx.x) > span) sum += sums[threadIdx.x - span];",
            "keys begin one block too early",
        ),
        (
            "place = next[key] + Id(__popc(lanes & ((1u << lane()) - 1)));",
            "place = next[key] + Id(__popc(lanes & ((2u << lane()) - 1)));",
            "pairs of a key leave out its first place",
        ),
    ],
}
