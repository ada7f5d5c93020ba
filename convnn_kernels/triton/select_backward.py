# SPDX-License-Identifier: MIT
"""Gradients of query and key, given those of the similarities of the chosen pairs."""

from torch import Tensor

from .backward import backward


def select_backward(
    grad_similarities: Tensor,
    query: Tensor,
    key: Tensor,
    similarities: Tensor,
    indices: Tensor,
    metric: str,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and key; see schemas.py and backward.py."""
    grad_query, grad_key = backward(
        {"query": need_query, "key": need_key},
        similarities,
        indices,
        query=query,
        key=key,
        grad_similarities=grad_similarities,
        metric=metric,
    )
    return grad_query, grad_key
