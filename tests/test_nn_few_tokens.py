# SPDX-License-Identifier: MIT
"""Layers whose input has fewer tokens than k: the places that nothing fills are missing."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convnn_kernels.nn import (
    Candidates,
    ConvNN1d,
    ConvNN2d,
    ConvNNAttention,
    HybridBranch2d,
    RandomCandidates,
    SpatialCandidates,
)

K = 9
SETTINGS: list[dict[str, Any]] = [
    {},
    {"metric": "dot", "scale": 2.0},
    {"rho": "similarity", "order": "index"},
    {"rho": "ones", "projections": "value", "metric": "euclidean"},
    {"aggregation": "sum", "positional_encoding": "similarity"},
    {"aggregation": "depthwise", "bias": True},
    {"aggregation": "dense", "bias": True},
]


def first_taps(layer: nn.Module, k: int) -> nn.Module:
    """A copy of the layer for k neighbors, which has the first k taps of its weight."""
    copied = copy.deepcopy(layer)
    copied.k = k
    if layer.weight is not None:
        copied.weight = nn.Parameter(layer.weight.detach()[..., :k].clone())
    return copied


def assert_equal_with_gradients(layer: nn.Module, expected: nn.Module, x: Tensor) -> None:
    """`expected` has fewer taps; the others get a gradient of zero."""
    inputs, same = (x.clone().requires_grad_() for _ in range(2))
    y = layer(inputs)
    assert y.isfinite().all()
    torch.testing.assert_close(y, expected(same))
    y.square().sum().backward()
    expected(same).square().sum().backward()
    torch.testing.assert_close(inputs.grad, same.grad)
    for ours, other in zip(layer.parameters(), expected.parameters(), strict=True):
        assert ours.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(ours.grad[..., : other.shape[-1]], other.grad)
        assert not ours.grad[..., other.shape[-1] :].any()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("length", [1, 5])
def test_attention_equals_masked_tokens(length: int, settings: dict[str, Any]) -> None:
    layer = ConvNNAttention(16, 2 if "positional_encoding" not in settings else 1, K, **settings)
    layer.double()
    x = torch.randn(2, length, 16, dtype=torch.float64)
    y = layer(x)
    assert y.isfinite().all()
    if layer.positional_encoding is None:
        mask = (torch.arange(K) < length).expand(2, -1)
        padded = torch.cat([x, torch.randn(2, K - length, 16, dtype=x.dtype)], 1)
        torch.testing.assert_close(y, layer(padded, key_mask=mask)[:, :length])
    assert_equal_with_gradients(layer, first_taps(layer, length), x)


def test_cross_attention_with_a_short_memory() -> None:
    layer = ConvNNAttention(16, 2, K)
    query, memory = torch.randn(2, 20, 16), torch.randn(2, 3, 16)
    torch.testing.assert_close(layer(query, memory), first_taps(layer, 3)(query, memory))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("shape", "padding"), [((5,), 0), ((3,), 2), ((2, 3), 0), ((1, 1), 0)])
def test_sequences_and_maps(shape: tuple[int, ...], padding: int, settings: dict[str, Any]) -> None:
    make = ConvNN1d if len(shape) == 1 else ConvNN2d
    layer = make(4, 4, K, padding=padding, **settings).double()
    tokens = torch.Size([size + 2 * padding for size in shape]).numel()
    x = torch.randn(2, 4, *shape, dtype=torch.float64)
    assert_equal_with_gradients(layer, first_taps(layer, tokens), x)
    similarities, indices = layer.neighbors(x)
    assert similarities.shape == indices.shape == (2, torch.Size(shape).numel(), K)
    assert similarities[..., :tokens].isfinite().all()
    assert (similarities[..., tokens:] == float("-inf")).all()
    assert ((indices >= 0) & (indices < tokens)).all()


@pytest.mark.parametrize("padding", [0, 1])
def test_hybrid(padding: int) -> None:
    layer = HybridBranch2d(3, 4, k=12, padding=padding)
    assert layer.convnn is not None
    x = torch.randn(2, 3, 1, 1) if padding else torch.randn(2, 3, 2, 2)
    expected = copy.deepcopy(layer)
    expected.convnn = first_taps(layer.convnn, 9 if padding else 4)
    torch.testing.assert_close(layer(x), expected(x))


@pytest.mark.parametrize(
    "candidates",
    [
        RandomCandidates(4, include_self=False, fixed_in_eval=True),
        SpatialCandidates(4, include_self=False),
        SpatialCandidates(stride=3, include_self=False),
    ],
    ids=["random", "spatial", "stride"],
)
def test_fewer_candidates_than_k(candidates: Candidates) -> None:
    layers = [
        ConvNN1d(4, 4, K, candidates=candidates).eval(),
        ConvNN2d(4, 4, K, padding=1, candidates=candidates).eval(),
        ConvNNAttention(4, 1, K, candidates=candidates).eval(),
    ]
    shapes = [(2, 4, 12), (2, 4, 6, 6), (2, 12, 4)]
    for layer, shape in zip(layers, shapes, strict=True):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), first_taps(layer, 4)(x))


def test_self_beside_few_candidates() -> None:
    """A token that is no candidate has one neighbor more than one that is."""
    layer = ConvNN1d(4, 4, K, candidates=SpatialCandidates(4))
    similarities, indices = layer.neighbors(torch.randn(2, 4, 12))
    filled = similarities.isfinite().sum(-1)  # [B, N]
    is_candidate = torch.arange(12) % 3 == 0
    assert torch.equal(filled, torch.where(is_candidate, 4, 5).expand(2, -1))
    assert torch.equal(indices[..., 0], torch.arange(12).expand(2, -1))


@pytest.mark.slow
def test_compiled_for_many_and_few_tokens() -> None:
    torch.compiler.reset()
    layer = ConvNNAttention(16, 2, K)
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="aot_eager")
    for length in (20, 5, 9):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(compiled(x), layer(x))
