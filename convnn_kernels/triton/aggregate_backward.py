# SPDX-License-Identifier: MIT
"""Gradients of the convolution over neighbors (Eq. 6), each in a file of its own.

| gradient | file |
|---|---|
| similarities: first of rho, then through the softmax | rho_grad.py, modulate.py |
| weight | weight_grad.py |
| value, over the inverse neighbor list | value_grad.py, inverse_list.py |

The gradient of bias is a sum that PyTorch takes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .aggregation import Aggregation, prepare
from .inverse_list import invert
from .launch import Pointers
from .modulate import plan_modulate, plan_softmax_backward
from .rho_grad import plan_rho_grad
from .tensors import empty_gradient
from .value_grad import compute_value_grad
from .weight_grad import compute_weight_grad

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def aggregate_backward(
    grad_output: Tensor,
    value: Tensor,
    similarities: Tensor,
    indices: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    rho: str,
    scale: float,
    need_value: bool,
    need_similarities: bool,
    need_weight: bool,
    need_bias: bool,
    inverse: Callable[[], Pointers] | None = None,
) -> Gradients:
    """Gradients of value, similarities, weight and bias; see schemas.py.

    `inverse` returns the inverse neighbor list where the caller needs it as well.
    """
    need_weight = need_weight and weight is not None
    grad_value = empty_gradient(value, need_value)
    grad_s = empty_gradient(similarities, need_similarities)
    grad_weight = value.new_empty(0)
    grad_bias = _bias_grad(grad_output, value) if need_bias and has_bias else value.new_empty(0)
    if grad_output.numel() == 0 or value.shape[-1] == 0:
        if need_weight and weight is not None:
            grad_weight = torch.zeros_like(weight)
        return grad_value.zero_(), grad_s.zero_(), grad_weight, grad_bias
    if not (need_value or need_similarities or need_weight):
        return grad_value, grad_s, grad_weight, grad_bias

    s, I = similarities.contiguous(), indices.contiguous()
    call, pointers = prepare(value, s, I, weight, rho, scale)
    # Rows of G are gathered; and what is compiled does not depend on how a caller's loss made it.
    pointers.add(p_grad=grad_output.contiguous(), p_rho=torch.empty_like(s))
    plan_modulate(call)(pointers)
    if need_similarities:
        _similarities_grad(call, pointers, grad_s)
    if need_weight:
        grad_weight = compute_weight_grad(call, pointers, value)
    # Last, because the inverse list takes most memory.
    if need_value:
        pairs = inverse() if inverse else invert(s, I, value.shape[-2], call.is_dense)
        compute_value_grad(call, pointers, pairs, grad_value)
    return grad_value, grad_s, grad_weight, grad_bias


def _bias_grad(grad_output: Tensor, value: Tensor) -> Tensor:
    batch = tuple(range(grad_output.dim() - 1))
    return grad_output.sum(dim=batch, dtype=torch.float32).to(value.dtype)


def _similarities_grad(call: Aggregation, pointers: Pointers, grad: Tensor) -> None:
    if call.rho == "ones":
        grad.zero_()
        return
    pointers.add(p_rho_grad=grad)
    plan_rho_grad(call)(pointers)
    if call.rho == "softmax":
        plan_softmax_backward(call)(pointers)
