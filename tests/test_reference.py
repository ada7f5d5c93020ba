# SPDX-License-Identifier: MIT
"""The reference against results computed by hand and against Algorithm 1 in eager PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import assert_special, make_case, make_special_case
from inputs import gradients, make_weight, randn
from torch import Tensor

import python_ref

INF = math.inf


def algorithm_1(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, rho: str, groups: int = 1
) -> Tensor:
    """Algorithm 1 on [B, C, N] after the projections; rows of S are queries, as in Eq. 3."""
    neighbors = weight.shape[-1]
    k_norm = F.normalize(k, p=2, dim=1)
    q_norm = F.normalize(q, p=2, dim=1)
    S = q_norm.mT @ k_norm
    kmax, kargmax = torch.topk(S, k=neighbors, dim=-1)
    if rho == "softmax":
        kmax = torch.softmax(kmax, dim=-1)
    elif rho == "ones":
        kmax = torch.ones_like(kmax)
    B, C, N = v.shape
    v = v.unsqueeze(-1).expand(B, C, N, neighbors)
    kmax = kmax.unsqueeze(1).expand(B, C, N, neighbors)
    kargmax = kargmax.unsqueeze(1).expand(B, C, N, neighbors)
    x_nn = kmax * torch.gather(v, dim=2, index=kargmax)
    return F.conv1d(x_nn.reshape(B, C, -1), weight, bias, stride=neighbors, groups=groups)


@pytest.mark.parametrize("rho", ["softmax", "ones", "similarity"])
@pytest.mark.parametrize("depthwise", [False, True])
def test_forward_is_algorithm_1(rho: str, depthwise: bool) -> None:
    B, C, N, k = 2, 6, 20, 5
    q, key, v = (torch.randn(B, C, N, dtype=torch.float64) for _ in range(3))
    kind, groups = ("depthwise", C) if depthwise else ("dense", 1)
    weight = make_weight(kind, C, k, torch.float64)
    bias = randn(len(weight), dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (q, key, v, weight, bias)]
    expected = algorithm_1(q, key, v, weight, bias, rho, groups)
    Y, _, _ = python_ref.forward(q.mT, key.mT, v.mT, k, weight, bias, rho=rho)
    torch.testing.assert_close(Y.mT, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(gradients(Y.mT, leaves, grad), gradients(expected, leaves, grad))


def test_algorithm_1_as_printed_swaps_queries_and_keys() -> None:
    """`k_norm.T @ q_norm` is the transpose of S."""
    q, k = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    k_norm, q_norm = F.normalize(k, p=2, dim=0), F.normalize(q, p=2, dim=0)
    S = python_ref.similarity(q.mT, k.mT)
    torch.testing.assert_close((k_norm.T @ q_norm).T, S)
    assert not torch.allclose(k_norm.T @ q_norm, S)


def test_all_neighbors_with_softmax_are_attention() -> None:
    """Section 5.2: k = N, softmax, depthwise weights of one, no bias."""
    B, heads, N, D = 2, 3, 17, 8
    q, k, v = (torch.randn(B, heads, N, D, dtype=torch.float64) for _ in range(3))
    ones = torch.ones(D, 1, N, dtype=torch.float64)
    scale = D**-0.5
    attention = F.scaled_dot_product_attention(q, k, v)
    Y, _, _ = python_ref.forward(q, k, v, N, ones, metric="dot", scale=scale)
    torch.testing.assert_close(Y, attention)
    Y, _, _ = python_ref.forward(q, k, v, N, metric="dot", scale=scale)
    torch.testing.assert_close(Y, attention)


def test_selection_by_position_is_a_convolution() -> None:
    """Section 5.1: neighbors by position, ordered by index, are the taps of a convolution."""
    C, N, k = 4, 12, 3
    x = torch.randn(1, C, N, dtype=torch.float64)
    conv = torch.nn.Conv1d(C, 5, k, dtype=torch.float64)
    position = torch.arange(N, dtype=torch.float64).reshape(1, N, 1)
    Y, _, I = python_ref.forward(
        position[:, 1:-1],
        position,
        x.mT,
        k,
        conv.weight,
        conv.bias,
        metric="euclidean",
        rho="ones",
        order="index",
    )
    assert I[0].tolist() == [[i, i + 1, i + 2] for i in range(N - 2)]
    torch.testing.assert_close(Y.mT, conv(x))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("dot", [[3.0, 4.0, 7.0, 0.0], [-3.0, -4.0, -7.0, 0.0]]),
        ("euclidean", [[-20.0, -18.0, -13.0, -25.0], [-32.0, -34.0, -41.0, -25.0]]),
        ("cosine", [[0.6, 0.8, 1.4 / math.sqrt(2), 0.0], [-0.6, -0.8, -1.4 / math.sqrt(2), 0.0]]),
    ],
)
def test_similarity_by_hand(metric: str, expected: list[list[float]]) -> None:
    Q = torch.tensor([[3.0, 4.0], [-3.0, -4.0]], dtype=torch.float64)
    K = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    S = python_ref.similarity(Q, K, metric)
    torch.testing.assert_close(S, torch.tensor(expected, dtype=torch.float64))
    I = torch.tensor([[3, 0], [2, 1]])
    torch.testing.assert_close(python_ref.similarities_at(Q, K, I, metric), S.gather(-1, I))


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_a_missing_neighbor_of_an_infinite_query_has_no_gradient(metric: str) -> None:
    Q = torch.tensor([[INF, 1.0]], requires_grad=True)
    K = torch.tensor([[1.0, 2.0], [3.0, math.nan]], requires_grad=True)
    I, missing = torch.tensor([[1, 0]]), torch.tensor([[False, True]])
    s = python_ref.similarities_at(Q, K, I, metric, missing)
    assert s.isnan().tolist() == [[True, False]]
    alone = python_ref.similarities_at(Q, K, I[:, :1], metric)
    found, expected = (torch.autograd.grad(each[0, 0], (Q, K)) for each in (s, alone))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# The similarities of a query of 1 are the keys themselves.
KEYS = torch.tensor([[5.0], [3.0], [math.nan], [5.0], [-INF], [0.0]])
ONE = torch.tensor([[1.0]])
# A missing place, in an expected list of indices.
MISSING = -1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2, 0, 3, 1, 5, 4]),
        ({"order": "index"}, [0, 1, 2, 3, 4, 5]),
        ({"self_indices": torch.tensor([5])}, [5, 2, 0, 3, 1, 4]),
        ({"self_indices": torch.tensor([5]), "k": 3}, [5, 2, 0]),
        ({"self_indices": torch.tensor([5]), "k": 3, "order": "index"}, [0, 2, 5]),
        ({"candidates": torch.tensor([4, 1, 3]), "k": 3}, [3, 1, 4]),
        (
            {"candidates": torch.tensor([4, 1, 3]), "k": 3, "self_indices": torch.tensor([0])},
            [0, 3, 1],
        ),
        ({"key_mask": torch.tensor([1, 1, 0, 1, 0, 1]).bool(), "k": 4}, [0, 3, 1, 5]),
        (
            {
                "key_mask": torch.tensor([1, 1, 0, 1, 0, 1]).bool(),
                "self_indices": torch.tensor([2]),
                "k": 2,
            },
            [0, 3],
        ),
    ],
)
def test_select_by_hand(options: dict, expected: list[int]) -> None:
    options = {"k": 6, "metric": "dot", **options}
    s, I = python_ref.select(ONE, KEYS, **options)
    assert I[0].tolist() == expected
    values = KEYS[torch.tensor(expected), 0]
    torch.testing.assert_close(s[0], values, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("order", ["similarity", "index"])
def test_missing_neighbors_are_last(order: str) -> None:
    mask = torch.tensor([False, True, False, False, True, True])
    s, I = python_ref.select(ONE, KEYS, 5, key_mask=mask, metric="dot", order=order)
    assert I[0].tolist() == ([1, 5, 4, 0, 0] if order == "similarity" else [1, 4, 5, 0, 0])
    assert s[0].tolist() == (
        [3, 0, -INF, -INF, -INF] if order == "similarity" else [3, -INF, 0, -INF, -INF]
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"k": 8}, [2, 0, 3, 1, 5, 4, MISSING, MISSING]),
        ({"k": 8, "order": "index"}, [0, 1, 2, 3, 4, 5, MISSING, MISSING]),
        ({"candidates": torch.tensor([4, 1, 3])}, [3, 1, 4, MISSING]),
        (
            {"candidates": torch.tensor([4, 1, 3]), "self_indices": torch.tensor([0]), "k": 5},
            [0, 3, 1, 4, MISSING],
        ),
        (
            {"candidates": torch.tensor([4, 1]), "self_indices": torch.tensor([1]), "k": 3},
            [1, 4, MISSING],
        ),
        (
            {"key_mask": torch.tensor([0, 1, 0, 1, 0, 0]).bool(), "k": 8, "order": "index"},
            [1, 3, *[MISSING] * 6],
        ),
        ({"key": KEYS[:0], "k": 2}, [MISSING, MISSING]),
    ],
)
def test_more_neighbors_than_keys(options: dict, expected: list[int]) -> None:
    arguments = {"key": KEYS, "k": 4, "metric": "dot", **options}
    s, I = python_ref.select(ONE, **arguments)
    rows = torch.tensor(expected)
    assert I[0].tolist() == rows.clamp(min=0).tolist()
    values = torch.cat([KEYS[:, 0], torch.tensor([-INF])])[rows]
    torch.testing.assert_close(s[0], values, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("rho", ["softmax", "ones", "similarity"])
@pytest.mark.parametrize("kind", ["none", "depthwise", "dense"])
def test_missing_places_contribute_nothing(kind: str, rho: str) -> None:
    """k = 5 of 3 keys equals k = 3 with the first taps of the weight; others get no gradient."""
    q, key = randn(2, 4, 3, dtype=torch.float64), randn(2, 3, 3, dtype=torch.float64)
    value = randn(2, 3, 6, dtype=torch.float64)
    weight = make_weight(kind, 6, 5, torch.float64)
    leaves = [t.requires_grad_() for t in (q, key, value, weight) if t is not None]
    few = None if weight is None else weight[..., :3]
    expected, _, _ = python_ref.forward(q, key, value, 3, few, rho=rho)
    Y, _, _ = python_ref.forward(q, key, value, 5, weight, rho=rho)
    torch.testing.assert_close(Y, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(gradients(Y, leaves, grad), gradients(expected, leaves, grad))


def test_without_keys_the_output_is_the_bias() -> None:
    bias = torch.arange(5.0)
    query, key, value = torch.ones(2, 3, 4), torch.ones(2, 0, 4), torch.ones(2, 0, 5)
    for weight in (None, torch.ones(5, 5, 2), torch.ones(5, 1, 2)):
        Y, s, I = python_ref.forward(query, key, value, 2, weight, bias)
        assert Y.tolist() == bias.expand(2, 3, 5).tolist()
        assert I.count_nonzero() == 0
        assert bool((s == -INF).all())


def test_signed_zeros_tie() -> None:
    keys = torch.tensor([[-0.0], [0.0], [-0.0], [0.0]])
    _, I = python_ref.select(ONE, keys, 4, metric="dot")
    assert I[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("rho", "scale", "expected"),
    [
        ("ones", 1.0, [1.0, 0.0, 1.0]),
        ("similarity", 1.0, [math.log(3), 0.0, 0.0]),
        ("softmax", 1.0, [0.75, 0.0, 0.25]),
        ("softmax", -1.0, [0.25, 0.0, 0.75]),
        ("softmax", 0.0, [0.5, 0.0, 0.5]),
    ],
)
def test_modulate_by_hand(rho: str, scale: float, expected: list[float]) -> None:
    s = torch.tensor([math.log(3), -INF, 0.0], dtype=torch.float64)
    weights = python_ref.modulate(s, rho, scale)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))
    assert python_ref.modulate(torch.full((2,), -INF), rho).tolist() == [0.0, 0.0]


def test_aggregate_by_hand() -> None:
    V = torch.tensor([[1.0, 2.0], [3.0, 5.0], [math.nan, math.nan]])
    s = torch.tensor([[2.0, -1.0, -INF]])
    I = torch.tensor([[1, 0, 2]])
    bias = torch.tensor([10.0, 20.0])
    Y = python_ref.aggregate(V, s, I, None, bias, "similarity")
    assert Y.tolist() == [[2 * 3 - 1 + 10, 2 * 5 - 2 + 20]]
    depthwise = torch.tensor([[[1.0, 2.0, 7.0]], [[3.0, 4.0, 7.0]]])
    Y = python_ref.aggregate(V, s, I, depthwise, None, "ones")
    assert Y.tolist() == [[3 + 2 * 1, 3 * 5 + 4 * 2]]
    dense = torch.tensor([[[1.0, 2.0, 7.0], [3.0, 4.0, 7.0]]])
    Y = python_ref.aggregate(V, s, I, dense, None, "ones")
    assert Y.tolist() == [[3 + 2 * 1 + 3 * 5 + 4 * 2]]


def test_normalize_zero_small_and_large_rows() -> None:
    X = torch.tensor([[0.0, 0.0], [3e-13, 4e-13], [3e20, 4e20], [3e-10, 4e-10], [3e38, 2e38]])
    X.requires_grad_()
    unit = python_ref.normalize(X)
    six, eight = 0.6, 0.8
    expected = [[0, 0], [0, 0], [six, eight], [six, eight], [3 / 13**0.5, 2 / 13**0.5]]
    torch.testing.assert_close(unit, torch.tensor(expected))
    (grad,) = torch.autograd.grad(unit, X, torch.ones_like(X))
    assert grad[:2].tolist() == [[0, 0], [0, 0]]
    # (g - u (u . g)) / norm
    torch.testing.assert_close(grad[3], torch.tensor([1 - six * 1.4, 1 - eight * 1.4]) / 5e-10)
    huge = torch.tensor([[3e200, 4e200]], dtype=torch.float64)
    torch.testing.assert_close(
        python_ref.normalize(huge), torch.tensor([[six, eight]], dtype=torch.float64)
    )


def test_normalize_gradcheck() -> None:
    X = torch.randn(4, 5, dtype=torch.float64) * torch.tensor([[1e-6], [1.0], [1e3], [2.0]])
    assert torch.autograd.gradcheck(python_ref.normalize, X[1:].requires_grad_())


def test_half_similarities_are_float32() -> None:
    Q, K = torch.randn(5, 7, dtype=torch.bfloat16), torch.randn(6, 7, dtype=torch.bfloat16)
    S = python_ref.similarity(Q, K)
    assert S.dtype == torch.float32
    torch.testing.assert_close(S, python_ref.similarity(Q.float(), K.float()), rtol=0, atol=0)


@pytest.mark.parametrize("seed", [*range(7, 160, 10), 0, 1, 2])
def test_the_reference_passes_its_own_comparison(seed: int) -> None:
    """Every tenth case has more neighbors than keys."""
    case = make_case(seed)
    assert (case.k > (case.candidates or case.M)) == (seed % 10 == 7)
    python_ref.assert_forward(python_ref.forward, **case.arguments(), exact=case.exact, seed=seed)


def test_the_reference_passes_its_own_comparison_of_special_values() -> None:
    for case in map(make_special_case, range(30)):
        assert_special(case, python_ref.forward, python_ref.select, backward=False)


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_the_comparison_without_keys(metric: str) -> None:
    query, key, value = torch.ones(2, 3, 4), torch.ones(2, 0, 4), torch.ones(2, 0, 5)
    weight, bias = torch.ones(6, 5, 2), torch.arange(6.0)
    call = (query, key, value, 2, weight, bias)
    python_ref.assert_forward(python_ref.forward, *call, metric=metric, exact=metric != "cosine")
    with pytest.raises(AssertionError, match="missing neighbor with a similarity"):
        python_ref.assert_certified_selection(
            query, key, torch.zeros(2, 3, 2), torch.zeros(2, 3, 2, dtype=torch.int64), 2
        )
