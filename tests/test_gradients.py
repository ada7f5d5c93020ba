# SPDX-License-Identifier: MIT
"""Gradients against finite differences in float64, at inputs with a stable selection."""

import pytest
import torch
from cases import METRICS, RHOS
from torch import Tensor

import convnn_kernels  # noqa: F401

ops = torch.ops.convnn

# A step of gradcheck changes a similarity by about 1e-6, which must not change the neighbors.
GAP = 1e-3
N, M, D, C, K = 3, 7, 3, 2, 3


def separated(metric: str, lead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Query and key whose similarities all differ by more than GAP."""
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        query, key = (
            torch.randn(*lead, n, D, generator=generator, dtype=torch.float64) for n in (N, M)
        )
        s, _ = ops.select(query, key, M, metric=metric)
        if (s[..., :-1] - s[..., 1:]).min() > GAP:
            return query.requires_grad_(), key.requires_grad_()
    raise AssertionError("no seed separates the similarities")


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def make_weight(kind: str) -> Tensor | None:
    return {"none": None, "depthwise": randn(C, 1, K), "dense": randn(4, C, K)}[kind]


OPTIONS = {
    "plain": {},
    "mask": {"key_mask": torch.tensor([True, False, True, True, False, True, True])},
    "few_left": {"key_mask": torch.tensor([False, False, True, False, True, False, False])},
    "none_left": {"key_mask": torch.zeros(M, dtype=torch.bool)},
    "candidates": {"candidates": torch.tensor([6, 0, 3, 4])},
    "self": {"self_indices": torch.tensor([5, 0, 2])},
    "by_index": {"order": "index", "self_indices": torch.tensor([5, 0, 2])},
}


@pytest.mark.quick_one_in(2)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("kind", ["none", "depthwise", "dense"])
@pytest.mark.parametrize("option", OPTIONS)
def test_forward(metric: str, rho: str, kind: str, option: str) -> None:
    query, key = separated(metric)
    weight = make_weight(kind)
    bias = randn(4 if kind == "dense" else C)
    scale = 0.7 if rho == "softmax" else 1.0

    def run(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor) -> tuple:
        Y, s, _ = ops.forward(
            query,
            key,
            value,
            K,
            weight,
            bias,
            **OPTIONS[option],
            metric=metric,
            rho=rho,
            scale=scale,
        )
        return Y, torch.where(s.isfinite(), s, 0.0)

    assert torch.autograd.gradcheck(run, (query, key, randn(M, C), weight, bias))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("lead", [(2,), (2, 1, 2)], ids=str)
def test_batch(metric: str, lead: tuple[int, ...]) -> None:
    query, key = separated(metric, lead)

    def run(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        return ops.forward(query, key, value, K, weight, metric=metric)[:2]

    assert torch.autograd.gradcheck(run, (query, key, randn(*lead, M, C), make_weight("dense")))


@pytest.mark.parametrize("metric", METRICS)
def test_select(metric: str) -> None:
    query, key = separated(metric)
    assert torch.autograd.gradcheck(
        lambda q, k: ops.select(q, k, M, metric=metric)[0], (query, key)
    )


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("kind", ["none", "depthwise", "dense"])
def test_aggregate(rho: str, kind: str) -> None:
    """Repeated indices, and every differentiable input."""
    indices = torch.randint(M, (N, K))
    indices[0] = 4

    def run(value: Tensor, s: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.aggregate(value, s, indices, weight, bias, rho)

    bias = randn(4 if kind == "dense" else C)
    assert torch.autograd.gradcheck(run, (randn(M, C), randn(N, K), make_weight(kind), bias))
