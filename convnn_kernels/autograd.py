# SPDX-License-Identifier: MIT
"""Derivatives of the operators.

Each operator has a kernel for the Autograd key. If nothing needs a gradient, it calls the
implementation and does no more. Otherwise it records a node that saves inputs, similarities and
indices, and whose backward calls ``aggregate_backward`` and ``select_backward``. Those two have no
derivative: second derivatives and forward-mode raise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convnn_kernels import schemas, torch_internals

_convnn = torch.ops.convnn


def kernel(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The kernel of ``op`` for the Autograd key."""
    nodes = {
        "convnn::forward": _Forward,
        "convnn::select": _Select,
        "convnn::aggregate": _Aggregate,
    }
    node = nodes.get(op.name(), _NoDerivative)
    arguments_of = schemas.arguments(op)
    redispatch = torch_internals.redispatcher(op)

    def autograd(keyset: Any, *args: Any) -> Any:
        below = keyset & torch_internals.BELOW_AUTOGRAD
        if torch_internals.needs_autograd(args):
            return torch_internals.apply(node, op, below, *arguments_of(*args))
        return redispatch(below, *args)

    return autograd


class _Node(torch_internals.Node):
    """A call of an operator in the autograd graph; no forward-mode."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(f"{ctx.op}: forward-mode automatic differentiation is not implemented")


class _Forward(_Node):
    @staticmethod
    def forward(ctx: Any, op: torch._ops.OpOverload, below: Any, *args: Any) -> Any:
        output, similarities, indices = torch_internals.redispatch(op, below, *args)
        arguments = _keep_options(ctx, op, args)
        ctx.save_for_backward(
            arguments.query,
            arguments.key,
            arguments.value,
            arguments.weight,
            similarities,
            indices,
        )
        ctx.mark_non_differentiable(indices)
        return output, similarities, indices

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_similarities: Tensor | None, _: None
    ) -> Any:
        query, key, value, weight, similarities, indices = ctx.saved_tensors
        needs = _needs(ctx)
        grad_value, grad_rho, grad_weight, grad_bias = _aggregate_backward(
            ctx,
            grad_output,
            (value, similarities, indices, weight),
            (needs.value, needs.query or needs.key, needs.weight, needs.bias),
        )
        if grad_similarities is None:
            grad_similarities = grad_rho
        elif grad_rho is not None:
            grad_similarities = grad_similarities + grad_rho
        grad_query, grad_key = _select_backward(
            ctx, grad_similarities, (query, key, similarities, indices), (needs.query, needs.key)
        )
        return _input_grads(
            ctx,
            query=grad_query,
            key=grad_key,
            value=grad_value,
            weight=grad_weight,
            bias=grad_bias,
        )


class _Select(_Node):
    @staticmethod
    def forward(ctx: Any, op: torch._ops.OpOverload, below: Any, *args: Any) -> Any:
        similarities, indices = torch_internals.redispatch(op, below, *args)
        arguments = _keep_options(ctx, op, args)
        ctx.save_for_backward(arguments.query, arguments.key, similarities, indices)
        ctx.mark_non_differentiable(indices)
        return similarities, indices

    @staticmethod
    def backward(ctx: Any, grad_similarities: Tensor | None, _: None) -> Any:
        needs = _needs(ctx)
        grad_query, grad_key = _select_backward(
            ctx, grad_similarities, ctx.saved_tensors, (needs.query, needs.key)
        )
        return _input_grads(ctx, query=grad_query, key=grad_key)


class _Aggregate(_Node):
    @staticmethod
    def forward(ctx: Any, op: torch._ops.OpOverload, below: Any, *args: Any) -> Any:
        output = torch_internals.redispatch(op, below, *args)
        arguments = _keep_options(ctx, op, args)
        ctx.save_for_backward(
            arguments.value, arguments.similarities, arguments.indices, arguments.weight
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> Any:
        needs = _needs(ctx)
        grad_value, grad_similarities, grad_weight, grad_bias = _aggregate_backward(
            ctx,
            grad_output,
            ctx.saved_tensors,
            (needs.value, needs.similarities, needs.weight, needs.bias),
        )
        return _input_grads(
            ctx,
            value=grad_value,
            similarities=grad_similarities,
            weight=grad_weight,
            bias=grad_bias,
        )


class _NoDerivative(_Node):
    @staticmethod
    def forward(ctx: Any, op: torch._ops.OpOverload, below: Any, *args: Any) -> Any:
        ctx.op = op.name()
        return torch_internals.redispatch(op, below, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{ctx.op}: second derivatives are not implemented")


def _keep_options(ctx: Any, op: torch._ops.OpOverload, args: tuple[Any, ...]) -> Any:
    """Keeps on ``ctx`` what backward needs besides tensors; returns the arguments by name."""
    arguments = schemas.arguments(op)(*args)
    ctx.op = op.name()
    ctx.metric = getattr(arguments, "metric", None)
    ctx.rho = getattr(arguments, "rho", None)
    ctx.scale = getattr(arguments, "scale", None)
    ctx.has_bias = getattr(arguments, "bias", None) is not None
    # The gradient of an output that is not used is None.
    ctx.set_materialize_grads(False)
    return arguments


def _needs(ctx: Any) -> Any:
    """For each argument of the operator, by name, whether it needs a gradient."""
    # The first two inputs of a node are the operator and the dispatch keys.
    return schemas.arguments(ctx.op)(*ctx.needs_input_grad[2:])


def _input_grads(ctx: Any, **grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """What the backward of a node returns: a gradient, or None, for each of its inputs."""
    return (None, None, *map(grads.get, schemas.arguments(ctx.op)._fields))


def _aggregate_backward(
    ctx: Any,
    grad_output: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor, Tensor | None],
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of value, similarities, weight and bias; None for one not needed."""
    need_value, need_similarities, need_weight, need_bias = needs
    # With rho="ones" the similarities do not enter the output.
    needs = (need_value, need_similarities and ctx.rho != "ones", need_weight, need_bias)
    if grad_output is None or not any(needs):
        return None, None, None, None
    grads = _convnn.aggregate_backward.default(
        grad_output, *saved, ctx.has_bias, ctx.rho, ctx.scale, *needs
    )
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _select_backward(
    ctx: Any,
    grad_similarities: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query and key; None for one not needed."""
    if grad_similarities is None or not any(needs):
        return None, None
    grads = _convnn.select_backward.default(grad_similarities, *saved, ctx.metric, *needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
