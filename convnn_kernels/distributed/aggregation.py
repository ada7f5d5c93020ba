# SPDX-License-Identifier: MIT
"""The aggregation of neighbors whose values are on all ranks."""

from typing import Any

import torch
from torch import Tensor

from convnn_kernels import functional
from convnn_kernels.distributed import exchange, gradients
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
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        options = ctx.has_bias, ctx.rho, ctx.scale
        grads = AggregateBackward.apply(
            grad_output, *ctx.saved_tensors, options, ctx.needs_input_grad[:4], ctx.ranks
        )
        return *grads, None, None


class AggregateBackward(gradients.Gradient):
    """Gradients of value, similarities, weight and bias, by blocks of queries."""

    function = "distributed.aggregate_neighbors"

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        value: Tensor,
        similarities: Tensor,
        indices: Tensor,
        weight: Tensor | None,
        options: tuple[bool, str, float],
        needs: tuple[bool, bool, bool, bool],
        ranks: Ranks,
    ) -> tuple[Tensor | None, ...]:
        grads = exchange.as_rows(grad_output)
        weight = None if weight is None else gradients.to_sum(weight)
        totals = (
            gradients.to_sum(torch.zeros_like(exchange.as_rows(value))),
            similarities.new_zeros(len(grads), indices.shape[-1]),
            grads.new_zeros(0) if weight is None else torch.zeros_like(weight),
            gradients.to_sum(grads.new_zeros(grads.shape[-1])),
        )
        for block in exchange.blocks(value, similarities, indices, ranks):
            of_rows, of_similarities, *of_parameters = torch.ops.convnn.aggregate_backward(
                gradients.to_sum(grads[block.queries]),
                gradients.to_sum(block.rows),
                block.similarities,
                block.indices,
                weight,
                *options,
                *needs,
            )
            if needs[0]:
                exchange.send_back(of_rows, block, totals[0], ranks)
            if needs[1]:
                totals[1][block.queries] = of_similarities
            for total, part, need in zip(totals[2:], of_parameters, needs[2:], strict=True):
                if need:
                    total += part
        shaped = (totals[0].view(value.shape), totals[1].view(similarities.shape), *totals[2:])
        dtypes = (value.dtype, similarities.dtype, value.dtype, value.dtype)
        return tuple(
            total.to(dtype) if need else None
            for total, dtype, need in zip(shaped, dtypes, needs, strict=True)
        )
