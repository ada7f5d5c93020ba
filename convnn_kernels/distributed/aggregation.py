# SPDX-License-Identifier: MIT
"""The aggregation of neighbors whose values are on all ranks."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from convnn_kernels import functional
from convnn_kernels.distributed import exchange
from convnn_kernels.distributed.agreement import Ranks


class Aggregate(torch.autograd.Function):
    """Aggregates by blocks of queries, each from a table of the values that are its neighbors.

    A query is aggregated at once, from all of its neighbors, so its output has the bits that it has
    in one process. ``arguments`` are those of ``convnn::aggregate`` by name.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        similarities: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        arguments: Any,
        ranks: Ranks,
    ) -> Tensor:
        indices = arguments.indices
        ctx.save_for_backward(value, similarities, indices, weight)
        ctx.has_bias, ctx.rho, ctx.scale = bias is not None, arguments.rho, arguments.scale
        ctx.ranks = ranks
        channels = value.shape[-1] if weight is None else weight.shape[0]
        output = value.new_empty(indices.shape[:-2].numel() * indices.shape[-2], channels)
        for block in exchange.blocks(value, similarities, indices, ranks):
            output[block.queries] = functional.aggregate_neighbors(
                block.rows,
                block.similarities,
                block.indices,
                weight,
                bias,
                arguments.rho,
                arguments.scale,
            )
        return output.view(*indices.shape[:-1], channels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        value, similarities, indices, weight = ctx.saved_tensors
        need_value, need_similarities, need_weight, need_bias = ctx.needs_input_grad[:4]
        grads = exchange.as_rows(grad_output)
        grad_value = exchange.to_sum(torch.zeros_like(exchange.as_rows(value)))
        grad_similarities = similarities.new_zeros(len(grads), indices.shape[-1])
        weight = None if weight is None else exchange.to_sum(weight)
        grad_weight = None if weight is None else torch.zeros_like(weight)
        grad_bias = exchange.to_sum(grads.new_zeros(grads.shape[-1]))
        for block in exchange.blocks(value, similarities, indices, ctx.ranks):
            of_rows, of_similarities, of_weight, of_bias = torch.ops.convnn.aggregate_backward(
                exchange.to_sum(grads[block.queries]),
                exchange.to_sum(block.rows),
                block.similarities,
                block.indices,
                weight,
                ctx.has_bias,
                ctx.rho,
                ctx.scale,
                need_value,
                need_similarities,
                need_weight,
                need_bias,
            )
            if need_value:
                exchange.send_back(of_rows, block, grad_value, ctx.ranks)
            if need_similarities:
                grad_similarities[block.queries] = of_similarities
            if need_weight:
                grad_weight += of_weight
            if need_bias:
                grad_bias += of_bias
        return (
            grad_value.to(value.dtype).view(value.shape) if need_value else None,
            grad_similarities.view(similarities.shape) if need_similarities else None,
            grad_weight.to(value.dtype) if grad_weight is not None and need_weight else None,
            grad_bias.to(value.dtype) if need_bias else None,
            None,
            None,
        )
