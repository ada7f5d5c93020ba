# SPDX-License-Identifier: MIT
"""Autocast and vmap rules of the operators."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from convnn_kernels import schemas

# The arguments that autocast casts. The others decide which tokens are neighbors: rounded, they
# would give other neighbors.
_CAST = {"value", "weight", "bias"}

_WIDENED = {torch.float64, torch.float32, torch.float16, torch.bfloat16}

# The arguments that have the leading dimensions; vmap adds the mapped dimension in front.
_BATCHED = {
    "convnn::forward": {"query", "key", "value", "key_mask"},
    "convnn::select": {"query", "key", "key_mask"},
    "convnn::aggregate": {"value", "similarities", "indices"},
    "convnn::forward_backward": {
        "grad_output",
        "grad_similarities",
        "query",
        "key",
        "value",
        "similarities",
        "indices",
    },
    "convnn::select_backward": {"grad_similarities", "query", "key", "similarities", "indices"},
    "convnn::aggregate_backward": {"grad_output", "value", "similarities", "indices"},
}

# The arguments of forward and select that have the leading dimensions, or none where the batch
# shares them, and how many dimensions they have then.
_OWN_DIMS = {"candidates": 1, "self_indices": 1, "key_range": 2}


def autocast(op: torch._ops.OpOverload, device_type: str) -> Callable[..., Any]:
    """The kernel of ``op`` for the autocast key of one device.

    Args:
        op: the operator.
        device_type: "cpu" or "cuda".

    Returns:
        A kernel that casts value, weight and bias to the active autocast dtype and calls the
        operator again without autocast. As in PyTorch's own operators, float64 is left alone. Of
        query and key, the narrower is cast to the dtype of the other.
    """
    arguments_of = schemas.arguments(op)

    def kernel(*args: Any) -> Any:
        arguments = cast_arguments(arguments_of(*args), device_type)
        with torch.autocast(device_type, enabled=False):
            return op(*arguments)

    return kernel


def cast_arguments(arguments: Any, device_type: str) -> Any:
    """The arguments as autocast casts them, on a device for which it is active."""
    dtype = torch.get_autocast_dtype(device_type)

    def cast(name: str, arg: Any) -> Any:
        eligible = (
            name in _CAST
            and isinstance(arg, Tensor)
            and arg.is_floating_point()
            and arg.dtype is not torch.float64
            and arg.device.type == device_type
        )
        return arg.to(dtype) if eligible else arg

    with torch.autocast(device_type, enabled=False):
        pairs = zip(arguments._fields, arguments, strict=True)
        return _widen(type(arguments)(*[cast(name, arg) for name, arg in pairs]))


def _widen(arguments: Any) -> Any:
    """The arguments, query and key with one dtype: the wider of the two."""
    query, key = getattr(arguments, "query", None), getattr(arguments, "key", None)
    if query is None or key is None or query.dtype is key.dtype:
        return arguments
    if not {query.dtype, key.dtype} <= _WIDENED:
        return arguments  # the operator's own check refuses them
    dtype = torch.promote_types(query.dtype, key.dtype)
    return arguments._replace(query=query.to(dtype), key=key.to(dtype))


def vmap(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The vmap rule of ``op``.

    If only arguments with leading dimensions are mapped, the mapped dimension becomes one of them
    and ``op`` is called once. Otherwise ``op`` is called for each entry.
    """
    arguments_of = schemas.arguments(op)
    fields = arguments_of._fields
    batched = {fields.index(name) for name in _BATCHED[op.name()]}
    restricting = {}
    if op.name() in ("convnn::forward", "convnn::select"):
        restricting = {fields.index(name): dims for name, dims in _OWN_DIMS.items()}

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        mapped = {i for i, dim in enumerate(in_dims) if dim is not None}
        if not mapped <= batched | set(restricting) or _sums_over_batch(arguments_of(*args)):
            results = _loop(op, info.batch_size, in_dims, args)
        else:
            folded = _fold(args, batched, info.batch_size, in_dims)
            for i, own_dims in restricting.items():
                if i < len(args) and isinstance(args[i], Tensor):
                    lead = folded[0].shape[:-2]
                    folded[i] = _fold_restricting(args[i], in_dims[i], own_dims, lead)
            results = op(*folded)
        if isinstance(results, Tensor):
            return results, 0
        # A folded call returns a gradient that is not needed as one empty tensor for all entries.
        return results, tuple(None if result.shape == (0,) else 0 for result in results)

    return rule


def _sums_over_batch(arguments: Any) -> bool:
    """Whether a gradient is needed that is a sum over the leading dimensions.

    It must not be summed over the mapped dimension, too.
    """
    return getattr(arguments, "need_weight", False) or getattr(arguments, "need_bias", False)


def _fold(
    args: Sequence[Any], batched: set[int], batch_size: int, in_dims: tuple[int | None, ...]
) -> list[Any]:
    """The arguments, the tensors at the positions ``batched`` with the mapped dimension first."""
    folded = list(args)
    for i in batched:
        if i < len(args) and isinstance(args[i], Tensor):
            arg, dim = args[i], in_dims[i]
            folded[i] = arg.expand(batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
    return folded


def _fold_restricting(arg: Tensor, dim: int | None, own_dims: int, lead: Sequence[int]) -> Tensor:
    """The argument with the leading dimensions ``lead``, the mapped one first, or with none.

    One with other dimensions gets the mapped one and no more, and the operator refuses it.
    """
    if dim is None:
        is_shared = arg.dim() == own_dims
        return arg if is_shared else arg.expand(lead[0], *arg.shape)
    arg = arg.movedim(dim, 0)
    if arg.dim() != own_dims + 1:
        return arg
    # Shared by the leading dimensions of an entry.
    own = arg.shape[-own_dims:]
    return arg.reshape(arg.shape[0], *[1] * (len(lead) - 1), *own).expand(*lead, *own)


def _loop(
    op: torch._ops.OpOverload,
    batch_size: int,
    in_dims: tuple[int | None, ...],
    args: Sequence[Any],
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
        return torch.stack(results)
    return tuple(torch.stack(each) for each in zip(*results, strict=True))
