# SPDX-License-Identifier: MIT
"""Autocast and vmap rules of the operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convnn_kernels import torch_internals


def autocast(
    op: torch._ops.OpOverload, device_type: str, keep: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """The kernel of ``op`` for the autocast key of one device.

    Args:
        op: the operator.
        device_type: "cpu" or "cuda".
        keep: positions of the arguments that are never cast.

    Returns:
        A kernel that casts the floating tensors to the active autocast dtype and goes on.
        As in PyTorch's own operators, float64 is left as it is.
    """

    def cast(arg: Any, dtype: torch.dtype) -> Any:
        eligible = (
            isinstance(arg, Tensor)
            and arg.is_floating_point()
            and arg.dtype is not torch.float64
            and arg.device.type == device_type
        )
        return arg.to(dtype) if eligible else arg

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch_internals.without_autocast(device_type):
            return op(*[arg if i in keep else cast(arg, dtype) for i, arg in enumerate(args)])

    return kernel


def vmap_forward(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """vmap of ``forward``: query, key, value and key_mask fold; the rest is looped over."""
    op = torch.ops.convnn.forward.default
    foldable = (0, 1, 2, 8)
    if not _only(in_dims, foldable):
        return _loop(op, info.batch_size, in_dims, args)
    return op(*_fold(args, foldable, info.batch_size, in_dims)), (0, 0, 0)


def vmap_select(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """vmap of ``select``: query, key and key_mask fold; the rest is looped over."""
    op = torch.ops.convnn.select.default
    foldable = (0, 1, 5)
    if not _only(in_dims, foldable):
        return _loop(op, info.batch_size, in_dims, args)
    return op(*_fold(args, foldable, info.batch_size, in_dims)), (0, 0)


def vmap_aggregate(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """vmap of ``aggregate``: value, similarities and indices fold; the rest is looped over."""
    op = torch.ops.convnn.aggregate.default
    foldable = (0, 1, 2)
    if not _only(in_dims, foldable):
        return _loop(op, info.batch_size, in_dims, args)
    return op(*_fold(args, foldable, info.batch_size, in_dims)), 0


def vmap_select_backward(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """vmap of ``select_backward``: every tensor folds."""
    need_query, need_key = args[6:]
    grads = torch.ops.convnn.select_backward.default(
        *_fold(args, (0, 1, 2, 3, 4), info.batch_size, in_dims)
    )
    return grads, (0 if need_query else None, 0 if need_key else None)


def vmap_aggregate_backward(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """vmap of ``aggregate_backward``.

    Gradients of weight and bias are sums over the leading dimensions, so where one is needed,
    folding would sum over the mapped dimension too.
    """
    op = torch.ops.convnn.aggregate_backward.default
    need_value, need_similarities, need_weight, need_bias = args[8:]
    foldable = (0, 1, 2, 3)
    if need_weight or need_bias or not _only(in_dims, foldable):
        return _loop(op, info.batch_size, in_dims, args)
    grads = op(*_fold(args, foldable, info.batch_size, in_dims))
    return grads, (0 if need_value else None, 0 if need_similarities else None, None, None)


def _only(in_dims: tuple[int | None, ...], positions: tuple[int, ...]) -> bool:
    return all(dim is None or i in positions for i, dim in enumerate(in_dims))


def _fold(
    args: tuple[Any, ...],
    positions: tuple[int, ...],
    batch_size: int,
    in_dims: tuple[int | None, ...],
) -> list[Any]:
    """Gives the tensors at ``positions`` the mapped dimension as their first."""
    folded = list(args)
    for i, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
        if i in positions and isinstance(arg, Tensor):
            folded[i] = arg.expand(batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
    return folded


def _loop(
    op: torch._ops.OpOverload,
    batch_size: int,
    in_dims: tuple[int | None, ...],
    args: tuple[Any, ...],
) -> Any:
    """Calls ``op`` for each entry of the mapped dimension and stacks the results."""
    if batch_size == 0:
        raise RuntimeError(
            f"{op.name()}: vmap over these arguments is a loop, which needs a mapped dimension of "
            "at least 1, got 0"
        )

    def entry(i: int) -> list[Any]:
        pairs = zip(args, in_dims, strict=True)
        return [arg if dim is None else arg.select(dim, i) for arg, dim in pairs]

    results = [op(*entry(i)) for i in range(batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(each) for each in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


VMAP = {
    "convnn::forward": vmap_forward,
    "convnn::select": vmap_select,
    "convnn::aggregate": vmap_aggregate,
    "convnn::select_backward": vmap_select_backward,
    "convnn::aggregate_backward": vmap_aggregate_backward,
}
