# SPDX-License-Identifier: MIT
"""Algorithm 1: the neighbors are selected, then modulated and convolved; and its gradients."""

import functools

import torch
from torch import Tensor

from .aggregate import aggregate
from .aggregate_backward import aggregate_backward
from .aggregation import is_dense
from .inverse_list import invert
from .select import select
from .select_backward import select_backward


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    weight: Tensor | None,
    bias: Tensor | None,
    candidates: Tensor | None,
    self_indices: Tensor | None,
    key_mask: Tensor | None,
    metric: str,
    rho: str,
    scale: float,
    order: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, similarities and indices; see schemas.py."""
    s, I = select(query, key, k, candidates, self_indices, key_mask, metric, order)
    return aggregate(value, s, I, weight, bias, rho, scale), s, I


def forward_backward(
    grad_output: Tensor,
    grad_similarities: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    similarities: Tensor,
    indices: Tensor,
    has_bias: bool,
    metric: str,
    rho: str,
    scale: float,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, weight and bias; see schemas.py.

    The gradients of value and key share one inverse neighbor list.
    """
    similarities, indices = similarities.contiguous(), indices.contiguous()
    dense = is_dense(weight, value.shape[-1])
    inverse = functools.cache(lambda: invert(similarities, indices, key.shape[-2], by_slot=dense))
    need_search = need_query or need_key
    grad_value, grad_s, grad_weight, grad_bias = aggregate_backward(
        grad_output,
        value,
        similarities,
        indices,
        weight,
        has_bias,
        rho,
        scale,
        need_value,
        need_search and rho != "ones",
        need_weight,
        need_bias,
        inverse,
    )
    if not need_search:
        return query.new_empty(0), key.new_empty(0), grad_value, grad_weight, grad_bias
    if rho == "ones":
        grad_s = torch.zeros_like(similarities) if grad_similarities is None else grad_similarities
    elif grad_similarities is not None:
        grad_s = grad_s + grad_similarities
    grad_query, grad_key = select_backward(
        grad_s, query, key, similarities, indices, metric, need_query, need_key, inverse, dense
    )
    return grad_query, grad_key, grad_value, grad_weight, grad_bias
