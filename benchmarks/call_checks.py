# SPDX-License-Identifier: MIT
"""Checks every call of this project's operators while a model runs.

The outputs of two implementations of a deep model may differ at any nearly tied neighbor, and then
in everything downstream. So each call is compared with the reference at its own inputs instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import python_ref

Arguments = dict[str, Any]


class CallChecks(TorchDispatchMode):
    """Records the operator calls within the block; `check` then compares them with the reference.

    Checking waits until after the block because inside the dispatcher autograd is off, which the
    reference of a gradient needs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Arguments, Any]] = []

    def check(self) -> int:
        """Returns the number of calls. Raises AssertionError for the first wrong one."""
        with torch.no_grad():
            for name, given, results in self.calls:
                if name not in _CHECKS:
                    raise AssertionError(f"there is no check for the operator {name}")
                _CHECKS[name](given, results)
        return len(self.calls)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "convnn":
            names = [argument.name for argument in func._schema.arguments]
            given = {a.name: a.default_value for a in func._schema.arguments}
            given |= dict(zip(names, args, strict=False)) | (kwargs or {})
            self.calls.append((func._opname, given, results))
        return results


def _aggregate(given: Arguments, value: Tensor, s: Tensor, weight: Tensor | None) -> Tensor:
    weight, bias = (
        None if each is None else each.to(value.dtype) for each in (weight, given.get("bias"))
    )
    return python_ref.aggregate(
        value, s, given["indices"], weight, bias, given["rho"], given["scale"]
    )


def _forward(given: Arguments, results: Any) -> None:
    output, similarities, indices = results
    selection = ("candidates", "self_indices", "key_mask", "metric", "order")
    python_ref.assert_certified_selection(
        given["query"],
        given["key"],
        similarities,
        indices,
        given["k"],
        **{name: given[name] for name in selection},
    )
    missing, given = similarities == -torch.inf, given | {"indices": indices}

    def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        s = python_ref.similarities_at(query, key, indices, given["metric"], missing)
        return _aggregate(given, value, s, given["weight"])

    tensors = [given[name] for name in ("query", "key", "value")]
    exact = reference(*(tensor.double() for tensor in tensors))
    python_ref.assert_values("forward", output, exact, reference(*tensors))


def _check_gradients(
    name: str,
    run: Callable[..., tuple[Tensor, ...]],
    leaves: Sequence[Tensor],
    grads: Sequence[Tensor],
    results: Sequence[Tensor],
) -> None:
    """Compares the gradients of `run(*leaves)`; those that were not requested are empty."""
    found = []
    for double in (True, False):
        with torch.enable_grad():
            inputs = [
                (leaf.double() if double else leaf.clone()).requires_grad_() for leaf in leaves
            ]
            outputs = run(*inputs)
            grad_outputs = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
            found.append(torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True))
    for result, exact, eager in zip(results, *found, strict=False):
        if result.numel() and exact is not None:
            python_ref.assert_values(name, result, exact, eager)


def _similarities(given: Arguments, query: Tensor, key: Tensor) -> Tensor:
    missing = given["similarities"] == -torch.inf
    return python_ref.similarities_at(query, key, given["indices"], given["metric"], missing)


def _select_backward(given: Arguments, results: Any) -> None:
    def run(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        return (_similarities(given, query, key),)

    leaves, grads = [given["query"], given["key"]], [given["grad_similarities"]]
    _check_gradients("select_backward", run, leaves, grads, results)


def _aggregate_backward(given: Arguments, results: Any) -> None:
    def run(value: Tensor, s: Tensor, weight: Tensor | None = None) -> tuple[Tensor, ...]:
        return (_aggregate(given, value, s, weight),)

    leaves = [given[name] for name in ("value", "similarities", "weight")]
    leaves = [leaf for leaf in leaves if leaf is not None]
    _check_gradients("aggregate_backward", run, leaves, [given["grad_output"]], results)


def _forward_backward(given: Arguments, results: Any) -> None:
    grads = [given["grad_output"], given["grad_similarities"]]

    def run(query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None = None) -> Any:
        s = _similarities(given, query, key)
        return (_aggregate(given, value, s, weight), s)[: 1 if grads[1] is None else 2]

    leaves = [given[name] for name in ("query", "key", "value", "weight")]
    leaves = [leaf for leaf in leaves if leaf is not None]
    given_grads = [grad for grad in grads if grad is not None]
    _check_gradients("forward_backward", run, leaves, given_grads, results)


_CHECKS = {
    "forward": _forward,
    "forward_backward": _forward_backward,
    "select_backward": _select_backward,
    "aggregate_backward": _aggregate_backward,
}
