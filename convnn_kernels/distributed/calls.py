# SPDX-License-Identifier: MIT
"""The arguments of a call, checked on this rank and against those of the other ranks."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from convnn_kernels import arguments as types
from convnn_kernels import checks, schemas, transforms
from convnn_kernels.distributed import agreement
from convnn_kernels.distributed.agreement import Ranks

_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "convnn::forward": checks.check_forward,
    "convnn::select": checks.check_select,
    "convnn::aggregate": checks.check_aggregate,
}

# The arguments whose rows are those of this rank, and that must have the same dtype, leading
# dimensions and columns on every rank.
_SHARDED = ("query", "key", "value", "similarities")


def prepare(op: str, args: Sequence[Any], group: Any) -> tuple[Any, Ranks]:
    """Checks the arguments of a call of ``op``, such as "convnn::forward", on all ranks.

    Returns:
        The arguments by name, as autocast casts them, and the ranks.

    Raises:
        TypeError, RuntimeError: see ``agreement.agree``.
    """
    function = _FUNCTIONS[op]
    agreement.check_group(function, group)
    checked: list[Any] = []

    def describe() -> tuple[dict[str, Any], int, int]:
        arguments = _checked(function, op, args)
        checked.append(arguments)
        queries = getattr(arguments, "query", None)
        queries = arguments.similarities if queries is None else queries
        keys = arguments.value if hasattr(arguments, "value") else arguments.key
        same = {"the function": function, **_in_common(arguments)}
        return same, queries.shape[-2], keys.shape[-2]

    ranks = agreement.agree(function, group, describe)
    (arguments,) = checked
    if _reads_values(arguments):
        agreement.check_together(
            function, group, lambda: _check_values(function, arguments, ranks.total_keys)
        )
    return arguments, ranks


_FUNCTIONS = {
    "convnn::forward": "distributed.convnn",
    "convnn::select": "distributed.select_neighbors",
    "convnn::aggregate": "distributed.aggregate_neighbors",
}


def _checked(function: str, op: str, args: Sequence[Any]) -> Any:
    """The arguments by name, checked as far as this rank alone can."""
    arguments = schemas.arguments(op)(*args)
    if hasattr(arguments, "k"):
        arguments = arguments._replace(k=types.whole(function, "k", arguments.k))
    if hasattr(arguments, "scale"):
        arguments = arguments._replace(scale=types.real(function, "scale", arguments.scale))
    types.require_types(function, schemas.OPERATORS[op], arguments)
    first = arguments[0]
    if isinstance(first, Tensor) and torch.is_autocast_enabled(first.device.type):
        arguments = transforms.cast_arguments(arguments, first.device.type)
    _CHECKS[op](function, arguments)
    return arguments


def _in_common(arguments: Any) -> dict[str, Any]:
    """What must be the same on every rank, by the name that a message gives it."""
    same: dict[str, Any] = {}
    for name, value in arguments._asdict().items():
        if not isinstance(value, Tensor | None):
            same[name] = repr(value)
            continue
        same[name] = "None" if value is None else "a tensor"
        if value is None:
            continue
        if name in _SHARDED:
            same[f"the dtype of {name}"] = str(value.dtype).removeprefix("torch.")
            same[f"the shape of {name}, without its rows,"] = [*value.shape[:-2], value.shape[-1]]
        elif name in ("weight", "bias"):
            same[f"the shape of {name}"] = [*value.shape]
        if value.is_floating_point():
            same[f"whether {name} requires a gradient"] = (
                torch.is_grad_enabled() and value.requires_grad
            )
    return same


def _reads_values(arguments: Any) -> bool:
    """Whether values of index tensors are checked, which is the same on all ranks."""
    given = [
        getattr(arguments, name, None)
        for name in ("candidates", "self_indices", "key_range", "indices")
    ]
    on_cpu = arguments[0].device.type == "cpu"
    wanted = on_cpu or os.environ.get("CONVNN_CHECK_INDICES", "0") == "1"
    return wanted and any(each is not None for each in given)


def _check_values(function: str, arguments: Any, rows: int) -> None:
    if hasattr(arguments, "indices"):
        checks.check_indices(function, arguments.indices, arguments.similarities, rows)
        return
    checks.check_candidates(function, arguments.candidates, rows)
    checks.check_self_indices(function, arguments.self_indices, rows)
    checks.check_key_range(function, arguments.key_range, rows)
