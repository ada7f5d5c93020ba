# SPDX-License-Identifier: MIT
"""Gradients of similarities of rows that are zero or close to the largest finite number."""

import torch
from inputs import by_key, each_dtype, each_rho, gradients, one_thread, randn

import convnn_kernels  # noqa: F401
from python_ref import assert_forward

ops = torch.ops.convnn
pytestmark = one_thread


@each_dtype
@each_rho
def test_zero_rows_have_cosine_zero_and_no_gradient(dtype: torch.dtype, rho: str) -> None:
    query, key, value = (randn(n, 6, dtype=dtype) for n in (12, 20, 20))
    query[3] = 0.0
    query[4] = -0.0
    key[[0, 7, 19]] = 0.0
    assert_forward(ops.forward, query, key, value, 20, rho=rho)
    leaves = [t.requires_grad_() for t in (query, key)]
    _, s, I = ops.forward(query, key, value, 20, rho=rho)
    similarity = by_key(s, I)
    assert not similarity[[3, 4]].any()
    assert not similarity[:, [0, 7, 19]].any()
    grad_query, grad_key = gradients(s, leaves, randn(12, 20, dtype=s.dtype))
    assert not grad_query[[3, 4]].any()
    assert not grad_key[[0, 7, 19]].any()
    assert grad_query[0].any()
    assert grad_key[1].any()


def test_rows_close_to_the_largest_finite_number() -> None:
    query = torch.full((1, 4), 1.5e308, dtype=torch.float64, requires_grad=True)
    key = torch.tensor([[1.0, 1.0, 1.0, 2.0]], dtype=torch.float64)
    s, _ = ops.select(query, key, 1)
    (grad,) = gradients(s, [query])
    assert grad.isfinite().all()
    assert grad[0, 3] > 0 > grad[0, 0]


@each_dtype
def test_infinite_rows(dtype: torch.dtype) -> None:
    """Their gradients are NaN, but 0 where a row is nobody's neighbor, or has none."""
    query, key = (randn(n, 6, dtype=dtype) for n in (5, 9))
    query[1, 2], key[[3, 7], 0] = float("inf"), -float("inf")
    mask = torch.arange(9) != 7
    leaves = [X.requires_grad_() for X in (query, key)]
    similarities, I = ops.select(query, key, 8, key_mask=mask)
    assert not I.eq(7).any()
    grad_query, grad_key = gradients(similarities, leaves, torch.ones_like(similarities))
    assert grad_query[1].isnan().all()
    assert grad_key[3].isnan().all()
    assert not grad_key[7].any()
    alone = ops.select(*leaves, 8, key_mask=torch.zeros(9, dtype=torch.bool))[0]
    assert not any(grad.any() for grad in gradients(alone, leaves, torch.ones_like(alone)))
