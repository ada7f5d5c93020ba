# SPDX-License-Identifier: MIT
"""Gradients of `forward`: shared keys, strided and expanded gradients, only some of them needed."""

import pytest
import torch
from cases import LAYOUTS, SHORT, with_layout
from inputs import (
    each_dtype,
    each_metric,
    each_weight,
    gradients,
    make_weight,
    one_thread,
    randn,
    two_threads,
)
from torch import Tensor

import convnn_kernels  # noqa: F401
from python_ref import assert_forward

ops = torch.ops.convnn
pytestmark = one_thread


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=SHORT.get)
@each_metric
def test_half_gradients_stay_finite(dtype: torch.dtype, metric: str) -> None:
    """A sharp softmax and rows with a tiny norm, as they occur late in training."""
    query, key, value = (randn(2, n, 16, dtype=dtype) for n in (20, 40, 40))
    query[0] *= 1e-4
    key[1, :20] *= 1e-4
    scale = 1000.0 if metric == "cosine" else 30.0
    value.requires_grad_()
    Y, _, _ = ops.forward(query, key, value, 9, metric=metric, scale=scale)
    (grad_value,) = gradients(Y, [value])
    assert grad_value.isfinite().all()
    assert_forward(ops.forward, query, key, value, 9, metric=metric, scale=scale)


@two_threads
@each_metric
@each_weight
def test_all_queries_select_one_key(metric: str, kind: str) -> None:
    """The gradients of all queries are summed in one row of key and value."""
    query = 1 + 0.1 * randn(2, 300, 5).abs()
    key = -randn(2, 60, 5).abs()
    key[:, 41] = 1.0
    for k in (1, 3):
        _, _, I = assert_forward(
            ops.forward, query, key, randn(2, 60, 4), k, make_weight(kind, 4, k), metric=metric
        )
        assert (I[..., 0] == 41).all()


@each_weight
@each_dtype
def test_expanded_gradient(kind: str, dtype: torch.dtype) -> None:
    """The gradient that `sum().backward()` passes has strides of 0."""
    query, key, value = (randn(2, n, 6, dtype=dtype) for n in (21, 30, 30))
    weight = make_weight(kind, 6, 4, dtype)
    outputs = 5 if kind == "dense" else 6
    one = torch.ones((), dtype=dtype)
    for grad in (one.expand(2, 21, outputs), randn(2, 21, 1, dtype=dtype).expand(2, 21, outputs)):
        assert_forward(ops.forward, query, key, value, 4, weight, grad_output=grad)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    Y, s, _ = ops.forward(*leaves, 4, weight)
    ones = [torch.ones_like(Y), torch.ones_like(s)]
    expected = torch.autograd.grad((Y, s), leaves, ones, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(Y.sum() + s.sum(), leaves), expected))


@pytest.mark.parametrize("layout", LAYOUTS)
@each_weight
def test_strided_gradient(layout: str, kind: str) -> None:
    query, key, value = (randn(3, n, 6) for n in (21, 30, 30))
    weight = make_weight(kind, 6, 4)
    grad = with_layout(randn(3, 21, 5 if kind == "dense" else 6), layout)
    assert_forward(ops.forward, query, key, value, 4, weight, grad_output=grad)


def test_only_some_gradients_are_needed() -> None:
    """The gradient of each input is the same alone as with those of all others."""
    inputs = [randn(9, 4), randn(12, 4), randn(12, 3), randn(3, 1, 5), randn(3)]

    def run(needed: list[int]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        Y, _, _ = ops.forward(*leaves[:3], 5, *leaves[3:])
        return torch.autograd.grad(Y.square().sum(), [leaves[i] for i in needed])

    expected = run([0, 1, 2, 3, 4])
    for i in range(5):
        torch.testing.assert_close(run([i])[0], expected[i])


def test_ones_gives_query_and_key_no_gradient() -> None:
    leaves = [t.requires_grad_() for t in (randn(9, 4), randn(12, 4), randn(12, 3))]
    Y, _, _ = ops.forward(*leaves, 5, rho="ones")
    grad_query, grad_key, grad_value = gradients(Y, leaves)
    assert not grad_query.any()
    assert not grad_key.any()
    assert grad_value.any()


def test_gradient_of_similarities_alone() -> None:
    query, key = randn(9, 4, dtype=torch.float64), randn(12, 4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (query, key)]
    _, s, I = ops.forward(*leaves, randn(12, 3, dtype=torch.float64), 5)
    cosine = torch.nn.functional.cosine_similarity(query.unsqueeze(1), key[I], dim=-1)
    grad = randn(9, 5, dtype=torch.float64)
    torch.testing.assert_close(gradients(s, leaves, grad), gradients(cosine, leaves, grad))
