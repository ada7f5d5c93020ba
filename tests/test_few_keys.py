# SPDX-License-Identifier: MIT
"""k beyond the number of keys, or of candidates: the neighbors that do not exist are missing."""

from typing import Any

import pytest
import torch
from torch import Tensor

import convnn_kernels  # noqa: F401, defines the operators

convnn = torch.ops.convnn

DTYPES = [torch.float32, torch.bfloat16]
N, M, C, K = 5, 3, 4, 7


def with_masked_keys(tensor: Tensor, count: int) -> Tensor:
    """`count` more rows."""
    return torch.cat([tensor, torch.randn_like(tensor[..., :1, :]).expand(-1, count, -1)], -2)


def inputs(dtype: torch.dtype, weight: str | None, m: int = M) -> list[Any]:
    torch.manual_seed(0)
    shapes = {"dense": (6, C, K), "depthwise": (C, 1, K), None: None}
    shape = shapes[weight]
    return [
        torch.randn(2, N, 4, dtype=dtype),
        torch.randn(2, m, 4, dtype=dtype),
        torch.randn(2, m, C, dtype=dtype),
        K,
        None if shape is None else torch.randn(shape, dtype=dtype),
        torch.randn(6 if weight == "dense" else C, dtype=dtype),
    ]


def run(args: list[Any], **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of the tensors."""
    leaves = [X.clone().requires_grad_() if isinstance(X, Tensor) else X for X in args]
    output, similarities, indices = convnn.forward(*leaves, **options)
    present = similarities.masked_fill(similarities.isneginf(), 0)
    loss = output.square().sum() + present.sum()
    tensors = [X for X in leaves if isinstance(X, Tensor)]
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    grads = [
        torch.zeros_like(X) if g is None else g for X, g in zip(tensors, gradients, strict=True)
    ]
    return [output, similarities, indices], grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", ["dense", "depthwise", None])
@pytest.mark.parametrize("rho", ["softmax", "ones", "similarity"])
@pytest.mark.parametrize("order", ["similarity", "index"])
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_equals_masked_keys(
    metric: str, order: str, rho: str, weight: str | None, dtype: torch.dtype
) -> None:
    """As if there were enough keys, of which all but M are masked."""
    query, key, value, *rest = inputs(dtype, weight)
    options = {"metric": metric, "order": order, "rho": rho}
    got, grads = run([query, key, value, *rest], **options)
    mask = (torch.arange(K + 2) < M).expand(2, -1)
    more = [with_masked_keys(X, K + 2 - M) for X in (key, value)]
    expected, expected_grads = run([query, *more, *rest], key_mask=mask, **options)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    expected_grads[1:3] = [g[:, :M] for g in expected_grads[1:3]]
    for a, b in zip(grads, expected_grads, strict=True):
        assert torch.equal(a, b)
    assert got[1].isneginf().sum(-1).eq(K - M).all()
    assert got[2][..., M:].eq(0).all()


@pytest.mark.parametrize("order", ["similarity", "index"])
@pytest.mark.parametrize("r", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_candidates_and_self(order: str, r: int, masked: bool) -> None:
    """The token itself need not be a candidate: then there is one neighbor more."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    candidates, self_indices = torch.tensor([3, 1])[:r], torch.arange(4)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[:, 1] = not masked
    similarities, indices = convnn.select(
        query, key, 5, candidates, self_indices, mask if masked else None, order=order
    )
    for b in range(2):
        for i in range(4):
            expected = {j for j in {i, *candidates.tolist()} if mask[b, j]}
            found = ~similarities[b, i].isneginf()
            assert found.sum() == len(expected)
            assert found[: len(expected)].all()
            chosen = indices[b, i][found].tolist()
            assert set(chosen) == expected
            assert chosen[:1] == [i] or order == "index" or not mask[b, i]
            assert chosen == sorted(chosen) or order == "similarity"
            assert indices[b, i][~found].eq(0).all()


@pytest.mark.parametrize("weight", ["dense", "depthwise", None])
@pytest.mark.parametrize("rho", ["softmax", "ones", "similarity"])
def test_no_keys(rho: str, weight: str | None) -> None:
    """The output is the bias; only the bias has a gradient."""
    args = inputs(torch.float32, weight, m=0)
    (output, similarities, indices), grads = run(args, rho=rho)
    assert torch.equal(output, args[-1].expand_as(output))
    assert similarities.isneginf().all()
    assert indices.eq(0).all()
    *others, bias_grad = grads
    assert all(g.eq(0).all() for g in others)
    torch.testing.assert_close(bias_grad, 2 * 2 * N * args[-1])
    again = convnn.aggregate(args[2], similarities, indices, *args[4:], rho=rho)
    assert torch.equal(again, output)


def test_no_rows_of_value_and_a_neighbor() -> None:
    similarities, indices = torch.full((1, 2), -torch.inf), torch.zeros(1, 2, dtype=torch.int64)
    assert convnn.aggregate(torch.ones(0, 3), similarities, indices).eq(0).all()
    similarities[0, 1] = 0.5
    with pytest.raises(RuntimeError, match="similarities must be -inf without rows of value, got"):
        convnn.aggregate(torch.ones(0, 3), similarities, indices)


def test_far_more_neighbors_than_keys() -> None:
    """Working memory follows the number of keys."""
    query = torch.randn(64, 4)
    similarities, indices = convnn.select(query, query[:10], 20_000)
    few = convnn.select(query, query[:10], 10)
    assert torch.equal(similarities[:, :10], few[0])
    assert torch.equal(indices[:, :10], few[1])
    assert similarities[:, 10:].isneginf().all()


@pytest.mark.parametrize("weight", ["dense", "depthwise", None])
def test_backward_without_queries(weight: str | None) -> None:
    """All gradients are zero, at once, however large k is."""
    k = 2**40 if weight is None else K
    query, key, value, _, *convolution = inputs(torch.float32, weight)
    args = [query[:, :0], key, value, k, *convolution]
    _, grads = run(args)
    assert all(g.eq(0).all() for g in grads)


def test_more_neighbors_than_memory() -> None:
    with pytest.raises(RuntimeError, match=r"cannot allocate .* shape \[5, 1099511627776\]"):
        convnn.select(torch.ones(5, 3), torch.ones(5, 3), 2**40)
