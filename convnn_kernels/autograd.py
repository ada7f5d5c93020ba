# SPDX-License-Identifier: MIT
"""Derivatives of the operators.

Each operator has a kernel for the Autograd key. Where nothing needs a gradient, it only goes on to
the implementation. Otherwise it records a node that saves inputs, similarities and indices, and
whose backward calls ``aggregate_backward`` and ``select_backward``. Those two have no derivative:
a second derivative, and forward-mode, raise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convnn_kernels import torch_internals

_convnn = torch.ops.convnn


def kernel(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The kernel of ``op`` for the Autograd key."""
    nodes = {
        "convnn::forward": _Forward,
        "convnn::select": _Select,
        "convnn::aggregate": _Aggregate,
    }
    node = nodes.get(op.name(), _NoDerivative)
    defaults = torch_internals.defaults(op)
    redispatch = torch_internals.redispatcher(op)

    def autograd(keyset: Any, *args: Any) -> Any:
        below = keyset & torch_internals.BELOW_AUTOGRAD
        if torch_internals.needs_autograd(args):
            # The dispatcher leaves out trailing arguments that have their default value.
            return torch_internals.apply(node, op, below, *args, *defaults[len(args) :])
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
        query, key, value, _, weight, bias, _, _, _, metric, rho, scale, _ = args
        ctx.op = op.name()
        ctx.metric, ctx.rho, ctx.scale, ctx.has_bias = metric, rho, scale, bias is not None
        ctx.save_for_backward(query, key, value, weight, similarities, indices)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return output, similarities, indices

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_similarities: Tensor | None, _: None
    ) -> Any:
        query, key, value, weight, similarities, indices = ctx.saved_tensors
        need_query, need_key, need_value, _, need_weight, need_bias = ctx.needs_input_grad[2:8]
        grad_value, grad_rho, grad_weight, grad_bias = _aggregate_backward(
            ctx,
            grad_output,
            (value, similarities, indices, weight),
            (need_value, need_query or need_key, need_weight, need_bias),
        )
        if grad_similarities is None:
            grad_similarities = grad_rho
        elif grad_rho is not None:
            grad_similarities = grad_similarities + grad_rho
        grad_query, grad_key = _select_backward(
            ctx, grad_similarities, (query, key, similarities, indices), (need_query, need_key)
        )
        grads = (grad_query, grad_key, grad_value, None, grad_weight, grad_bias)
        return None, None, *grads, *[None] * 7


class _Select(_Node):
    @staticmethod
    def forward(ctx: Any, op: torch._ops.OpOverload, below: Any, *args: Any) -> Any:
        similarities, indices = torch_internals.redispatch(op, below, *args)
        query, key, _, _, _, _, metric, _ = args
        ctx.op = op.name()
        ctx.metric = metric
        ctx.save_for_backward(query, key, similarities, indices)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return similarities, indices

    @staticmethod
    def backward(ctx: Any, grad_similarities: Tensor | None, _: None) -> Any:
        grads = _select_backward(
            ctx, grad_similarities, ctx.saved_tensors, ctx.needs_input_grad[2:4]
        )
        return None, None, *grads, *[None] * 6


class _Aggregate(_Node):
    @staticmethod
    def forward(ctx: Any, op: torch._ops.OpOverload, below: Any, *args: Any) -> Any:
        output = torch_internals.redispatch(op, below, *args)
        value, similarities, indices, weight, bias, rho, scale = args
        ctx.op = op.name()
        ctx.rho, ctx.scale, ctx.has_bias = rho, scale, bias is not None
        ctx.save_for_backward(value, similarities, indices, weight)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> Any:
        need_value, need_similarities, _, need_weight, need_bias = ctx.needs_input_grad[2:7]
        grad_value, grad_similarities, grad_weight, grad_bias = _aggregate_backward(
            ctx,
            grad_output,
            ctx.saved_tensors,
            (need_value, need_similarities, need_weight, need_bias),
        )
        grads = (grad_value, grad_similarities, None, grad_weight, grad_bias)
        return None, None, *grads, None, None


class _NoDerivative(_Node):
    @staticmethod
    def forward(ctx: Any, op: torch._ops.OpOverload, below: Any, *args: Any) -> Any:
        ctx.op = op.name()
        return torch_internals.redispatch(op, below, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{ctx.op}: second derivatives are not implemented")


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
