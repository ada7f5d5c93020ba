# SPDX-License-Identifier: MIT
"""Convolutional Nearest Neighbors as functions of tensors.

Every function raises TypeError for an argument of a wrong type and RuntimeError for a wrong shape,
dtype, device or value. Numbers may be of any type of ``numbers.Integral`` or ``numbers.Real``, such
as those of numpy, but not tensors, which would lose their gradient.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from convnn_kernels import arguments, ops, torch_internals
from convnn_kernels.key_ranges import segment_ranges, window_ranges

__all__ = [
    "Metric",
    "Order",
    "Rho",
    "aggregate_neighbors",
    "convnn",
    "edge_index",
    "segment_ranges",
    "select_neighbors",
    "warmup",
    "window_ranges",
]

Metric = Literal["cosine", "dot", "euclidean"]
"""How similar a query and a key are (Eq. 3); see :func:`convnn`."""

Rho = Literal["softmax", "ones", "similarity"]
"""How a neighbor is weighted by its similarity (section 4.1); see :func:`convnn`."""

Order = Literal["similarity", "index"]
"""Which neighbor meets which tap of the weight; see :func:`convnn`."""


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
    metric: Metric = "cosine",
    rho: Rho = "softmax",
    scale: float = 1.0,
    order: Order = "similarity",
    key_range: Tensor | None = None,
    exclude_self: bool = False,
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
    tensors that have them. Keys and values that the batch shares can be expanded: on the CPU,
    they are not repeated in memory. Tensors are dense: pad nested ones, and pass key_mask. Autocast
    applies to value, weight and bias; query and key are never rounded.

    Args:
        query: [..., N, D]; float64, float32, float16 or bfloat16; any strides.
        key: [..., M, D], same dtype as query, or, under autocast, one that is widened to it or
            to which query is widened.
        value: [..., M, C]; float64, float32, float16 or bfloat16, which may differ from query's.
        k: the number of neighbors, at least 1, and at most 2**56 for all queries together. Beyond
            the number of keys that are allowed, neighbors are missing.
        weight: laid out as ``nn.Conv1d.weight`` with kernel size k: [O, C, k] dense or [C, 1, k]
            depthwise; same dtype as value; shared by all leading dimensions.
        bias: [O] ([C] with a depthwise weight or none), same dtype as value.
        candidates: [R], or [..., R] with other ones for each batch element: int64, the rows of key
            that may be neighbors (section 4.2.2), distinct and in any order. Duplicates are not
            detected on CUDA; the result is then undefined.
        self_indices: [N] or [..., N] int64, the row of key that is the token itself, for each
            query. It is always a neighbor, even if it is not a candidate, unless ``key_mask`` or
            ``key_range`` rules it out, and is never counted twice.
        key_mask: [..., M] bool, False where a key may not be a neighbor, not even of itself.
        metric: "cosine": :math:`q \cdot k / (\max(\|q\|, \epsilon) \max(\|k\|, \epsilon))` with
            :math:`\epsilon = 10^{-12}`; "dot": :math:`q \cdot k`; "euclidean":
            :math:`-\|q - k\|^2`.
        rho: "softmax": softmax of scale times similarity, over the k neighbors; "ones": 1, so
            query and key receive no gradient; "similarity": the similarity itself.
        scale: a finite number, not a tensor; must be 1.0 unless rho="softmax". For a temperature
            that is learned, see :func:`aggregate_neighbors`.
        order: which neighbor meets which of the k taps of weight. "similarity": nearest first
            (self before all others), ties by row; "index": by row of key, as in a convolution.
        key_range: [N, 2] or [..., N, 2] int64, begin and end for each query: only rows of key with
            begin <= row < end may be its neighbors, not even the token itself outside of them.
            (0, i + 1) is causal; :func:`window_ranges` and :func:`segment_ranges` make such ranges,
            also for windows and packed sequences. The work follows the ranges: most keys outside
            of them are skipped.
        exclude_self: the token itself is never a neighbor, rather than always one; the nearest
            others take its place. Needs ``self_indices``.

    Returns:
        [..., N, O], or [..., N, C] with a depthwise weight or none; same dtype as value. Where
        fewer than k keys are allowed, the missing neighbors contribute nothing; a query without
        neighbors gives the bias, or zero. A similarity that overflows to -inf counts as missing.
        Exception: with a dense weight that contains inf or NaN, a missing neighbor gives NaN,
        except with the backend "cuda".

    Raises:
        TypeError: if an argument has a wrong type, such as a numpy array for a tensor.
        RuntimeError: if an argument does not have the shape, dtype, device or values above. Both
            name it, what was expected and what was passed. On CUDA, values of index tensors are
            not checked unless ``CONVNN_CHECK_INDICES=1``.

    Example:
        >>> import torch
        >>> from convnn_kernels.functional import convnn
        >>> tokens = torch.randn(2, 100, 16, requires_grad=True)
        >>> weight = torch.randn(32, 16, 9)  # dense: [O, C, k]
        >>> y = convnn(tokens, tokens, tokens, 9, weight)
        >>> y.shape
        torch.Size([2, 100, 32])
        >>> y.sum().backward()
    """
    if type(k) is not int:
        k = arguments.whole("convnn", "k", k)
    exclude_self = arguments.flag("convnn", "exclude_self", exclude_self)
    if type(scale) is not float:
        scale = arguments.real("convnn", "scale", scale)
    output, _, _ = _call(
        "convnn",
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
        key_range,
        exclude_self,
    )
    return output


def select_neighbors(
    query: Tensor,
    key: Tensor,
    k: int,
    candidates: Tensor | None = None,
    self_indices: Tensor | None = None,
    key_mask: Tensor | None = None,
    metric: Metric = "cosine",
    order: Order = "similarity",
    key_range: Tensor | None = None,
    exclude_self: bool = False,
    within: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Finds the k nearest neighbors of every query among the keys (Eq. 3, 4, 5).

    Neighbors are the keys with the highest similarity; ties go to the lower row. NaN ranks above
    every number, so that it shows up in the result. The similarities are differentiable with
    respect to query and key; the choice of neighbors is not.

    Args:
        query: [..., N, D]; float64, float32, float16 or bfloat16; any strides.
        key: [..., M, D], same dtype and leading dimensions as query.
        k: the number of neighbors, at least 1, and at most 2**56 for all queries together. Beyond
            the number of keys that are allowed, neighbors are missing.
        candidates: [R] or [..., R] int64, the rows of key that may be neighbors (section 4.2.2),
            distinct. Duplicates are not detected on CUDA; the result is then undefined.
        self_indices: [N] or [..., N] int64, the row of key that is the token itself, for each
            query: a neighbor unless ``key_mask`` or ``key_range`` rules it out, and the first one
            with order="similarity".
        key_mask: [..., M] bool, False where a key may not be a neighbor.
        metric: "cosine", "dot" or "euclidean", as in :func:`convnn`.
        order: "similarity": nearest first; "index": by row of key.
        key_range: [N, 2] or [..., N, 2] int64, begin and end of the rows of key that may be
            neighbors of a query, as in :func:`convnn`.
        exclude_self: the token itself is never a neighbor, as in :func:`convnn`.
        within: a radius r, finite and at least 0, for metric="euclidean" only: a neighbor q, k with
            :math:`\|q - k\| > r` becomes a missing one, the token itself, too. To be exact, it is
            kept where its similarity, as returned, is at least -(r * r), computed in float64 and
            rounded to the dtype of the similarities. For the other metrics, compare similarities.

    Returns:
        similarities, [..., N, k] float32 (float64 if query is), and indices, [..., N, k] int64:
        rows of key, even with candidates. Where fewer than k keys are allowed, or lie within the
        radius, **the missing neighbors come last, with similarity -inf and index 0**;
        :func:`edge_index` lists the edges of a graph without them.

    Raises:
        TypeError: if an argument has a wrong type, such as a numpy array for a tensor.
        RuntimeError: if an argument does not have the shape, dtype, device or values above. Both
            name it, what was expected and what was passed. On CUDA, values of index tensors are
            not checked unless ``CONVNN_CHECK_INDICES=1``.

    Example:
        >>> import torch
        >>> from convnn_kernels.functional import select_neighbors
        >>> points = torch.tensor([[0.0], [1.0], [5.0], [7.0]])
        >>> similarities, indices = select_neighbors(points, points, 2, metric="euclidean")
        >>> indices  # of each point, itself and the nearest other
        tensor([[0, 1],
                [1, 0],
                [2, 3],
                [3, 2]])
        >>> similarities[:, 1]  # minus the squared distance to that one
        tensor([-1., -1., -4., -4.])

        At most two within a radius of 1.5:

        >>> select_neighbors(points, points, 2, metric="euclidean", within=1.5)[0]
        tensor([[ 0., -1.],
                [ 0., -1.],
                [ 0., -inf],
                [ 0., -inf]])
    """
    if type(k) is not int:
        k = arguments.whole("select_neighbors", "k", k)
    exclude_self = arguments.flag("select_neighbors", "exclude_self", exclude_self)
    if within is not None:
        within = arguments.radius("select_neighbors", within, metric)
    similarities, indices = _call(
        "select_neighbors",
        ops.select,
        query,
        key,
        k,
        candidates,
        self_indices,
        key_mask,
        metric,
        order,
        key_range,
        exclude_self,
    )
    if within is None:
        return similarities, indices
    is_sorted = order == "similarity" and (self_indices is None or exclude_self)
    return _nearer(similarities, indices, within, is_sorted)


def _nearer(
    similarities: Tensor, indices: Tensor, radius: float, is_sorted: bool
) -> tuple[Tensor, Tensor]:
    """Makes neighbors beyond a radius missing ones.

    Args:
        similarities: [..., N, k], minus squared distances. NaN is within every radius.
        indices: [..., N, k].
        radius: at least 0.
        is_sorted: whether the similarities descend, so that those beyond are last already.
    """
    beyond = similarities < -(radius * radius)  # [..., N, k]
    similarities = similarities.masked_fill(beyond, -torch.inf)
    indices = indices.masked_fill(beyond, 0)
    if is_sorted:
        return similarities, indices
    places = beyond.byte().argsort(dim=-1, stable=True)  # [..., N, k]
    return similarities.gather(-1, places), indices.gather(-1, places)


def aggregate_neighbors(
    value: Tensor,
    similarities: Tensor,
    indices: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rho: Rho = "softmax",
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
        scale: a finite number, not a tensor; must be 1.0 unless rho="softmax".

    Returns:
        [..., N, O], or [..., N, C] with a depthwise weight or none; same dtype as value.

    Raises:
        TypeError: if an argument has a wrong type, such as a numpy array for a tensor.
        RuntimeError: if an argument does not have the shape, dtype, device or values above. Both
            name it, what was expected and what was passed. On CUDA, values of indices are not
            checked unless ``CONVNN_CHECK_INDICES=1``.

    Example:
        A temperature that is learned multiplies the similarities, since ``scale`` is a number
        without a gradient:

        >>> import torch
        >>> from convnn_kernels.functional import aggregate_neighbors, select_neighbors
        >>> tokens, weight = torch.randn(2, 100, 16), torch.randn(16, 1, 9)
        >>> temperature = torch.nn.Parameter(torch.tensor(2.0))
        >>> similarities, indices = select_neighbors(tokens, tokens, 9)
        >>> y = aggregate_neighbors(tokens, temperature * similarities, indices, weight)
        >>> y.sum().backward()
        >>> temperature.grad.isfinite().item()
        True

        Where neighbors may be missing, their -inf must not be multiplied: its gradient would be
        NaN.

        >>> mask = torch.arange(100) < torch.tensor([[100], [5]])
        >>> similarities, indices = select_neighbors(tokens, tokens, 9, key_mask=mask)
        >>> missing = similarities == -torch.inf
        >>> scaled = temperature * similarities.masked_fill(missing, 0.0)
        >>> scaled = scaled.masked_fill(missing, -torch.inf)
        >>> y = aggregate_neighbors(tokens, scaled, indices, weight)
    """
    if type(scale) is not float:
        scale = arguments.real("aggregate_neighbors", "scale", scale)
    return _call(
        "aggregate_neighbors",
        ops.aggregate,
        value,
        similarities,
        indices,
        weight,
        bias,
        rho,
        scale,
    )


def edge_index(indices: Tensor, similarities: Tensor, num_keys: int | None = None) -> Tensor:
    """Lists the neighbors as the edges of a graph, without the missing ones.

    **Do not use ``indices`` as edges without dropping the missing neighbors: they carry index 0 and
    similarity -inf.** Each of the others gives one edge, from the key to the query, as PyTorch
    Geometric's ``knn_graph`` directs it by default (``flow="source_to_target"``). All batch
    elements become one graph, in which they are numbered consecutively.

    Args:
        indices: [..., N, k] int64, from :func:`select_neighbors`.
        similarities: [..., N, k], floating point, from the same call. NaN is a neighbor, -inf a
            missing one.
        num_keys: M, the number of keys of each batch element; by default N, as where tokens are
            neighbors of one another. It matters only if there are leading dimensions.

    Returns:
        [2, E] int64, ordered by query, then by place among its neighbors. For batch element b, a
        row of the flattened leading dimensions, row 0 is b * M + the index of the key (the source)
        and row 1 is b * N + that of the query (the target). The similarities of the edges are
        ``similarities[similarities != -torch.inf]``.

    Raises:
        TypeError: if an argument has a wrong type.
        RuntimeError: if an argument has a wrong shape, dtype, device or value, or under
            ``torch.vmap``. Values are not checked while compiling.

    Example:
        Only the second of three points may be a neighbor, so every second place is missing:

        >>> import torch
        >>> from convnn_kernels.functional import edge_index, select_neighbors
        >>> x = torch.tensor([[0.0], [1.0], [5.0]])
        >>> mask = torch.tensor([False, True, False])
        >>> similarities, indices = select_neighbors(x, x, 2, key_mask=mask, metric="euclidean")
        >>> indices
        tensor([[1, 0],
                [1, 0],
                [1, 0]])
        >>> edge_index(indices, similarities)
        tensor([[1, 1, 1],
                [0, 1, 2]])
    """
    num_keys = arguments.check_edge_index(indices, similarities, num_keys)
    try:
        return _edges(indices, similarities, num_keys)
    except RuntimeError as error:
        if not str(error).startswith("vmap"):
            raise
        raise RuntimeError(
            "edge_index: vmap cannot run it, because the number of edges depends on the data; "
            "call it on the whole batch, whose leading dimensions it numbers consecutively"
        ) from None


def _edges(indices: Tensor, similarities: Tensor, num_keys: int | None) -> Tensor:
    """[2, E] int64, from checked arguments."""
    rows, k = indices.shape[-2:]
    places = (similarities != -torch.inf).flatten().nonzero().squeeze(1)  # [E]
    found = indices.flatten()[places]
    # A single graph of more keys than queries needs no number of keys.
    is_limited = num_keys is not None or indices.numel() > rows * k
    keys = rows if num_keys is None else num_keys
    if not torch.compiler.is_compiling() and found.numel():
        least, most = (int(each) for each in found.aminmax())
        if least < 0 or (most >= keys and is_limited):
            raise RuntimeError(
                f"edge_index: indices must be in [0, {keys}), got {least if least < 0 else most}; "
                "num_keys, the number of keys of each batch element, is by default the number of "
                f"queries, {rows}"
            )
    target = places // k
    return torch.stack([target // rows * keys + found, target])


def warmup(*args: Any, **options: Any) -> None:
    """Compiles the kernels that a call of ``convnn`` with these arguments needs.

    Triton compiles a kernel the first time it is launched with a new combination of dtypes,
    options, tile sizes and divisibility of channel counts by 16. That takes seconds and cannot
    happen while a CUDA graph is captured. Nor can the check of kernels before their first use.
    ``warmup`` runs the call once, and its backward if a tensor requires a gradient. It changes
    neither tensors nor gradients.

    Args:
        *args: as for ``convnn``.
        **options: as for ``convnn``.

    Raises:
        TypeError, RuntimeError: as ``convnn`` does.

    Example:
        >>> import torch
        >>> import convnn_kernels
        >>> x = torch.randn(8, 256, 64, requires_grad=True)  # on the GPU that is used later
        >>> convnn_kernels.warmup(x, x, x, 9, metric="dot")
        >>> x.grad is None
        True
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


def _call(function: str, op: torch._ops.OpOverload, *args: Any) -> Any:
    """``op(*args)``, with a message of our own if the type of an argument is wrong."""
    try:
        return torch_internals.call(op, *args)
    # A ValueError comes of a number of more digits than Python prints.
    except (RuntimeError, ValueError):
        try:
            arguments.require_types(function, op, args)
        except (TypeError, RuntimeError) as explained:
            raise explained from None
        raise
