# SPDX-License-Identifier: MIT
"""The k nearest of the keys of all ranks."""

from typing import Any

import torch
from torch import Tensor

from convnn_kernels import functional
from convnn_kernels.distributed import exchange, gradients, order, ring
from convnn_kernels.distributed.agreement import Ranks


class Select(torch.autograd.Function):
    """Selects from every shard and keeps the k best of all.

    ``arguments`` are those of ``convnn::select`` by name: rows of key, in candidates, self_indices
    and key_range, are those of all ranks; query, key and key_mask are those of this rank.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, arguments: Any, ranks: Ranks) -> Any:
        similarities, indices = _select(arguments._replace(query=query, key=key), ranks)
        ctx.save_for_backward(query, key, similarities, indices)
        ctx.metric, ctx.ranks = arguments.metric, ranks
        ctx.mark_non_differentiable(indices)
        return similarities, indices

    @staticmethod
    def backward(ctx: Any, grad_similarities: Tensor, _: Tensor) -> Any:
        grads = SelectBackward.apply(
            grad_similarities, *ctx.saved_tensors, ctx.metric, ctx.needs_input_grad[:2], ctx.ranks
        )
        return *grads, None, None


class SelectBackward(gradients.Gradient):
    """Gradients of query and key, by blocks of queries."""

    function = "distributed.select_neighbors"

    @staticmethod
    def forward(
        ctx: Any,
        grad_similarities: Tensor,
        query: Tensor,
        key: Tensor,
        similarities: Tensor,
        indices: Tensor,
        metric: str,
        needs: tuple[bool, bool],
        ranks: Ranks,
    ) -> tuple[Tensor | None, Tensor | None]:
        need_query, need_key = needs
        queries, grads = exchange.as_rows(query), exchange.as_rows(grad_similarities)
        grad_query = torch.zeros_like(queries, memory_format=torch.contiguous_format)
        grad_key = similarities.new_zeros(key.shape[:-1].numel(), key.shape[-1])
        for block in exchange.blocks(key, similarities, indices, ranks):
            of_queries, of_rows = torch.ops.convnn.select_backward(
                grads[block.queries],
                gradients.to_sum(queries[block.queries]),
                gradients.to_sum(block.rows),
                block.similarities,
                block.indices,
                metric,
                *needs,
            )
            if need_query:
                grad_query[block.queries] = of_queries
            if need_key:
                exchange.send_back(of_rows, block, grad_key, ranks)
        return (
            grad_query.view(query.shape) if need_query else None,
            grad_key.to(key.dtype).view(key.shape) if need_key else None,
        )


def _select(arguments: Any, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The results of ``convnn::select`` with the keys of all ranks."""
    query, k = arguments.query, arguments.k
    shape = query.shape[:-1]
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    similarities = query.new_full((*shape, k), -torch.inf, dtype=dtype)
    indices = similarities.new_full((*shape, k), order.MISSING, dtype=torch.int64)
    own, own_index = similarities[..., :1].clone(), indices[..., :1].clone()
    for owner, key, key_mask in ring.shards(arguments.key, arguments.key_mask, ranks):
        if not key.shape[-2]:
            continue
        shard = _Shard(arguments._replace(key=key, key_mask=key_mask), ranks.first_key(owner))
        s, i = shard.neighbors()
        similarities, indices = order.best_of([similarities, s], [indices, i], k)
        if arguments.self_indices is not None and not shard.excludes_self:
            s, i = shard.own()
            own, own_index = torch.where(i < order.MISSING, s, own), i.minimum(own_index)
    # The token itself comes first, before all others; where it is no neighbor, at the end.
    present = own_index < order.MISSING
    similarities = torch.where(present, torch.cat([own, similarities[..., :-1]], -1), similarities)
    indices = torch.where(present, torch.cat([own_index, indices[..., :-1]], -1), indices)
    if arguments.order == "index":
        similarities, indices = order.by_index(similarities, indices)
    return similarities, indices.masked_fill(indices == order.MISSING, 0)


class _Shard:
    """A search among the keys of one rank, which begin with the row ``first`` of all keys."""

    def __init__(self, arguments: Any, first: int) -> None:
        self.arguments = arguments
        self.first = first
        self.rows = arguments.key.shape[-2]
        self.excludes_self = arguments.exclude_self
        self.range = self._clamp_range(arguments.key_range)
        self.candidates, self.mask = self._restrict(arguments.candidates, arguments.key_mask)

    def neighbors(self) -> tuple[Tensor, Tensor]:
        """The nearest keys but for the token itself; missing ones have the index MISSING."""
        arguments = self.arguments
        # The token itself may be one of those found, and is then removed.
        k = min(arguments.k + (arguments.self_indices is not None), self.rows)
        s, i = functional.select_neighbors(
            arguments.query,
            arguments.key,
            k,
            candidates=self.candidates,
            key_mask=self.mask,
            metric=arguments.metric,
            key_range=self.range,
        )
        removed = self._missing(s, i)
        if arguments.self_indices is not None:
            removed |= i + self.first == arguments.self_indices.unsqueeze(-1)
        return s.masked_fill(removed, -torch.inf), (i + self.first).masked_fill(
            removed, order.MISSING
        )

    def own(self) -> tuple[Tensor, Tensor]:
        """Similarity and index of the token itself, [..., N, 1], where it is one of these keys."""
        arguments = self.arguments
        rows = arguments.self_indices - self.first
        allowed = (rows >= 0) & (rows < self.rows)
        rows = rows.clamp(0, self.rows - 1)
        s, i = functional.select_neighbors(
            arguments.query,
            arguments.key,
            1,
            candidates=rows.new_empty(0),
            self_indices=rows,
            metric=arguments.metric,
        )
        if self.range is not None:
            allowed = allowed & (self.range[..., 0] <= rows) & (rows < self.range[..., 1])
        if arguments.key_mask is not None:
            allowed = allowed & arguments.key_mask.gather(-1, i.squeeze(-1))
        absent = ~allowed.expand(i.shape[:-1]).unsqueeze(-1)
        return s, (i + self.first).masked_fill(absent, order.MISSING)

    def _clamp_range(self, key_range: Tensor | None) -> Tensor | None:
        return None if key_range is None else (key_range - self.first).clamp(0, self.rows)

    def _restrict(
        self, candidates: Tensor | None, key_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The candidates among these keys, and the mask. Those of each batch element are masks."""
        if candidates is None:
            return None, key_mask
        rows = candidates - self.first
        inside = (rows >= 0) & (rows < self.rows)
        if rows.dim() == 1:
            return rows[inside], key_mask
        # One more place, for candidates that are keys of other ranks.
        among = rows.new_zeros((*rows.shape[:-1], self.rows + 1), dtype=torch.bool)
        among.scatter_(-1, rows.masked_fill(~inside, self.rows), True)
        among = among[..., :-1]
        return None, among if key_mask is None else among & key_mask

    def _missing(self, similarities: Tensor, indices: Tensor) -> Tensor:
        """Which places are missing neighbors, not keys whose similarity is -inf.

        Both have the similarity -inf. Only index 0 may be either: it is the key in its first place,
        if that key is allowed.
        """
        zero = indices == 0
        first = zero & (zero.cumsum(-1) == 1) & self._allows_first().unsqueeze(-1)
        return zero & ~first & (similarities == -torch.inf)

    def _allows_first(self) -> Tensor:
        """Whether the first of these keys may be a neighbor of a query, [..., N] or broadcast."""
        allowed = torch.ones(1, dtype=torch.bool, device=self.arguments.key.device)
        if self.mask is not None:
            allowed = self.mask[..., :1]
        if self.candidates is not None:
            allowed = allowed & (self.candidates == 0).any()
        if self.range is not None:
            allowed = allowed & (self.range[..., 0] == 0) & (self.range[..., 1] > 0)
        return allowed
