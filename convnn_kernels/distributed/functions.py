# SPDX-License-Identifier: MIT
"""The functions of ``convnn_kernels.functional`` for tokens that are sharded over ranks.

Every rank of a process group calls the same function. It passes its rows of query, and of key and
value, and gets the results for its rows of query. Shards may differ in size and may be empty. The
rows of all ranks, in the order of ranks, are one sequence of tokens: returned indices, and those in
candidates, self_indices and key_range, are rows of it. On the CPU, neighbors, similarities and
outputs are, bit for bit, those of one process that has all rows. docs/distributed.md says what is
communicated.

The functions communicate, forward and backward: every rank must call them in the same order, and
run backward if one does. Gradients of query, key and value are those of the sum of what all ranks
differentiate. Gradients of weight and bias are this rank's part of that sum, like those of any
other parameter of a model whose tokens are sharded: add them up over the ranks.

An argument that is wrong on one rank is an error on all of them. If a rank stops in the middle of a
call, the others raise what the process group raises: with gloo, as soon as the process of that rank
ends, otherwise after the timeout of the group.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from convnn_kernels import schemas
from convnn_kernels.distributed import calls
from convnn_kernels.distributed.aggregation import Aggregate
from convnn_kernels.distributed.agreement import Ranks
from convnn_kernels.distributed.selection import Select
from convnn_kernels.functional import Metric, Order, Rho

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _not_compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, called as it is by what torch.compile compiles.

    ``torch.compiler.disable`` as a decorator would import the compiler with this module.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@_not_compiled
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
    *,
    group: Any = None,
) -> Tensor:
    """Convolves the k nearest of the keys of all ranks for every query of this rank (Algorithm 1).

    Keys travel from rank to rank in a ring; then each rank fetches the values that are neighbors of
    its queries. The arguments are those of :func:`convnn_kernels.functional.convnn`; N_r and M_r
    are the rows of this rank, and rows of key are those of all ranks.

    Args:
        query: [..., N_r, D].
        key: [..., M_r, D].
        value: [..., M_r, C].
        k: the number of neighbors, at least 1.
        weight: [O, C, k] dense or [C, 1, k] depthwise, the same on every rank.
        bias: [O], or [C] with a depthwise weight or none, the same on every rank.
        candidates: [R] or [..., R] int64, rows of key. Those that a rank passes are for its
            queries.
        self_indices: [N_r] or [..., N_r] int64, rows of key.
        key_mask: [..., M_r] bool.
        metric: "cosine", "dot" or "euclidean".
        rho: "softmax", "ones" or "similarity".
        scale: a finite number; must be 1.0 unless rho="softmax".
        order: "similarity" or "index".
        key_range: [N_r, 2] or [..., N_r, 2] int64, rows of key.
        exclude_self: the token itself is never a neighbor.
        group: the process group; the default one if None.

    Returns:
        [..., N_r, O], or [..., N_r, C] with a depthwise weight or none; same dtype as value.

    Raises:
        TypeError: if an argument of this rank has a wrong type.
        RuntimeError: on every rank, if an argument is wrong on one of them, or differs where ranks
            must agree: in numbers, options, dtypes, the sizes of all dimensions but rows, which
            tensors are given, and which require a gradient. Also if a rank has stopped or calls
            another of these functions.

    Example:
        >>> import os, tempfile, torch
        >>> from convnn_kernels import distributed, functional
        >>> store = "file://" + os.path.join(tempfile.mkdtemp(), "store")
        >>> torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
        >>> rows, weight = torch.randn(2, 100, 16), torch.randn(32, 16, 9)
        >>> y = distributed.convnn(rows, rows, rows, 9, weight)  # on each rank, its own rows
        >>> torch.equal(y, functional.convnn(rows, rows, rows, 9, weight))
        True
        >>> torch.distributed.destroy_process_group()
    """
    arguments, ranks = calls.prepare(
        "convnn::forward",
        (
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
        ),
        group,
    )
    similarities, indices = _select(arguments, ranks)
    return _aggregate(arguments, similarities, indices, ranks)


@_not_compiled
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
    *,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Finds the k nearest of the keys of all ranks for every query of this rank (Eq. 3, 4, 5).

    Keys travel from rank to rank in a ring, and each rank keeps the k best of those it has seen.

    Args:
        query: [..., N_r, D].
        key: [..., M_r, D].
        k: the number of neighbors, at least 1.
        candidates: as in :func:`convnn`, like all others.
        self_indices: [N_r] or [..., N_r] int64, rows of key.
        key_mask: [..., M_r] bool.
        metric: "cosine", "dot" or "euclidean".
        order: "similarity" or "index".
        key_range: [N_r, 2] or [..., N_r, 2] int64, rows of key.
        exclude_self: the token itself is never a neighbor.
        group: the process group; the default one if None.

    Returns:
        similarities, [..., N_r, k] float32 (float64 if query is), and indices, [..., N_r, k] int64:
        rows of the keys of all ranks. Missing neighbors come last, with similarity -inf and
        index 0.

    Raises:
        TypeError, RuntimeError: as :func:`convnn` does.

    Example:
        >>> import os, tempfile, torch
        >>> from convnn_kernels import distributed
        >>> store = "file://" + os.path.join(tempfile.mkdtemp(), "store")
        >>> torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
        >>> points = torch.tensor([[0.0], [1.0], [5.0], [7.0]])
        >>> _, indices = distributed.select_neighbors(points, points, 2, metric="euclidean")
        >>> indices  # of each point, itself and the nearest other
        tensor([[0, 1],
                [1, 0],
                [2, 3],
                [3, 2]])
        >>> torch.distributed.destroy_process_group()
    """
    arguments, ranks = calls.prepare(
        "convnn::select",
        (
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
        ),
        group,
    )
    return _select(arguments, ranks)


@_not_compiled
def aggregate_neighbors(
    value: Tensor,
    similarities: Tensor,
    indices: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rho: Rho = "softmax",
    scale: float = 1.0,
    *,
    group: Any = None,
) -> Tensor:
    """Weights the neighbors of this rank's queries by their similarity and convolves them (Eq. 6).

    The values that are neighbors are fetched from the ranks that have them.

    Args:
        value: [..., M_r, C].
        similarities: [..., N_r, k], float32 or float64. -inf marks a missing neighbor.
        indices: [..., N_r, k] int64, rows of the values of all ranks.
        weight: [O, C, k] dense or [C, 1, k] depthwise, the same on every rank.
        bias: [O], or [C] with a depthwise weight or none, the same on every rank.
        rho: "softmax", "ones" or "similarity".
        scale: a finite number; must be 1.0 unless rho="softmax".
        group: the process group; the default one if None.

    Returns:
        [..., N_r, O], or [..., N_r, C] with a depthwise weight or none; same dtype as value.

    Raises:
        TypeError, RuntimeError: as :func:`convnn` does.

    Example:
        >>> import os, tempfile, torch
        >>> from convnn_kernels import distributed
        >>> store = "file://" + os.path.join(tempfile.mkdtemp(), "store")
        >>> torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
        >>> rows = torch.randn(2, 100, 16)
        >>> similarities, indices = distributed.select_neighbors(rows, rows, 9)
        >>> distributed.aggregate_neighbors(rows, 2.0 * similarities, indices).shape
        torch.Size([2, 100, 16])
        >>> torch.distributed.destroy_process_group()
    """
    arguments, ranks = calls.prepare(
        "convnn::aggregate", (value, similarities, indices, weight, bias, rho, scale), group
    )
    return _aggregate(arguments, similarities, indices, ranks)


def _select(arguments: Any, ranks: Ranks) -> tuple[Tensor, Tensor]:
    query, key = arguments.query, arguments.key
    with torch.autocast(query.device.type, enabled=False):
        similarities, indices = Select.apply(
            query, key, arguments._replace(query=None, key=None), ranks
        )
    return similarities, indices


def _aggregate(arguments: Any, similarities: Tensor, indices: Tensor, ranks: Ranks) -> Tensor:
    value = arguments.value
    # With rho="ones" the output does not depend on the similarities.
    s = similarities.detach() if arguments.rho == "ones" else similarities
    named = schemas.arguments("convnn::aggregate")(
        None, None, indices, rho=arguments.rho, scale=arguments.scale
    )
    with torch.autocast(value.device.type, enabled=False):
        return Aggregate.apply(value, s, arguments.weight, arguments.bias, named, ranks)
