# SPDX-License-Identifier: MIT
"""Gradients of the convolution over neighbors (Eq. 6), with a dense weight each in its own file.

| gradient | file |
|---|---|
| similarities: first of rho, then through the softmax | rho_grad.py, modulate.py |
| weight | weight_grad.py |
| value, where there are few keys, and rho from the same products | value_grad_one_hot.py |
| value, over the inverse neighbor list | value_grad.py, inverse_list.py |

The gradient of bias is a sum that PyTorch takes. Those of a depthwise weight, or without one, are
in backward.py.
"""

import torch
from torch import Tensor

from . import configs
from .aggregation import Aggregation, is_dense, prepare
from .backward import backward
from .dense_inputs import prepare_dense_inputs
from .inverse_list import invert
from .launch import Plan, Pointers, cache_plans
from .modulate import prepare_modulate_backward
from .rho_grad import prepare_rho_grad
from .tensors import empty_gradient
from .value_grad import plan_value_grad
from .value_grad_one_hot import prepare_value_grad_one_hot, rho_parts
from .weight_grad import plan_weight_grad


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
) -> tuple[Tensor, ...]:
    """Gradients of value, similarities, weight and bias; see schemas.py."""
    needs = {"value": need_value, "similarities": need_similarities}
    needs |= {"weight": need_weight and weight is not None, "bias": need_bias and has_bias}
    if weight is not None and is_dense(weight, value.shape[-1]):
        return _dense_backward(needs, grad_output, value, similarities, indices, weight, rho, scale)
    return backward(
        needs,
        similarities,
        indices,
        value=value,
        weight=weight,
        grad_output=grad_output,
        rho=rho,
        scale=scale,
    )


def _dense_backward(
    needs: dict[str, bool],
    grad_output: Tensor,
    value: Tensor,
    similarities: Tensor,
    indices: Tensor,
    weight: Tensor,
    rho: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_value = empty_gradient(value, needs["value"])
    grad_s = empty_gradient(similarities, needs["similarities"])
    grad_bias = _bias_grad(grad_output, value) if needs["bias"] else value.new_empty(0)
    is_empty = grad_output.numel() == 0 or value.numel() == 0
    if is_empty or not (needs["value"] or needs["similarities"] or needs["weight"]):
        grad_weight = value.new_zeros(weight.shape if needs["weight"] else 0)
        return grad_value.zero_(), grad_s.zero_(), grad_weight, grad_bias

    s, I = similarities.contiguous(), indices.contiguous()
    call, tensors = prepare(value, s, I, weight, rho, scale)
    through_rho = needs["similarities"] and rho != "ones"
    grad_weight = empty_gradient(weight, needs["weight"])
    pointers = Pointers(
        value.device,
        **tensors,
        p_rho=None,
        # Rows of G are gathered; and what is compiled does not depend on how a loss made it.
        p_grad=grad_output.contiguous(),
        p_rho_grad=grad_s,
        p_weight_grad=grad_weight,
        p_value_grad=grad_value,
    )
    few_keys = configs.allows_one_hot(call.bits, call.N, call.V.N)
    plan_by_query(call, through_rho, needs["value"] and few_keys)(pointers)
    if needs["weight"]:
        plan_weight_grad(call)(pointers)
        pointers.add(p_part=None)
    if not through_rho:
        grad_s.zero_()
    # Last, because the inverse list takes most memory.
    if needs["value"] and not few_keys:
        pairs = invert(s, I, value.shape[-2])
        pointers.take(pairs, "p_pairs", "p_keys", "p_offsets")
        plan_value_grad(call)(pointers)
    return grad_value, grad_s, grad_weight, grad_bias


@cache_plans
def plan_by_query(call: Aggregation, through_rho: bool, with_value: bool) -> Plan:
    """What other kernels read, and the gradients of similarities and, with few keys, of value."""
    inputs, buffers = prepare_dense_inputs(call)
    launches = [inputs]
    parts = rho_parts(call) if through_rho and with_value else 0
    if parts > 1:
        buffers["p_rho_part"] = (parts * call.rows * call.k, torch.float32)
    if with_value:
        launches.append(prepare_value_grad_one_hot(call, parts))
    if through_rho:
        if parts == 0:
            launches.append(prepare_rho_grad(call))
        if parts > 1 or call.rho == "softmax":
            launches.append(prepare_modulate_backward(call, max(1, parts)))
    return Plan(launches, **buffers)


def _bias_grad(grad_output: Tensor, value: Tensor) -> Tensor:
    batch = tuple(range(grad_output.dim() - 1))
    return grad_output.sum(dim=batch, dtype=value.dtype)  # of numbers of float32
