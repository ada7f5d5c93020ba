# SPDX-License-Identifier: MIT
"""Algorithm 1: the neighbors are selected, then modulated and convolved; and its gradients."""

from torch import Tensor

from .aggregate import aggregate
from .aggregate_backward import aggregate_backward
from .aggregation import is_dense
from .aggregation import prepare as prepare_aggregation
from .backward import backward
from .launch import Pointers
from .search import prepare as prepare_search
from .select import empty_results, is_large, is_tile, select_alone
from .select_large import select_large
from .select_network import select_network


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
    key_range: Tensor | None = None,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, similarities and indices; see schemas.py."""
    s, I = empty_results(query, k)
    if I.numel() == 0:
        return aggregate(value, s, I, weight, bias, rho, scale), s, I
    options = (candidates, self_indices, key_mask, metric, order, key_range, exclude_self)
    search, tensors = prepare_search(query, key, k, *options)
    pointers = Pointers(query.device, **tensors, p_similarities=s, p_indices=I)
    large = is_large(search, query.device)
    in_one_plan = large or is_tile(search)
    if in_one_plan and value.numel() and not is_dense(weight, value.shape[-1]):
        aggregation, more = prepare_aggregation(value, s, I, weight, rho, scale)
        output = value.new_empty((*query.shape[:-1], value.shape[-1]))
        bias = None if bias is None else bias.contiguous()
        pointers.add(**more, p_bias=bias, p_output=output)
        (select_large if large else select_network)(search, pointers, aggregation)
        return output, s, I
    select_alone(search, pointers, s, I)
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
    candidates: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, weight and bias; see schemas.py."""
    if not is_dense(weight, value.shape[-1]):
        needs = {"query": need_query, "key": need_key, "value": need_value}
        needs |= {"weight": need_weight and weight is not None, "bias": need_bias and has_bias}
        return backward(
            needs,
            similarities,
            indices,
            query=query,
            key=key,
            value=value,
            weight=weight,
            grad_output=grad_output,
            grad_similarities=grad_similarities,
            metric=metric,
            rho=rho,
            scale=scale,
            candidates=candidates,
        )
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
    )
    direct = grad_similarities
    if rho != "ones" and need_search:
        direct = grad_s if direct is None else grad_s + direct
    grad_query, grad_key = backward(
        {"query": need_query, "key": need_key},
        similarities,
        indices,
        query=query,
        key=key,
        grad_similarities=direct,
        metric=metric,
    )
    return grad_query, grad_key, grad_value, grad_weight, grad_bias
