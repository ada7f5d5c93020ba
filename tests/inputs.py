# SPDX-License-Identifier: MIT
"""Parametrizations and random inputs that the tests of the operators share."""

import pytest
import torch
from cases import DTYPES, METRICS, RHOS, SHORT
from torch import Tensor

each_metric = pytest.mark.parametrize("metric", METRICS)
each_rho = pytest.mark.parametrize("rho", RHOS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
each_weight = pytest.mark.parametrize("kind", ["none", "depthwise", "dense"])

# Results do not depend on the number of threads, and the reference is faster on one.
one_thread = pytest.mark.usefixtures("one_thread")
two_threads = pytest.mark.usefixtures("two_threads")

# Indices of rows that a tensor of 7 rows does not have.
OUT_OF_RANGE = (-1, 7, 2**31, -(2**31), 2**40)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def make_weight(
    kind: str, C: int, k: int, dtype: torch.dtype = torch.float32, outputs: int = 5
) -> Tensor | None:
    shapes = {"depthwise": (C, 1, k), "dense": (outputs, C, k)}
    return randn(*shapes[kind], dtype=dtype) if kind in shapes else None


def gradients(
    output: Tensor, leaves: list[Tensor], grad_output: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Gradients of one output, by default of its sum; zeros for leaves that it does not use."""
    grad_output = torch.ones_like(output) if grad_output is None else grad_output
    return torch.autograd.grad(output, leaves, grad_output, materialize_grads=True)


def by_key(s: Tensor, I: Tensor) -> Tensor:
    """Similarities in the order of the keys, of a selection that has every key."""
    return torch.empty_like(s).scatter(-1, I, s)


def allowed_by(ranges: Tensor, M: int) -> Tensor:
    """[..., N, M] bool: whether key j is in the range of query i, of ranges [..., N, 2]."""
    j = torch.arange(M)
    return (ranges[..., :1] <= j) & (j < ranges[..., 1:])


def with_any_bytes(mask: Tensor) -> Tensor:
    """The same mask, True in bytes of 1, 2, 128 and 255, as a mask of another program may be."""
    of_true = torch.tensor([1, 2, 128, 255], dtype=torch.uint8).repeat(mask.numel() // 4 + 1)
    return (mask.contiguous().view(torch.uint8) * of_true[: mask.numel()].view(mask.shape)).view(
        torch.bool
    )
