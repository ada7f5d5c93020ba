# SPDX-License-Identifier: MIT
"""Checks every call of this project's operators while a model runs: the gate for layers in a model.

The outputs of two implementations of a deep model may differ in any neighbor that is nearly tied,
and then in all that follows. So each call is held against the reference at its own inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import python_ref

_SELECTION = ("candidates", "self_indices", "key_mask", "metric", "order")


class Audit(TorchDispatchMode):
    """Records the calls of the operators within it. They are checked afterwards: in the dispatcher
    autograd is off, and the reference of a gradient needs it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[str, dict[str, Any], Any]] = []

    def check(self) -> int:
        """How many calls there were. AssertionError for the first that is wrong."""
        with torch.no_grad():
            for name, given, results in self._calls:
                _CHECKS[name](given, results)
        return len(self._calls)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "convnn":
            names = [argument.name for argument in func._schema.arguments]
            given = {a.name: a.default_value for a in func._schema.arguments}
            given |= dict(zip(names, args, strict=False)) | (kwargs or {})
            self._calls.append((func._opname, given, results))
        return results


def _values(name: str, reference: Any, result: Tensor, tensors: list[Tensor]) -> None:
    """`reference` of the tensors, in float64 and in their precision."""
    exact = reference(*(t.double() if t.is_floating_point() else t for t in tensors))
    python_ref.assert_values(name, result, exact, reference(*tensors))


def _forward(given: dict[str, Any], results: Any) -> None:
    output, similarities, indices = results
    selection = {name: given[name] for name in _SELECTION}
    python_ref.assert_certified_selection(
        given["query"], given["key"], similarities, indices, given["k"], **selection
    )
    missing = similarities == -torch.inf
    weight, bias, rho, scale = (given[name] for name in ("weight", "bias", "rho", "scale"))

    def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        s = python_ref.similarities_at(query, key, indices, given["metric"], missing)
        w = None if weight is None else weight.to(value.dtype)
        b = None if bias is None else bias.to(value.dtype)
        return python_ref.aggregate(value, s, indices, w, b, rho, scale)

    _values("forward", reference, output, [given["query"], given["key"], given["value"]])


def _gradients(name: str, run: Any, leaves: list[Tensor], grad: Tensor, results: Any) -> None:
    """Of the tensors that were asked for: the others are empty."""
    found = []
    for double in (True, False):
        with torch.enable_grad():
            inputs = [
                (leaf.double() if double else leaf.clone()).requires_grad_() for leaf in leaves
            ]
            result = run(*inputs)
            found.append(
                torch.autograd.grad(result, inputs, grad.to(result.dtype), allow_unused=True)
            )
    for result, exact, eager in zip(results, *found, strict=False):
        if result.numel() and exact is not None:
            python_ref.assert_values(name, result, exact, eager)


def _select_backward(given: dict[str, Any], results: Any) -> None:
    indices, missing = given["indices"], given["similarities"] == -torch.inf

    def run(query: Tensor, key: Tensor) -> Tensor:
        return python_ref.similarities_at(query, key, indices, given["metric"], missing)

    leaves = [given["query"], given["key"]]
    _gradients("select_backward", run, leaves, given["grad_similarities"], results)


def _aggregate_backward(given: dict[str, Any], results: Any) -> None:
    weight = given["weight"]

    def run(value: Tensor, similarities: Tensor, w: Tensor | None = None) -> Tensor:
        rho, scale = given["rho"], given["scale"]
        return python_ref.aggregate(value, similarities, given["indices"], w, None, rho, scale)

    leaves = [given["value"], given["similarities"], *([] if weight is None else [weight])]
    _gradients("aggregate_backward", run, leaves, given["grad_output"], results)


def _unchecked(given: dict[str, Any], results: Any) -> None:
    raise AssertionError("no check for this operator")


_CHECKS = {
    "forward": _forward,
    "select_backward": _select_backward,
    "aggregate_backward": _aggregate_backward,
    "select": _unchecked,
    "aggregate": _unchecked,
}
