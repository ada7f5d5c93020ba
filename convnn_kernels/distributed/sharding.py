# SPDX-License-Identifier: MIT
"""Sharding rules of the operators for DTensor.

``convnn_kernels.distributed.register_sharding`` registers them; until then, nothing here is
imported.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from convnn_kernels import schemas

# Of arguments and results: those with leading dimensions, and how many dimensions these come
# before. Candidates, tokens and ranges that the batch shares have none.
_OWN_DIMS = {
    "query": 2,
    "key": 2,
    "value": 2,
    "similarities": 2,
    "indices": 2,
    "output": 2,
    "key_mask": 1,
    "candidates": 1,
    "self_indices": 1,
    "key_range": 2,
}

# Those with a row for each query.
_ROWS_OF_QUERIES = {"query", "similarities", "indices", "output", "self_indices", "key_range"}

# Where a tensor of this name and number of dimensions lies.
_Layout = Callable[[str, int], Placement]

_Rule = list[tuple[list[Placement | None], list[Placement | None]]]


def register() -> None:
    """Registers a rule for every operator."""
    for op in schemas.OPERATORS.values():
        register_sharding(op)(_rule(op))
        # DTensor keeps what a rule says for the tensors it was asked about, and for the arguments
        # from the first int on. Others decide too, such as which gradients are needed.
        # test_distributed_sharding.py::test_rules_are_kept_for_all_arguments
        propagator = DTensor._op_dispatcher.sharding_propagator
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(0, needs_pytree=True)


def _rule(op: torch._ops.OpOverload) -> Callable[..., _Rule]:
    """What DTensor asks for the ways to run ``op``: where results and arguments lie in each."""
    arguments_of = schemas.arguments(op)
    results = [each.name or "output" for each in op._schema.returns]

    def placed(layout: _Layout, name: str, arg: Any) -> Placement | None:
        is_tensor = hasattr(arg, "ndim")
        return layout(name.removeprefix("grad_"), arg.ndim) if is_tensor else None

    def rule(*args: Any) -> _Rule:
        arguments = arguments_of(*args)
        named = [*zip(arguments_of._fields, args, strict=False)]
        return [
            (
                [_of_result(layout, name, arguments) for name in results],
                [placed(layout, name, arg) for name, arg in named],
            )
            for layout in _layouts(arguments)
        ]

    return rule


def _layouts(arguments: Any) -> list[_Layout]:
    """All replicated; or sharded by one of the leading dimensions, or by the rows of query."""
    leading = _dims(arguments) - 2
    return [_replicated, *(_by_leading(dim) for dim in range(leading)), _by_queries]


def _dims(arguments: Any) -> int:
    """How many dimensions tensors with leading dimensions and rows have."""
    return (arguments.query if hasattr(arguments, "query") else arguments.value).ndim


def _replicated(name: str, dims: int) -> Placement:
    return Replicate()


def _by_leading(dim: int) -> _Layout:
    def layout(name: str, dims: int) -> Placement:
        return Shard(dim) if dims > _OWN_DIMS.get(name, dims) else Replicate()

    return layout


def _by_queries(name: str, dims: int) -> Placement:
    return Shard(dims - _OWN_DIMS[name]) if name in _ROWS_OF_QUERIES else Replicate()


def _of_result(layout: _Layout, name: str, arguments: Any) -> Placement:
    """Where a result lies. A gradient of what all ranks have is a part of a sum in each of them."""
    of = name.removeprefix("grad_")
    if of == name:
        return layout(name, _dims(arguments))
    if not getattr(arguments, f"need_{of}"):
        return Replicate()  # an empty tensor
    dims = _dims(arguments) if of in _OWN_DIMS else 1
    placement = layout(of, dims)
    is_part = placement.is_replicate() and layout is not _replicated
    return Partial() if is_part else placement
