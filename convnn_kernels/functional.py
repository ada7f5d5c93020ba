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
    r"""Convolves, for every query, its k nearest neighbors among the keys (Algorithm 1).

    For query row :math:`i`, with similarities :math:`S_{ij}` (Eq. 3) and the rows
    :math:`I_i = (I_{i1}, \ldots, I_{ik})` of the k most similar keys (Eq. 4, 5):

    .. math::
        y_i[o] = b[o] + \sum_{j=1}^{k} \sum_c W[o, c, j]\, \rho_{ij}\, V[I_{ij}, c]
        \qquad \text{(Eq. 6)}

    where :math:`\rho` modulates the neighbors by their similarity (section 4.1). With a depthwise
    weight, :math:`y_i[c] = b[c] + \sum_j W[c, 0, j]\, \rho_{ij}\, V[I_{ij}, c]`; without a weight,
    :math:`y_i = b + \sum_j \rho_{ij}\, V[I_{ij}]`. No N×M matrix is ever stored.

    The leading dimensions ``...`` are batch, heads or whatever is wanted; they are equal in all
    tensors that have them.

    Args:
        query: [..., N, D]; float64, float32, float16 or bfloat16; any strides.
        key: [..., M, D], dtype of query.
        value: [..., M, C]; float64, float32, float16 or bfloat16, which may differ from query's.
        k: the number of neighbors, from 1 to M, or to R with candidates.
        weight: as ``nn.Conv1d.weight`` with kernel size k: [O, C, k] dense or [C, 1, k] depthwise,
            dtype of value; shared by all leading dimensions.
        bias: [O] ([C] with a depthwise weight or none), dtype of value.
        candidates: [R] int64, the rows of key that may be neighbors (section 4.2.2); distinct,
            in any order. On CUDA duplicates are not found out: the result is then undefined.
        self_indices: [N] int64, for each query the row of key that is the token itself. It is
            always a neighbor, even if not among the candidates, and never counted twice.
        key_mask: [..., M] bool, False where a key may not be a neighbor, itself included.
        metric: "cosine": :math:`q \cdot k / (\max(\|q\|, \epsilon) \max(\|k\|, \epsilon))` with
            :math:`\epsilon = 10^{-12}`; "dot": :math:`q \cdot k`; "euclidean":
            :math:`-\|q - k\|^2`.
        rho: "softmax": softmax over the k of scale times similarity; "ones": 1, so that query and
            key receive no gradient; "similarity": the similarity itself.
        scale: finite; other than 1.0 only with rho="softmax".
        order: how the k neighbors meet the k taps of weight. "similarity": the nearest first (self
            before all), ties by row; "index": by row of key, as in a convolution.

    Returns:
        [..., N, O], or [..., N, C] with a depthwise weight or none; dtype of value. Where fewer
        than k keys are allowed, the missing ones contribute nothing; a query without neighbors
        gives the bias, or zero. A similarity that overflows to -inf counts as missing.

    Raises:
        RuntimeError: if an argument does not have the shape, dtype, device or values above; the
            message names it, what was expected and what came. On CUDA, values of index tensors
            are not examined.
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
    r"""Finds, for every query, its k nearest neighbors among the keys (Eq. 3, 4, 5).

    Neighbors are those of the highest similarity; of equals, those of the lower row. NaN ranks
    above every number, so that it is seen. The similarities are differentiable in query and key;
    the choice of neighbors is not.

    Args:
        query: [..., N, D]; float64, float32, float16 or bfloat16; any strides.
        key: [..., M, D], dtype of query; the leading dimensions are those of query.
        k: the number of neighbors, from 1 to M, or to R with candidates.
        candidates: [R] int64, the rows of key that may be neighbors (section 4.2.2); distinct.
        self_indices: [N] int64, for each query the row of key that is the token itself: always a
            neighbor, and the first one with order="similarity".
        key_mask: [..., M] bool, False where a key may not be a neighbor.
        metric: "cosine", "dot" or "euclidean", as in :func:`convnn`.
        order: "similarity": the nearest first; "index": by row of key.

    Returns:
        similarities, [..., N, k] float32 (float64 if query is), and indices, [..., N, k] int64:
        rows of key, also with candidates. Where fewer than k keys are allowed, the missing ones
        come last, with similarity -inf and index 0.

    Raises:
        RuntimeError: if an argument does not have the shape, dtype, device or values above; the
            message names it, what was expected and what came. On CUDA, values of index tensors
            are not examined.
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
    r"""Modulates the given neighbors by their similarity and convolves them (Eq. 6).

    For query row :math:`i` with neighbors :math:`I_{i1}, \ldots, I_{ik}`:
    :math:`y_i[o] = b[o] + \sum_j \sum_c W[o, c, j]\, \rho_{ij}\, V[I_{ij}, c]`, with the forms of
    weight and :math:`\rho` of :func:`convnn`. The [..., N, k, C] tensor of neighbors is never
    stored.

    Args:
        value: [..., M, C]; float64, float32, float16 or bfloat16; any strides.
        similarities: [..., N, k], float32 or float64; the leading dimensions are those of value.
            A similarity of -inf marks a missing neighbor, which contributes nothing.
        indices: [..., N, k] int64, rows of value.
        weight: [O, C, k] dense or [C, 1, k] depthwise, dtype of value.
        bias: [O] ([C] with a depthwise weight or none), dtype of value.
        rho: "softmax", "ones" or "similarity", as in :func:`convnn`. With "ones", similarities
            receive no gradient.
        scale: finite; other than 1.0 only with rho="softmax".

    Returns:
        [..., N, O], or [..., N, C] with a depthwise weight or none; dtype of value.

    Raises:
        RuntimeError: if an argument does not have the shape, dtype, device or values above; the
            message names it, what was expected and what came. On CUDA, values of indices are not
            examined.
    """
    return torch_internals.call(
        ops.aggregate, value, similarities, indices, weight, bias, rho, scale
    )


def warmup(*args: Any, **options: Any) -> None:
    """Compiles what a call of ``convnn`` with these arguments needs, forward and backward.

    A kernel of a CUDA device is compiled when it is first used with tensors of a kind: dtype,
    divisibility of sizes and strides by 16, tile sizes that follow from k and the columns. That
    takes seconds and cannot happen while a CUDA graph is captured. ``warmup`` runs the call once,
    and its backward if a tensor requires a gradient. It changes neither tensors nor gradients.

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
