# SPDX-License-Identifier: MIT
"""A given similarity of a token to itself, against layers computed from all pairs."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convnn_kernels import functional
from convnn_kernels.nn import (
    AllCandidates,
    Candidates,
    ConvNN1d,
    ConvNN2d,
    ConvNNAttention,
    HybridBranch2d,
    RandomCandidates,
    SpatialCandidates,
)

OWN = 0.75
METRICS = {
    "cosine": lambda q, k: (
        nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).mT
    ),
    "dot": lambda q, k: q @ k.mT,
    "euclidean": lambda q, k: -(q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1),
}


def all_pairs(layer: nn.Module, q: Tensor, k: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities and indices, [..., N, k] each, of tokens that are queries and keys.

    Args:
        layer: its metric, order and k are used.
        q: [..., N, D].
        k: [..., N, D].
        allowed: [..., N, N] bool, which pairs may be neighbors. The token itself is first if it is
            allowed, with the similarity OWN.
    """
    pairs = METRICS[layer.metric](q, k)  # [..., N, N]
    itself = torch.eye(pairs.shape[-1], dtype=torch.bool)
    ranks = pairs.masked_fill(itself, torch.inf).masked_fill(~allowed, -torch.inf)
    pairs = torch.where(itself, OWN, pairs)
    best = ranks.argsort(dim=-1, descending=True, stable=True)[..., : layer.k]
    missing = ~allowed.gather(-1, best)
    if layer.order == "index":
        places = (best + pairs.shape[-1] * missing).argsort(-1)
        best, missing = best.gather(-1, places), missing.gather(-1, places)
    similarities = pairs.gather(-1, best).masked_fill(missing, -torch.inf)
    more = (0, layer.k - best.shape[-1])
    indices = nn.functional.pad(best.masked_fill(missing, 0), more)
    return nn.functional.pad(similarities, more, value=-torch.inf), indices


def convolved(layer: nn.Module, value: Tensor, similarities: Tensor, indices: Tensor) -> Tensor:
    """[..., N, O] from value, [..., M, C], with the dense or depthwise weight of the layer."""
    found = similarities != -torch.inf
    if layer.rho == "softmax":
        scaled = (layer.scale * similarities).exp() * found
        rho = scaled / scaled.sum(-1, keepdim=True).clamp(min=1e-300)
    else:
        rho = similarities.masked_fill(~found, 0.0)
    rows = indices.flatten(-2).unsqueeze(-1).expand(*value.shape[:-2], -1, value.shape[-1])
    gathered = value.gather(-2, rows).unflatten(-2, indices.shape[-2:])  # [..., N, k, C]
    weighted = gathered * rho.unsqueeze(-1)
    if layer.aggregation == "depthwise":
        return torch.einsum("...nkc,ck->...nc", weighted, layer.weight.squeeze(1))
    return torch.einsum("...nkc,ock->...no", weighted, layer.weight)


def is_candidate(candidates: Candidates, count: int) -> Tensor:
    """[N, N] bool: every token may have the candidates and itself as neighbors."""
    drawn = candidates((count,), 0, torch.device("cpu"))
    allowed = torch.eye(count, dtype=torch.bool)
    allowed[:, slice(None) if drawn is None else drawn] = True
    return allowed


def assert_same(y: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """The outputs and the gradients of all inputs."""
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    for ours, other in zip(
        torch.autograd.grad(y, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-12)


every_metric = pytest.mark.parametrize("metric", METRICS)
every_order = pytest.mark.parametrize("order", ["similarity", "index"])


@every_metric
@every_order
@pytest.mark.parametrize("rho", ["softmax", "similarity"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "candidates",
    [
        AllCandidates(True, self_similarity=OWN),
        SpatialCandidates(3, self_similarity=OWN),
        RandomCandidates(4, fixed_in_eval=True, self_similarity=OWN),
    ],
    ids=["all", "spatial", "random"],
)
def test_attention(candidates: Candidates, masked: bool, rho: str, order: str, metric: str) -> None:
    """With and without a mask that leaves fewer keys than k, without the first token."""
    scale = 1.5 if rho == "softmax" else 1.0
    layer = ConvNNAttention(
        6, 2, k=4, metric=metric, rho=rho, order=order, scale=scale, candidates=candidates
    )
    layer.double().eval()
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 9, dtype=torch.bool)
    if masked:
        mask[0] = torch.tensor([0, 1, 0, 1, 0, 0, 1, 0, 0])
        mask[1, ::2] = False
    q, k, v = (
        projection(x).unflatten(-1, (2, -1)).transpose(1, 2)
        for projection in (layer.query_projection, layer.key_projection, layer.value_projection)
    )
    allowed = is_candidate(candidates, 9) & mask[:, None, None]  # [B, 1, N, N]
    neighbors = all_pairs(layer, q, k, allowed.expand(-1, 2, -1, -1))
    expected = convolved(layer, v, *neighbors).transpose(1, 2).flatten(2)
    y = layer(x, key_mask=mask if masked else None)
    assert_same(y, layer.output_projection(expected), [x, *layer.parameters()])


@every_metric
@every_order
@pytest.mark.parametrize("k", [3, 12])
@pytest.mark.parametrize("projections", ["learned", "identity", "coordinates"])
def test_sequences(projections: str, k: int, order: str, metric: str) -> None:
    """Also with more places than tokens: the missing ones have index 0, and remain missing."""
    layer = ConvNN1d(
        3,
        4,
        k,
        metric=metric,
        order=order,
        projections=projections,
        bias=False,
        positional_encoding="similarity" if projections == "coordinates" else None,
        coordinates="pixel",
        candidates=SpatialCandidates(4, self_similarity=OWN),
    ).double()
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    tokens = x.mT
    q = k_ = v = tokens
    if projections == "learned":
        q, k_, v = (
            projection(tokens)
            for projection in (layer.query_projection, layer.key_projection, layer.value_projection)
        )
    elif projections == "coordinates":
        q = k_ = torch.arange(10, dtype=torch.float64).view(1, 10, 1).expand(2, -1, -1)
    allowed = is_candidate(layer.candidates, 10).expand(2, -1, -1)
    similarities, indices = layer.neighbors(x)
    expected = all_pairs(layer, q, k_, allowed)
    torch.testing.assert_close(similarities, expected[0], rtol=1e-12, atol=1e-12)
    found = expected[0] != -torch.inf
    assert not indices[~found].any()
    if metric != "cosine" or projections != "coordinates":  # where positive numbers all tie
        assert torch.equal(indices[found], expected[1][found])
    itself = torch.arange(10).unsqueeze(-1)
    own = similarities[(indices == itself) & found]
    assert torch.equal(own, torch.full((20,), OWN, dtype=torch.float64))
    y = convolved(layer, v, expected[0], indices)
    assert_same(layer(x), y.mT, [x, layer.weight])


def test_a_map_with_padding_and_a_stride() -> None:
    own, plain = (
        ConvNN2d(
            3, 4, 5, padding=1, stride=2, candidates=SpatialCandidates(9, self_similarity=value)
        )
        for value in (OWN, None)
    )
    plain.load_state_dict(own.state_dict())
    x = torch.randn(2, 3, 6, 5)
    similarities, indices = plain.neighbors(x)
    queries = torch.arange(8 * 7).view(8, 7)[1:-1:2, 1:-1:2].flatten()
    assert torch.equal(indices[..., 0], queries.expand(2, -1))
    similarities[..., 0] = OWN
    torch.testing.assert_close(own.neighbors(x), (similarities, indices))
    value = own.value_projection(nn.functional.pad(x, (1, 1, 1, 1)).flatten(2).mT)
    y = functional.aggregate_neighbors(value, similarities, indices, own.weight, own.bias)
    torch.testing.assert_close(own(x), y.mT.unflatten(-1, (3, 3)))


def build(value: float | None, name: str, **settings: Any) -> nn.Module:
    candidates = AllCandidates(True, self_similarity=value)
    torch.manual_seed(0)
    if name == "attention":
        return ConvNNAttention(4, k=3, candidates=candidates, **settings)
    if name == "hybrid":
        return HybridBranch2d(4, 6, candidates=candidates, **settings)
    return ConvNN2d(4, 4, k=3, candidates=candidates, **settings)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["2d", "hybrid", "attention"])
@pytest.mark.parametrize("rho", ["softmax", "similarity", "ones"])
def test_one_is_the_cosine_without_projections(name: str, rho: str, autocast: bool) -> None:
    """Its gradient is zero, too."""
    x = torch.randn((2, 9, 4) if name == "attention" else (2, 4, 4, 4))
    results = []
    for value in (1.0, None, 2.0):
        layer = build(value, name, rho=rho, projections="identity")
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(inputs)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), inputs)))
    tolerance = {"rtol": 0.05, "atol": 0.05} if autocast else {}
    assert results[0][0].dtype == (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(results[0], results[1], **tolerance)
    assert torch.equal(results[2][0], results[0][0]) == (rho == "ones")


def test_it_carries_no_gradient() -> None:
    layer = ConvNNAttention(
        4, k=1, rho="similarity", metric="dot", candidates=AllCandidates(True, self_similarity=OWN)
    )
    layer(torch.randn(2, 5, 4)).square().sum().backward()
    for projection in (layer.query_projection, layer.key_projection):
        assert not projection.weight.grad.any()
    assert layer.value_projection.weight.grad.any()


def test_cross_attention_has_no_self() -> None:
    query, memory = torch.randn(2, 5, 4), torch.randn(2, 7, 4)
    assert torch.equal(
        build(OWN, "attention")(query, memory), build(None, "attention")(query, memory)
    )
    assert not torch.equal(build(OWN, "attention")(query), build(None, "attention")(query))


@pytest.mark.parametrize("name", ["2d", "attention"])
def test_modules_without_the_settings(name: str) -> None:
    """As they come from a file that was written before there were these settings."""

    def make() -> nn.Module:
        layer = build(None, name, positional_encoding="similarity")
        layer.candidates = SpatialCandidates(4)
        return layer

    layer, expected = make(), make()
    for module in layer.modules():
        for setting in ("self_similarity", "standardize", "coordinate_order", "spacing"):
            vars(module).pop(setting, None)
    x = torch.randn((2, 9, 4) if name == "attention" else (2, 4, 4, 4))
    for same in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(same) == repr(expected)
        assert torch.equal(same(x), expected(x))


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.int64(2), 2, 0.5, -1, 0])
def test_numbers(value: Any) -> None:
    for candidates in (
        AllCandidates(True, self_similarity=value),
        RandomCandidates(3, self_similarity=value),
        SpatialCandidates(3, self_similarity=value),
    ):
        assert type(candidates.self_similarity) is float
        assert candidates.self_similarity == value
        assert f"include_self=True, self_similarity={float(value)}" in repr(candidates)


def test_a_class_of_a_user() -> None:
    class First(Candidates):
        def forward(self, shape: Any, padding: int, device: torch.device) -> Tensor:
            return torch.arange(2, device=device)

    assert First(True).self_similarity is None
    layer = ConvNNAttention(4, k=2, candidates=First(True, 3.0))
    assert layer(torch.randn(2, 5, 4)).shape == (2, 5, 4)
    with pytest.raises(ValueError, match="First: self_similarity must be None with include_self"):
        First(False, 3.0)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (-float("inf"), "-inf"),
        (1e39, "1e"),
        (10**400, "1000"),
        (True, "True"),
        ("1", "'1'"),
        (torch.tensor(1.0), r"Tensor of shape \[\]"),
        (np.ones(2), r"ndarray of shape \[2\]"),
    ],
    ids=str,
)
def test_wrong_numbers(value: Any, got: str) -> None:
    message = f"self_similarity must be a number that is finite in float32, got {got}"
    for make in (
        lambda: AllCandidates(True, self_similarity=value),
        lambda: RandomCandidates(3, self_similarity=value),
        lambda: SpatialCandidates(3, self_similarity=value),
    ):
        with pytest.raises(ValueError, match=f"Candidates: {message}"):
            make()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_it_needs_the_token_itself(value: float) -> None:
    message = f"self_similarity must be None with include_self=False, got {value}"
    for make in (
        lambda: AllCandidates(self_similarity=value),
        lambda: RandomCandidates(3, include_self=False, self_similarity=value),
        lambda: SpatialCandidates(stride=3, include_self=False, self_similarity=value),
    ):
        with pytest.raises(ValueError, match=f"Candidates: {message}"):
            make()
