# SPDX-License-Identifier: MIT
"""Convolutional Nearest Neighbors as functions of tensors."""

from typing import Any

import torch
from torch import Tensor

from convnn_kernels import ops, torch_internals


def convnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    candidates: Tensor | None = None,
    self_indices: Tensor | None = None,
    key_mask: Tensor | None = None,
    metric: str = "cosine",
    rho: str = "softmax",
    scale: float = 1.0,
    order: str = "similarity",
) -> Tensor:
    r"""Convolves the k nearest neighbors of every query among the keys (Algorithm 1).

    For query row :math:`i` with similarities :math:`S_{ij}` (Eq. 3), let
    :math:`I_i = (I_{i1}, \ldots, I_{ik})` be the rows of the k most similar keys (Eq. 4, 5). Then

    .. math::
        y_i[o] = b[o] + \sum_{j=1}^{k} \sum_c W[o, c, j]\, \rho_{ij}\, V[I_{ij}, c]
        \qquad \text{(Eq. 6)}

    where :math:`\rho` weights each neighbor by its similarity (section 4.1). With a depthwise
    weight, :math:`y_i[c] = b[c] + \sum_j W[c, 0, j]\, \rho_{ij}\, V[I_{ij}, c]`; without a weight,
    :math:`y_i = b + \sum_j \rho_{ij}\, V[I_{ij}]`. No N×M matrix is ever stored.

    The leading dimensions ``...`` are batch, heads or anything else; they must be equal in all
    tensors that have them.

    Args:
        query: [..., N, D]; float64, float32, float16 or bfloat16; any strides.
        key: [..., M, D], same dtype as query.
        value: [..., M, C]; float64, float32, float16 or bfloat16, which may differ from query's.
        k: the number of neighbors, from 1 to M, or to R with candidates.
        weight: laid out as ``nn.Conv1d.weight`` with kernel size k: [O, C, k] dense or [C, 1, k]
            depthwise; same dtype as value; shared by all leading dimensions.
        bias: [O] ([C] with a depthwise weight or none), same dtype as value.
        candidates: [R] int64, the rows of key that may be neighbors (section 4.2.2), distinct and
            in any order. Duplicates are not detected on CUDA; the result is then undefined.
        self_indices: [N] int64, the row of key that is the token itself, for each query. It is
            always a neighbor, even if it is not a candidate, and is never counted twice.
        key_mask: [..., M] bool, False where a key may not be a neighbor, not even of itself.
        metric: "cosine": :math:`q \cdot k / (\max(\|q\|, \epsilon) \max(\|k\|, \epsilon))` with
            :math:`\epsilon = 10^{-12}`; "dot": :math:`q \cdot k`; "euclidean":
            :math:`-\|q - k\|^2`.
        rho: "softmax": softmax of scale times similarity, over the k neighbors; "ones": 1, so
            query and key receive no gradient; "similarity": the similarity itself.
        scale: a finite number; must be 1.0 unless rho="softmax".
        order: which neighbor meets which of the k taps of weight. "similarity": nearest first
            (self before all others), ties by row; "index": by row of key, as in a convolution.

    Returns:
        [..., N, O], or [..., N, C] with a depthwise weight or none; same dtype as value. Where
        fewer than k keys are allowed, the missing neighbors contribute nothing; a query without
        neighbors gives the bias, or zero. A similarity that overflows to -inf counts as missing.
        Exception: with a dense weight that contains inf or NaN, a missing neighbor gives NaN,
        except with the backend "cuda".

    Raises:
        RuntimeError: if an argument does not have the shape, dtype, device or values above; the
            message names it, what was expected and what was passed. On CUDA, values of index
            tensors are not checked unless ``CONVNN_CHECK_INDICES=1``.
    """
    output, _, _ = torch_internals.call(
        ops.forward,
        query,
        key,
        value,
        k,
        weight,
        bias,
        candidates,
        self_indices,
        key_mask,
        metric,
        rho,
        scale,
        order,
    )
    return output


def select_neighbors(
    query: Tensor,
    key: Tensor,
    k: int,
    candidates: Tensor | None = None,
    self_indices: Tensor | None = None,
    key_mask: Tensor | None = None,
    metric: str = "cosine",
    order: str = "similarity",
) -> tuple[Tensor, Tensor]:
    r"""Finds the k nearest neighbors of every query among the keys (Eq. 3, 4, 5).

    Neighbors are the keys with the highest similarity; ties go to the lower row. NaN ranks above
    every number, so that it shows up in the result. The similarities are differentiable with
    respect to query and key; the choice of neighbors is not.

    Args:
        query: [..., N, D]; float64, float32, float16 or bfloat16; any strides.
        key: [..., M, D], same dtype and leading dimensions as query.
        k: the number of neighbors, from 1 to M, or to R with candidates.
        candidates: [R] int64, the rows of key that may be neighbors (section 4.2.2), distinct.
            Duplicates are not detected on CUDA; the result is then undefined.
        self_indices: [N] int64, the row of key that is the token itself, for each query: always a
            neighbor, and the first one with order="similarity".
        key_mask: [..., M] bool, False where a key may not be a neighbor.
        metric: "cosine", "dot" or "euclidean", as in :func:`convnn`.
        order: "similarity": nearest first; "index": by row of key.

    Returns:
        similarities, [..., N, k] float32 (float64 if query is), and indices, [..., N, k] int64:
        rows of key, even with candidates. Where fewer than k keys are allowed, the missing
        neighbors come last, with similarity -inf and index 0.

    Raises:
        RuntimeError: if an argument does not have the shape, dtype, device or values above; the
            message names it, what was expected and what was passed. On CUDA, values of index
            tensors are not checked unless ``CONVNN_CHECK_INDICES=1``.
    """
    return torch_internals.call(
        ops.select, query, key, k, candidates, self_indices, key_mask, metric, order
    )


def aggregate_neighbors(
    value: Tensor,
    similarities: Tensor,
    indices: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rho: str = "softmax",
    scale: float = 1.0,
) -> Tensor:
    r"""Weights the given neighbors by their similarity and convolves them (Eq. 6).

    For query row :math:`i` with neighbors :math:`I_{i1}, \ldots, I_{ik}`,
    :math:`y_i[o] = b[o] + \sum_j \sum_c W[o, c, j]\, \rho_{ij}\, V[I_{ij}, c]`, with the same
    forms of weight and :math:`\rho` as in :func:`convnn`. The [..., N, k, C] tensor of neighbors is
    never stored.

    Args:
        value: [..., M, C]; float64, float32, float16 or bfloat16; any strides.
        similarities: [..., N, k], float32 or float64, same leading dimensions as value. -inf marks
            a missing neighbor, which contributes nothing, with the exception that :func:`convnn`
            names.
        indices: [..., N, k] int64, rows of value.
        weight: [O, C, k] dense or [C, 1, k] depthwise, same dtype as value.
        bias: [O] ([C] with a depthwise weight or none), same dtype as value.
        rho: "softmax", "ones" or "similarity", as in :func:`convnn`. With "ones", similarities
            receive no gradient.
        scale: a finite number; must be 1.0 unless rho="softmax".

    Returns:
        [..., N, O], or [..., N, C] with a depthwise weight or none; same dtype as value.

    Raises:
        RuntimeError: if an argument does not have the shape, dtype, device or values above; the
            message names it, what was expected and what was passed. On CUDA, values of indices
            are not checked unless ``CONVNN_CHECK_INDICES=1``.
    """
    return torch_internals.call(
        ops.aggregate, value, similarities, indices, weight, bias, rho, scale
    )


def warmup(*args: Any, **options: Any) -> None:
    """Compiles the kernels that a call of ``convnn`` with these arguments needs.

    Triton compiles a kernel the first time it is launched with a new combination of dtypes,
    options, tile sizes and divisibility of channel counts by 16. That takes seconds and cannot
    happen while a CUDA graph is captured. ``warmup`` runs the call once, and its backward if a
    tensor requires a gradient. It changes neither tensors nor gradients.

    Args:
        *args: as for ``convnn``.
        **options: as for ``convnn``.

    Raises:
        RuntimeError: as ``convnn`` does.
    """

    def leaf(X: Any) -> Any:
        if not isinstance(X, Tensor):
            return X
        return X.detach().requires_grad_(X.requires_grad)

    args = tuple(leaf(X) for X in args)
    options = {name: leaf(X) for name, X in options.items()}
    inputs = [X for X in (*args, *options.values()) if isinstance(X, Tensor) and X.requires_grad]
    with torch.enable_grad():
        output = convnn(*args, **options)
        if inputs:
            torch.autograd.grad(output, inputs, torch.zeros_like(output), allow_unused=True)
