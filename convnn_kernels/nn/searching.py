# SPDX-License-Identifier: MIT
"""Selection and aggregation, where a token may have a given similarity to itself."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from convnn_kernels import functional
from convnn_kernels.functional import Metric, Order, Rho


class Search(NamedTuple):
    """How a layer searches for the neighbors of N queries among M keys."""

    k: int
    candidates: Tensor | None  # [R] int64
    self_indices: Tensor | None  # [N] int64
    self_similarity: float | None
    metric: Metric
    order: Order
    exclude_self: bool
    key_mask: Tensor | None = None  # [..., M] bool
    key_range: Tensor | None = None  # [N, 2] or [..., N, 2] int64

    def arguments(self) -> dict[str, Any]:
        """What ``functional.select_neighbors`` and ``functional.convnn`` take."""
        return {
            "k": self.k,
            "candidates": self.candidates,
            "self_indices": self.self_indices,
            "key_mask": self.key_mask,
            "metric": self.metric,
            "order": self.order,
            "key_range": self.key_range,
            "exclude_self": self.exclude_self,
        }


def select(query: Tensor, key: Tensor, search: Search) -> tuple[Tensor, Tensor]:
    """The neighbors of every query; see ``functional.select_neighbors``.

    A given self_similarity takes the place of the similarity of each token to itself. It does not
    change which neighbors are chosen, nor their order. Missing places remain missing.

    Args:
        query: [..., N, D].
        key: [..., M, D].
        search: among which keys, and how.

    Returns:
        similarities and indices, [..., N, k] each.
    """
    similarities, indices = functional.select_neighbors(query, key, **search.arguments())
    if search.self_similarity is None or search.self_indices is None:
        return similarities, indices
    # Missing places have index 0, which may be the token itself.
    is_self = (indices == search.self_indices.unsqueeze(-1)) & (similarities != -torch.inf)
    return similarities.masked_fill(is_self, search.self_similarity), indices


def convolve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    search: Search,
    rho: Rho,
    scale: float,
) -> Tensor:
    """Convolves the neighbors of every query; see ``functional.convnn``.

    Args:
        query: [..., N, D].
        key: [..., M, D].
        value: [..., M, C].
        weight: [O, C, k], [C, 1, k] or None.
        bias: [O] or None.
        search: among which keys, and how.
        rho: how neighbors are weighted; "ones" has no use for a self_similarity.
        scale: factor of the similarities in the softmax.

    Returns:
        [..., N, O].
    """
    if search.self_similarity is None or rho == "ones":
        return functional.convnn(
            query,
            key,
            value,
            weight=weight,
            bias=bias,
            rho=rho,
            scale=scale,
            **search.arguments(),
        )
    similarities, indices = select(query, key, search)
    return functional.aggregate_neighbors(value, similarities, indices, weight, bias, rho, scale)
