# SPDX-License-Identifier: MIT
"""Derivatives of the operators.

Each operator has a kernel for the Autograd key. If nothing needs a gradient, it calls the
implementation and does no more. Otherwise it records a node that saves inputs, similarities and
indices, and whose backward calls one of the backward operators. These have no derivative of their
own: second derivatives and forward-mode raise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convnn_kernels import raised, schemas, torch_internals

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
        try:
            if torch_internals.needs_autograd(args):
                return torch_internals.apply(node, op, below, *arguments_of(*args))
            return redispatch(below, *args)
        except RuntimeError as error:
            if kept := raised.original(error):
                raise kept from None
            raise

    return autograd


class _Node(torch_internals.Node):
    """A call of an operator in the autograd graph; no forward-mode."""

    # The arguments among the saved tensors, "" for others.
    saved: tuple[str, ...] = ()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(f"{ctx.op}: forward-mode automatic differentiation is not implemented")


class _Forward(_Node):
    saved = ("query", "key", "value", "weight")

    @staticmethod
    def forward(ctx: Any, op: torch._ops.OpOverload, below: Any, *args: Any) -> Any:
        output, similarities, indices = torch_internals.redispatch(op, below, *args)
        arguments = _keep_options(ctx, op, args)
        candidates = arguments.candidates
        is_shared = candidates is not None and candidates.dim() == 1
        ctx.save_for_backward(
            arguments.query,
            arguments.key,
            arguments.value,
            arguments.weight,
            similarities,
            indices,
            candidates if is_shared else None,
        )
        ctx.mark_non_differentiable(indices)
        return output, similarities, indices

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_similarities: Tensor | None, _: None
    ) -> Any:
        needs = _needs(ctx)
        # With rho="ones" the output does not depend on the similarities.
        through_output = grad_output is not None and ctx.rho != "ones"
        selects = through_output or grad_similarities is not None
        needed = {"query": needs.query and selects, "key": needs.key and selects}
        if grad_output is None:
            query, key, _, _, similarities, indices, _ = ctx.saved_tensors
            grads = _gradients(
                _convnn.select_backward.default,
                (grad_similarities, query, key, similarities, indices, ctx.metric),
                needed,
            )
        else:
            *tensors, candidates = ctx.saved_tensors
            grads = _gradients(
                _convnn.forward_backward.default,
                (
                    grad_output,
                    grad_similarities,
                    *tensors,
                    ctx.has_bias,
                    ctx.metric,
                    ctx.rho,
                    ctx.scale,
                ),
                needed | {"value": needs.value, "weight": needs.weight, "bias": needs.bias},
                candidates,
            )
        return _input_grads(ctx, grads)


class _Select(_Node):
    saved = ("query", "key")

    @staticmethod
    def forward(ctx: Any, op: torch._ops.OpOverload, below: Any, *args: Any) -> Any:
        similarities, indices = torch_internals.redispatch(op, below, *args)
        arguments = _keep_options(ctx, op, args)
        ctx.save_for_backward(arguments.query, arguments.key, similarities, indices)
        ctx.mark_non_differentiable(indices)
        return similarities, indices

    @staticmethod
    def backward(ctx: Any, grad_similarities: Tensor | None, _: None) -> Any:
        if grad_similarities is None:
            return _input_grads(ctx, {})
        needs = _needs(ctx)
        grads = _gradients(
            _convnn.select_backward.default,
            (grad_similarities, *ctx.saved_tensors, ctx.metric),
            {"query": needs.query, "key": needs.key},
        )
        return _input_grads(ctx, grads)


class _Aggregate(_Node):
    saved = ("value", "similarities", "", "weight")

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
        if grad_output is None:
            return _input_grads(ctx, {})
        needs = _needs(ctx)
        grads = _gradients(
            _convnn.aggregate_backward.default,
            (grad_output, *ctx.saved_tensors, ctx.has_bias, ctx.rho, ctx.scale),
            {
                "value": needs.value,
                # With rho="ones" the output does not depend on the similarities.
                "similarities": needs.similarities and ctx.rho != "ones",
                "weight": needs.weight,
                "bias": needs.bias,
            },
        )
        return _input_grads(ctx, grads)


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
    arguments = schemas.arguments(op)._make(args)
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
    return schemas.arguments(ctx.op)._make(ctx.needs_input_grad[2:])


def _gradients(
    op: torch._ops.OpOverload,
    args: tuple[Any, ...],
    needed: dict[str, bool],
    *more: Tensor | None,
) -> dict[str, Tensor]:
    """Calls a backward operator with `args`, then which gradients are needed, then `more`.

    Returns the needed ones by name.
    """
    if not any(needed.values()):
        return {}
    grads = torch_internals.call(op, *args, *needed.values(), *more)
    return {name: grad for name, grad in zip(needed, grads, strict=True) if needed[name]}


def _input_grads(ctx: Any, grads: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """What the backward of a node returns: a gradient, or None, for each of its inputs."""
    if torch_internals.adds_without_none(ctx):
        grads = _zeros(ctx) | grads
    return (None, None, *map(grads.get, schemas.arguments(ctx.op)._fields))


def _zeros(ctx: Any) -> dict[str, Tensor]:
    """Zeros for each argument of the operator that needs a gradient, by name."""
    needs = _needs(ctx)._asdict()
    inputs = dict(zip(ctx._forward_cls.saved, ctx.saved_tensors, strict=False))
    grads = {name: torch.zeros_like(X) for name, X in inputs.items() if needs.get(name, False)}
    if needs.get("bias", False):
        value, weight = inputs["value"], inputs["weight"]
        channels = value.shape[-1] if weight is None else weight.shape[0]
        grads["bias"] = value.new_zeros(channels)
    return grads
